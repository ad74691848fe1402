"""Tests, most of which need no GPU; several ranks are processes that talk by gloo."""

import torch

IS_TORCH_211 = torch.__version__.startswith("2.11.")
"""The oldest torch that is supported, which has some limits of its own."""
