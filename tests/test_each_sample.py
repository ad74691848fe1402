"""Which calls of ``F.batch_norm`` normalize each sample by itself, and are no sites."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import bnrewrite
from tests.cases import StandardizedRows, StandardizesByParametrization
from tests.ranks import RankPool

Reshape = Callable[[Tensor], Tensor]

OF_EACH_SAMPLE: dict[str, Reshape] = {
    "reshape": lambda x: x.reshape(1, x.shape[0] * x.shape[1], x.shape[2], x.shape[3]),
    "view of a copy": lambda x: x.contiguous().view(1, x.size(0) * x.size(1), -1),
    "what is left": lambda x: x.reshape(1, -1, x.size(2), x.size(3)),
    "sizes in a tuple": lambda x: torch.reshape(x, (1, x.shape[0] * 4, 5, 6)),
    "converted": lambda x: x.view(1, x.size(dim=0) * 2, -1).double(),
    "flattened, a new axis": lambda x: x.flatten(1)[None],
    "flattened, two new axes": lambda x: x.flatten()[None, None, :].flatten(0, 1)[None],
    "flattened, unsqueezed": lambda x: x.flatten(0, 1).unsqueeze(0),
    "reshaped, unsqueezed": lambda x: torch.unsqueeze(x.view(-1, 30), dim=0),
    "groups": lambda x: x.view(1, x.size()[0] * 2, 2, 5, 6),
    "product of sizes": lambda x: x.view(1, math.prod(x.shape[:2]), 5, 6),
}

OF_A_BATCH: dict[str, Reshape] = {
    "as it is": lambda x: x,
    "images in a row": lambda x: x.view(x.size(0), x.size(1), -1),
    "other first size": lambda x: x.reshape(2, -1, 5, 6),
    "channels are constant": lambda x: x.transpose(0, 1).reshape(1, 4, -1),
    "channels are those of the input": lambda x: x.transpose(0, 1).reshape(1, x.size(1), -1),
    "points of a batch": lambda x: x.flatten(2).transpose(1, 2).flatten(0, 1).t()[None],
    "a new last axis": lambda x: x.flatten(1).unsqueeze(-1),
    "one sample": lambda x: x[0][None],
}


class Reshaped(nn.Module):
    """BatchNorm of what a function makes of its input."""

    def __init__(self, reshape: Reshape) -> None:
        super().__init__()
        self.reshape = reshape

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.reshape(x), None, None, training=True)


@pytest.mark.parametrize("name", OF_EACH_SAMPLE)
def test_what_normalizes_each_sample_is_no_site(name: str) -> None:
    model = bnrewrite.convert(Reshaped(OF_EACH_SAMPLE[name]), strict=True)
    report = bnrewrite.report(model)
    assert report.sites == ()
    (skip,) = report.skipped
    assert skip.name == "batch_norm"
    assert "normalizes each sample by itself" in skip.reason
    x = torch.randn(3, 4, 5, 6)
    torch.testing.assert_close(model(x), Reshaped(OF_EACH_SAMPLE[name])(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", OF_A_BATCH)
def test_what_normalizes_a_batch_is_a_site(name: str) -> None:
    model = bnrewrite.convert(Reshaped(OF_A_BATCH[name]), strict=True)
    assert len(bnrewrite.report(model).sites) == 1


def test_channels_of_parameters_are_no_samples() -> None:
    """However their number is found: those of one unbatched sample."""

    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            x = x.reshape(1, x.shape[0], -1)
            return F.batch_norm(x, None, None, self.weight, training=True)

    assert len(bnrewrite.report(bnrewrite.convert(Unbatched())).sites) == 1


def test_what_a_parametrization_calls_is_no_site() -> None:
    """However far below it."""
    conv = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(conv, "weight", nn.Sequential(StandardizedRows()))
    with pytest.warns(UserWarning, match="nothing to convert"):
        bnrewrite.convert(conv)


def _reads_its_weight(rank: int, world_size: int) -> float:
    model: Any = bnrewrite.convert(StandardizesByParametrization())
    # The other ranks read nothing.
    weight = model.conv.weight if rank == 0 else torch.zeros(4)
    return weight.sum().item()


def test_reading_a_parametrized_weight_communicates_nothing(ranks: RankPool) -> None:
    for total in ranks.run(_reads_its_weight, 2):
        assert abs(total) < 1e-4
