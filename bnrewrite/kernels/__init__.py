"""Kernels behind the ops, one file per way to run them; none of them communicates."""
