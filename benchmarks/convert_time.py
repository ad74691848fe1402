"""How long ``convert`` takes, beside one ``torch.fx.symbolic_trace`` of the same model.

Bars: ResNet-50 in less than one second, twice the time of the trace for each model. ``convert``
traces one owner of each structure, a second time for evaluation where the forward reads the
training flag, puts graphs of children in place of their calls where these are inlined, and runs the
passes. Code is generated and compiled when a graph is first called; "with code" is ``convert`` and
that for every graph.
"""

import copy
import statistics
import time

from measure import arguments, finish, interleaved, ratio
from models import torchvision_model
from torch import fx, nn

import bnrewrite
from bnrewrite.capture.owner import is_owner, owner_state

MODELS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet1_0",
    "efficientnet_b0",
    "efficientnet_b3",
    "efficientnet_v2_s",
    "densenet121",
    "densenet169",
    "densenet201",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "regnet_y_3_2gf",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "googlenet",
    "inception_v3",
    "vgg11_bn",
    "vgg16_bn",
    "vgg19_bn",
    "fcn_resnet50",
    "deeplabv3_resnet50",
    "lraspp_mobilenet_v3_large",
    "r3d_18",
    "s3d",
)


def convert_and_compile(model: nn.Module) -> None:
    """``convert``, and the code of every graph."""
    bnrewrite.convert(model)
    states = [owner_state(module) for module in model.modules() if is_owner(module)]
    graphs = [graph for state in states if state is not None for graph in (state.train, state.eval)]
    for graph in graphs:
        if graph.function is None:
            graph.compile()


def main() -> None:
    options = arguments(__doc__, rounds=5)
    rows = []
    for name in MODELS:
        weightless = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        if name.startswith(("fcn", "deeplab", "lraspp")):
            weightless = {"weights_backbone": None}
        model = torchvision_model(name, **weightless)

        plain = copy.deepcopy(model)
        variants = {
            "convert": lambda model=model: bnrewrite.convert(bnrewrite.revert(model)),
            "trace": lambda plain=plain: fx.symbolic_trace(plain),
            "with code": lambda model=model: convert_and_compile(bnrewrite.revert(model)),
        }
        seconds = interleaved(variants, rounds=options.rounds, warmup=1, clock=time.process_time)
        row = {
            "model": name,
            "convert_s": statistics.median(seconds["convert"]),
            "trace_s": statistics.median(seconds["trace"]),
            "ratio": ratio(seconds, "convert", "trace"),
            "ratio_with_code": ratio(seconds, "with code", "trace"),
        }
        rows.append(row)
        print(
            f"{name:>20}: convert {row['convert_s']:.3f} s, symbolic_trace {row['trace_s']:.3f} s,",
            f"ratio {row['ratio']:.2f}, with code {row['ratio_with_code']:.2f}",
            flush=True,
        )
    resnet50 = next(row["convert_s"] for row in rows if row["model"] == "resnet50")
    ratios = [row["ratio"] for row in rows]
    summary = {
        "resnet50_s": resnet50,
        "geometric_mean_ratio": statistics.geometric_mean(ratios),
        "largest_ratio": max(ratios),
        "geometric_mean_ratio_with_code": statistics.geometric_mean(
            row["ratio_with_code"] for row in rows
        ),
    }
    print(f"resnet50 in {resnet50:.2f} s (bar 1)")
    print(
        f"{len(rows)} models: geometric mean {summary['geometric_mean_ratio']:.2f}, "
        f"largest {summary['largest_ratio']:.2f} (bar 2)"
    )
    finish(__file__, {**summary, "models": rows}, save=options.save)


if __name__ == "__main__":
    main()
