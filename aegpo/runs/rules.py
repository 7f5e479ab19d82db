"""The rules by which a run draws and computes, numbered: a run that was begun under one goes on under no other.

A rule is what changes a run's numbers and is in no experiment file. Whoever changes one gives it a new number here:
then folders of earlier versions are still opened, painted and reported, but no step is added to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RULES: Mapping[str, int] = {"noise": 2, "decisions": 2, "evaluation": 2, "cost": 2}
DESCRIPTIVE = ("about",)  # fields of an experiment that only say what it is: no number depends on them
_FIRST = 1  # the number of every rule in version 0.1.0, whose manifests name none
_DOES = {
    "noise": "draws noise",
    "decisions": "draws prompts, counts and steps",
    "evaluation": "paints held-out prompts",
    "cost": "counts what a step costs",
}


def changed_rules(begun: Mapping[str, int]) -> list[str]:
    """Why a run that was begun under these rules cannot go on, a line a rule; empty if it can.

    Args:
        begun: the rules in its manifest; those it does not name are of version 0.1.0.
    """
    lines = []
    for name in dict.fromkeys((*RULES, *begun)):
        old, new = begun.get(name, _FIRST), RULES.get(name)
        if new is None:
            lines.append(f"was begun under {name} rule {old}, which this version does not know")
        elif old != new:
            lines.append(f"was begun under {name} rule {old}; this version {_DOES[name]} by rule {new}")
    return lines


def without_words(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """An experiment as JSON without the fields that only say what it is, which may change at any time."""
    return {name: value for name, value in experiment.items() if name not in DESCRIPTIVE}
