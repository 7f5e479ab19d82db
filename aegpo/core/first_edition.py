"""What plugins of aegpo 0.1 say that is answered otherwise now, and what to write instead: one table for all.

A name is old only while nothing answers to it: what its record or spec base still has is not looked up here. The same
in a reader's words, old beside new, is in plugins/README.md.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from inspect import Signature

from pydantic import BaseModel

from aegpo.core.records import Prompt


def _declaring(signal: str) -> str:
    return f'reads: ClassVar[tuple[str, ...]] = ("{signal}",)'


def _signal(verb: str, name: str) -> str:
    return f'signals.{verb}("{name}"), declared by  {_declaring(name)}'


# class variables of specs -> the line to write instead
DECLARED: Mapping[str, str] = {"needs_entropy": _declaring("entropy")}

# verbs -> what they were, where a class has that and not the new one
RENAMED: Mapping[str, str] = {"frozen": "base"}

# (record, attribute) -> what to use instead
READ: Mapping[tuple[str, str], str] = {
    ("Signals", "entropy"): _signal("by_step", "entropy"),
    ("Signals", "base_entropy"): _signal("by_prompt", "entropy-delta"),
    ("Signals", "delta"): _signal("by_prompt", "entropy-delta"),
    ("Signals", "stds"): _signal("by_step", "step-noise"),
    ("Signals", "reward_mean"): _signal("by_prompt", "reward-mean"),
    ("Signals", "reward_std"): _signal("by_prompt", "reward-std"),
    ("StepReport", "entropy"): 'report.signals["entropy"].values, there if a part of the run reads it',
    ("StepReport", "delta"): 'report.signals["entropy-delta"].values, there if a part of the run reads it',
    ("StepReport", "evaluation"): (
        "the hook aegpo_on_evaluation(run, step, evaluation), which is told of step 0, before training, too; "
        "aegpo_on_step_end begins with step 1"
    ),
}

_SAW_STRINGS = ("reward", "model")  # other kinds were given prompts as records then, too
# Of Python ("expected str instance, Prompt found", "'Prompt' object is not iterable") and of tokenizers
_STRING_WANTED = re.compile(r"\bPrompt\b(?!\.)|^Text(Encode|Input)\w* must be")
_OF_STRINGS, _OF_PROMPTS = re.compile(r"\bstr\b"), re.compile(r"\bPrompt\b")


def declared(spec: type[BaseModel], base: type) -> str | None:
    """What a spec class declares as in aegpo 0.1 and how it is said now, in words that follow its name."""
    for name, line in DECLARED.items():
        sets = name in spec.model_fields or any(name in vars(cls) for cls in spec.__mro__)
        if sets and inspect.getattr_static(base, name, None) is None:
            return f"sets {name!r}, as in aegpo 0.1; write  {line}"
    return None


def renamed(owner: object, verb: str) -> str:
    """What to add where a verb is missing that had another name in aegpo 0.1; nothing for any other."""
    old = RENAMED.get(verb)
    return f"; it was {old!r} in aegpo 0.1" if old is not None and hasattr(owner, old) else ""


def takes_strings(own: Signature, asked: Signature) -> bool:
    """True if a parameter of a verb is annotated with strings where prompts are given, as in aegpo 0.1."""
    pairs = zip(own.parameters.values(), asked.parameters.values(), strict=False)
    said = [(str(mine.annotation), str(theirs.annotation)) for mine, theirs in pairs]
    return any(
        _OF_PROMPTS.search(theirs) and _OF_STRINGS.search(mine) and not _OF_PROMPTS.search(mine)
        for mine, theirs in said
    )


def told(error: BaseException, part: str) -> str:
    """A failure by its type and words, with what to write instead if the part was written for aegpo 0.1.

    Args:
        error: how it failed.
        part: its kind, such as ``reward``.
    """
    said = " ".join(str(error).split())  # an error is one line; the part's own traceback has all its words
    return f"{type(error).__name__}: {said}{_advice(error, part)}" if said else f"{type(error).__name__}"


def _advice(error: BaseException, part: str) -> str:
    if isinstance(error, AttributeError):
        instead = READ.get((type(error.obj).__name__, error.name or ""))
        if instead is not None:
            return f"; it was written for aegpo 0.1: use {instead}"
    if part in _SAW_STRINGS and _wants_strings(error):
        return "; it was written for aegpo 0.1, whose prompts were strings: use prompt.text"
    return ""


def _wants_strings(error: BaseException) -> bool:
    stringly = isinstance(error, AttributeError) and isinstance(error.obj, Prompt) and error.name in dir(str)
    unknown = isinstance(error, KeyError) and bool(error.args) and isinstance(error.args[0], Prompt)
    mistaken = isinstance(error, TypeError) and _STRING_WANTED.search(str(error)) is not None
    untokenized = isinstance(error, ValueError) and str(error).startswith("text input must be of type `str`")
    return stringly or unknown or mistaken or untokenized
