"""Triton kernels behind the phase ops, one file each.

A tensor is (N, C, S) to all of them, S positions; channels-last becomes one image of N * S
positions. A program walks tiles of BLOCK_C channels by BLOCK_S positions of its channels, which it
shares with the other *splits* of these channels, so that few channels fill the device too.
Arithmetic is in float32, in float64 for float64 input; sums over programs are in float64 and in a
fixed order, so equal input gives equal bits.
"""
