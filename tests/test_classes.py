"""Classes of modules that others change, too: parametrizations, lazy layers, trainers."""

import copy
import gc
import pickle
import threading
import weakref
from abc import ABCMeta
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import bnrewrite
from bnrewrite.capture.owner import is_owner
from bnrewrite.errors import BnRewriteError
from bnrewrite.naming import sites_of
from bnrewrite.sites.classes import Converted, converted_class
from tests.models import ActivatedNorm, ResidualNet

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class NormalizedConvolution(nn.Conv2d):
    """A convolution that owns the BatchNorm behind it."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self.bn(super().forward(input)))


class Double(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(NormalizedConvolution(), nn.BatchNorm2d(4), ActivatedNorm(4))


def _parametrize(model: Any) -> Any:
    weight_norm(model[0])
    for module, name in ((model[0].bn, "weight"), (model[1], "bias"), (model[2], "weight")):
        parametrize.register_parametrization(module, name, Double())
    return model


def _remove(model: Any) -> Any:
    for module, name in (
        *((model[0], "weight"), (model[0].bn, "weight")),
        *((model[1], "bias"), (model[2], "weight")),
    ):
        parametrize.remove_parametrizations(module, name)
    return model


def _classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def _names(model: nn.Module) -> list[str]:
    return [cls.__name__ for cls in _classes(model)]


class TestParametrizations:
    """They come and go, before conversion and after it."""

    def test_those_from_before_are_back_after_revert(self) -> None:
        model = _parametrize(_model())
        before = _classes(model)
        bnrewrite.revert(bnrewrite.convert(bnrewrite.convert(model), "local"))
        assert _classes(model) == before

    def test_those_from_before_can_be_removed(self) -> None:
        plain, model = _parametrize(_model()), bnrewrite.convert(_parametrize(_model()))
        torch.testing.assert_close(_remove(model)(X), _remove(plain)(X))
        assert all(isinstance(module, Converted) for module in model)
        assert _names(model) == _names(plain)
        assert _classes(bnrewrite.revert(model)) == _classes(_model())

    def test_one_of_two_can_be_removed(self) -> None:
        model = _model()
        for name in ("weight", "bias"):
            parametrize.register_parametrization(model[1], name, Double())
        bnrewrite.convert(model)
        parametrize.remove_parametrizations(model[1], "bias")
        bnrewrite.revert(model)
        assert torch.equal(model[1].weight, torch.full((4,), 2.0))
        assert isinstance(model[1].bias, nn.Parameter)
        parametrize.remove_parametrizations(model[1], "weight")
        assert type(model[1]) is nn.BatchNorm2d

    @pytest.mark.parametrize("again", [False, True], ids=["reverted", "converted again"])
    def test_those_from_after_stay(self, again: bool) -> None:
        plain, model = _parametrize(_model()), _parametrize(bnrewrite.convert(_model()))
        if again:
            bnrewrite.convert(model, "local")
        else:
            bnrewrite.revert(model)
        assert _names(model) == _names(plain)
        torch.testing.assert_close(model(X), plain(X))
        bnrewrite.revert(model)
        assert _classes(_remove(model)) == _classes(_model())

    def test_those_from_after_are_exported(self) -> None:
        model = _parametrize(bnrewrite.convert(_model()))
        assert bnrewrite.export_onnx(model, (X,)).num_batch_norm == 3

    def test_another_class_in_between_is_named(self) -> None:
        model = bnrewrite.convert(_model())
        # As fully_shard does it.
        model[1].__class__ = type("FSDPBatchNorm2d", (nn.Identity, type(model[1])), {})
        parametrize.register_parametrization(model[1], "weight", Double())
        with pytest.raises(BnRewriteError, match=r"ParametrizedFSDPBatchNorm2d: the class of this"):
            bnrewrite.revert(model)


def _reverted(model: Any) -> Any:
    return bnrewrite.revert(model)


def _reverted_copy(model: Any) -> Any:
    return bnrewrite.revert(copy.deepcopy(model))


def _converted_again(model: Any) -> Any:
    return bnrewrite.convert(bnrewrite.revert(model), "local")


class TestForwardOnTheInstance:
    """Lightning puts ``model.forward`` back on the instance after each step."""

    @pytest.mark.parametrize("change", [_reverted, _reverted_copy, _converted_again, pickle.dumps])
    def test_it_follows_the_class(self, change: Callable[[Any], Any]) -> None:
        plain, model = ResidualNet().eval(), bnrewrite.convert(ResidualNet()).eval()
        model.load_state_dict(plain.state_dict())
        for module in (model, model.bn, model.layer1):
            module.forward = module.forward
        changed = change(model)
        changed = pickle.loads(changed) if isinstance(changed, bytes) else changed
        assert torch.equal(changed(X), plain(X))
        for module in (changed, changed.bn, changed.layer1):
            assert module.forward.__func__ is type(module).forward

    def test_one_from_before_conversion_is_converted(self) -> None:
        model = ResidualNet()
        model.bn.forward = model.bn.forward  # pyright: ignore
        bnrewrite.convert(model)
        assert model.bn.forward.__func__ is type(model.bn).forward  # pyright: ignore

    @pytest.mark.parametrize("change", [_reverted, copy.deepcopy, _converted_again])
    def test_its_owner_is_captured(self, change: Callable[[Any], Any]) -> None:
        torch.manual_seed(0)
        plain: Any = ResidualNet()
        model = copy.deepcopy(plain)
        for module in (model, model.layer1):
            module.forward = module.forward
        bnrewrite.convert(model)
        assert is_owner(model)
        assert is_owner(model.layer1)
        assert not bnrewrite.report(model).skipped
        changed = change(model)
        torch.testing.assert_close(changed(X), plain(X))
        assert changed.forward.__func__ is type(changed).forward

    def test_another_one_stays(self) -> None:
        model = bnrewrite.convert(_model())
        model.forward = forward = model[1].forward
        bnrewrite.revert(model)
        assert model.forward is forward

    def test_it_is_exported(self) -> None:
        model = bnrewrite.convert(ResidualNet())
        model.forward = model.forward
        assert bnrewrite.export_onnx(model, (X,)).num_batch_norm == ResidualNet.NUM_SITES


class LazyActivatedNorm(nn.LazyBatchNorm2d):
    """A lazy layer that becomes one with a forward of its own."""

    cls_to_become = ActivatedNorm  # pyright: ignore


class TestLazyLayers:
    """Their class changes at the first batch."""

    @pytest.mark.parametrize("cls", [nn.LazyBatchNorm2d, LazyActivatedNorm])
    @pytest.mark.parametrize("num_batches", [0, 1])
    def test_pickles_go_on(self, cls: type[nn.Module], num_batches: int) -> None:
        plain, model = nn.Sequential(cls()), bnrewrite.convert(nn.Sequential(cls()))
        for _ in range(num_batches):
            torch.testing.assert_close(model(X), plain(X))
        model = pickle.loads(pickle.dumps(model))
        # The first of them runs the forward of the lazy class still, as in torch.
        for _ in range(2):
            torch.testing.assert_close(model(X), plain(X))
        assert len(bnrewrite.report(model).sites) == 1
        bnrewrite.revert(model)
        assert _classes(model) == _classes(plain)
        assert vars(model[0]).keys() == vars(plain[0]).keys()


def test_a_forward_that_was_kept_serves_the_module_after_it_is_reverted() -> None:
    model = bnrewrite.convert(_model())
    kept = [module.forward for module in (model[0], model[0].bn, model[1], model[2])]
    bnrewrite.revert(model)
    inputs = (X, torch.randn(4, 4, 6, 6), torch.randn(4, 4, 6, 6), torch.randn(4, 4, 6, 6))
    for forward, x in zip(kept, inputs, strict=True):
        assert torch.equal(forward(x), forward.__self__.forward(x))


def _pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("change", [copy.deepcopy, _pickled])
def test_errors_name_the_sites_of_copies(change: Callable[[Any], Any]) -> None:
    changed = change(bnrewrite.convert(_model()))
    for name in ("0.bn", "1", "2"):
        assert sites_of((changed.get_submodule(name).weight,)) == name


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is")
@pytest.mark.parametrize("model", [
    lambda: bnrewrite.convert(nn.BatchNorm2d(3)),
    lambda: bnrewrite.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))),
    lambda: nn.Sequential(nn.ReLU(), nn.Sequential(bnrewrite.convert(ResidualNet()))),
], ids=["a site", "an owner", "a part of another model"])  # fmt: skip
def test_torchscript_is_told_to_revert_first(model: Callable[[], nn.Module]) -> None:
    converted = model()
    with pytest.raises(BnRewriteError, match=r"Script bnrewrite.revert\(model\)"):
        torch.jit.script(converted)
    scripted: Any = torch.jit.script(bnrewrite.revert(converted).eval())
    torch.testing.assert_close(scripted(X), converted(X))


def _model_of_its_own_classes() -> Any:
    """A model whose classes are made anew by each call, as in a notebook or a search."""

    class Norm(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), Norm(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv(x)) + x)

    class Functional(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, training=True)

    class Lazy(nn.LazyBatchNorm2d):
        cls_to_become = Norm  # pyright: ignore

    class Unused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    class Model(nn.Sequential):
        pass

    return Model(Block(), Functional(), Lazy(), nn.Sequential(Unused(), Block()))


def _train(model: Any) -> None:
    model(X).sum().backward()


def _train_compiled(model: Any) -> None:
    # The whole has a lazy layer, at which torch keeps the class of any model.
    torch.compile(model[0], backend="eager")(X).sum().backward()
    torch._dynamo.reset()


def _train_copy(model: Any) -> None:
    _train(model)
    _train(copy.deepcopy(model))


def _revert(model: Any) -> None:
    _train(model)
    bnrewrite.revert(model)


def _fail(model: Any) -> None:
    with pytest.raises(ValueError, match="matches none"):
        bnrewrite.convert(model, {"nope": "sync"})


def _alive(classes: list[weakref.ref[type]]) -> set[type]:
    """Those that are not gone, but for torch's own."""
    # The classes of the user once those made from them are gone.
    gc.collect()
    gc.collect()
    return {one for ref in classes if (one := ref()) is not None} - {nn.Conv2d, nn.Sequential}


class TestLifetime:
    """A class that conversion makes lives as long as something uses it."""

    @pytest.mark.parametrize("use", [_train, _train_compiled, _train_copy, _revert, _fail])
    def test_classes_of_a_model_that_is_gone_are_gone(self, use: Callable[[Any], None]) -> None:
        model = _model_of_its_own_classes()
        originals = [weakref.ref(type(module)) for module in model.modules()]
        if use is _train_compiled:
            plain = _model_of_its_own_classes()
            theirs = [weakref.ref(type(module)) for module in plain.modules()]
            use(plain)
            del plain
            if _alive(theirs):
                pytest.skip("torch keeps the classes of what it has compiled")
        bnrewrite.convert(model)
        converted = [weakref.ref(type(module)) for module in model.modules()]
        assert len({*converted} - {*originals}) >= 3
        use(model)
        del model
        assert not _alive([*originals, *converted])

    def test_it_is_one_class_while_it_lives(self) -> None:
        model = bnrewrite.convert(_model())
        classes = _classes(model)
        gc.collect()
        assert _classes(bnrewrite.convert(_model())) == classes
        assert _classes(copy.deepcopy(model)) == classes
        assert _classes(pickle.loads(pickle.dumps(model))) == classes

    def test_threads_get_one_class(self) -> None:
        class Original(nn.Module):
            pass

        start, made = threading.Barrier(8), []

        def make() -> None:
            start.wait()
            made.append(converted_class(Original, (Converted, None)))

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 8
        assert len(set(made)) == 1

    def test_compiled_code_goes_on_with_a_class_that_came_back(self) -> None:
        """A class that is made again may lie where the old one lay."""
        torch._dynamo.reset()
        model = _model()
        run = torch.compile(model, backend="eager")
        for mode in ("sync", "frozen", "local"):
            bnrewrite.convert(model, mode)
            expected = bnrewrite.convert(copy.deepcopy(model), mode)(X)
            torch.testing.assert_close(run(X), expected)
            bnrewrite.revert(model)
            torch.testing.assert_close(run(X), copy.deepcopy(model)(X))
            gc.collect()
        torch._dynamo.reset()


class Announced(nn.Module):
    """Demands a name of its subclasses, and keeps a register of them."""

    register: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.register[name] = cls


class Register(ABCMeta):
    """Makes one class of each name."""

    made: ClassVar[list[str]] = []

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        assert name not in mcs.made
        mcs.made.append(name)
        return super().__new__(mcs, name, bases, namespace)


class AnnouncedNorm(nn.BatchNorm2d, metaclass=Register):
    """A site whose forward is its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class AnnouncedBlock(Announced, name="block"):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), AnnouncedNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class TestRegisters:
    """Classes that conversion makes are in no register of classes."""

    def test_nobody_hears_of_converted_classes(self) -> None:
        model: Any = AnnouncedBlock()
        plain = copy.deepcopy(model)
        bnrewrite.convert(model)
        assert type(type(model.bn)) is Register
        assert isinstance(model.bn, AnnouncedNorm)
        assert not isinstance(plain.bn, type(model.bn))
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(X), plain(X))
        torch.testing.assert_close(copy.deepcopy(model)(X), model(X))
        assert Announced.register == {"block": AnnouncedBlock}
        assert Register.made == ["AnnouncedNorm"]
        assert type(bnrewrite.revert(model)) is AnnouncedBlock

    def test_subclasses_of_a_converted_class_are_announced(self) -> None:
        model = bnrewrite.convert(AnnouncedBlock())
        cls: Any = type(model)
        more = type("More", (cls,), {}, name="more")
        assert Announced.register.pop("more") is more


class Locked(nn.Module):
    """Takes no attribute but those of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.locked = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "locked" in vars(self) and name != "training":
            raise AttributeError(f"there is no {name}")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Wrapper(nn.Module):
    """Hands on all attributes to what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._modules["inner"] = inner
        vars(self)["bn"] = inner.bn

    def __setattr__(self, name: str, value: Any) -> None:
        if "_modules" in vars(self) and "inner" in self._modules:
            setattr(self._modules["inner"], name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self._modules["inner"](x))  # pyright: ignore


@pytest.mark.parametrize("make", [Locked, lambda: Wrapper(NormalizedConvolution())])
def test_modules_with_a_setattr_of_their_own(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    plain = copy.deepcopy(model)
    classes = [type(one) for one in model.modules()]
    bnrewrite.convert(model)
    assert [type(one).__name__ for one in model.modules()] == [cls.__name__ for cls in classes]
    torch.testing.assert_close(model(X), plain(X))
    with pytest.raises(ValueError, match="matches no"):
        bnrewrite.convert(model, {"nothing": "sync"})
    torch.testing.assert_close(model(X), plain(X))
    bnrewrite.revert(model)
    assert [type(one) for one in model.modules()] == classes
