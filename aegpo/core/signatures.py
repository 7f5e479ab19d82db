"""What a part must have before it is asked: verbs and their parameters, read off the protocols of interfaces.py.

There is one truth, the protocols. Which of them a kind of part fulfils is what its spec base says `build` returns.
Parts are called by position: names of parameters are free, their number is not.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from inspect import Parameter, Signature
from types import FunctionType
from typing import Any, TypeVar

from pydantic import BaseModel

from aegpo.core import first_edition
from aegpo.core.contracts import blaming
from aegpo.errors import ContractError

P = TypeVar("P")
_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def protocols_of(base: type) -> tuple[type, ...]:
    """The protocols that `build` of a spec base promises one of; none where it returns any object, as for trackers."""
    build = inspect.getattr_static(base, "build", None)
    promised = build.__annotations__["return"] if isinstance(build, FunctionType) else ""
    known = vars(sys.modules[base.__module__])
    return tuple(known[name] for name in promised.split(" | ") if name in known)


def refusal(spec: type[BaseModel], base: type[BaseModel]) -> str | None:
    """What a spec class lacks that shows with nothing built, in words that follow its name; None: nothing.

    Args:
        spec: the class, a subclass of `base`.
        base: the spec base of its kind.
    """
    return first_edition.declared(spec, base) or next(_lacking(spec, base), None)


def _lacking(spec: type[BaseModel], base: type[BaseModel]) -> Iterator[str]:
    for name in sorted(getattr(spec, "__abstractmethods__", ())):
        yield f"has no {name!r}; asked is  {_written(name, base)}"
    for name, annotation in inspect.get_annotations(base).items():
        if name in base.__class_vars__ and not hasattr(spec, name):
            yield f"has no {name!r}; asked is  {name}: {annotation}"
    for name in _methods(base):
        if inspect.getattr_static(spec, name) is not inspect.getattr_static(base, name):
            wrong = _misfit(spec, name, _signature(inspect.getattr_static(base, name)))
            if wrong is not None:
                yield wrong
    if inspect.getattr_static(spec, "build", None) is inspect.getattr_static(base, "build", None):
        wrong = _first(spec, protocols_of(base), data=False)  # else what it builds is looked at when it is built
        if wrong is not None:
            yield f"{wrong}, or define  {_written('build', base)}  to return another object"


def built(part: str, name: str, build: Callable[[], P], *protocols: type, kind: str | None = None) -> P:
    """Builds a part, and returns it if it has all that one of the protocols asks for.

    Args:
        part: its kind, such as ``reward``.
        name: its name.
        build: of its spec.
        protocols: one of which it must fulfil.
        kind: what it is registered as, where it has a name of its own.

    Raises:
        ContractError: if it cannot be built, lacks a verb or an attribute, or has a verb that cannot be called as it
            will be.
    """
    with blaming(part, name, kind=kind):
        made = build()
        wrong = _first(made, protocols, data=True)
        if wrong is not None:
            raise ContractError(f"{part} {name!r} was built as {type(made).__name__!r}, which {wrong}")
    return made


def _first(owner: object, protocols: tuple[type, ...], data: bool) -> str | None:
    """What is wrong by the first protocol; None if one of them has nothing against it."""
    problems = [next(_problems(owner, protocol, data), None) for protocol in protocols]
    return None if None in problems else next(iter(problems), None)


def _problems(owner: object, protocol: type, data: bool) -> Iterator[str]:
    verbs, attributes = _asked(protocol)
    for name, signature in verbs.items():
        wrong = _misfit(owner, name, signature)
        if wrong is not None:
            yield wrong
    for name in attributes if data else ():
        if not hasattr(owner, name):
            yield f"has no attribute {name!r}; {protocol.__name__} asks for it"


@cache
def _asked(protocol: type) -> tuple[Mapping[str, Signature], tuple[str, ...]]:
    """Verbs and attributes of a protocol, those it inherits too."""
    verbs: dict[str, Signature] = {}
    attributes: dict[str, None] = {}
    for cls in reversed(protocol.__mro__):
        attributes |= dict.fromkeys(name for name in inspect.get_annotations(cls) if not name.startswith("_"))
        for name, member in vars(cls).items():
            if isinstance(member, FunctionType) and not name.startswith("_"):
                verbs[name] = _signature(member)
            elif isinstance(member, property):
                attributes[name] = None
    return verbs, tuple(attributes)


def _methods(base: type) -> list[str]:
    """What a spec base lets its subclasses define, itself or by the bases it shares with others."""
    own = [cls for cls in base.__mro__ if cls.__module__ == base.__module__]
    return [name for cls in own for name, member in vars(cls).items() if _overridable(name, member)]


def _overridable(name: str, member: object) -> bool:
    return isinstance(member, FunctionType) and not name.startswith("_")


def _misfit(owner: object, name: str, asked: Signature) -> str | None:
    """What is wrong with a verb of a class or an object, in words; None: it can be called as asked."""
    if not callable(getattr(owner, name, None)):
        static = inspect.getattr_static(owner, name, None) if isinstance(owner, type) else None
        computed = hasattr(static, "__get__")  # a property of a class may hold anything
        old = first_edition.renamed(owner, name)
        return None if computed else f"has no {name!r}; asked is  {_called(name, asked)}{old}"
    own = _own_signature(owner, name)
    if own is None:
        return None
    if not _takes(own, *_call(asked)):
        return f"has {_called(name, own)}, which cannot be called as  {_called(name, asked)}"
    if first_edition.takes_strings(own, asked):
        return f"has {_called(name, own)}, as in aegpo 0.1; asked is  {_called(name, asked)}  now: use prompt.text"
    return None


def _own_signature(owner: object, name: str) -> Signature | None:
    """The signature of a verb without `self`; None where it cannot be known."""
    member: Callable[..., Any] = getattr(owner, name)
    unbound = isinstance(owner, type) and isinstance(inspect.getattr_static(owner, name), FunctionType)
    try:
        return _signature(member) if unbound else inspect.signature(member)
    except ValueError:  # of what is written in C
        return None


def _signature(function: Callable[..., Any]) -> Signature:
    """Of a function in a class, without `self`."""
    whole = inspect.signature(function)
    every = list(whole.parameters.values())
    return whole.replace(parameters=every[1:]) if every and every[0].kind in _BY_POSITION else whole


def _call(asked: Signature) -> tuple[list[str], dict[str, str]]:
    """The call that every part must bear: what has a default in the protocol is an ability that it may lack."""
    given = [each for each in asked.parameters.values() if each.default is Parameter.empty]
    named = {each.name: each.name for each in given if each.kind is Parameter.KEYWORD_ONLY}
    return [each.name for each in given if each.kind in _BY_POSITION], named


def _takes(own: Signature, by_position: list[str], by_name: dict[str, str]) -> bool:
    try:
        own.bind(*by_position, **by_name)
    except TypeError:
        return False
    return True


def _written(name: str, base: type) -> str:
    return _called(name, _signature(inspect.getattr_static(base, name)))


def _called(name: str, signature: Signature) -> str:
    """A signature as it is written in code."""
    bare = [each.replace(annotation=_bare(each.annotation)) for each in signature.parameters.values()]
    return f"{name}{signature.replace(parameters=bare, return_annotation=_bare(signature.return_annotation))}"


class _Words(str):
    """An annotation that shows without the quotes of a string."""

    def __repr__(self) -> str:
        return str(self)


def _bare(annotation: Any) -> Any:
    return _Words(annotation) if isinstance(annotation, str) else annotation
