"""How modules are traced: how often, and that nothing of it stays behind."""

import builtins
import copy
import gc
import math
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bnrewrite
from bnrewrite.capture.owner import is_owner, owner_state
from bnrewrite.capture.tracer import OwnerTracer
from bnrewrite.ops.batch_norm import BATCH_NORM
from bnrewrite.torch_versions import is_fx_tracing
from tests.cases import DenseLayers, OptionalFromParent, OrderedOutput


class Wrapper(nn.Module):
    """Owns no site: its child does."""

    def __init__(self, *, fails: bool = False) -> None:
        super().__init__()
        self.child = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ArithmeticError("it fails")
        return self.child(x) * math.sqrt(x.size(1))


class Named(nn.Module):
    """A convolution and its BatchNorm as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Class names of the modules that are traced."""
    seen: list[str] = []
    trace = OwnerTracer.trace

    def noting(self: OwnerTracer, root: nn.Module, *args: Any) -> fx.Graph:
        seen.append(type(root).__name__)
        return trace(self, root, *args)

    monkeypatch.setattr(OwnerTracer, "trace", noting)
    return seen


def test_modules_of_one_structure_are_traced_once_even_if_they_own_no_site(
    traced: list[str],
) -> None:
    bnrewrite.convert(nn.Sequential(*(Wrapper() for _ in range(4))))
    assert sorted(traced) == ["Sequential", "Wrapper"]


def _touched() -> list[Any]:
    """What traces change."""
    names = ("__getattr__", "__setattr__", "__call__", "__getattribute__")
    classes = (nn.Module, nn.Conv2d, nn.Sequential, Wrapper)
    return [
        *(vars(cls).get(name) for cls in classes for name in names),
        vars(torch.autograd.Function)["apply"],
        builtins.isinstance,
        math.sqrt,
        gc.isenabled(),
        fx._symbolic_trace.CURRENT_PATCHER,
        is_fx_tracing(),
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_tracing_leaves_torch_and_python_as_they_were(fails: bool) -> None:
    before = _touched()
    model = nn.Sequential(Wrapper(), Wrapper(fails=fails))
    bnrewrite.convert(model)
    assert _touched() == before
    with pytest.raises(ValueError, match="matches none"):
        bnrewrite.convert(model, {"no such site": "sync"})
    assert _touched() == before
    gc.disable()
    try:
        bnrewrite.convert(model)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_functions_of_math_are_recorded() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) * math.sqrt(x.size(2))

    model = bnrewrite.convert(Scaled(), strict=True)
    assert "math_sqrt" in bnrewrite.graphs(model)[""].code
    x = torch.randn(2, 3, 9, 1)
    torch.testing.assert_close(model(x), 3 * nn.BatchNorm2d(3)(x), rtol=1e-5, atol=1e-5)


class Repeated(nn.Module):
    """Asks how many dimensions and images there are; a list has the length that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        scales = [x.mean(), x.std()]
        sizes = [x.shape[0], 1] + [1] * (len(x.shape) - 2)
        return self.bn(x) * torch.full(sizes, float(len(scales))) + len(x)


def test_lengths_of_computed_values_are_recorded() -> None:
    plain = Repeated()
    model = bnrewrite.convert(copy.deepcopy(plain), strict=True)
    assert bnrewrite.graphs(model)[""].code.count("len(") == 2
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for size in (2, 5):
        x = torch.randn(size, 3, 4, 4)
        expected = plain(x)
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(compiled(x), expected)
    assert builtins.len is len
    assert "len" not in globals()


class Counts(nn.Module):
    """Numbers with two names, of which one is counted on; and a tensor with two, changed."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        images, height = len(x), x.size(2)
        more, half = images, height
        more += 1
        half //= 2
        y = self.bn(x) * images + more
        same = y
        same += 1
        return y[:, :, :height] * 2 + half


def test_numbers_keep_their_values_under_other_names() -> None:
    plain = Counts()
    model = bnrewrite.convert(copy.deepcopy(plain), strict=True)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    for run in (model, compiled):
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(run(x), plain(x))


class HidesTeacher(nn.Module):
    """As models that keep a teacher out of their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = Named(), Named()

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        for name, module in super().named_modules(*args, **kwargs):
            if not name.startswith("teacher"):
                yield name, module

    def children(self) -> Any:
        yield self.teacher

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x) + self.teacher(x)


def test_modules_may_hide_their_children() -> None:
    model = bnrewrite.convert(HidesTeacher())
    assert [site.name for site in bnrewrite.report(model).sites] == ["student.bn"]
    assert is_owner(model.student)
    assert not is_owner(model.teacher)


class TwoNames(nn.Module):
    """Calls a child with an optional argument, by a name that is not its first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.backbone = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(self.backbone(x, x))


def test_forms_of_a_child_with_two_names_are_captured() -> None:
    inner: Any = OptionalFromParent().inner
    model = nn.Module()
    model.inner, model.head = inner, TwoNames(inner)
    bnrewrite.convert(model)
    state: Any = owner_state(inner)
    assert [form.arguments for form in state.train.forms] == [["x"], ["x", "shortcut"]]


def test_code_is_compiled_when_a_graph_is_first_called() -> None:
    model: Any = bnrewrite.convert(nn.Sequential(Wrapper()))
    state: Any = owner_state(model[0].child)
    assert is_owner(model[0].child)
    assert (state.train.function, state.eval.function) == (None, None)
    model(torch.randn(2, 3, 4, 4))
    assert state.train.function is not None
    assert state.eval.function is None


def test_code_finds_a_module_once_and_calls_composites_without_a_dispatch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: Counter[str] = Counter()
    getattr_of_module = nn.Module.__getattr__

    def counted(self: nn.Module, name: str) -> Any:
        seen[name] += 1
        return getattr_of_module(self, name)

    model = bnrewrite.convert(Named()).eval()
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    monkeypatch.setattr(nn.Module, "__getattr__", counted)
    call = type(BATCH_NORM).__call__

    def without_ours(op: Any, *args: Any) -> Any:
        assert op is not BATCH_NORM, "a dispatch"
        return call(op, *args)

    monkeypatch.setattr(type(BATCH_NORM), "__call__", without_ours)
    assert torch.equal(model(x), expected)
    tensors = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert seen == dict.fromkeys(("conv", "bn", *tensors), 1) | {"weight": 2, "bias": 2}


def test_children_may_have_any_name() -> None:
    class Names(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("self", nn.BatchNorm1d(3))
            self.layers = nn.ModuleDict({"global": nn.BatchNorm1d(3), "in": nn.ReLU()})
            self.add_module("class", nn.BatchNorm1d(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers["in"](self.layers["global"](getattr(self, "self")(x)))  # noqa: B009
            return getattr(self, "class")(x)

    torch.manual_seed(0)
    plain = Names()
    model = bnrewrite.convert(copy.deepcopy(plain))
    assert is_owner(model)
    x = torch.randn(4, 3)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x))


def test_layers_that_take_tensors_or_lists_have_a_graph_for_each() -> None:
    """As those of DenseNet, which are called with lists."""
    x = torch.randn(4, 3, 5, 5)
    for argument, used in ((x, [True, False]), ([x], [False, True])):
        layer: Any = DenseLayers().first
        bnrewrite.convert(layer)
        layer(argument)
        state: Any = owner_state(layer)
        assert [form.function is not None for form in state.train.forms] == used


def test_children_have_graphs_for_the_optional_arguments_that_their_parents_give() -> None:
    model: Any = bnrewrite.convert(OptionalFromParent(), passes=())
    model = bnrewrite.convert(model)
    state: Any = owner_state(model.inner)
    forms = [form.arguments for form in state.train.forms]
    assert forms == [["x"], ["x", "shortcut"], ["x", "scale"]]
    x, other = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    for index, call in enumerate(
        (lambda: model.inner(x), lambda: model.inner(x, other), lambda: model.inner(x, scale=other))
    ):
        assert state.train.forms[index].function is None
        call()
        assert state.train.forms[index].function is not None
    for args in ((x, other, other), (x, None, other), (x, 2.0)):
        plain = copy.deepcopy(model.inner)
        torch.testing.assert_close(model.inner(*args), bnrewrite.revert(plain)(*args))
    with pytest.raises(TypeError, match="positional argument"):
        model.inner(x, x, x, x)


def test_ordered_dictionaries_stay_what_they_are() -> None:
    model = bnrewrite.convert(OrderedOutput(), strict=True)
    out = model(torch.randn(2, 3, 5, 5))
    assert type(out) is OrderedDict
    assert [*out] == ["second", "first"]
    state: Any = owner_state(model)
    assert state.train.function is not None


def test_layers_of_torch_have_no_line_of_the_code_that_converts() -> None:
    model = bnrewrite.convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    (site,) = bnrewrite.report(model).sites
    assert (site.owner, site.where) == ("", None)


def test_a_model_that_never_ran_compiles_without_a_break() -> None:
    model = bnrewrite.convert(nn.Sequential(Wrapper()))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 4, 4)
    out = compiled(x)
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model.get_submodule("0.child.1").reset_running_stats()  # pyright: ignore
    torch.testing.assert_close(compiled(x), out)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count
    torch._dynamo.reset()


class Narrow(nn.Conv2d):
    """A layer of the user's, which is traced through."""


@pytest.mark.parametrize("base_first", [False, True])
def test_a_class_and_its_base_note_a_read_once(base_first: bool) -> None:
    layers = [nn.Conv2d(3, 3, 1), Narrow(3, 3, 1)]
    model = nn.Sequential(*(layers if base_first else reversed(layers)))
    tracer = OwnerTracer(through=("0", "1"))
    tracer.trace(model)
    for path in ("0", "1"):
        assert tracer.assumptions.present[path] == {"weight", "bias"}
    assert {name for _, name in tracer.assumptions.inherited} <= {"_conv_forward", "forward"}


class Masked(nn.Module):
    """Demands an argument that only its name gives, and takes another one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(
        self, x: Tensor, y: Tensor | None = None, *, mask: Tensor, scale: float = 1.0
    ) -> Tensor:
        x = self.bn(self.conv(x)) * mask * scale
        return x if y is None else x + y


class TwoMasked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Masked(), Masked()

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        return self.a(x, mask=mask) + self.b(x, x, mask=mask)


@pytest.mark.parametrize("make", [Masked, TwoMasked])
def test_required_arguments_that_only_their_names_give(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = make()
    model: Any = bnrewrite.convert(copy.deepcopy(plain))
    report = bnrewrite.report(model)
    assert not report.skipped
    assert report.collectives_forward == 1
    x, mask = torch.randn(2, 3, 5, 5), torch.rand(2, 1, 5, 5)
    chosen = []
    choose = type(model)._bnrewrite_choose
    with pytest.MonkeyPatch.context() as patch:
        noting = lambda self, *args: chosen.append(choose(self, *args)) or chosen[-1]  # noqa: E731
        patch.setattr(type(model), "_bnrewrite_choose", noting)
        for training in (True, False):
            plain.train(training)
            model.train(training)
            torch.testing.assert_close(model(x, mask=mask), plain(x, mask=mask))
            torch.testing.assert_close(model(mask=mask, x=x), plain(mask=mask, x=x))
    assert len(chosen) == 4
    assert all(values is not None for _, values in chosen)


@pytest.mark.parametrize("make", [Masked, TwoMasked])
def test_arguments_that_python_refuses_are_refused(make: type[nn.Module]) -> None:
    x, mask = torch.randn(2, 3, 5, 5), torch.rand(2, 1, 5, 5)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((x, x, mask), {}),
        ((x, x, mask, 1.0), {}),
        ((x, x, 1.0), {"mask": mask}),
        ((x,), {"mask": mask, "unknown": 1}),
    ]
    for model in (make(), bnrewrite.convert(make())):
        for args, kwargs in calls:
            with pytest.raises(TypeError):
                model(*args, **kwargs)


def test_a_default_by_position_where_only_its_name_gives_it_is_refused() -> None:
    class Scaled(Masked):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:  # pyright: ignore
            return self.bn(self.conv(x)) * scale

    model: Any = bnrewrite.convert(Scaled())
    with pytest.raises(TypeError, match="positional"):
        model(torch.randn(2, 3, 5, 5), 1.0)


def test_symbolic_traces_of_torch_take_arguments_that_only_their_names_give() -> None:
    model = bnrewrite.convert(Masked()).eval()
    x, mask = torch.randn(2, 3, 5, 5), torch.rand(2, 1, 5, 5)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, mask), model(x, mask=mask))
