"""Which evaluations a run has, and which of them are missing from its record."""

from __future__ import annotations

from collections.abc import Collection, Sequence

_SHOWN = 5  # steps that a message names


def evaluated_steps(training_steps: int, every: int) -> tuple[int, ...]:
    """After which training steps a run scores the held-out prompts; 0 is before training."""
    return tuple(step for step in range(training_steps + 1) if step % every == 0 or step == training_steps)


def unevaluated(recorded: Collection[int], due: Sequence[int], until: int) -> str:
    """The evaluations that should be recorded once step `until` is done and are not, in words; empty if all are."""
    lost = [step for step in due if step <= until and step not in recorded]
    after = [str(step) for step in lost if step > 0]
    if len(after) > _SHOWN:
        after = [*after[: _SHOWN - 1], f"{len(after) - _SHOWN + 1} more"]
    many = "s" * (len(after) > 1)
    words = ["the evaluation before training"] if 0 in lost else []
    words += [f"the evaluation{many} after step{many} {', '.join(after)}"] if after else []
    return " and ".join(words)
