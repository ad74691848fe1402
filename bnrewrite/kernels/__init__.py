"""Kernels behind the ops, one file per way of running them; none of them communicates."""
