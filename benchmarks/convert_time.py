"""How long ``convert`` takes, beside one ``torch.fx.symbolic_trace`` of the same model.

Bar: ResNet-50 in less than one second. ``convert`` traces every owner twice (training and
evaluation), runs the passes and compiles the graphs.
"""

import copy
import statistics

from measure import arguments, finish, interleaved, ratio
from models import torchvision_model
from torch import fx

import bnrewrite

MODELS = (
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "densenet121",
    "regnet_y_400mf",
    "shufflenet_v2_x1_0",
    "googlenet",
)


def main() -> None:
    options = arguments(__doc__, rounds=5)
    rows = []
    for name in MODELS:
        weightless = {"init_weights": False} if name == "googlenet" else {}
        model = torchvision_model(name, **weightless)

        plain = copy.deepcopy(model)
        variants = {
            "convert": lambda model=model: bnrewrite.convert(bnrewrite.revert(model)),
            "trace": lambda plain=plain: fx.symbolic_trace(plain),
        }
        seconds = interleaved(variants, rounds=options.rounds, warmup=1)
        row = {
            "model": name,
            "convert_s": statistics.median(seconds["convert"]),
            "trace_s": statistics.median(seconds["trace"]),
            "ratio": ratio(seconds, "convert", "trace"),
        }
        rows.append(row)
        print(
            f"{name:>20}: convert {row['convert_s']:.3f} s, symbolic_trace {row['trace_s']:.3f} s,",
            f"ratio {row['ratio']:.1f}",
        )
    resnet50 = next(row["convert_s"] for row in rows if row["model"] == "resnet50")
    print(f"resnet50 in {resnet50:.2f} s (bar 1)")
    finish(__file__, {"resnet50_s": resnet50, "models": rows}, save=options.save)


if __name__ == "__main__":
    main()
