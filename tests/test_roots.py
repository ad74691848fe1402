"""Reports on what holds converted models, and on models that changed after conversion."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import bnrewrite
from tests.models import FunctionalNorm, ResidualNet


@pytest.fixture
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


WRAPPERS: dict[str, tuple[Any, str]] = {
    "AveragedModel": (AveragedModel, "module"),
    "DDP": (DistributedDataParallel, "module"),
    "compile": (partial(torch.compile, backend="eager"), "_orig_mod"),
    "Sequential": (nn.Sequential, "0"),
}


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_is_taken_for_what_it_holds(wrapper: str) -> None:
    wrap, path = WRAPPERS[wrapper]
    model = bnrewrite.convert(ResidualNet())
    whole = wrap(model)
    report, inner = bnrewrite.report(whole), bnrewrite.report(model)
    assert [site.name for site in report.sites] == [f"{path}.{site.name}" for site in inner.sites]
    assert [site.owner for site in report.sites] == [
        path if site.owner == "" else f"{path}.{site.owner}" for site in inner.sites
    ]
    assert report.collectives_forward == inner.collectives_forward
    assert [one.num_rewritten for one in report.passes] == [
        one.num_rewritten for one in inner.passes
    ]
    owners = {owner.name for owner in report.owners}
    assert owners == bnrewrite.graphs(whole).keys()
    assert report.skipped == ()
    bnrewrite.check(whole)
    bnrewrite.revert(whole)
    with pytest.raises(ValueError, match="is not converted"):
        bnrewrite.report(whole)


class Parts(nn.Module):
    """Two parts with layers of the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.back, self.head = Part(), Part()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.back(x))


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.b1, self.b2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b2(self.b1(self.conv(x)))


NAMES = ["back.b1", "back.b2", "head.b1", "head.b2"]


def test_a_part_that_is_converted_anew_keeps_its_path() -> None:
    model = bnrewrite.convert(Parts())
    bnrewrite.convert(model.back, "frozen")
    report = bnrewrite.report(model)
    modes = ["frozen", "frozen", "sync", "sync"]
    assert [(site.name, site.mode) for site in report.sites] == [*zip(NAMES, modes, strict=True)]
    assert [site.owner for site in report.sites] == ["back", "back", "head", "head"]
    assert report.skipped == ()
    assert report.collectives_forward == 2
    assert [site.name for site in bnrewrite.report(model.back).sites] == ["b1", "b2"]
    assert "replace_batch_norm               4" in str(report)


def test_parts_that_are_converted_by_themselves() -> None:
    model = Parts()
    bnrewrite.convert(model.head)
    report = bnrewrite.report(model)
    assert [site.name for site in report.sites] == NAMES[2:]
    left = {skip.name: skip.reason for skip in report.skipped}
    assert left.keys() == {"back.b1", "back.b2"}
    assert "outside" in left["back.b1"]
    bnrewrite.convert(model.back, "local")
    report = bnrewrite.report(model)
    assert [site.name for site in report.sites] == NAMES
    assert report.skipped == ()


def test_sites_that_torch_replaced_are_listed() -> None:
    model: Any = nn.SyncBatchNorm.convert_sync_batchnorm(bnrewrite.convert(Parts()))
    report = bnrewrite.report(model)
    assert report.sites == report.owners == report.rounds == ()
    assert all(one.num_rewritten == 0 for one in report.passes)
    assert [skip.name for skip in report.skipped] == NAMES
    assert "left: back.b1: is not converted: it was added after convert" in str(report)


def test_a_layer_that_is_added_is_listed() -> None:
    model = bnrewrite.convert(Parts())
    model.head.b2 = nn.BatchNorm2d(3)
    model.back.b3 = nn.BatchNorm2d(3)
    report = bnrewrite.report(model)
    assert [site.name for site in report.sites] == NAMES[:-1]
    assert [skip.name for skip in report.skipped] == ["back.b3", "head.b2", "head"]
    *added, left = report.skipped
    assert all("added after convert" in skip.reason for skip in added)
    assert left.reason == "runs its own forward since the class of b2 changed"
    assert report.collectives_forward == 3


def test_a_site_that_is_gone_is_listed() -> None:
    model: Any = bnrewrite.convert(Parts())
    model.head.b2 = nn.Identity()
    gone, left = bnrewrite.report(model).skipped
    assert (gone.name, gone.reason) == ("head.b2", "was converted, but is no longer there")
    assert (left.name, left.reason) == (
        "head",
        "runs its own forward since the class of b2 changed",
    )
    del model.head
    assert len(bnrewrite.report(model).sites) == 2


def test_a_part_that_is_reverted_is_listed() -> None:
    model = bnrewrite.convert(Parts())
    bnrewrite.revert(model.back)
    report = bnrewrite.report(copy.deepcopy(model))
    assert [skip.name for skip in report.skipped] == ["back.b1", "back.b2"]
    assert all("reverted since then" in skip.reason for skip in report.skipped)


def test_what_no_pattern_matches_is_not_added() -> None:
    report = bnrewrite.report(bnrewrite.convert(Parts(), {"head.*": "sync"}))
    assert {skip.reason for skip in report.skipped} == {"no pattern in mode matches it"}


class Blend(nn.Module):
    """Two branches, whose BatchNorms share, and a number that its forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.b1, self.b2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.share = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.share * self.b1(x) + (1 - self.share) * self.b2(x.relu())


def test_a_module_that_has_left_its_graph_is_listed() -> None:
    model: Any = bnrewrite.convert(nn.Sequential(Blend(), nn.Conv2d(3, 3, 1), Blend())).eval()
    report = bnrewrite.report(model)
    assert report.collectives_forward == 2
    assert report.skipped == ()
    model[0].share = 0.25
    report = bnrewrite.report(model)
    (left,) = report.skipped
    assert (left.name, left.reason) == ("0", "runs its own forward since share was 0.5 and is 0.25")
    assert [site.owner for site in report.sites] == [None, None, "2", "2"]
    assert [site.shares_with for site in report.sites] == [(), (), ("2.b2",), ("2.b1",)]
    assert report.collectives_forward == 3
    assert [owner.name for owner in report.owners] == ["2"]
    model[0].share = 0.5
    assert bnrewrite.report(model).skipped == ()
    handle = model[2].b1.register_forward_hook(lambda *_: None)
    assert [skip.reason for skip in bnrewrite.report(model).skipped] == [
        "runs its own forward since hooks of b1 changed"
    ]
    handle.remove()
    with torch.no_grad():
        assert bnrewrite.report(model).skipped == ()


def test_the_graph_of_a_subclass_that_checks_its_input_runs() -> None:
    model: Any = bnrewrite.convert(nn.Sequential(FunctionalNorm(3)))
    assert model[0]._bnrewrite_owner.train.holds(model[0])
    assert bnrewrite.report(model).skipped == ()
