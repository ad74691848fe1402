"""What tells whether a compiler traces: on every version of torch, in every kind of frame."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bnrewrite import guards

QUESTIONS = {"this torch": guards.is_compiling, "torch 2.11": guards._is_compiling}


@pytest.fixture(params=QUESTIONS)
def is_compiling(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], bool]]:
    if request.param == "torch 2.11":
        # As there, while AOTAutograd traces.
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", False)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    yield QUESTIONS[request.param]
    torch._dynamo.reset()


def test_aot_autograd_traces(is_compiling: Callable[[], bool]) -> None:
    answers = []
    library = torch.library.Library("bnrewrite_asks", "DEF")
    library.define("ask(Tensor x) -> Tensor")

    def ask(x: Tensor) -> Tensor:
        answers.append(is_compiling())
        return x + 1

    library.impl("ask", ask, "CompositeImplicitAutograd")
    op = torch.ops.bnrewrite_asks.ask
    x = torch.ones(2, requires_grad=True)
    op(x)
    assert answers == [False]
    compiled: Any = torch.compile(lambda x: op(x) * 2, backend="aot_eager", fullgraph=True)
    compiled(x)
    assert set(answers[1:]) == {True}
    library._destroy()


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_what_runs_after_a_graph_break_is_not_traced(question: Callable[[], bool]) -> None:
    def outside(_: Tensor) -> bool:
        return question()

    # Dynamo leaves this frame alone, but not those of its calls.
    asked: Any = torch.compiler.disable(outside, recursive=False)
    outer: Any = torch.compile(lambda x: asked(x + 1), backend="eager")
    assert outer(torch.ones(2)) is False
    torch._dynamo.reset()
