"""Every kind of trouble that real models give to capture: nothing escapes, nothing differs."""

import warnings

import pytest
import torch
from torch import nn

import bnrewrite
from tests.cases import CASES, Case, NoOverride
from tests.parity import assert_same_training


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trains_and_evaluates_like_the_unconverted_model(case: Case) -> None:
    with warnings.catch_warnings():
        # Some of torch's own constructors warn; what our code warns of stays an error.
        warnings.filterwarnings("ignore", module="torch")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        assert_same_training(
            case.model,
            case.arguments,
            num_other=case.num_other,
            rtol=case.rtol,
            double=case.double,
        )


@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, NoOverride])
def test_captured_graphs_check_the_dimensions_of_inputs(cls: type[nn.Module]) -> None:
    # Five dimensions fit only BatchNorm3d, four only BatchNorm2d, which NoOverride extends.
    shape = (2, 3, 4, 5) if cls in (nn.BatchNorm1d, nn.BatchNorm3d) else (2, 3, 4)
    plain = nn.Sequential(nn.Identity(), cls(3))
    converted = bnrewrite.convert(nn.Sequential(nn.Identity(), cls(3)))
    for model in (plain, converted):
        with pytest.raises(ValueError, match=r"expected .* input \(got .* input\)"):
            model(torch.randn(shape))
