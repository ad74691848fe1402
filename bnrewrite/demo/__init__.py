"""The demo: the same network trained with ordinary, distributed and single-process BatchNorm.

``network``, ``data`` and ``training`` are what any training script has; ``runs`` says what is
compared; ``worker`` is what one rank executes and ``launcher`` starts the ranks; ``picture`` and
``text`` show the results; ``onnx_check`` exports the trained network; ``command`` puts it together.
"""
