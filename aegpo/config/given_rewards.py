"""Rewards that the command line is given one by one, with their mistakes as a file has them."""

from __future__ import annotations

from collections.abc import Sequence
from types import GenericAlias
from typing import Any

from pydantic import SerializeAsAny, create_model

from aegpo.config.marks import Mark, Marked, Mistake, refuse
from aegpo.config.parsing import parse
from aegpo.config.validation import mistake, validate
from aegpo.core.parts import RewardSpec
from aegpo.core.registries import Registries
from aegpo.core.registry import Spec


def parse_rewards(texts: Sequence[str], registries: Registries, option: str = "--rewards") -> tuple[RewardSpec, ...]:
    """Rewards that are given one a text, as in a file: a kind, or a mapping such as ``{kind: hpsv2, path: ...}``.

    Args:
        texts: YAML each.
        registries: the rewards there are.
        option: what messages call the place of the texts.

    Raises:
        SpecError: with every mistake, as a file has them.
    """
    mistakes: list[Mistake] = []
    items: list[Marked] = []
    for text in texts:
        value, found = parse(text, option, lines=False)
        mark = Mark(option, None, 1, text)
        if value is None and not found:
            found = [Mistake(mark, "", "there is no reward; give a kind such as 'hpsv2', or a mapping with a 'kind'")]
        mistakes += found
        items.append(Marked(None, mark, mark) if value is None else value)
    refuse(mistakes)
    start = Mark(option, None, 1, "")
    tree = Marked({"rewards": Marked(tuple(items), start, start)}, start, start)
    rewards, findings = validate(_rewards_type(registries), tree.plain)
    refuse([mistake(tree, finding) for finding in findings])
    assert rewards is not None, "what has no mistakes is valid"
    labels: dict[str, Marked] = {}
    for spec, item in zip(rewards.rewards, items, strict=True):
        if spec.label in labels:
            what = f"two rewards are called {spec.label!r}; give one a 'name' of its own"
            mistakes.append(Mistake(item.mark, "", what))
        labels[spec.label] = item
    refuse(mistakes)
    return rewards.rewards


class _Rewards(Spec):
    """Rewards alone."""

    rewards: tuple[SerializeAsAny[RewardSpec], ...]


def _rewards_type(registries: Registries) -> type[_Rewards]:
    of_the_union: Any = GenericAlias(tuple, (registries.rewards.union(), ...))
    narrowed: Any = {"rewards": (of_the_union, ...)}
    return create_model("_Rewards", __base__=_Rewards, __doc__=_Rewards.__doc__, **narrowed)
