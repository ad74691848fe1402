"""The zoo: every model with BatchNorm of four collections, to convert and to count.

``python -m tests.zoo`` sweeps over them; ``tests/test_zoo.py`` takes a sample.
"""
