"""What is wrong with the data of a spec, in our words: every mistake with its location and what would be right."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from aegpo.config.marks import Marked, Mistake, dotted
from aegpo.core.foreign import blaming
from aegpo.core.problems import Location
from aegpo.core.registry import Spec, kind_of, suggestion
from aegpo.errors import AegpoError

S = TypeVar("S", bound=Spec)
_STRICT_ONLY = {"int_type", "float_type", "bool_type", "string_type"}


@dataclass(frozen=True)
class Finding:
    """One mistake in data: where and what."""

    location: Location
    message: str
    at_key: bool = False  # the key is wrong, not its value
    warning: bool = False  # possible, but probably not meant


def validate(spec: type[S], data: Mapping[str, Any]) -> tuple[S | None, list[Finding]]:
    """The spec of plain data, or None and everything that is wrong with it.

    Numbers, booleans and texts are never converted into one another, unlike pydantic's default.
    """
    errors: list[ErrorDetails] = []  # of pydantic
    value: S | None = None
    try:
        value = _valid(spec, data)
    except ValidationError as error:
        errors += [each for each in error.errors(include_url=False) if not _is_echo(each)]
    try:
        _valid(spec, _with_tuples(data), strict=True)
    except ValidationError as error:
        errors += [each for each in error.errors(include_url=False) if each["type"] in _STRICT_ONLY]
    findings = list(dict.fromkeys([*_findings(spec, errors), *_without_kind(_members(spec), data, ())]))
    return (None if findings else value), findings


def _valid(spec: type[S], data: Mapping[str, Any], strict: bool | None = None) -> S:
    """The spec of plain data.

    Raises:
        ValidationError: if the data is wrong.
        ContractError: if a part's own validation fails otherwise; it is blamed.
    """
    try:
        return spec.model_validate(data, strict=strict)
    except (ValidationError, AegpoError):
        raise
    except BaseException:
        for part, kind, own, given in _parts(_members(spec), data, ()):
            with blaming(part, str(given.get("name") or kind), kind=kind), suppress(ValidationError):
                own.model_validate(given, strict=strict)
        raise


def _parts(types: list[Any], data: object, place: Location) -> Iterator[tuple[str, str, type[Spec], Mapping[str, Any]]]:
    """The parts that data names, innermost first: kind of part, name, class and data of each."""
    if isinstance(data, list | tuple):
        for index, item in enumerate(data):
            members = [member for kind in types for member in _members(_item(kind, index))]
            yield from _parts(members, item, (*place, index))
    given = {"kind": data} if isinstance(data, str) else data
    if not isinstance(given, Mapping):
        return
    classes = _specs(types)
    own = next((each for each in classes if kind_of(each) == given.get("kind")), None)
    inside = own or (classes[0] if len(classes) == 1 else None)
    for name, field in {} if inside is None else inside.model_fields.items():
        if name in given:
            yield from _parts(_members(field.annotation), given[name], (*place, name))
    if own is not None and kind_of(own) is not None:
        words = [each for each in place if isinstance(each, str)]
        yield _SINGULAR.get(words[-1], words[-1]), str(kind_of(own)), own, given


_SINGULAR = {"rewards": "reward", "trackers": "tracker"}  # keys that hold several parts


def _with_tuples(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _with_tuples(value) for key, value in data.items()}
    return tuple(_with_tuples(value) for value in data) if isinstance(data, list) else data


def _is_echo(error: ErrorDetails) -> bool:
    """True for a list called too short only because its items are wrong, which is reported for each."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _findings(spec: type[Spec], errors: list[ErrorDetails]) -> Iterator[Finding]:
    """One finding a location: what the members of a plain union would accept is joined by 'or'."""
    places: dict[Location, list[tuple[ErrorDetails, type[Spec] | None]]] = {}
    for error in errors:
        location, owner = _locate(spec, error["loc"])
        places.setdefault(location, []).append((error, owner))
    for location, found in places.items():
        options = list(dict.fromkeys(_expectation(error) for error, _ in found))
        direct = _direct(found[0][0], location, found[0][1])
        if direct is not None and len(options) == 1:
            yield direct
        else:
            yield Finding(location, f"must be {' or '.join(options)}, not {_given(found[0][0]['input'])}")


def _direct(error: ErrorDetails, location: Location, owner: type[Spec] | None) -> Finding | None:
    """The finding of an error that is not of the form 'must be x, not y'."""
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            known = owner.model_fields if owner is not None else ()
            return Finding(location, f"unknown key; {suggestion(str(location[-1]), known)}", at_key=True)
        case "missing" if isinstance(location[-1], int):
            return Finding(location[:-1], f"too few values: number {location[-1] + 1} is missing")
        case "missing":
            return Finding(location, f"required, but not given{_choice(owner, location[-1])}")
        case "union_tag_not_found":
            return Finding(location, f"a part needs a 'kind'{_choice(owner, next(filter(_is_name, location[::-1])))}")
        case "union_tag_invalid":
            return _unknown_kind(location, context["tag"], context["expected_tags"])
        case "literal_error" if location[-1] == "kind":
            return _unknown_kind(location[:-1], str(error["input"]), context["expected"])
        case "literal_error":
            close = suggestion(str(error["input"]), _quoted(context["expected"]))
            hint = f"; {close}" if close.startswith("did you mean") else ""
            return Finding(location, f"must be {context['expected']}, not {_given(error['input'])}{hint}")
        case "value_error" | "assertion_error":
            return Finding(location, str(context["error"]))
    return None


_BOUNDS = {  # of pydantic's errors: what is said of a bound, and its key in the context
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def _expectation(error: ErrorDetails) -> str:
    """What would be right, after 'must be'."""
    context = error.get("ctx", {})
    match error["type"]:
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            return "a whole number"
        case "float_type" | "float_parsing":
            return "a number"
        case "finite_number":
            return "a finite number"
        case "bool_type" | "bool_parsing":
            return "true or false"
        case "string_type" | "path_type" | "is_instance_of":
            return "text"
        case "tuple_type" | "list_type":
            return "a list"
        case "model_type" | "model_attributes_type" | "dict_type" | "mapping_type":
            return "a mapping of keys to values"
        case "literal_error":
            return str(context["expected"])
        case "none_required":
            return "null"
        case "too_short":
            return f"a list of at least {context['min_length']}"
        case "too_long":
            return f"a list of at most {context['max_length']}"
        case "string_too_long":
            return f"text of at most {context['max_length']} letters"
        case "string_pattern_mismatch":
            return f"text of the form {context['pattern']}"
    if error["type"] in _BOUNDS:
        words, key = _BOUNDS[error["type"]]
        bound = context[key]
        return f"{words} {bound}" if isinstance(bound, int) else f"{words} {bound:g}"
    return re.sub(r"^(Input|Value|String|Tuple) should (be )?", "", error["msg"])


def _unknown_kind(location: Location, kind: str, known: str) -> Finding:
    return Finding(location, f"unknown kind {kind!r}; {suggestion(kind, _quoted(known))}")


def _is_name(element: str | int) -> bool:
    return isinstance(element, str)


def _quoted(names: str) -> list[str]:
    return re.findall(r"'([^']*)'", names)


def _choice(owner: type[Spec] | None, field: str | int) -> str:
    """The kinds a field may have, as the end of a message."""
    info = owner.model_fields.get(str(field)) if owner is not None else None
    types = _members(info.annotation) if info is not None else []
    types += [member for each in types for member in _members(_item(each, 0))]
    names = [kind for spec in _specs(types) if (kind := kind_of(spec)) is not None]
    return f"; known: {', '.join(names)}" if names else ""


def _given(value: object) -> str:
    """A value as the user wrote it."""
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return json.dumps(value)


def _locate(spec: type[Spec], location: Location) -> tuple[Location, type[Spec] | None]:
    """pydantic's location without the names of union members, and the spec class that has its last field."""
    types: list[Any] = [spec]
    place: Location = ()
    owner: type[Spec] | None = None
    for element in location:
        classes = _specs(types)
        if isinstance(element, int):
            types = [member for kind in types for member in _members(_item(kind, element))]
        elif tagged := [each for each in classes if len(classes) > 1 and kind_of(each) == element]:
            types = [*tagged]
            continue
        elif len(classes) == 1:
            owner = classes[0]
            field = owner.model_fields.get(element)
            types = _members(field.annotation) if field is not None else []
        elif values := [get_args(kind)[1] for kind in types if get_origin(kind) is dict]:
            types = [member for value in values for member in _members(value)]
        else:  # a member of a plain union
            continue
        place = (*place, element)
    return place, owner


def _without_kind(types: list[Any], data: object, place: Location) -> Iterator[Finding]:
    """Parts without a `kind`, which pydantic forgives while only one is registered."""
    if isinstance(data, list):
        for index, item in enumerate(data):
            members = [member for kind in types for member in _members(_item(kind, index))]
            yield from _without_kind(members, item, (*place, index))
    classes = _specs(types)
    if not isinstance(data, Mapping) or len(classes) != 1:
        return
    kind = kind_of(classes[0])
    if kind is not None and "kind" not in data:
        yield Finding(place, f"a part needs a 'kind'; known: {kind}")
    for name, field in classes[0].model_fields.items():
        if name in data:
            yield from _without_kind(_members(field.annotation), data[name], (*place, name))


def _members(annotation: Any) -> list[Any]:
    """The types an annotation allows, without unions and annotations around them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for argument in get_args(annotation) for member in _members(argument)]
    return [annotation]


def _specs(types: list[Any]) -> list[type[Spec]]:
    return [kind for kind in types if isinstance(kind, type) and issubclass(kind, Spec)]


def _item(kind: Any, index: int) -> Any:
    """The type of one item of a tuple or list type; None for other types."""
    arguments = get_args(kind)
    if get_origin(kind) is list:
        return arguments[0]
    if get_origin(kind) is not tuple:
        return None
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return arguments[index] if index < len(arguments) else None


def mistake(tree: Marked, finding: Finding) -> Mistake:
    """A finding at the place it was written; what was not written down is blamed on what should contain it."""
    location: Location = finding.location
    node, written = tree.find(location)
    kind, has_kind = tree.find((*location, "kind"))
    if finding.message.startswith("unknown kind") and has_kind:
        return Mistake(kind.mark, dotted((*location, "kind")), finding.message)
    mark = node.mark if written and not finding.at_key else node.key
    return Mistake(mark, dotted(location), finding.message)
