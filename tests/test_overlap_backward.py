"""Weight gradients in the backward of eager mode: when they run, and that they stay the same."""

import contextlib
import copy
import gc
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bnrewrite
from bnrewrite.ops import sites
from bnrewrite.ops.hand_over import HandOver
from bnrewrite.passes import OPTIMIZING
from tests.models import ResidualNet, perturb
from tests.ranks import SUMS, CountCollectives, RankPool
from tests.test_fuse_shared import FORMS, Pair

WITHOUT = tuple(one.__name__ for one in OPTIMIZING if one.__name__ != "overlap_backward")


class _Trace(TorchDispatchMode):
    """Launches, waits and the halves of convolutions, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._opname
        if name == "convolution_backward":
            input, weight, _ = args[-1]
            self.seen.append("both" if input and weight else "input" if input else "weight")
        elif name in SUMS:
            self.seen.append("launch")
        elif name == "wait_tensor":
            self.seen.append("wait")
        return func(*args, **(kwargs or {}))


def _chain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
    )  # fmt: skip


def _orders(rank: int, world_size: int) -> dict[str, list[str]]:
    """What runs in the backward of a chain, and of a network whose blocks are graphs apart."""
    found = {}
    models = {"plain": (_chain(), WITHOUT), "chain": (_chain(), None), "net": (ResidualNet(), None)}
    for name, (model, passes) in models.items():
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        out = bnrewrite.convert(model, passes=passes)(x).sum()
        with _Trace() as trace:
            out.backward()
        found[name] = trace.seen
    return found


def test_weight_gradients_run_between_launch_and_wait(ranks: RankPool) -> None:
    found = ranks.run(_orders, 2)
    assert found[0] == found[1]
    orders = found[0]
    assert orders["plain"] == ["both", "launch", "wait", "both", "launch", "wait", "both"]
    hidden = ["input", "launch", "weight", "wait"]
    assert orders["chain"] == [*hidden, *hidden, "input", "weight"]
    # Every collective hides a weight gradient, but the two behind which no convolution lies.
    launches = [i for i, what in enumerate(orders["net"]) if what == "launch"]
    assert len(launches) == ResidualNet.NUM_ROUNDS
    assert [orders["net"][i + 1] for i in launches] == ["wait", "wait", *["weight"] * 4]


def _numbers(rank: int, world_size: int) -> dict[str, list[int]]:
    """Sequence numbers of all nodes of a graph, by the names of the nodes."""
    model = bnrewrite.convert(ResidualNet())
    todo = [model(torch.randn(2, 3, 8, 8, requires_grad=True)).sum().grad_fn]
    found: dict[Any, None] = {}
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found[node] = None
            todo += [following for following, _ in node.next_functions]
    numbers: dict[str, list[int]] = {}
    for node in found:
        if "AccumulateGrad" not in node.name():
            numbers.setdefault(node.name(), []).append(node._sequence_nr())
    return numbers


def test_weight_gradients_alone_share_a_number(ranks: RankPool) -> None:
    """Which of two equal numbers runs first may depend on what else a rank computes."""
    for numbers in ranks.run(_numbers, 2):
        slots = set(numbers.pop("_LateGradientsBackward"))
        others = [number for values in numbers.values() for number in values]
        assert len(set(others)) == len(others)
        assert slots.isdisjoint(others)
        ends, launches = numbers["_EndCollectiveBackward"], numbers["_BatchNormBackward"]
        assert sorted(launches) == sorted(end + 2 for end in ends)
        # The first convolution comes before all sites of this step, and its gradient after all.
        first = min(slots)
        assert first < min(others)
        assert slots - {first} <= {end + 1 for end in ends}


class Convolutions(nn.Module):
    """Every kind of convolution behind a site, with and without bias, padding and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm1d(4)
        self.conv1 = nn.Conv1d(4, 6, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm1d(6)
        self.up1 = nn.ConvTranspose1d(6, 8, 2, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=(1, 0), dilation=(1, 2), bias=False)
        self.bn4 = nn.BatchNorm2d(8)
        self.up2 = nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1, groups=4)
        self.bn5 = nn.BatchNorm3d(4)
        self.conv3 = nn.Conv3d(4, 4, (1, 2, 2))
        self.bn6 = nn.BatchNorm3d(4)
        self.up3 = nn.ConvTranspose3d(4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up1(self.bn2(self.conv1(self.bn1(x))))
        x = x.unflatten(2, (4, -1))
        x = self.up2(self.bn4(self.conv2(self.bn3(x))))
        return self.up3(self.bn6(self.conv3(self.bn5(x.unsqueeze(2)))))


def _gradients(model: nn.Module, x: Tensor, *, autocast: bool = False) -> list[Any]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
        out = model(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in model.parameters())]
    return [None if one is None else one.clone() for one in found]


def _freeze_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("conv1.weight" not in name and "conv2" not in name)


def _same_bits(rank: int, world_size: int, case: str) -> bool:
    torch.manual_seed(0)
    plain = Convolutions() if case != "channels-last" else ResidualNet()
    if case == "frozen":
        _freeze_weights(plain)
    if case == "double":
        plain.double()
    torch.manual_seed(rank)
    x = torch.randn(2, 4, 12) if case != "channels-last" else torch.randn(2, 3, 8, 8)
    x = x.double() if case == "double" else x
    if case == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
        plain.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    ours, other = (
        bnrewrite.convert(copy.deepcopy(plain), passes=passes) for passes in (None, WITHOUT)
    )
    pairs: list[Any] = [_gradients(m, x, autocast=case == "autocast") for m in (ours, other)]
    return all(a is b is None or torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("case", ["float", "double", "autocast", "frozen", "channels-last"])
def test_all_gradients_are_the_same_bits(ranks: RankPool, case: str) -> None:
    assert ranks.run(_same_bits, 2, case) == [True, True]


def _twice(model: nn.Module, x: Tensor) -> list[Tensor]:
    """One graph gives the same gradients as often as it is asked."""
    out = model(x).square().sum()
    parameters = list(model.parameters())
    first = torch.autograd.grad(out, parameters, retain_graph=True)
    second = torch.autograd.grad(out, parameters)
    return [a - b for a, b in zip(first, second, strict=True)]


def _some_only(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Asking for some gradients only, the others later."""
    out = model(x).square().sum()
    parameters = dict(model.named_parameters())
    some = {name: one for name, one in parameters.items() if name.endswith(("bn1.weight", "bias"))}
    first = torch.autograd.grad(out, list(some.values()), retain_graph=True)
    everything = dict(
        zip(parameters, torch.autograd.grad(out, list(parameters.values())), strict=True)
    )
    return [one - everything[name] for name, one in zip(some, first, strict=True)]


def _second_order(model: nn.Module, x: Tensor) -> list[Tensor]:
    """A gradient penalty on the input, whose derivative comes to all nodes by two ways."""
    x = x.clone().requires_grad_()
    out = model(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    parameters = list(model.parameters())
    return list(torch.autograd.grad(grad.square().sum() + out.sum(), parameters, allow_unused=True))


def _recomputed(model: nn.Module, x: Tensor, *, reentrant: bool = False) -> list[Tensor]:
    out: Any = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
    return list(torch.autograd.grad(out.square().sum(), list(model.parameters())))


def _reentrant(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out: Any = checkpoint(model, x.clone().requires_grad_(), use_reentrant=True)
    out.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def _under_ddp(model: nn.Module, x: Tensor) -> list[Tensor]:
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.001)  # pyright: ignore
    for _ in range(2):
        ddp.zero_grad()
        ddp(x).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


USES = {
    "twice": _twice,
    "some-only": _some_only,
    "second-order": _second_order,
    "recomputed": _recomputed,
    "reentrant": _reentrant,
    "under-ddp": _under_ddp,
}


def _uses(rank: int, world_size: int, name: str) -> tuple[list[Any], list[Any]]:
    torch.manual_seed(0)
    plain = ResidualNet().double()
    torch.manual_seed(rank)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    use: Callable[[nn.Module, Tensor], list[Tensor]] = USES[name]
    ours, other = (
        use(bnrewrite.convert(copy.deepcopy(plain), passes=passes), x) for passes in (None, ())
    )
    return ours, other


@pytest.mark.parametrize("use", USES)
def test_other_uses_of_a_graph_give_what_they_gave(ranks: RankPool, use: str) -> None:
    for ours, other in ranks.run(_uses, 2, use):
        assert len(ours) == len(other) > 0
        for a, b in zip(ours, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                # Of float64, through a network with sums of some hundred values.
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        if use in ("twice", "some-only"):
            assert all(not one.any() for one in ours)


def test_what_is_left_has_a_reason() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, 1, 1, padding_mode="reflect"), nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Linear(6, 6),
    )  # fmt: skip
    report = bnrewrite.report(bnrewrite.convert(model))
    (summary,) = (one for one in report.passes if one.name == "overlap_backward")
    padding = "its padding is not plain zero padding"
    assert {skip.name: skip.reason for skip in summary.skipped} == {"1": padding, "3": padding}
    assert summary.num_rewritten == 1


def _live_after(rank: int, world_size: int) -> list[list[str]]:
    """Convolutions without a site between them: only the first one's weight gradient waits."""
    found = []
    for num in (1, 4):
        layers = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid()) for _ in range(num)]
        model = bnrewrite.convert(
            nn.Sequential(nn.BatchNorm2d(3), *[m for one in layers for m in one])
        )
        out = model(torch.randn(2, 3, 4, 4, requires_grad=True)).sum()
        with _Trace() as trace:
            out.backward()
        found.append(trace.seen)
    return found


def test_only_the_convolution_behind_a_site_waits(ranks: RankPool) -> None:
    last = ["input", "launch", "weight", "wait"]
    assert ranks.run(_live_after, 2) == [[last, [*["both"] * 3, *last]]] * 2


def _kept_alive(rank: int, world_size: int) -> list[int]:
    """Values of living tensors after each of some partial gradients."""
    model = bnrewrite.convert(_chain())
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    out = model(x).sum()
    sizes = []
    targets: list[Any] = [x, model[1].weight, model[3].weight]
    for wanted in targets:
        # Before they are counted, constants that kernels keep come into being.
        torch.autograd.grad(out, wanted, retain_graph=True)
    for wanted in targets:
        for _ in range(2):
            torch.autograd.grad(out, wanted, retain_graph=True)
            gc.collect()
            living = [one for one in gc.get_objects() if type(one) is Tensor]
            sizes.append(sum(one.numel() for one in living))
    return sizes


def test_partial_gradients_leave_nothing_behind(ranks: RankPool) -> None:
    for sizes in ranks.run(_kept_alive, 2):
        # An activation has 6,144 values and more. A collective's eight may still be with gloo.
        assert max(sizes) - min(sizes) < 1000


class _GivesNone(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def _undefined(rank: int, world_size: int) -> list[bool]:
    model = bnrewrite.convert(_chain())
    out = model(torch.randn(2, 3, 8, 8, requires_grad=True))
    _GivesNone.apply(out).sum().backward()  # pyright: ignore[reportAttributeAccessIssue]
    return [p.grad is None for p in model[6].parameters()]


def test_a_gradient_that_is_undefined_stays_so(ranks: RankPool) -> None:
    assert ranks.run(_undefined, 2) == [[True, True]] * 2


def _changed_meanwhile(rank: int, world_size: int) -> str:
    model = bnrewrite.convert(_chain())
    y = model[:3](torch.randn(2, 3, 8, 8, requires_grad=True))
    out = model[3:](y).sum()
    y.register_hook(lambda _: y.detach().zero_())
    try:
        out.backward()
    except RuntimeError as error:
        return str(error)
    return ""


def test_what_changes_between_the_halves_is_an_error(ranks: RankPool) -> None:
    for message in ranks.run(_changed_meanwhile, 2):
        assert "modified by an inplace operation" in message


def _with_hooks(rank: int, world_size: int, hooked: int) -> tuple[list[str], list[Any]]:
    """A rank with hooks makes its gradients in the order of the others, and calls the hooks."""
    torch.manual_seed(0)
    model = bnrewrite.convert(_chain())
    calls: list[Any] = []
    if rank == hooked:
        model[3].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        model[3].register_forward_hook(lambda _, args, out: calls.append(out.shape))
        model[3].register_full_backward_hook(lambda _, grads, __: calls.append(grads[0].shape))
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.0001)  # pyright: ignore
    out = ddp(torch.randn(2, 3, 8, 8, requires_grad=True)).sum()
    with _Trace() as trace:
        out.backward()
    return [one for one in trace.seen if one != "launch"], calls


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_with_and_without_hooks_keep_one_order(ranks: RankPool, rank: int) -> None:
    results = ranks.run(_with_hooks, 2, rank)
    (plain, _), (hooked, calls) = results[1 - rank], results[rank]
    assert plain == hooked == ["input", "weight", "wait"] * 2 + ["input", "weight"]
    shape = (2, 4, 4, 4)
    assert calls == [shape, (2, 4, 6, 6)]


def _without_a_graph(rank: int, world_size: int, hooked: int) -> list[str]:
    """A hook on an activation that is part of a site rules the graph out, on one rank."""
    torch.manual_seed(0)
    model = bnrewrite.convert(_chain())
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.0001)  # pyright: ignore
    if rank == hooked:
        model[2].register_forward_hook(lambda *_: None)
    for _ in range(2):
        ddp(torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
    out = ddp(torch.randn(2, 3, 8, 8, requires_grad=True)).sum()
    with _Trace() as trace:
        out.backward()
    assert all("forward" not in vars(layer) for layer in model)
    return [one for one in trace.seen if one != "launch"]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_with_and_without_a_graph_keep_one_order(ranks: RankPool, rank: int) -> None:
    expected = ["input", "weight", "wait"] * 2 + ["input", "weight"]
    assert ranks.run(_without_a_graph, 2, rank) == [expected] * 2


class _Changing(nn.Module):
    """Calls its convolutions in other ways once its attributes changed."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(3)
        self.up = nn.ConvTranspose2d(3, 4, 3, stride=2)
        self.bn2 = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3)
        self.output_size: list[int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(x)
        size = self.output_size
        x = self.bn2(self.up(x) if size is None else self.up(x, output_size=size))
        return self.conv(input=x) if hasattr(self, "conv") else x


def _changes(rank: int, world_size: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    plain = _Changing().double()
    converted = bnrewrite.convert(copy.deepcopy(plain))
    other = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 1)).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    found = []
    for change in ("output_size", "removed", "replaced"):
        for model in (plain, converted):
            if change == "output_size":
                model.output_size = [18, 18]
            elif change == "removed":
                del model.conv
            else:
                model.up = copy.deepcopy(other)
                model.output_size = None
        whole, part = (x.clone().requires_grad_() for _ in range(2))
        rows = slice(3) if rank else slice(3, 4)
        plain(whole).sin().sum().backward()
        converted(part[rows]).sin().sum().backward()
        assert whole.grad is not None
        assert part.grad is not None
        found.append((part.grad[rows], whole.grad[rows]))
    return found


def test_the_own_forward_may_call_its_convolutions_in_any_way(ranks: RankPool) -> None:
    for found in ranks.run(_changes, 2):
        for ours, expected in found:
            torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def _after_eval(rank: int, world_size: int) -> list[str]:
    """Frozen by its user after a step: nothing communicates, so torch makes the gradients."""
    model = bnrewrite.convert(_chain())
    model(torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
    model[1].eval()
    model[4].eval()
    out = model(torch.randn(2, 3, 8, 8, requires_grad=True)).sum()
    with _Trace() as trace:
        out.backward()
    return trace.seen


def test_without_a_collective_nothing_waits(ranks: RankPool) -> None:
    assert ranks.run(_after_eval, 2) == [["both"] * 3] * 2


def test_alone_torch_makes_both_gradients_at_once() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    out = bnrewrite.convert(_chain())(x).sum()
    with _Trace() as trace:
        out.backward()
    assert trace.seen == ["both", "both", "both"]


def _step_in_backward(rank: int, world_size: int, recomputes: bool) -> list[list[Tensor | None]]:
    """Gradients without and with optimizers that step as soon as they can; the error of another."""
    found = []
    for steps in (False, True):
        torch.manual_seed(0)
        branches = perturb(Pair(FORMS["relu(a + b)"][0]))
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU(), branches).double()
        model = bnrewrite.convert(model)
        for parameter in model.parameters() if steps else ():
            optimizer = torch.optim.SGD([parameter], lr=0.5)
            parameter.register_post_accumulate_grad_hook(lambda _, one=optimizer: one.step())
        torch.manual_seed(rank)
        x = torch.randn(3, 3, 5, 7, dtype=torch.float64, requires_grad=True)
        with mock.patch.object(sites, "prefers_recomputing", return_value=recomputes):
            y = model(x)
            (y * torch.sin(torch.arange(y.numel()).view_as(y))).sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    return found


def _two_losses(rank: int, world_size: int) -> list[list[Tensor]]:
    """Biases that an optimizer changes between the backwards of two forwards, without and with."""
    results = []
    for convert in (lambda model: model, lambda model: bnrewrite.convert(model, mode="sync")):
        torch.manual_seed(0)
        model = convert(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
        ).double()
        biases = [model[1].bias, model[3].bias]
        optimizer = torch.optim.SGD(biases, lr=0.1)
        # The same batch on all ranks, so that torch's BatchNorm sees the same statistics.
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        for loss in [model(x).square().mean(), model(x + 1).square().mean()]:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([bias.detach() for bias in biases])
    return results


def test_a_bias_may_change_before_the_backward(ranks: RankPool) -> None:
    """Torch's BatchNorm does not keep it."""
    for plain, ours in ranks.run(_two_losses, 2):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
def test_an_optimizer_may_step_in_the_backward(ranks: RankPool, recomputes: bool) -> None:
    for left, stepped in ranks.run(_step_in_backward, 2, recomputes):
        torch.testing.assert_close(left, stepped, rtol=0, atol=0)


def _change_in_backward(rank: int, world_size: int, what: str) -> str:
    """A hook that runs during a collective changes what the rest of the backward needs."""
    model: Any = bnrewrite.convert(_chain())
    bn = model[4]
    changed = [bn.weight.detach()]
    if what == "input":
        model[3].register_forward_hook(lambda *args: changed.__setitem__(0, args[-1].detach()))

    def change(_: Tensor) -> None:
        changed[0].zero_()

    model[6].weight.register_post_accumulate_grad_hook(change)
    try:
        model(torch.randn(3, 3, 9, 9)).sin().sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", ["input", "weight"])
def test_other_changes_in_the_backward_are_errors(ranks: RankPool, what: str) -> None:
    for message in ranks.run(_change_in_backward, 2, what):
        assert "modified by an inplace operation" in message
        assert "between two parts of one backward pass" in message


def _of_some(rank: int, world_size: int, what: str, leaf: bool) -> tuple[int, int]:
    """Collectives that start in a backward for the sake of ``what``, and that end in it."""
    model: Any = bnrewrite.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    image = torch.randn(3, 3, 5, 7, requires_grad=True)
    x = image if leaf else model[0](image)
    wanted = {"image": image, "x": x, "weight": model[1].weight, "bias": model[1].bias}[what]
    loss = model[1](x).sin().sum()
    ended = []
    take = HandOver.take

    def counted_take(between: HandOver) -> Any:
        ended.append(take(between))
        return ended[-1]

    with CountCollectives() as counted, mock.patch.object(HandOver, "take", counted_take):
        (found,) = torch.autograd.grad(loss, [wanted])
    assert found.abs().max() > 0
    return len(counted.seen), sum(one is not None for one in ended)


@pytest.mark.parametrize("leaf", [False, True], ids=["inner", "leaf"])
@pytest.mark.parametrize("what", ["image", "x", "weight", "bias"])
def test_a_backward_communicates_for_inputs_only(ranks: RankPool, what: str, leaf: bool) -> None:
    # Whether the gradient of a leaf was asked for, torch does not say.
    expected = what in ("image", "x") or (leaf and what == "weight")
    assert ranks.run(_of_some, 2, what, leaf) == [(expected, expected)] * 2
