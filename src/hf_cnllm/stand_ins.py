"""Classes that are registered before they are imported.

The models of this package rest on all that transformers has for models, which takes longer to import than everything that a
tokenizer needs, PyTorch included. transformers' auto classes want a class to register; they get a [`StandIn`], and the class
itself as soon as it is defined, by whatever import.
"""

import sys
from collections.abc import Callable, Collection
from importlib import import_module
from importlib.util import find_spec
from inspect import Signature, signature
from typing import Any

from ._stack import naming_what_does_not_fit

Place = Callable[[Any, Any], None]
"""Puts its first argument, a class or a stand-in, in place of the second, the class's stand-in if it has one."""


class StandIn:
    """Is what its class is: it can be called, derived from, pickled, and asked for by `isinstance` and `issubclass`; it equals
    the class, and has its attributes, those that are set here too. Any of that imports the class, except for the name, the
    module and what is `known` besides."""

    def __init__(self, module: str, name: str, **known: Any):
        vars(self).update(known, __module__=module, __name__=name, __qualname__=name)

    def imported(self) -> Any:
        return imported(self.__module__, self.__name__)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.imported(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.imported(), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.imported(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.imported()(*args, **kwargs)

    def __eq__(self, other: Any) -> bool:
        return self.imported() is (other.imported() if type(other) is StandIn else other)

    def __hash__(self) -> int:
        return hash(self.imported())

    def __or__(self, other: Any) -> Any:
        return self.imported() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.imported()

    def __dir__(self) -> list[str]:
        return dir(self.imported())

    @property
    def __signature__(self) -> Signature:
        return signature(self.imported())

    @property
    def __class__(self) -> type:
        return type

    @property
    def __bases__(self) -> tuple[type, ...]:
        return (self.imported(),)  # by which `issubclass` finds all of its own

    def __mro_entries__(self, bases: tuple) -> tuple[type, ...]:
        return (self.imported(),)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self.imported())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self.imported())

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return imported, (self.__module__, self.__name__)

    def __repr__(self) -> str:
        return f"<class '{self.__module__}.{self.__name__}', not imported yet>"


def imported(module: str, name: str) -> Any:
    """What a module has under a name.

    Raises:
        ImportError: it cannot be imported; which of the installed libraries do not fit each other is said as well.
    """
    with naming_what_does_not_fit():
        found = import_module(module)
    return getattr(found, name)


def later(package: str, module: str, names: Collection[str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package that imports one of its modules when it is asked for any of the
    names which it has not itself, and every module when it is asked for that."""

    def __getattr__(name: str) -> Any:
        if name in names:
            return imported(f"{package}.{module}", name)
        if find_spec(f"{package}.{name}"):
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__, lambda: sorted({*vars(sys.modules[package]), *names})


_places: dict[tuple[str, str], tuple[Any, dict[Place, None]]] = {}  # and what is in them


def put(place: Place, module: str, name: str, **known: Any) -> None:
    """Puts a class of this package in a place, or its stand-in until it is defined. A second time changes nothing."""
    if (defined := getattr(sys.modules.get(module), name, None)) is not None:
        return place(defined, None)
    stand_in, places = _places.setdefault((module, name), (StandIn(module, name, **known), {}))
    places[place] = None
    place(stand_in, stand_in)


def take_places(defined: type) -> None:
    """Puts a class that was just defined wherever there is a stand-in of it, or what an import defined that did not end well."""
    key = defined.__module__, defined.__qualname__
    if key in _places:
        former, places = _places[key]
        _places[key] = defined, places
        for place in places:
            place(defined, former)
