"""What classes of parts declare in class variables, checked once all are registered: signals and names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from aegpo.core.parts import ComparedWith, RewardSpec, SignalSpec
from aegpo.core.records import Per
from aegpo.core.registries import Registries
from aegpo.core.registry import KEBAB_CASE, Entry
from aegpo.errors import PluginError


def check_declared(registries: Registries) -> None:
    """Sources say what they provide, each signal is provided once, and rewards what they need and compare with.

    Raises:
        PluginError: if one does not; the message names who ships it.
    """
    providers: dict[str, Entry[SignalSpec]] = {}
    for source in registries.signals:
        who = f"{source.source} registers signals {source.name!r}"
        for wrong in _wrong_signals(source.spec.provides):
            raise PluginError(f"{who}, whose 'provides' {wrong}; mend it")
        for signal in source.spec.provides:
            if signal in providers:
                first = providers[signal]
                raise PluginError(
                    f"{who}, which provides the signal {signal!r} that {first.name!r} of {first.source} provides; "
                    "rename one"
                )
            providers[signal] = source
    for reward in registries.rewards:
        if (text := _wrong_reward(reward.spec)) is not None:
            raise PluginError(f"{reward.source} registers rewards {reward.name!r}, whose {text}")


def _wrong_signals(provides: Any) -> Iterator[str]:
    known = get_args(Per)
    if not isinstance(provides, Mapping):
        yield f"is a {type(provides).__name__}; a mapping of names to one of {', '.join(map(repr, known))} is asked"
        return
    for name, per in provides.items():
        if not isinstance(name, str) or not KEBAB_CASE.fullmatch(name):
            yield f"names a signal {name!r}; names are kebab-case, as my-signal"
        if per not in known:
            yield f"has {name!r} per {per!r}; must be {', '.join(map(repr, known[:-1]))} or {known[-1]!r}"


def _wrong_reward(reward: type[RewardSpec]) -> str | None:
    needed: Any = reward.needs_metadata
    if isinstance(needed, str):
        return f"'needs_metadata' is the text {needed!r}; a tuple of keys is asked: write ({needed!r},)"
    if reward.compared_with not in (known := get_args(ComparedWith)):
        return f"'compared_with' is {reward.compared_with!r}; must be {' or '.join(map(repr, known))}"
    return None
