"""Collectives and what hides them in compiled graphs: torch's bucketing, and ours.

The graphs of AOTAutograd of one training step, in a world of two ranks of which one exists. Counted
are the all-reduces of both directions, and those of the backward with a weight gradient of a
convolution between their launch and their wait. Nothing is run, so nothing is timed. The overlap
scheduling of torch estimates times on a GPU and does not run without one, so it is not here.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from measure import arguments, finish
from models import torchvision_model
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.fx_passes.bucketing import bucket_all_reduce
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.testing._internal.distributed.fake_pg import FakeStore

import bnrewrite
from bnrewrite.collectives import WAIT, is_launch
from bnrewrite.compiler import HideCollectives

MODELS = {"resnet18": 64, "resnet50": 64, "googlenet": 64}


def _bucket(module: fx.GraphModule) -> None:
    bucket_all_reduce(module, lambda index: 25.0)
    stable_topological_sort(module.graph)


SCHEDULES: dict[str, tuple[tuple[str, ...] | None, Callable[[fx.GraphModule], Any]]] = {
    "a collective per site": ((), lambda module: None),
    "torch's bucketing": ((), _bucket),
    "ours": (None, lambda module: HideCollectives()(module.graph)),
}


def _counts(graph: fx.Graph) -> dict[str, int]:
    """All-reduces, and those that have a weight gradient between launch and wait."""
    nodes = list(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    works = [index for index, node in enumerate(nodes) if _makes_weight_gradient_alone(node)]
    launches = [node for node in nodes if is_launch(node.target)]
    hidden = 0
    for launch in launches:
        end = min(position[node] for node in nodes if node.target is WAIT and _from(node, launch))
        hidden += any(position[launch] < index < end for index in works)
    return {"all-reduces": len(launches), "hidden behind weight gradients": hidden}


def _from(wait: fx.Node, launch: fx.Node) -> bool:
    source = wait.args[0]
    while isinstance(source, fx.Node) and source.target is operator.getitem:
        source = source.args[0]
    return source is launch


def _makes_weight_gradient_alone(node: fx.Node) -> bool:
    """Whether a node makes a weight gradient that does not wait for the input gradient."""
    return node.target is torch.ops.aten.convolution_backward.default and not node.args[-1][0]  # pyright: ignore


def _step(name: str, side: int, schedule: str) -> list[dict[str, int]]:
    """Counts of the forward and the backward graph."""
    passes, apply = SCHEDULES[schedule]
    found: list[dict[str, int]] = []

    def compiler(module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        apply(module)
        module.recompile()
        found.append(_counts(module.graph))
        return make_boxed_func(module.forward)

    torch._dynamo.reset()
    model = bnrewrite.convert(torchvision_model(name, num_classes=10), passes=passes)
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    out = torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, 3, side, side))
    out = out if isinstance(out, torch.Tensor) else sum(out)
    out.sum().backward()  # pyright: ignore[reportAttributeAccessIssue]
    return found


def main() -> None:
    options = arguments(__doc__, rounds=1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    rows = []
    for name, side in MODELS.items():
        for schedule in SCHEDULES:
            forward, backward = _step(name, side, schedule)
            row = {"model": name, "schedule": schedule}
            rows.append({**row, "forward": forward, "backward": backward})
            print(
                f"{name:10} {schedule:21} forward {forward['all-reduces']:3}, backward "
                f"{backward['all-reduces']:3}, of these hidden "
                f"{backward['hidden behind weight gradients']:3}"
            )
    dist.destroy_process_group()
    finish(__file__, {"rows": rows}, save=options.save)


if __name__ == "__main__":
    main()
