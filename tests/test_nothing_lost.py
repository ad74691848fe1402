"""After ``convert`` everything that worked on the model still works, and still means the same."""

import copy
import dataclasses
import functools
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

import bnrewrite
from bnrewrite.capture.owner import is_owner, owner_state
from bnrewrite.sites.schedule import schedule_of
from tests.cases import OptionalMask
from tests.parity import CountEvaluations, assert_same_training


class Residual(nn.Module):
    """Two convolutions with BatchNorm and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.scale = 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) * self.scale + x)


class Net(nn.Module):
    """A stem, three residual blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.blocks = nn.Sequential(Residual(), Residual(), Residual())
        self.head = nn.Linear(4, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def pair() -> tuple[Any, Any]:
    """The same network plain and converted, in float64."""
    torch.manual_seed(0)
    plain = Net().double()
    return plain, bnrewrite.convert(copy.deepcopy(plain))


def batch(n: int = 4) -> Tensor:
    """(n, 3, 8, 8), float64."""
    return torch.randn(n, 3, 8, 8, dtype=torch.float64)


def assert_same(plain: Callable[..., Tensor], converted: Callable[..., Tensor]) -> None:
    """Both give the same outputs to rounding (1e-16 a layer, some layers)."""
    x = batch()
    torch.testing.assert_close(converted(x), plain(x), rtol=1e-10, atol=1e-12)


def test_hooks_registered_before_and_after_run() -> None:
    plain, _ = pair()
    for module in (plain, plain.blocks[0], plain.blocks[0].bn1):
        module.register_forward_hook(lambda m, args, out: out * 1.25)
    converted = bnrewrite.convert(copy.deepcopy(plain))
    assert_same(plain, converted)
    for model in (plain, converted):
        model.blocks[1].bn2.register_forward_pre_hook(lambda m, args: (args[0] * 2 + 1,))
        model.blocks[2].register_full_backward_hook(lambda m, gi, go: (gi[0] * 3,))
    assert_same(plain, converted)
    grads = []
    for model in (plain, converted):
        x = torch.ones(2, 3, 8, 8, dtype=torch.float64).requires_grad_()
        (model(x) * torch.arange(5).double()).sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


def test_global_hooks_see_the_batch_norm_modules() -> None:
    _, converted = pair()
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(module)
    )
    try:
        converted(batch())
    finally:
        handle.remove()
    assert converted.blocks[0].bn1 in seen


def test_indexing_attributes_and_methods_stay() -> None:
    plain, converted = pair()
    assert isinstance(converted.blocks[1], Residual)
    assert converted.blocks[1].scale == 0.5
    assert [*dict(converted.named_modules())] == [*dict(plain.named_modules())]
    assert repr(converted) == repr(plain)
    assert_same(plain.features, converted.features)


def test_replacing_a_submodule_takes_effect() -> None:
    plain, converted = pair()
    for model in (plain, converted):
        model.blocks[0].bn1 = nn.Identity()
        model.blocks[1] = nn.Identity()
        model.stem.append(nn.Tanh())
    assert_same(plain, converted)


def test_removing_a_submodule_takes_effect() -> None:
    class Skipping(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if hasattr(self, "bn1") else self.conv1(x)

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), Skipping()).double()
    converted = bnrewrite.convert(copy.deepcopy(plain))
    assert_same(plain, converted)
    for model in (plain, converted):
        del model[1].bn1
    assert_same(plain, converted)


class Asking(Residual):
    """Asks what it has before it uses it."""

    negative = False

    def __init__(self) -> None:
        super().__init__()
        self.act: nn.Module | None = nn.Tanh()
        self.last = nn.Conv2d(4, 4, 1)
        self.gain: nn.Parameter | None = nn.Parameter(torch.rand(1))

    def ending(self, x: Tensor) -> Tensor:
        return -x if self.negative else x

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if self.act is not None:
            x = self.act(x)
        if hasattr(self, "last"):
            x = self.last(x)
        if hasattr(self, "extra"):
            x = self.extra(x)  # pyright: ignore[reportCallIssue]
        if self.gain is not None:
            x = x * self.gain
        return self.ending(x)


class Branches(nn.Module):
    """The sum of some modules, all of the same input."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


CHANGES: dict[str, Callable[[Any], None]] = {
    "a child becomes None": lambda block: setattr(block, "act", None),
    "a child goes": lambda block: delattr(block, "last"),
    "a child comes": lambda block: setattr(block, "extra", nn.Sigmoid()),
    "a parameter becomes None": lambda block: setattr(block, "gain", None),
    "a value of the class is hidden": lambda block: setattr(block, "negative", True),
    "a method is replaced": lambda block: setattr(block, "ending", torch.exp),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("twice", [False, True], ids=["own graph", "inlined"])
def test_changing_what_a_forward_asks_for_takes_effect(change: str, twice: bool) -> None:
    torch.manual_seed(0)
    # Two branches share a round, and so are inlined where the sum is.
    branches = [Asking(), Asking()] if twice else [Asking()]
    plain = Branches(branches).double()
    converted = bnrewrite.convert(copy.deepcopy(plain))
    inlined = converted._bnrewrite_owner.train.inlined if is_owner(converted) else ()
    assert ("branches.0" in inlined) is twice
    for step in range(2):
        x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
        torch.testing.assert_close(converted(x), plain(x), rtol=1e-10, atol=1e-12)
        for model in (plain, converted):
            if step == 0:
                CHANGES[change](model.branches[0])


def test_changing_an_attribute_takes_effect() -> None:
    plain, converted = pair()
    for model in (plain, converted):
        model.blocks[0].scale = 2.0
        model.blocks[0].bn2.momentum = 0.5
        model.blocks[0].bn2.eps = 0.25
        model.blocks[1].bn1.track_running_stats = False
    assert_same(plain, converted)
    for ours, theirs in zip(converted.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


class Sized(nn.Module):
    """Reads values that are made of several."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.size = (4, 4)
        self.pads = [1, 1, 1, 1]
        self.options: dict[str, Any] = {"gain": 2.0, "axes": [2, 3]}
        self.wanted = {"gain", "shift"}

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.bn(x), self.size)
        x = F.pad(x, self.pads)
        if "gain" in self.wanted:
            x = x * self.options["gain"]
        return x.cumsum(self.options["axes"][0])


@dataclasses.dataclass
class Options:
    """Held by a module that reads it."""

    gain: float = 2.0
    steps: int = 0

    @property
    def shift(self) -> float:
        """A value computed of another."""
        return self.gain / 4


class Configured(nn.Module):
    """Reads an object."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.options = Options()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) + self.options.shift


class Table:
    """Compares element by element, and so has no truth."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth of a table is ambiguous")


class WithTable(nn.Module):
    """Asks for an object that cannot be compared."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.table: Table | None = Table()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x) if self.table is None else self.bn(x) * 2


def test_a_copy_of_what_cannot_be_compared_runs() -> None:
    model = bnrewrite.convert(WithTable())
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize("twice", [False, True], ids=["own graph", "inlined"])
def test_changing_an_object_that_a_forward_reads_takes_effect(twice: bool) -> None:
    torch.manual_seed(0)
    plain = Branches([Configured(), Configured()] if twice else [Configured()]).double()
    converted: Any = copy.deepcopy(bnrewrite.convert(copy.deepcopy(plain)))
    owner = converted if twice else converted.branches[0]
    captured = owner._bnrewrite_owner.train
    assert "__getattribute__" not in vars(Options)
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    for block in converted.branches:
        # Nobody reads it.
        block.options.steps = 1
    assert captured.holds(owner)
    torch.testing.assert_close(converted(x), plain(x), rtol=1e-10, atol=1e-12)
    changes: list[Callable[[Any], None]] = [
        lambda block: setattr(block.options, "gain", 8.0),
        lambda block: setattr(block, "options", Options(3.0)),
    ]
    for change in changes:
        for model in (plain, converted):
            for block in model.branches:
                change(block)
        assert not captured.holds(owner)
        torch.testing.assert_close(converted(x), plain(x), rtol=1e-10, atol=1e-12)
    for block in converted.branches:
        block.options = Options()
    assert captured.holds(owner)


VALUES: dict[str, Callable[[Any], None]] = {
    "a tuple is replaced": lambda block: setattr(block, "size", (5, 6)),
    "a list is replaced": lambda block: setattr(block, "pads", [0, 1, 2, 3]),
    "a list changes": lambda block: block.pads.__setitem__(0, 3),
    "a dict changes": lambda block: block.options.update(gain=0.5),
    "a list in a dict changes": lambda block: block.options["axes"].reverse(),
    "a set changes": lambda block: block.wanted.discard("gain"),
}


@pytest.mark.parametrize("change", VALUES)
@pytest.mark.parametrize("twice", [False, True], ids=["own graph", "inlined"])
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "a copy"])
def test_changing_a_value_made_of_several_takes_effect(
    change: str, twice: bool, copied: bool
) -> None:
    torch.manual_seed(0)
    plain = Branches([Sized(), Sized()] if twice else [Sized()]).double()
    converted = bnrewrite.convert(copy.deepcopy(plain))
    converted = copy.deepcopy(converted) if copied else converted
    x = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    with CountEvaluations() as counts:
        torch.testing.assert_close(converted(x), plain(x), rtol=1e-10, atol=1e-12)
    assert counts.num_ours == 1 + twice
    owner: Any = converted if twice else converted.branches[0]
    assert owner._bnrewrite_owner.train.holds(owner)
    for model in (plain, converted):
        for block in model.branches:
            VALUES[change](block)
    assert not owner._bnrewrite_owner.train.holds(owner)
    torch.testing.assert_close(converted(x), plain(x), rtol=1e-10, atol=1e-12)


def test_replacing_a_forward_on_the_instance_takes_effect() -> None:
    plain, converted = pair()
    for model in (plain, converted):
        block = model.blocks[0]
        block.forward = lambda x, block=block: block.bn2(block.conv2(x))
        model.blocks[1].bn1.forward = lambda x: x * 2
    assert_same(plain, converted)


def test_flags_per_layer_and_at_any_time() -> None:
    plain, converted = pair()
    for model in (plain, converted):
        model.blocks[0].bn1.eval()
        model.blocks[1].eval()
    assert_same(plain, converted)
    for model in (plain, converted):
        model.eval()
        model.blocks[2].bn2.train()
    assert_same(plain, converted)
    for ours, theirs in zip(converted.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_changing_the_dtype_afterwards(dtype: torch.dtype) -> None:
    plain, converted = pair()
    plain, converted = plain.to(dtype), converted.to(dtype)
    x = batch().to(dtype)
    # Both round to the dtype after each layer, in another order: some units in the last place.
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(converted(x), plain(x), rtol=tolerance, atol=tolerance)
    assert converted.blocks[0].bn1.running_mean.dtype == dtype


class Defaults(nn.Module):
    """Optional arguments of several types."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(
        self, x: Tensor, scale: float = 1.5, p: float = 0.0, size: Any = (1, 2), kind: str = "some"
    ) -> Tensor:
        return self.bn(self.conv(x)) * scale + len(size) + len(kind) + math.copysign(1, p)


def test_a_default_that_is_given_keeps_the_graph() -> None:
    model: Any = bnrewrite.convert(Defaults())
    plain = bnrewrite.revert(copy.deepcopy(model))
    x = torch.randn(3, 3, 8, 8)
    equal = {"scale": float("1.5"), "p": float("0"), "size": (1, 2), "kind": "".join("some")}
    others = {"scale": 2.5, "p": -0.0, "size": (1, 2.0), "kind": "many"}
    for name in equal:
        for values, holds in ((equal, True), (others, False)):
            given = {name: values[name]}
            assert (model._bnrewrite_choose(True, (x,), given)[1] is not None) is holds
            torch.testing.assert_close(model(x, **given), plain(x, **given))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, scale=1.5), plain(x))
    torch.testing.assert_close(compiled(x, scale=2.5), plain(x, scale=2.5))
    torch.testing.assert_close(compiled(x, p=0.0), plain(x))


def test_optional_arguments_given_at_call_time() -> None:
    torch.manual_seed(0)
    plain = OptionalMask()
    converted = bnrewrite.convert(copy.deepcopy(plain))
    x, mask = torch.randn(3, 3, 8, 8), torch.rand(3, 1, 8, 8)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((x, mask), {}),
        ((x, None), {}),
        ((), {"x": x}),
        ((x,), {"scale": 3.0}),
        ((x, mask, 2.0), {}),
    ]
    for args, kwargs in calls:
        torch.testing.assert_close(
            converted(*args, **kwargs), plain(*args, **kwargs), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        converted()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        converted(x, wrong=1)


def test_copies_and_pickles_run_their_graphs() -> None:
    plain, converted = pair()
    stream = io.BytesIO()
    torch.save(converted, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(converted),
        copy.copy(converted),
        pickle.loads(pickle.dumps(converted)),
        torch.load(stream, weights_only=False),
    ]
    for other in copies:
        assert is_owner(other.blocks[0])
        assert type(other) is type(converted)
        assert "torch.ops.bnrewrite" in bnrewrite.graphs(other)["blocks.0"].code
        with CountEvaluations() as counts:
            assert_same(copy.deepcopy(plain), other)
        assert counts.num_ours == 7


def test_averaged_model_and_update_bn() -> None:
    plain, converted = pair()
    averages = [AveragedModel(model) for model in (plain, converted)]
    data = [batch() for _ in range(3)]
    for average in averages:
        update_bn(data, average)
    for ours, theirs in zip(averages[1].buffers(), averages[0].buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_activation_checkpointing_wrapper() -> None:
    plain, converted = pair()
    results = []
    for model in (plain, converted):
        apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=checkpoint_wrapper,
            check_fn=lambda module: isinstance(module, Residual),
        )
        torch.manual_seed(1)
        out = model(batch())
        (out * torch.arange(5).double()).sum().backward()
        results.append([out, *[p.grad for p in model.parameters()]])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_checkpoints_of_plain_and_converted_models_are_exchangeable() -> None:
    plain, converted = pair()
    assert [*plain.state_dict()] == [*converted.state_dict()]
    plain(batch())
    converted.load_state_dict(plain.state_dict())
    assert torch.equal(converted.eval()(x := batch()), plain.eval()(x))
    Net().double().load_state_dict(converted.state_dict())


def test_evaluation_under_vmap() -> None:
    plain, converted = pair()
    x = torch.stack([batch(2), batch(2)])
    evaluate = [torch.func.vmap(model.eval()) for model in (plain, converted)]
    torch.testing.assert_close(evaluate[1](x), evaluate[0](x))


def test_gradients_of_single_samples() -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.eval()
        parameters: dict[str, Tensor] = dict(model.named_parameters())

        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            out = torch.func.functional_call(model, parameters, (image[None],))
            return out.square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)

    images = batch(3)
    plain, converted = map(gradients, pair())
    torch.testing.assert_close(converted, plain)


def test_lazy_batch_norm_converts_at_its_first_call() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(), nn.ReLU())

    plain, converted = make(), bnrewrite.convert(make())
    x = torch.randn(4, 3, 8, 8)
    with CountEvaluations() as counts:
        out = converted(x)
    assert counts.num_ours == 1
    assert counts.num_torch == 0
    torch.testing.assert_close(out, plain(x), rtol=1e-5, atol=1e-5)
    assert type(converted[1]).__name__ == "BatchNorm2d"
    bnrewrite.revert(converted)
    assert type(converted[1]) is nn.BatchNorm2d
    untouched = bnrewrite.revert(bnrewrite.convert(make()))
    assert type(untouched[1]) is nn.LazyBatchNorm2d
    assert untouched[1].__dict__.keys() == make()[1].__dict__.keys()


def test_weights_frozen_or_shared_after_conversion() -> None:
    plain, converted = pair()
    for model in (plain, converted):
        model.blocks[0].bn1.weight.requires_grad_(False)
        model.blocks[1].bn1.weight = model.blocks[0].bn1.weight
        model.stem[1].bias = None
    assert_same(plain, converted)


def test_alternating_modes_and_batch_sizes_do_not_recompile_more_than_the_plain_model() -> None:
    numbers = []
    for model in pair():
        torch.compiler.reset()
        count = [0]

        def backend(gm: torch.fx.GraphModule, example: Any, count: list[int] = count) -> Any:
            count[0] += 1
            return gm

        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for size in (4, 6, 8):
            for training in (True, False):
                model.train(training)
                compiled(batch(size))
        for momentum in (0.1, 0.2, 0.3):
            model.blocks[0].bn1.momentum = momentum
            compiled(batch(4))
        numbers.append(count[0])
    assert numbers[1] <= numbers[0]


class Typed(nn.Module):
    """Finds positive values; its answers have another type in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn(x) > 0) * (1 if self.training else 1.0)


def test_equal_numbers_of_other_types_make_graphs_of_their_own() -> None:
    plain = Typed()
    model = bnrewrite.convert(copy.deepcopy(plain))
    x = torch.randn(4, 3, 8, 8)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x))
    state = owner_state(model)
    assert state is not None
    assert state.differs


def test_cases_hold_after_a_deep_copy() -> None:
    assert_same_training(
        Net, lambda n: ((batch(n),), {}), convert=lambda m: copy.deepcopy(bnrewrite.convert(m))
    )


class TestModulesMadeOfConvertedClasses:
    """Slices of a Sequential and new layers of a layer's type."""

    def test_a_slice_runs_its_converted_layers(self) -> None:
        torch.manual_seed(0)
        plain: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        model = bnrewrite.convert(copy.deepcopy(plain))
        x = torch.randn(2, 3, 5, 5)
        torch.testing.assert_close(model[:2](x), plain[:2](x))
        assert model[:2][1] is model[1]
        torch.testing.assert_close(model[1].running_mean, plain[1].running_mean)

    def test_a_new_layer_of_the_same_type_is_a_plain_one(self) -> None:
        model = bnrewrite.convert(nn.Sequential(nn.BatchNorm2d(4)))
        make: Any = type(model[0])
        new = make(3, momentum=0.5)
        x = torch.randn(2, 3, 5, 5)
        plain = nn.BatchNorm2d(3, momentum=0.5)
        torch.testing.assert_close(new(x), plain(x))
        torch.testing.assert_close(new.running_var, plain.running_var)


class OwnForward(nn.BatchNorm2d):
    """A forward that no graph can stand for."""

    def forward(self, input: Tensor) -> Tensor:
        try:
            return super().forward(input)
        except ZeroDivisionError:
            return input


def test_frozen_sites_with_a_forward_of_their_own_change_no_flag() -> None:
    """Ranks agree anew after each change."""
    model = bnrewrite.convert(nn.Sequential(nn.Conv2d(3, 4, 1), OwnForward(4)), mode="frozen")
    schedule = schedule_of(model[1])
    x = torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(model).eval()(x)
    with mock.patch.object(schedule, "change") as change:
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected
        )
    assert model[1].training
    assert not change.called


class Bound(nn.Module):
    """Keeps methods of its own and of a child, one of them in a container."""

    def __init__(self, outer: Any = None) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.scale = 2.0
        self.post = self._post
        self.partly = functools.partial(self._post, times=2)
        self.steps = [self._post, self.conv.float]
        if outer is not None:
            self.outer = outer

    def _post(self, x: Tensor, times: int = 1) -> Tensor:
        return x * self.scale * times

    def forward(self, x: Tensor) -> Tensor:
        y = self.steps[0](self.partly(self.post(self.bn(self.conv(x)))))
        return self.outer(y) if hasattr(self, "outer") else y


def test_copies_run_graphs_that_read_methods_and_let_the_original_go() -> None:
    model: Any = bnrewrite.convert(Bound())
    assert is_owner(model)
    x = torch.randn(2, 3, 4, 4)
    copied = copy.deepcopy(model)
    expected, original = model(x), weakref.ref(model)
    del model
    gc.collect()
    assert original() is None
    for one in (copied, copy.deepcopy(copied)):
        assert one._bnrewrite_choose(True, (x,), {})[1] is not None
        torch.testing.assert_close(one(x), expected)
        one.post = one.bn.forward
        assert one._bnrewrite_choose(True, (x,), {})[1] is None
        one.post = one._post
        one.scale = 3.0
        torch.testing.assert_close(one(x), expected * 27 / 8)


def test_a_method_of_another_model_is_that_of_no_second_one() -> None:
    others = [Bound(), Bound()]
    others[1].scale = 5.0
    model: Any = bnrewrite.convert(Bound(others[0]._post))
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    model.outer = others[1]._post
    torch.testing.assert_close(model(x), expected * 2.5)


def test_blocks_that_keep_methods_share_a_graph() -> None:
    model: Any = bnrewrite.convert(nn.Sequential(Bound(), nn.Conv2d(4, 3, 1), Bound()))
    first, second = owner_state(model[0]), owner_state(model[2])
    assert first is not None
    assert second is not None
    assert first.train is second.train
