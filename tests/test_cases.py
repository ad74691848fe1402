"""Every kind of trouble that real models give to capture: nothing escapes, nothing differs."""

import warnings

import pytest

from tests.cases import CASES, Case
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
