"""The pass ``fuse_epilogue`` behind sites that share a collective, or overlap theirs."""

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import bnrewrite
from bnrewrite.activations import activate
from bnrewrite.ops import epilogue, input_gradients, normalize_sites, sites
from bnrewrite.ops.library import argument
from bnrewrite.passes import OPTIMIZING
from tests.models import perturb
from tests.parity import assert_same_training
from tests.ranks import RankPool

FINISH = torch.ops.bnrewrite.finish_batch_norm.default
WITHOUT = tuple(one.__name__ for one in OPTIMIZING if one.__name__ != "fuse_epilogue")

Tail = Callable[["Pair", Tensor, Tensor, Tensor], Any]


class Pair(nn.Module):
    """Two branches with a BatchNorm each, and whatever ``tail`` does with both results."""

    def __init__(self, tail: Tail, act: nn.Module | None = None) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.right = nn.Conv2d(3, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True) if act is None else act
        self.last = nn.Conv2d(4, 3, 1)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        return self.last(self.tail(self, self.bn1(self.left(x)), self.bn2(self.right(x)), x))


def _iadd(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


def _into_residual(self: Pair, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """The residual is there before the collective ends, but changes after it."""
    shortcut = torch.cat([x, x[:, :1]], 1)
    a = F.relu(a)
    shortcut.mul_(a.mean())
    return a + F.relu(b + shortcut)


# For each form: what fuses into the first and the second site, as (residual, activation), where a
# residual is "-", "tensor" or the number of a site.
FORMS: dict[str, tuple[Tail, list[tuple[str, str]]]] = {
    "relu(a + b)": (lambda s, a, b, x: F.relu(a + b), [("-", "identity"), ("0", "relu")]),
    "relu(b + a)": (lambda s, a, b, x: F.relu(b + a), [("-", "identity"), ("0", "relu")]),
    "a += b": (lambda s, a, b, x: s.act(_iadd(a, b)), [("-", "identity"), ("0", "relu")]),
    "b += a": (lambda s, a, b, x: s.act(_iadd(b, a)), [("-", "identity"), ("0", "relu")]),
    "a + b": (lambda s, a, b, x: a + b, [("-", "identity"), ("0", "identity")]),
    "silu(a + b)": (lambda s, a, b, x: F.silu(a + b), [("-", "identity"), ("0", "silu")]),
    "relu(a) * gelu(b)": (lambda s, a, b, x: F.relu(a) * F.gelu(b), [("-", "relu"), ("-", "gelu")]),
    "relu(a) + b": (lambda s, a, b, x: F.relu(a) + b, [("-", "relu"), ("-", "identity")]),
    "a + relu(b)": (lambda s, a, b, x: a + F.relu(b), [("-", "identity"), ("-", "relu")]),
    "a is read elsewhere": (
        lambda s, a, b, x: F.relu(a + b) * a,
        [("-", "identity"), ("-", "identity")],
    ),
    "the residual was there": (
        lambda s, a, b, x: F.relu(a + torch.cat([x, x[:, :1]], 1)) * b,
        [("tensor", "relu"), ("-", "identity")],
    ),
    "the residual changes": (_into_residual, [("-", "relu"), ("-", "identity")]),
    "broadcast": (
        lambda s, a, b, x: F.relu(a + torch.cat([x[:, :1]])) * b,
        [("tensor", "relu"), ("-", "identity")],
    ),
}


def _epilogues(model: nn.Module) -> list[tuple[str, str]]:
    (node,) = bnrewrite.graphs(model)[""].graph.find_nodes(op="call_function", target=FINISH)
    residuals, residual_sites, activations = (
        argument(node, name) for name in ("residual", "residual_site", "activation")
    )
    return [
        (str(site) if site >= 0 else "-" if residual is None else "tensor", activation)
        for residual, site, activation in zip(residuals, residual_sites, activations, strict=True)
    ]


def _inputs(n: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(n, 3, 5, 7),), {}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_as_it_did(form: str) -> None:
    tail, expected = FORMS[form]
    model = assert_same_training(lambda: perturb(Pair(tail)), _inputs)
    assert _epilogues(model) == expected


def test_report_says_why_the_rest_is_left() -> None:
    reasons = {}
    for form in ("a is read elsewhere", "the residual changes", "relu(a) + b"):
        model = bnrewrite.convert(Pair(FORMS[form][0]))
        passes = {one.name: one for one in bnrewrite.report(model).passes}
        reasons[form] = {skip.name: skip.reason for skip in passes["fuse_epilogue"].skipped}
    late = "its other inputs are not ready when its collective ends"
    assert reasons["the residual changes"] == {"bn2": late}
    assert reasons["relu(a) + b"] == {"bn2": late}
    assert reasons["a is read elsewhere"]["bn1"] == "its result is used in several places"
    assert "also used elsewhere" in reasons["a is read elsewhere"]["bn2"]


class Sums(nn.Module):
    """Sums in place whose operands differ in dtype: the result has that of what it goes into."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn1 = nn.BatchNorm2d(3)
        self.bn2 = nn.BatchNorm2d(3) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv(x).to(torch.bfloat16))
        y += x if self.bn2 is None else self.bn2(x)
        return F.relu(y)


@pytest.mark.parametrize("shared", [False, True])
def test_a_sum_in_place_keeps_its_dtype_and_shape(shared: bool) -> None:
    torch.manual_seed(0)
    plain = Sums(shared)
    model = bnrewrite.convert(copy.deepcopy(plain))
    x = torch.randn(4, 3, 5, 5)
    ours, expected = model(x), plain(x)
    assert ours.dtype == expected.dtype == torch.bfloat16
    # Two units in the last place of what is added.
    torch.testing.assert_close(ours, expected, rtol=2**-6, atol=2**-6)
    if not shared:
        for one in (model, plain):
            one.conv = nn.Conv2d(3, 3, 5)
            with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                one(x)


class Overlap(nn.Module):
    """A lone site that overlaps its collective with the convolution of its own residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 1, 1)
        self.bn = nn.BatchNorm2d(4)
        self.shortcut = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return F.relu(y + self.shortcut(x))


def test_a_site_that_overlaps_takes_what_was_made_meanwhile() -> None:
    model = assert_same_training(lambda: perturb(Overlap()), _inputs)
    assert _epilogues(model) == [("tensor", "relu")]


def _train_recomputing(rank: int, world_size: int, case: str) -> tuple[list[list[Any]], list[int]]:
    """:func:`_train` as on a device that prefers recomputing, and how often pairs were one."""
    with (
        mock.patch.object(sites, "prefers_recomputing", return_value=True),
        _counting(normalize_sites, "NORMALIZE_TWO") as forward,
        _counting(input_gradients, "NORMALIZE_TWO_BACKWARD_REDUCE") as reduction,
        _counting(input_gradients, "NORMALIZE_TWO_BACKWARD") as backward,
    ):
        results = _train(rank, world_size, case)
    return results, [calls.call_count for calls in (forward, reduction, backward)]


def _counting(module: Any, phase: str) -> Any:
    """Counts the calls that ``module`` makes of a phase."""
    return mock.patch.object(module, phase, side_effect=getattr(module, phase))


def _train(rank: int, world_size: int, case: str) -> list[list[Any]]:
    """Values, gradients and buffers with and without the pass, over ranks of 4, 1 and 0 images."""
    torch.manual_seed(0)
    form, layer = case.split(", ") if ", " in case else (case, "")
    plain = perturb(Overlap() if form == "overlap" else Pair(FORMS[form][0])).double()
    torch.manual_seed(rank)
    x = torch.randn((4, 1, 0)[rank], 3, 5, 7, dtype=torch.float64)
    results = []
    for passes in (None, WITHOUT, ()):
        model = bnrewrite.convert(copy.deepcopy(plain), passes=passes)
        if layer:
            model.get_submodule(layer).eval()
        y = model(x)
        (y * torch.sin(torch.arange(y.numel()).view_as(y))).sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters()), *model.buffers()])
    return results


CASES = [*FORMS, "overlap", "relu(a + b), bn1", "relu(a + b), bn2", "relu(a) * gelu(b), bn1"]


@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_with_and_without_the_pass(ranks: RankPool, case: str) -> None:
    for fused, unfused, apart in ranks.run(_train, 3, case):
        for one, other, third in zip(fused, unfused, apart, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(one, third, rtol=1e-9, atol=1e-9)


PAIRS = ("relu(a + b)", "relu(b + a)", "a += b", "b += a", "a + b", "silu(a + b)")
"""Forms in which both branches are one in each phase, on a device that has kernels for it."""


@pytest.mark.parametrize("case", CASES)
def test_so_they_do_where_two_branches_are_one_kernel(ranks: RankPool, case: str) -> None:
    for (fused, unfused, apart), num_pairs in ranks.run(_train_recomputing, 3, case):
        assert num_pairs == [case in PAIRS] * 3
        for one, other, third in zip(fused, unfused, apart, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(one, third, rtol=1e-9, atol=1e-9)


def _hooked(rank: int, world_size: int, hooked: tuple[int, ...]) -> str:
    """A hook on an activation that is part of sites which share their collective."""
    torch.manual_seed(0)
    model = bnrewrite.convert(nn.Sequential(nn.Conv2d(3, 3, 1), Pair(FORMS["a += b"][0])))
    for step in range(3):
        if step == 1 and rank in hooked:
            model[1].act.register_forward_hook(lambda *_: None)
        try:
            model(torch.randn(2, 3, 5, 7)).sum().backward()
        except bnrewrite.ScheduleError as error:
            return str(error)
    return ""


def test_a_hook_on_one_rank_is_an_error_on_all(ranks: RankPool) -> None:
    for message in ranks.run(_hooked, 2, (0,)):
        assert "the graph of 1" in message
        assert "a hook or another change rules out the graph" in message


def test_a_hook_on_all_ranks_is_none(ranks: RankPool) -> None:
    assert ranks.run(_hooked, 2, (0, 1)) == ["", ""]


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_gradcheck_of_a_site_that_is_added_to_another(
    activation: str, order: int, recomputes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the phases, as if there were somebody to share with."""
    monkeypatch.setattr(sites, "prefers_recomputing", lambda x: recomputes)
    monkeypatch.setattr(epilogue, "NO_GROUP", "another name")

    def function(
        a: Tensor, b: Tensor, weight: Tensor, bias: Tensor, its_weight: Tensor, its_bias: Tensor
    ) -> Tensor:
        from bnrewrite.ops.moments import MOMENTS
        from bnrewrite.ops.normalize_sites import normalize_sites
        from bnrewrite.ops.sites import join

        common = (None, None, None, True, True, 0.1, 1e-3)
        first = sites.Site(a, weight, bias, *common)
        second = sites.Site(b, its_weight, its_bias, *common)
        second = second._replace(residual_site=0, act=(activation, 0.0))
        with torch.no_grad():
            totals = join([MOMENTS(a), MOMENTS(b)])
        return normalize_sites([first, second], [a, b], totals, "")[1]

    args = [
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in ((3, 2, 4), (3, 2, 4), (2,), (2,), (2,), (2,))
    ]
    check: Any = gradcheck if order == 1 else gradgradcheck
    assert check(function, args)


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
def test_a_sum_that_nobody_reads_gives_nobody_a_gradient(
    recomputes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnrewrite.ops.moments import MOMENTS
    from bnrewrite.ops.normalize_sites import normalize_sites
    from bnrewrite.ops.sites import join

    monkeypatch.setattr(sites, "prefers_recomputing", lambda x: recomputes)
    monkeypatch.setattr(epilogue, "NO_GROUP", "another name")
    xs = [torch.randn(3, 2, 4, requires_grad=True) for _ in range(3)]
    weights = [torch.ones(2, requires_grad=True) for _ in range(3)]
    common = (None, None, None, None, True, True, 0.1, 1e-3)
    first, second, third = (
        sites.Site(x, weight, *common) for x, weight in zip(xs, weights, strict=True)
    )
    second = second._replace(residual_site=0, act=("relu", 0.0))
    with torch.no_grad():
        totals = join([MOMENTS(x) for x in xs])
    *_, read = normalize_sites([first, second, third], xs, totals, "")
    read.square().sum().backward()
    assert [weight.grad is not None for weight in weights] == [False, False, True]
    # Their inputs take part in the collective all the same.
    assert not any(x.grad is not None and x.grad.any() for x in xs[:2])


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("wanted", [(1,), (2,), (1, 2), (0, 1, 2), (0, 2), (0,)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_sum_of_which_some_inputs_need_gradients(
    activation: str, wanted: tuple[int, ...], recomputes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bnrewrite.ops.moments import MOMENTS
    from bnrewrite.ops.normalize_sites import normalize_sites
    from bnrewrite.ops.sites import join

    monkeypatch.setattr(sites, "prefers_recomputing", lambda x: recomputes)
    monkeypatch.setattr(epilogue, "NO_GROUP", "another name")
    xs = [torch.randn(3, 2, 4, dtype=torch.float64).requires_grad_(i in wanted) for i in range(3)]
    common = (None, None, None, None, None, True, True, 0.1, 1e-3)
    weights = [torch.rand(2, dtype=torch.float64).requires_grad_() for _ in xs]
    alone, first, second = (
        sites.Site(x, weight, *common[1:]) for x, weight in zip(xs, weights, strict=True)
    )
    second = second._replace(residual_site=1, act=(activation, 0.0))
    with torch.no_grad():
        totals = join([MOMENTS(x) for x in xs])
    factor = torch.sin(torch.arange(24.0, dtype=torch.float64)).view(3, 2, 4)
    leaves = [*(xs[i] for i in wanted), *weights]
    y, _, total = normalize_sites([alone, first, second], xs, totals, "")
    found = torch.autograd.grad(((total + y) * factor).sum(), leaves)
    parts = [
        F.batch_norm(x, None, None, weight, training=True, eps=1e-3)
        for x, weight in zip(xs, weights, strict=True)
    ]
    expected = ((activate(parts[1] + parts[2], activation, 0.0) + parts[0]) * factor).sum()
    torch.testing.assert_close(found, torch.autograd.grad(expected, leaves), rtol=1e-9, atol=1e-9)
