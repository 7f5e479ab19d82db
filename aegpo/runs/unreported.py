"""A step that was learned but whose evaluation failed: kept in the checkpoint, so that it is reported after all."""

from __future__ import annotations

from typing import Any

import numpy as np

from aegpo.core.records import FloatArray, Prompt, StepReport


def to_json(report: StepReport) -> dict[str, Any]:
    """Everything of a report without an evaluation; floats keep every bit."""
    assert report.evaluation is None
    return {
        "step": report.step,
        "metrics": {name: float(value) for name, value in report.metrics.items()},
        "prompts": [[prompt.index, prompt.text] for prompt in report.prompts],
        "counts": report.counts.tolist(),
        "selected": report.selected.tolist(),
        "entropy": None if report.entropy is None else report.entropy.tolist(),
        "delta": None if report.delta is None else report.delta.tolist(),
        "seconds": dict(report.seconds),
    }


def from_json(data: dict[str, Any]) -> StepReport:
    """The report that `to_json` was given."""
    return StepReport(
        step=data["step"],
        metrics=data["metrics"],
        prompts=tuple(Prompt(index, text) for index, text in data["prompts"]),
        counts=np.array(data["counts"], dtype=np.int64),
        selected=np.array(data["selected"], dtype=np.bool_),
        entropy=_floats(data["entropy"]),
        delta=_floats(data["delta"]),
        evaluation=None,
        seconds=data["seconds"],
    )


def _floats(values: list[Any] | None) -> FloatArray | None:
    return None if values is None else np.array(values, dtype=np.float64)
