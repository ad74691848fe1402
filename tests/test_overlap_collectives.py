"""What runs while a collective is under way, and what stays as it was."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnrewrite
from tests.models import Block
from tests.ranks import SUMS, RankPool
from tests.test_share_collectives import Chain, Inception

_NAMES = {**dict.fromkeys(SUMS, "launch"), "wait_tensor": "wait", "convolution": "conv"}


class _Trace(TorchDispatchMode):
    """Names of what runs: launches, waits and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = _NAMES.get(func._opname)
        if name is not None:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Late(nn.Module):
    """Work that is written after the site and does not need it, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.other = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).relu()
        return y * self.other(x)


def _trace(rank: int, world_size: int) -> dict[str, list[str]]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 5)
    seen = {}
    models = {
        "block": nn.Sequential(nn.Conv2d(3, 4, 1), Block(4, 8, 2)),
        "late": Late(),
        "chain": Chain(),
    }
    for name, model in models.items():
        with _Trace() as trace:
            bnrewrite.convert(model)(x)
        seen[name] = trace.seen
    return seen


def test_convolutions_run_between_launch_and_wait(ranks: RankPool) -> None:
    expected = {
        # Stem, conv1, bn1 with the projection's convolution meanwhile, conv2, both last sites.
        "block": ["conv", "conv", "launch", "conv", "wait", "conv", "launch", "wait"],
        "late": ["conv", "launch", "conv", "conv", "wait"],
        "chain": ["conv", "launch", "wait", "conv", "launch", "wait"],
    }
    assert ranks.run(_trace, 2) == [expected] * 2


def test_a_chain_keeps_its_graph() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    others = ("inline_children", "share_collectives", "overlap_collectives")
    codes = [
        bnrewrite.graphs(bnrewrite.convert(model, passes=passes))[""].code
        for passes in (others, ())
    ]
    assert codes[0] == codes[1]


def test_report_says_during_which_collectives_nothing_runs() -> None:
    report = bnrewrite.report(bnrewrite.convert(Inception()))
    (summary,) = (one for one in report.passes if one.name == "overlap_collectives")
    assert summary.num_rewritten == 1
    assert {skip.reason for skip in summary.skipped} == {"no other work could run meanwhile"}
    assert summary.num_rewritten + len(summary.skipped) == 7


@pytest.mark.parametrize("name", ["inline_children", "share_collectives", "overlap_collectives"])
def test_each_pass_can_be_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNREWRITE_DISABLE", name)
    report = bnrewrite.report(bnrewrite.convert(Inception()))
    assert name not in {one.name for one in report.passes}
