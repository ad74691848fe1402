"""What objects and containers hold, to give it back to them after traced code changed it."""

import contextlib
from collections.abc import Iterator
from types import MemberDescriptorType, SimpleNamespace
from typing import Any


def slots_of(value: Any) -> dict[str, Any]:
    """What ``value`` holds now in slots."""
    found: dict[str, Any] = {}
    for base in type(value).__mro__:
        # Classes in C have members of the same type, which nobody may write to.
        for name, slot in vars(base).items() if "__slots__" in vars(base) else ():
            if isinstance(slot, MemberDescriptorType):
                with contextlib.suppress(AttributeError):
                    found[name] = slot.__get__(value)
    return found


def attributes_of(value: Any) -> dict[str, Any]:
    """What ``value`` holds now, in its dictionary and in slots."""
    found = slots_of(value)
    with contextlib.suppress(AttributeError):
        found.update(object.__getattribute__(value, "__dict__"))
    return found


def give_back(value: Any, attributes: dict[str, Any]) -> None:
    """Gives an object the attributes back that it held."""
    for name in attributes_of(value).keys() - attributes.keys():
        object.__delattr__(value, name)
    for name, one in attributes.items():
        object.__setattr__(value, name, one)


def identical(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether two objects hold the same things under the same names."""
    return now.keys() == before.keys() and all(now[name] is before[name] for name in now)


def refill(value: Any, keys: tuple[Any, ...], elements: tuple[Any, ...]) -> None:
    """Gives a container its keys and elements back."""
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    value.clear()
    if isinstance(value, dict):
        value.update(zip(keys, elements, strict=True))
    elif isinstance(value, set):
        value.update(*keys, elements)
    else:
        value.extend(elements)


@contextlib.contextmanager
def keeping_attributes(tracer: Any) -> Iterator[None]:
    """Gives modules the attributes back that traced code set; ``tracer`` refuses that.

    ``object.__setattr__`` tells nobody, so ``tracer.kept`` has dictionaries of modules with copies.
    """
    try:
        yield
    finally:
        for now, before in tracer.kept:
            if not identical(now, before):
                now.clear()
                now.update(before)
                tracer.note_refusal("sets a module attribute while bypassing the module")
