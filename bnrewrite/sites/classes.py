"""Changing the class of a module in place, reversibly, with copies and pickles that work."""

import inspect
import threading
import weakref
from abc import ABCMeta
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from bnrewrite.errors import BnRewriteError
from bnrewrite.guards import is_compiling
from bnrewrite.sites.schedule import SCHEDULE, schedule_of

_ORIGINAL = "_bnrewrite_original"
"""Attribute that every class has which conversion makes."""


class _Unannounced:
    """First base of every class that conversion makes.

    Classes of users may keep a register of their subclasses, or demand arguments of them.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Tells the classes of users of their own subclasses only."""
        if _ORIGINAL not in vars(cls):
            super().__init_subclass__(**kwargs)


class Converted:
    """Base of every class that conversion puts on a module."""

    _bnrewrite_original: type[nn.Module]

    @staticmethod
    def _bnrewrite_becomes(become: type[nn.Module]) -> type[nn.Module]:
        """The class that a lazy module gets with its first batch, in place of ``become``."""
        return become

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training":
            attributes = self.__dict__
            schedule = attributes.get(SCHEDULE)
            if schedule is not None and attributes.get("training") is not value:
                schedule.change()
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        module: Any = self
        schedule = schedule_of(module)
        if schedule is not None:
            schedule.before_load()
        super()._load_from_state_dict(*args, **kwargs)  # pyright: ignore

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # pyright: ignore
        module: Any = self
        schedule = schedule_of(module)
        if schedule is not None:
            schedule.enter(module)

    def __prepare_scriptable__(self) -> nn.Module:
        raise BnRewriteError(
            f"{type(self).__name__}: torch.jit.script compiles the source of a module, which does "
            "not contain the conversion. Script bnrewrite.revert(model), or a reverted copy."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so copies and pickles name the original and the mixins.
        function, args, *rest = super().__reduce_ex__(protocol)
        cls = type(self)
        if args and args[0] is cls:
            _, *bases = cls.__bases__
            original = cls._bnrewrite_original
            recipe = tuple(None if base is original else base for base in bases)
            return (_rebuild, (original, recipe, function, args[1:]), *rest)
        return (function, args, *rest)


def _rebuild(original: type, recipe: tuple, function: Any, args: tuple) -> Any:
    return function(converted_class(original, recipe), *args)


_MADE = frozenset(("forward", "cls_to_become", "__module__", "__qualname__", "__doc__", _ORIGINAL))
"""Attributes that such a class has from the beginning."""

_making = threading.RLock()
_made: "weakref.WeakValueDictionary[tuple[type, tuple], type]" = weakref.WeakValueDictionary()
"""Converted classes that something uses. One that nothing uses goes, and so may its original."""


def converted_class(original: type, recipe: tuple[type | None, ...]) -> type:
    """The class named like ``original`` with the bases of ``recipe``; None stands for it."""
    with _making:
        made = _made.get((original, recipe))
        if made is None:
            made = _made[original, recipe] = _make(original, recipe)
        return made


def _make(original: type, recipe: tuple[type | None, ...]) -> type:
    bases = (_Unannounced, *(original if base is None else base for base in recipe))
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_bnrewrite_original": original,
    }
    if getattr(original, "cls_to_become", None) is not None:
        # Not on the instance: pickles cannot name a class that is made at run time.
        namespace["cls_to_become"] = property(_class_to_become)
    if recipe[0] is not None and "forward" in vars(recipe[0]):
        namespace["forward"] = _with_signature(vars(recipe[0])["forward"], original.forward)
    metaclass: Any = type(original)
    # Metaclasses of users may keep registers, too; what they do to classes is inherited.
    make = next(one.__new__ for one in metaclass.__mro__ if one in (type, ABCMeta))
    return make(metaclass, original.__name__, bases, namespace)


def _class_to_become(module: Any) -> type:
    """The class of a lazy module after its first batch."""
    return module._bnrewrite_becomes(original_class(module).cls_to_become)


def _with_signature(forward: FunctionType, original: Callable[..., Any]) -> FunctionType:
    """``forward`` that shows the arguments of ``original``.

    ``torch.export`` reads the names for ``dynamic_shapes`` there, and trainers the columns to keep.
    It is no wrapper (``__wrapped__``): what takes wrappers off would take the conversion off.
    Compilers count for each code how often they compile it, so it gets one of its own.
    """
    shown = FunctionType(
        forward.__code__.replace(),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    shown.__doc__ = original.__doc__
    shown.__dict__["__signature__"] = inspect.signature(original)
    return shown


def change_class(module: nn.Module, recipe: tuple[type | None, ...]) -> None:
    """Puts the class of ``recipe`` on ``module``, in place of its own.

    Raises:
        BnRewriteError: the module got yet another class after conversion.
    """
    cls = type(module)
    changed = converted_class(_plain_class(cls), recipe)
    if _is_of_parametrizations(cls):
        # torch takes properties off the class on top, and in the end goes on with the one below.
        original = vars(cls).get(_ORIGINAL) if issubclass(cls, Converted) else cls
        changed = _parametrized(cls, changed, {} if original is None else {_ORIGINAL: original})
    _set_class(module, changed)


def is_converted(module: nn.Module) -> bool:
    """Whether conversion has changed the class of ``module``."""
    return issubclass(type(module), Converted)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class that ``module`` had before conversion, or has if it is not converted."""
    cls = type(module)
    return cls._bnrewrite_original if issubclass(cls, Converted) else cls


def restore_class(module: nn.Module) -> None:
    """Gives ``module`` the class back that it had before conversion.

    Raises:
        BnRewriteError: the module got yet another class after conversion.
    """
    _set_class(module, restored_class(module))


def restored_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` without conversion, with the parametrizations that it has now.

    Raises:
        BnRewriteError: the module got yet another class after conversion.
    """
    cls = type(module)
    restored = _plain_class(cls)
    if _is_of_parametrizations(cls):
        before = vars(cls).get(_ORIGINAL)
        if before is not None and _properties(before) == _properties(cls):
            return before
        return _parametrized(cls, restored, {})
    return restored


def _plain_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of the user below conversion and ``torch.nn.utils.parametrize``."""
    below = cls.__bases__[0] if _is_of_parametrizations(cls) else cls
    if not issubclass(below, Converted):
        return below
    if _ORIGINAL not in vars(below):
        raise BnRewriteError(
            f"{cls.__name__}: the class of this module was changed after conversion, e.g. by "
            "fully_shard, so the conversion cannot be undone or replaced. Convert or revert "
            "the model first, then wrap it."
        )
    return below._bnrewrite_original


def _is_of_parametrizations(cls: type) -> bool:
    """Whether ``torch.nn.utils.parametrize`` made the class, for one module and its copies."""
    return getattr(vars(cls).get("__getstate__"), "__module__", "") == parametrize.__name__


def _parametrized(cls: type, base: type, more: dict[str, Any]) -> type:
    """The class ``cls`` of a parametrized module made anew on top of ``base``."""
    namespace = {
        name: value
        for name, value in vars(cls).items()
        if name not in ("__dict__", "__weakref__", _ORIGINAL)
    }
    return type(cls.__name__, (base,), {**namespace, **more})


def _properties(cls: type) -> set[str]:
    return {name for name, value in vars(cls).items() if isinstance(value, property)}


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives ``module`` the class, and its forward if the instance holds that of its class."""
    follows = "forward" in vars(module) and not has_forward_of_its_own(module)
    assign_class(module, cls)
    if follows:
        vars(module)["forward"] = MethodType(cls.forward, module)


def assign_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives ``module`` the class, past a ``__setattr__`` of its own, which may hand it on."""
    object.__setattr__(module, "__class__", cls)


def is_hidden(module: nn.Module, name: str) -> bool:
    """Whether something stands before the attribute ``name`` of the module's original class.

    It may be on the module, or on the class that conversion made, by ``type(module).name = ...``.
    """
    if is_compiling():
        # A compiler guards what is read, and not that a dictionary lacks a key.
        getattr(module, name, None)
        return name in module.__dict__
    if name in module.__dict__:
        return True
    cls = type(module)
    return name in vars(cls) and _Unannounced in cls.__bases__ and name not in _MADE


def has_forward_of_its_own(module: nn.Module) -> bool:
    """Whether the instance holds another forward than that of its class.

    Trainers such as Lightning put ``model.forward`` back on the instance after each step.
    """
    held: Any = vars(module).get("forward")
    if isinstance(held, MethodType) and held.__self__ is module:
        return held.__func__ is not type(module).forward
    return "forward" in vars(module)


def below(module: Any, path: str) -> Any:
    """The submodule at ``path``; "" is the module itself.

    Raises:
        AttributeError: there is none.
    """
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        module = getattr(module, name) if child is None else child
    return module


def has_frozen_weight(module: nn.Module) -> bool:
    """Whether the weight of a BatchNorm is there and gets no gradient."""
    # Reading a parametrized weight computes it, which may change what it is made of.
    weight = module._parameters.get("weight")
    if weight is not None or not parametrize.is_parametrized(module, "weight"):
        return weight is not None and not weight.requires_grad
    parametrization: Any = module.parametrizations["weight"]  # pyright: ignore
    return not any(one.requires_grad for one in parametrization.parameters())
