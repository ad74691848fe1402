"""One rank of a random example, and the same example in one process."""

import contextlib
import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnrewrite
from bnrewrite.modes import Mode
from bnrewrite.passes import optimizing_names
from tests.fuzz.layers import Functional, Switch
from tests.fuzz.networks import make_net
from tests.fuzz.norms import OwnForwardNorm
from tests.fuzz.reference import Plain, Reference, World
from tests.parity import tensors
from tests.ranks import CountCollectives

Example = dict[str, Any]
"""A network and what to do with it: plain values, as :mod:`tests.fuzz.strategies` makes them."""

MODES: dict[str, Mode | None] = {
    "sync": bnrewrite.Sync(),
    "local": bnrewrite.Local(),
    "frozen": bnrewrite.Frozen(),
    "ring": bnrewrite.Shuffle(),
    "detach": bnrewrite.Shuffle(backward="detach"),
    "group": bnrewrite.Shuffle(running="group"),
    "random": bnrewrite.Shuffle("random", seed=3),
    "random group": bnrewrite.Shuffle("random", running="group"),
    "unmatched": None,
}


@dataclasses.dataclass
class StepResult:
    """What one step gave: outputs, gradients of the input and, before an update, of parameters."""

    outputs: list[Tensor]
    x_grad: Tensor | None
    grads: list[Tensor | None] | None
    buffers: dict[str, Tensor]
    collectives: list[tuple[str, torch.dtype, int]] = dataclasses.field(default_factory=list)


def make_model(example: Example) -> nn.Module:
    """The unconverted network in the dtype and layout of the example."""
    net = make_net(example["net"]).to(getattr(torch, example["dtype"]))
    if example["channels_last"] and example["net"]["num_dims"] in (2, 3):
        formats = {2: torch.channels_last, 3: torch.channels_last_3d}
        net = net.to(memory_format=formats[example["net"]["num_dims"]])  # pyright: ignore
    return net


def site_modes(net: nn.Module, example: Example) -> dict[str, Mode | None]:
    """The mode of every site by name: those of the example in turn, where a site can have them."""
    modes: dict[str, Mode | None] = {}
    wanted = example["modes"]
    for name, module in net.named_modules():
        if not isinstance(module, (_BatchNorm, Functional)):
            continue
        mode = MODES[wanted[len(modes) % len(wanted)]]
        if isinstance(mode, bnrewrite.Frozen) and module.running_mean is None:
            mode = bnrewrite.Local()
        if isinstance(mode, bnrewrite.Shuffle) and mode.schedule == "random":
            # Without a counter the schedule is a digest, which only the ops know.
            counted = getattr(module, "num_batches_tracked", None) is not None
            if not counted or isinstance(module, OwnForwardNorm):
                mode = bnrewrite.Shuffle()
        if mode is None and isinstance(module, nn.SyncBatchNorm):
            mode = bnrewrite.Local()
        if isinstance(module, Functional):
            for suffix in ("batch_norm", "batch_norm_1")[: module.num_calls]:
                modes[f"{name}.{suffix}".lstrip(".")] = mode
        else:
            modes[name] = mode
    return modes


def make_batch(example: Example, step: int, rank: int) -> Tensor:
    """The batch of a rank, of another mean and scale on every rank."""
    net = example["net"]
    size = example["steps"][step]["sizes"][rank]
    generator = torch.Generator().manual_seed(1000 * step + rank + net["seed"])
    shape = (size, net["num_in"], *net["space"])
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * (1 + 0.3 * rank)
    x = (x + 0.5 * rank - 0.3).to(getattr(torch, example["dtype"]))
    if example["channels_last"] and x.dim() > 3:
        return x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])
    if example["strided"] and x.dim() > 2:
        return x.transpose(1, -1).contiguous().transpose(1, -1)
    return x


def loss_of(outputs: list[Tensor], first: int) -> Tensor:
    """A sum over samples in which every value weighs differently; ``first`` is their number."""
    losses = []
    for out in outputs:
        place = torch.arange(out[:1].numel() or out.numel()).to(out)
        sample = torch.arange(first, first + out.size(0)).to(out)
        if out.numel():
            phase = (place + 3 * sample.unsqueeze(1)).view_as(out)
            losses.append((out * torch.sin(phase + out)).sum())
        else:
            losses.append(out.sum())
    return torch.stack(losses).sum()


def set_up(net: nn.Module, step: dict[str, Any]) -> None:
    """Flags and numbers that users change between steps, on the modules of ``net``."""
    net.train(step["kind"] != "eval")
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    switches = [module for module in net.modules() if isinstance(module, Switch)]
    for what, index, value in step["changes"]:
        norm = norms[index % len(norms)]
        if what == "eval":
            norm.eval()
        elif what == "momentum":
            norm.momentum = value
        elif what == "eps":
            norm.eps = value
        elif what == "track" and norm.running_mean is not None:
            norm.track_running_stats = value
        elif what == "weight" and norm.weight is not None:
            norm.weight.requires_grad_(value)
        elif what == "switch" and switches:
            switch = switches[index % len(switches)]
            switch.use_second = not switch.use_second


def run_step(net: Callable[..., Any], x: Tensor, step: dict[str, Any], first: int) -> list[Tensor]:
    """One forward and what follows it; returns the outputs."""
    grad = step["kind"] in ("train", "penalty") or (step["kind"] == "eval" and step["grad"])
    with torch.set_grad_enabled(grad):
        outputs = [out for out in tensors(net(x)) if out.is_floating_point()]
        if any(out.requires_grad for out in outputs):
            loss = loss_of([out for out in outputs if out.requires_grad], first)
            if step["kind"] == "penalty" and x.requires_grad:
                (slope,) = torch.autograd.grad(loss, x, create_graph=True)
                loss = loss + slope.square().sum()
            loss.backward()
    return [out.detach() for out in outputs]


def update(net: nn.Module, grads: list[Tensor | None]) -> None:
    """One small step of gradient descent, with gradients that are sums over the ranks."""
    with torch.no_grad():
        for parameter, grad in zip(net.parameters(), grads, strict=True):
            if grad is not None:
                parameter -= 0.02 * grad.clamp(-1, 1)
            parameter.grad = None


def train(
    net: nn.Module,
    example: Example,
    batch_of: Callable[[int], Tensor],
    first_of: Callable[[int], int],
    total: Callable[[Tensor], Tensor],
    around: Any,
) -> list[StepResult]:
    """All steps of an example.

    Args:
        net: the network, converted or not.
        example: what to do.
        batch_of: the input of a step.
        first_of: the number of its first sample in the global batch.
        total: a gradient summed over ranks.
        around: called with a step's number for the context in which it runs.
    """
    results = []
    for index, step in enumerate(example["steps"]):
        set_up(net, step)
        x = batch_of(index).requires_grad_(example["x_grad"])
        torch.manual_seed(index)
        with around(index) as seen:
            outputs = run_step(net, x, step, first_of(index))
        grads = None
        if step["update"]:
            grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
            update(net, [None if grad is None else total(grad) for grad in grads])
        x_grad = None if x.grad is None else x.grad.clone()
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
        results.append(StepResult(outputs, x_grad, grads, buffers, list(seen.seen)))
    return results


def convert(net: nn.Module, example: Example, passes: tuple[str, ...] | None) -> nn.Module:
    """The converted network, in one of several ways that must come to the same."""
    rank = dist.get_rank()
    groups, group = example["groups"], None
    if groups is not None:
        for ranks in groups:
            made = dist.new_group(ranks)
            group = made if rank in ranks else group
    modes = site_modes(net, example)
    mode: Any = {name: mode for name, mode in modes.items() if mode is not None}
    if len(set(modes.values())) == 1:
        mode = next(iter(modes.values()))
    options: dict[str, Any] = {"process_group": group, "passes": passes}
    how = example["how"]
    if how == "replace":
        net = bnrewrite.convert(net, "local")
    elif how == "reverted":
        net = bnrewrite.revert(bnrewrite.convert(net, "local"))
    net = bnrewrite.convert(net, mode, **options)
    if how == "twice":
        net = bnrewrite.convert(net, mode, **options)
    elif how == "copied":
        net = copy.deepcopy(net)
    elif how == "pickled":
        net = pickle.loads(pickle.dumps(net))
    return net


def passes_to_try(example: Example) -> list[tuple[str, ...] | None]:
    """All passes, none, and a subset of them."""
    names = optimizing_names(None)
    subset = tuple(name for i, name in enumerate(names) if example["subset"] >> i & 1)
    return [None, (), *([subset] if 0 < len(subset) < len(names) else [])]


def run_rank(rank: int, world_size: int, example: Example) -> list[list[StepResult]]:
    """The steps of one rank, for every choice of passes."""
    results = []
    for passes in passes_to_try(example):
        net = make_model(example)
        keys, classes = [*net.state_dict()], [type(module) for module in net.modules()]
        net = convert(net, example, passes)
        assert [*net.state_dict()] == keys

        def total(grad: Tensor) -> Tensor:
            grad = grad.clone()
            dist.all_reduce(grad)
            return grad

        results.append(
            train(
                net,
                example,
                lambda step: make_batch(example, step, rank),
                lambda step: sum(example["steps"][step]["sizes"][:rank]),
                total,
                lambda step: CountCollectives(),
            )
        )
        bnrewrite.revert(net)
        assert [type(module) for module in net.modules()] == classes
        assert [*net.state_dict()] == keys
    return results


class _Around:
    """The context of a step in one process; there are no collectives to see."""

    seen: tuple[()] = ()

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __enter__(self) -> "_Around":
        self.inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)


def run_one_process(
    example: Example,
    dtype: torch.dtype = torch.float64,
    noise: float = 0.0,
    *,
    intercept: bool = True,
) -> tuple[list[StepResult], list[list[dict[str, Tensor]]]]:
    """The steps on the batches of all ranks at once, and the buffers of every rank after each.

    Args:
        example: what to do.
        dtype: in which it is computed.
        noise: relative change of the inputs, to see how much comes of it.
        intercept: share statistics as the ranks do; False leaves everything to torch.
    """
    net = make_model(example).to(dtype)
    world_size = len(example["steps"][0]["sizes"])
    groups = example["groups"] or [list(range(world_size))]
    world = World(groups, site_modes(net, example), [])
    reference = None if is_plain(net, example, world) else Reference(net, world)
    buffers: list[list[dict[str, Tensor]]] = []

    def batch_of(step: int) -> Tensor:
        parts = [make_batch(example, step, rank).to(dtype) for rank in range(world_size)]
        x = torch.cat(parts)
        generator = torch.Generator().manual_seed(step)
        return x * (1 + noise * torch.randn(x.shape, dtype=dtype, generator=generator))

    def around(step: int) -> _Around:
        if step:
            note()
        if not intercept:
            return _Around(contextlib.nullcontext())
        if reference is None:
            return _Around(Plain())
        reference.world.sizes = example["steps"][step]["sizes"]
        return _Around(reference.watching())

    def note() -> None:
        plain = {name: buffer.clone() for name, buffer in net.named_buffers()}
        buffers.append(
            [plain | ({} if reference is None else _cloned(reference.buffers(rank)))
             for rank in range(world_size)]
        )  # fmt: skip

    results = train(net, example, batch_of, lambda step: 0, lambda grad: grad, around)
    note()
    return results, buffers


def _cloned(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


def is_plain(net: nn.Module, example: Example, world: World) -> bool:
    """Whether plain torch with the global batch does the same, without any interception."""
    norms = [module for module in net.modules() if isinstance(module, (_BatchNorm, Functional))]
    changes = [what for step in example["steps"] for what, _, _ in step["changes"]]
    return (
        len(world.groups) == 1
        and all(isinstance(mode, bnrewrite.Sync) for mode in world.modes.values())
        and all(norm.running_mean is not None for norm in norms)
        and all(sum(step["sizes"]) for step in example["steps"])
        and "track" not in changes
    )
