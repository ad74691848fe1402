"""Distributed BatchNorm for PyTorch by rewriting graphs."""
