"""What specs say with nothing built, and what parts remember, checked as `contracts` checks what parts return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aegpo.core.foreign import blaming
from aegpo.core.records import Prompt, StepTable
from aegpo.core.signals import SignalCost
from aegpo.errors import ContractError

if TYPE_CHECKING:
    from aegpo.core.parts import SignalSpec


def check_levels(name: str, sigmas: object, steps: int) -> None:
    """A model spec's (steps+1,) noise levels: finite and strictly falling, as `contracts.check_sigmas`."""
    who = f"model {name!r}"
    if not isinstance(sigmas, np.ndarray) or sigmas.shape != (steps + 1,) or sigmas.dtype.kind != "f":
        raise ContractError(f"{who} returned sigmas {_brief(sigmas)}; an array ({steps + 1},) of floats was asked")
    if not np.isfinite(sigmas).all() or (np.diff(sigmas) >= 0).any():
        raise ContractError(f"{who} returned sigmas {_brief(sigmas.tolist())}; they must fall strictly")


def check_table(name: str, table: object, steps: int) -> None:
    """A sampler's coefficients of K steps: three (K,) float64, finite, stds of at least 0."""
    who = f"sampler {name!r}"
    if not isinstance(table, StepTable):
        raise ContractError(f"{who} returned a table {_brief(table)}; an aegpo.StepTable was asked")
    for field in ("latents", "velocity", "std"):
        values: object = vars(table)[field]
        if not isinstance(values, np.ndarray) or values.shape != (steps,) or values.dtype != np.float64:
            raise ContractError(
                f"{who} returned {field!r} of a table as {_brief(values)}; ({steps},) float64 was asked"
            )
        if not np.isfinite(values).all() or (field == "std" and (values < 0).any()):
            raise ContractError(f"{who} returned {field!r} of a table with values that are not finite, or stds below 0")


def check_captions(name: str, captions: object, count: int) -> Sequence[str | Prompt]:
    """A model's captions: `count` texts or prompts."""
    who = f"model {name!r}"
    if not isinstance(captions, Sequence) or isinstance(captions, str):
        raise ContractError(f"{who} returned captions as {type(captions).__name__}; a tuple of texts was asked")
    for each in captions:
        if not isinstance(each, str | Prompt):
            raise ContractError(f"{who} returned the caption {each!r}; a text or an aegpo.Prompt was asked")
    if len(captions) != count:
        raise ContractError(f"{who} returned {len(captions)} captions; {count} were asked")
    return captions


def said(part: str, name: str, ask: Callable[[], Any], kind: type = str) -> list[Any]:
    """What a spec finds wrong with an experiment, by one of its verbs.

    Raises:
        ContractError: if it says something else than that; it is blamed for what it raises.
    """
    with blaming(part, name):
        found = ask()
        if isinstance(found, str) or not isinstance(found, Iterable):
            raise ContractError(
                f"{part} {name!r} found {_brief(found)} wrong; an iterable of {kind.__name__} was asked"
            )
        messages = list(found)  # a generator runs here, while the part is blamed
        for each in messages:
            if not isinstance(each, kind):
                raise ContractError(f"{part} {name!r} found {each!r} wrong; each must be a {kind.__name__}")
    return messages


def cost_of(source: SignalSpec, steps: int) -> SignalCost:
    """What a source says that it spends on one prompt."""
    with blaming("signals", source.kind):
        cost: object = source.cost(steps)
        if not isinstance(cost, SignalCost):
            raise ContractError(f"signals {source.kind!r} said {cost!r} as its cost; an aegpo.SignalCost was asked")
    return cost


def check_state(part: str, name: str, state: object) -> None:
    """What a part remembers: tensors and JSON values by name."""
    who = f"{part} {name!r}"
    if not isinstance(state, Mapping):
        raise ContractError(f"{who} returned {_brief(state)} from state_dict(); a mapping was asked")
    for key, value in state.items():
        if not isinstance(key, str):
            raise ContractError(f"{who} remembers {key!r}; names in state_dict() are texts")
        if not _is_tensor(value) and (wrong := _no_json(value)) is not None:
            raise ContractError(f"{who} remembers {key!r} with {wrong}; tensors and what JSON has can be saved")


def _is_tensor(value: object) -> bool:
    return any(cls.__module__ == "torch" and cls.__name__ == "Tensor" for cls in type(value).__mro__)


def _no_json(value: object) -> str | None:
    """What JSON lacks of a value; None: nothing."""
    if value is None or isinstance(value, bool | int | float | str):
        return None
    if isinstance(value, list | tuple):
        return next((wrong for each in value if (wrong := _no_json(each)) is not None), None)
    if isinstance(value, dict):
        odd = next((key for key in value if not isinstance(key, str | int | float | bool) and key is not None), None)
        return f"the key {odd!r}" if odd is not None else _no_json(list(value.values()))
    return f"a {type(value).__name__}"


def _brief(value: object) -> str:
    """A value as an error shows it."""
    if isinstance(value, np.ndarray):
        return f"of shape {value.shape}, {value.dtype}"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
