"""`--cluster-set KEY=VALUE`: what each cluster can be told, and what it is told if nobody says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from aegpo.core.registry import suggestion
from aegpo.errors import AegpoError

Kind: TypeAlias = Literal["slurm", "ray", "local"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Value: TypeAlias = str | int | float | list[str]


@dataclass(frozen=True)
class _Reading:
    """How the text of a value is read."""

    read: Callable[[str], Value]
    expected: str
    many: bool = False  # the key may be repeated


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(text)
    return int(text)


def _amount(text: str) -> float:
    if not 0 <= (value := float(text)) < float("inf"):
        raise ValueError(text)
    return value


_TEXT, _COUNT = _Reading(str, "a text"), _Reading(_count, "a whole number from 1 on")
_AMOUNT, _LINES = _Reading(_amount, "a number from 0 on"), _Reading(str, "a line of the shell", many=True)
_SLURM_TEXTS = "account comment constraint dependency exclude gres mail_type mail_user mem nodelist partition qos wckey"
_SLURM_COUNTS = "cpus_per_task gpus_per_node signal_delay_s time"

# As sbatch and ray have them; submitit: `time` in minutes, `signal_delay_s`, `setup`. `jobs`: runs at a time.
KNOWN: Mapping[Kind, Mapping[str, _Reading]] = {
    "slurm": {**dict.fromkeys(_SLURM_TEXTS.split(), _TEXT), **dict.fromkeys(_SLURM_COUNTS.split(), _COUNT)}
    | {"setup": _LINES},
    "ray": {"accelerator_type": _TEXT, "address": _TEXT, "max_restarts": _COUNT, "num_cpus": _AMOUNT},
    "local": {"jobs": _COUNT, "setup": _LINES},
}


def read_settings(kind: Kind, given: Sequence[str]) -> dict[str, Value]:
    """The settings of a cluster by key.

    Args:
        kind: of cluster.
        given: KEY=VALUE, as on the command line.

    Raises:
        AegpoError: for a key it does not have, one that is given twice, or a value that cannot be read.
    """
    found: dict[str, Value] = {}
    for each in given:
        key, sign, text = each.partition("=")
        if not sign:
            raise AegpoError(f"--cluster-set {each}: expected KEY=VALUE, such as partition=gpu")
        if key not in KNOWN[kind]:
            raise AegpoError(f"--cluster-set: {kind} has no setting {key!r}; {suggestion(key, KNOWN[kind])}")
        reading = KNOWN[kind][key]
        try:
            value = reading.read(text)
        except ValueError:
            raise AegpoError(f"--cluster-set {each}: {reading.expected} was expected for {key!r}") from None
        if reading.many:
            value = [*_lines(found.get(key, [])), text]
        elif key in found:
            raise AegpoError(f"--cluster-set names {key!r} twice: {found[key]} and {text}; leave one out")
        found[key] = value
    return found


def _lines(value: Value) -> list[str]:
    return value if isinstance(value, list) else []
