"""``F.batch_norm`` on activations, however a forward comes by it: rewritten, or refused by name."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnrewrite
from tests import hidden_batch_norm
from tests.hidden_batch_norm import Helper, two_calls_away

SECRET = functools.partial(F.batch_norm, running_mean=None, running_var=None, training=True)


def _closing_over(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x)


class Base(nn.Module):
    """Forwards that can be traced call ``norm`` plainly, others behind a branch on data."""

    traceable = True

    def norm(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        return self.norm(x)


class ByModule(Base):
    def norm(self, x: Tensor) -> Tensor:
        return hidden_batch_norm.through_another_name(x)


class ByFunction(Base):
    def norm(self, x: Tensor) -> Tensor:
        return two_calls_away(x)


class ByClass(Base):
    def norm(self, x: Tensor) -> Tensor:
        return Helper.call(x)


class ByPartial(Base):
    def norm(self, x: Tensor) -> Tensor:
        return SECRET(x)


class ByAttribute(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = _closing_over(two_calls_away)

    def norm(self, x: Tensor) -> Tensor:
        return self.act(x)


class ByProperty(Base):
    @property
    def normalized(self) -> Any:
        return two_calls_away

    def norm(self, x: Tensor) -> Tensor:
        return self.normalized(x)


class ByInnerFunction(Base):
    def norm(self, x: Tensor) -> Tensor:
        def outer() -> Tensor:
            def inner() -> Tensor:
                return F.batch_norm(x, None, None, training=True)

            return inner()

        return outer()


KINDS = (ByModule, ByFunction, ByClass, ByPartial, ByAttribute, ByProperty, ByInnerFunction)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_can_be_traced_is_a_site(kind: type[Base]) -> None:
    model = bnrewrite.convert(nn.Sequential(kind()), strict=True)
    assert [site.name for site in bnrewrite.report(model).sites] == ["0.batch_norm"]
    x = torch.randn(4, 3, 2)
    expected = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_cannot_be_traced_is_refused_by_name(
    kind: type[Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Base, "traceable", False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*nothing to convert")
        with pytest.warns(UserWarning, match=rf"0 \({kind.__name__}\).*uses local statistics"):
            model = bnrewrite.convert(nn.Sequential(kind()))
    (skip,) = bnrewrite.report(model).skipped
    assert skip.name == "0"
    assert "test_hidden_batch_norm.py:" in skip.reason
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            bnrewrite.CaptureError, match="0: branches on a computed value or shape"
        ):
            bnrewrite.convert(nn.Sequential(kind()), strict=True)


def test_operators_below_are_refused_by_name() -> None:
    class Native(Base):
        def norm(self, x: Tensor) -> Tensor:
            return hidden_batch_norm.native(x)

    model = nn.Sequential(Native(), nn.BatchNorm1d(3))
    with pytest.warns(UserWarning, match="0 calls native_batch_norm, which uses local statistics"):
        bnrewrite.convert(model)
    (skip,) = bnrewrite.report(model).skipped
    assert "native_batch_norm" in skip.reason
    assert "hidden_batch_norm.py:" in str(skip.where)
    with pytest.raises(bnrewrite.CaptureError, match="native_batch_norm"):
        bnrewrite.convert(model, strict=True)


class ByHand(nn.BatchNorm2d):
    """Computes its own statistics; ``traceable`` says whether a graph can stand for it."""

    traceable = True

    def forward(self, input: Tensor) -> Tensor:
        if not self.traceable and input.sum() > 1e9:
            return input
        mean = input.mean((0, 2, 3), keepdim=True)
        var = input.var((0, 2, 3), unbiased=False, keepdim=True)
        return (input - mean) / (var + self.eps).sqrt() * self.weight[:, None, None]


class ByHandUntraced(ByHand):
    traceable = False


class InTraining(nn.BatchNorm2d):
    """Computes its own statistics in training only."""

    def forward(self, input: Tensor) -> Tensor:
        return input - input.mean() if self.training else super().forward(input)


def _report_of(layer: nn.Module, mode: str) -> bnrewrite.Report:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.BatchNorm2d(3))
    return bnrewrite.report(bnrewrite.convert(model, mode))


@pytest.mark.parametrize("layer", [ByHand, ByHandUntraced, InTraining])
def test_statistics_of_its_own_are_not_counted(layer: type[nn.BatchNorm2d]) -> None:
    report = _report_of(layer(3), "sync")
    assert report.collectives_forward == report.num_communicating == 1
    assert [site.mode for site in report.sites] == ["own statistics", "sync"]
    skip = next(one for one in report.skipped if "not distributed" in one.reason)
    assert skip.name == "1"
    assert "test_hidden_batch_norm.py" in str(skip.where)
    assert "left: 1: is not distributed" in str(report)
    with pytest.raises(bnrewrite.CaptureError, match="0: is not distributed"):
        bnrewrite.convert(nn.Sequential(layer(3)), strict=True)


def test_statistics_of_its_own_are_local() -> None:
    report = _report_of(ByHand(3), "local")
    assert [site.mode for site in report.sites] == ["local", "local"]
    assert not report.skipped


def test_frozen_runs_what_is_for_evaluation() -> None:
    assert not _report_of(InTraining(3), "frozen").skipped
    assert "not distributed" in _report_of(ByHand(3), "frozen").skipped[0].reason
