"""Bad arguments of every kind: an error that names them, and a model that is as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnrewrite
from bnrewrite import cli
from tests.models import ResidualNet

ERRORS = (TypeError, ValueError, bnrewrite.BnRewriteError)
MODES = ("sync", "local", "frozen", "shuffle")

_WORDS = st.text(max_size=12).filter(lambda text: text not in MODES)
_NUMBERS = st.integers() | st.floats() | st.booleans() | st.complex_numbers()
_THINGS = st.sampled_from(
    [object(), b"sync", nn.BatchNorm2d, torch.float32, torch.ones(2), len, {1}, range(3), ...]
)
_ODD = _NUMBERS | _THINGS
_NO_MODULE = _ODD | _WORDS | st.none() | st.lists(_WORDS, max_size=2)
_NO_NAMES = _ODD.filter(lambda value: value != {1}) | _WORDS | st.dictionaries(_WORDS, _WORDS)
_WRONG_NAMES = st.lists(_ODD | _WORDS | st.none(), min_size=1, max_size=3)
_NO_MODE = _ODD | _WORDS | st.none() | st.lists(_WORDS, max_size=2)
_WRONG_MODE = st.dictionaries(_WORDS | st.integers(), _NO_MODE, min_size=1, max_size=3)
_UNMATCHED = st.dictionaries(st.text("xyz.", min_size=1), st.sampled_from(MODES), max_size=2)
_NO_FLAG = st.integers() | st.floats() | _WORDS | st.none() | _THINGS
_NO_GROUP = _ODD | _WORDS | st.lists(_WORDS, max_size=2)

CONVERT = {
    "mode": _NO_MODE | _WRONG_MODE | _UNMATCHED,
    "process_group": _NO_GROUP,
    "keep": _NO_NAMES | _WRONG_NAMES,
    "passes": _NO_NAMES | _WRONG_NAMES,
    "strict": _NO_FLAG,
}

SHUFFLE = {
    "schedule": _ODD | _WORDS | st.none(),
    "backward": _ODD | _WORDS | st.none(),
    "running": _ODD | _WORDS | st.none(),
    "seed": _THINGS | _WORDS | st.none() | st.floats() | st.booleans() | st.integers(max_value=-1),
}

EXPORT = {
    "args": st.integers() | _WORDS | st.none() | st.lists(st.integers(), max_size=2),
    "path": st.integers() | st.floats() | st.lists(_WORDS, max_size=1),
    "kwargs": st.integers() | _WORDS.filter(bool) | st.lists(_WORDS, min_size=1),
    "input_names": st.integers() | _WORDS | st.lists(st.integers() | st.none(), min_size=1),
    "output_names": st.integers() | _WORDS | st.lists(st.integers() | st.none(), min_size=1),
    "dynamic_shapes": st.integers() | _WORDS | st.dictionaries(_WORDS, _WORDS, min_size=1),
    "opset_version": st.floats() | _WORDS | st.booleans() | st.integers(max_value=14),
    "fold": _NO_FLAG,
    "verify": _NO_FLAG,
    "rtol": _WORDS | st.booleans() | st.floats(max_value=0, exclude_max=True) | _THINGS,
    "atol": _WORDS | st.booleans() | st.floats(max_value=0, exclude_max=True) | _THINGS,
    "external_data": st.integers() | _WORDS | _THINGS,
}

_few = settings(
    max_examples=80, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def _one_of(options: dict[str, Any]) -> st.SearchStrategy[tuple[str, Any]]:
    """The name of an argument and a bad value for it."""
    return st.one_of([st.tuples(st.just(name), values) for name, values in options.items()])


def _refuses(call: Callable[[], object], argument: str, value: object) -> None:
    """``call`` raises one of our errors, which names the argument or the value."""
    with pytest.raises(ERRORS) as caught:
        call()
    message = str(caught.value)
    assert len(message) > 20
    words = (argument, repr(value), type(value).__name__)
    assert any(word in message for word in words), (message, words)


class _Untouched:
    """Inside, nothing about a model may change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def _picture(self) -> list[tuple[Any, ...]]:
        pictures = []
        for module in self.model.modules():
            attributes = {name: id(value) for name, value in vars(module).items()}
            tables = [[*vars(module)[table].items()] for table in ("_modules", "_forward_hooks")]
            parameters = [
                (name, id(parameter), parameter.requires_grad)
                for name, parameter in module.named_parameters(recurse=False)
            ]
            pictures.append((type(module), module.training, attributes, tables, parameters))
        return pictures

    def __enter__(self) -> None:
        self.picture = self._picture()
        self.state = copy.deepcopy(self.model.state_dict())

    def __exit__(self, *error: object) -> None:
        assert self._picture() == self.picture
        state = self.model.state_dict()
        assert [*state] == [*self.state]
        assert all(torch.equal(state[name], value) for name, value in self.state.items())


def _models() -> tuple[nn.Module, ...]:
    torch.manual_seed(0)
    plain, converted = ResidualNet(), bnrewrite.convert(ResidualNet(), "local")
    converted.layer1.bn1.eval()
    return plain, converted


MODELS = _models()


@_few
@given(bad=_one_of(CONVERT), which=st.integers(0, 1))
def test_convert(bad: tuple[str, Any], which: int) -> None:
    model = MODELS[which]
    with _Untouched(model):
        _refuses(lambda: bnrewrite.convert(model, **{bad[0]: bad[1]}), *bad)


@_few
@given(bad=_one_of(CONVERT), other=_one_of(CONVERT))
def test_convert_with_two_bad_arguments(bad: tuple[str, Any], other: tuple[str, Any]) -> None:
    with _Untouched(MODELS[0]), pytest.raises(ERRORS):
        bnrewrite.convert(MODELS[0], **{bad[0]: bad[1], other[0]: other[1]})


@pytest.mark.parametrize("name", ["convert", "revert", "report", "graphs", "check", "export_onnx"])
@settings(_few, max_examples=20)
@given(value=_NO_MODULE)
def test_what_is_no_model(name: str, value: Any) -> None:
    _refuses(lambda: getattr(bnrewrite, name)(value), "model", value)


@pytest.mark.parametrize("name", ["report", "check"])
def test_what_is_not_converted(name: str) -> None:
    with (
        _Untouched(MODELS[0]),
        pytest.raises(ValueError, match=r"ResidualNet is not converted.*co"),
    ):
        getattr(bnrewrite, name)(MODELS[0])


@_few
@given(bad=_one_of(SHUFFLE))
def test_mode_objects(bad: tuple[str, Any]) -> None:
    _refuses(lambda: bnrewrite.Shuffle(**{bad[0]: bad[1]}), *bad)


@_few
@given(bad=_one_of(EXPORT), which=st.integers(0, 1))
def test_export_onnx(bad: tuple[str, Any], which: int) -> None:
    model, arguments = MODELS[which], {"args": torch.ones(2, 3, 8, 8), bad[0]: bad[1]}
    with _Untouched(model):
        _refuses(lambda: bnrewrite.export_onnx(model, **arguments), *bad)


_TOKENS = st.sampled_from(
    ["demo", "report", "export", "env", "torch.nn:Identity", "math:pi", "x.onnx", "--mode",
     "--shape", "1,3", "--epochs", "-1", "--world-size", "0", "--seed", "--out", "--html", "--fold",
     "--opset", "", ":", "json:", "é:ü", "--no-such-option"]
)  # fmt: skip


@_few
@given(line=st.lists(_TOKENS, max_size=4), fault=st.sampled_from(["--no-such", "\x00", "a b:c d"]))
def test_command_line(line: list[str], fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With something in it that no command takes, every line is one error and exit code 2."""
    try:
        code = cli.main([*line, fault])
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err
    assert code == 2
    assert err.strip()
    assert "Traceback" not in err


def test_a_tensor_in_a_batch_of_arguments_is_no_model() -> None:
    values: list[Tensor] = [torch.ones(2)]
    _refuses(lambda: bnrewrite.convert(values), "model", values)  # pyright: ignore
