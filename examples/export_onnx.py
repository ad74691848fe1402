"""Exports a trained network to ONNX and runs it in onnxruntime.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py
    python examples/export_onnx.py checkpoint.pt digits.onnx

Without arguments it uses the checkpoint.pt that training wrote, or fresh weights if there is none.
The network need not be converted: the export describes evaluation, which conversion does not
change.
"""

import argparse
from pathlib import Path

import onnxruntime
import torch

import bnrewrite
from bnrewrite.demo.data import load_digits
from bnrewrite.demo.network import DigitsNet


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a trained network to ONNX.")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="written by train_ddp.py")
    parser.add_argument("output", type=Path, nargs="?", default=Path("digits.onnx"))
    parser.add_argument("--fold", action="store_true", help="fold BatchNorm into the convolutions")
    args = parser.parse_args()

    network = bnrewrite.convert(DigitsNet(), mode="sync")
    trained = Path("checkpoint.pt")
    checkpoint = args.checkpoint or (trained if trained.exists() else None)
    print(f"weights: {checkpoint or 'fresh'}")
    if checkpoint is not None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        network.load_state_dict(state["network"])

    _, test_data = load_digits(seed=0)
    images = test_data.images.float()
    batch = {"x": {0: "batch"}}
    print(
        bnrewrite.export_onnx(
            network, (images[:2],), args.output, dynamic_shapes=batch, fold=args.fold
        )
    )

    session = onnxruntime.InferenceSession(args.output, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": images.numpy()})
    right = torch.as_tensor(found).argmax(1) == test_data.labels
    print(f"onnxruntime: {int(right.sum())} of {len(right)} test images correct")


if __name__ == "__main__":
    main()
