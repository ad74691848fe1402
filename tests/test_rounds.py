"""How many collectives real models issue, against the bounds that sharing can reach."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import bnrewrite
from tests.parity import tensors
from tests.ranks import CountCollectives
from tests.test_zoo import spec

BOUNDS = {
    ("torchvision", "resnet18"): (17, 20, (64, 64)),
    ("torchvision", "resnet50"): (49, 53, (64, 64)),
    ("torchvision", "googlenet"): (23, 59, (64, 64)),
    ("torchvision", "inception_v3"): (49, 96, (299, 299)),
    ("torchvision", "s3d"): (32, 77, (16, 224, 224)),
    ("timm", "hrnet_w18"): (117, 325, (64, 64)),
    ("timm", "repvgg_a0"): (23, 61, (64, 64)),
    ("timm", "mobileone_s0"): (44, 226, (64, 64)),
}
"""Most collectives in each direction, BatchNorm layers, and the size of inputs that suffices."""


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A world of two ranks of which only this one exists: it issues collectives to nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def _count(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Collectives of a forward and of its backward."""
    with CountCollectives() as forward:
        outputs = [out for out in tensors(model(x)) if out.requires_grad]
    with CountCollectives() as backward:
        torch.stack([out.sum() for out in outputs]).sum().backward()
    return len(forward.seen), len(backward.seen)


@pytest.mark.parametrize(("suite", "name"), BOUNDS, ids=[name for _, name in BOUNDS])
@pytest.mark.usefixtures("two_ranks")
def test_real_models_issue_as_few_as_they_can(suite: str, name: str) -> None:
    bound, num_layers, size = BOUNDS[suite, name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = spec(suite, name).make().train()
    assert (
        sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) == num_layers
    )
    x = torch.randn(1 if len(size) == 3 else 2, 3, *size)
    report = bnrewrite.report(bnrewrite.convert(model))
    assert report.collectives_forward <= bound
    assert report.collectives_backward <= bound
    assert _count(model, x) == (report.collectives_forward, report.collectives_backward)


class TwoViews(nn.Module):
    """Both views through one encoder and one projector, in one forward."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.projector(self.encoder(x)), self.projector(self.encoder(x.flip(-1)))


class QueryAndKey(nn.Module):
    """Two encoders of the same kind, one of them without gradient, as momentum contrast has."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.query = make()
        self.key = make()
        self.key.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(x), self.key(x.flip(-1))


def _resnet18() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchvision.models import resnet18
    return resnet18(num_classes=10)


@pytest.mark.usefixtures("two_ranks")
def test_two_views_take_one_set_of_rounds() -> None:
    spec("torchvision", "resnet18")
    x = torch.randn(2, 3, 64, 64)
    views = bnrewrite.convert(TwoViews(_resnet18()))
    # 17 rounds of a ResNet-18 and one of the projector.
    assert bnrewrite.report(views).collectives_forward == 18
    assert _count(views, x) == (18, 18)
    pair = bnrewrite.convert(QueryAndKey(_resnet18))
    assert _count(pair, x) == (17, 17)


class Skip(nn.Module):
    """A level of a network in the shape of a U, with the next one inside."""

    def __init__(self, down: nn.Module, inner: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.down, self.inner, self.up = down, inner, up

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        return self.up(y + self.inner(y))


class Levels(nn.Module):
    """Lists its layers by kind, and calls them by way of the outermost level."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)) for _ in range(5)
        ]
        self.first, self.bottom = layers[0], layers[2]
        self.downs = nn.ModuleList(layers[1:2])
        self.ups = nn.ModuleList(layers[3:])
        self.outermost = Skip(
            self.first, Skip(self.downs[0], self.bottom, self.ups[0]), self.ups[1]
        )

    def forward(self, x: Tensor) -> Tensor:
        # No graph can have this.
        return self.outermost(x if x.sum() > 0 else -x)


@pytest.mark.usefixtures("two_ranks")
def test_what_a_graph_below_calls_is_counted_there() -> None:
    model = bnrewrite.convert(Levels())
    assert "" not in bnrewrite.graphs(model)
    report = bnrewrite.report(model)
    assert sum(len(one.sites) for one in report.rounds) == 5
    counted = (report.collectives_forward, report.collectives_backward)
    assert _count(model, torch.randn(2, 3, 4, 4)) == counted
