"""What services are told of a step and of an evaluation: the record's numbers, and beside them those others log.

Our names stay as `metrics.jsonl` has them. Only `reward/NAME` is told as `reward_NAME`, for MLflow's file store takes a
number for a file and cannot have one called `reward` beside a folder of that name.

    reward_NAME           mean over the step's prompts of the mean of reward NAME over a prompt's rollouts
    reward_std_mean       mean over prompts of the std (n - 1) of the weighted reward over a prompt's rollouts
    zero_std_ratio        prompts whose rollouts all have one and the same weighted reward / prompts, in [0, 1]
    ratio_mean            mean of r = exp(log p - log p_old), as the loss is averaged; `objective` says what its r is
    ratio_std             sqrt(mean((r - 1)^2) - (mean(r) - 1)^2), averaged as ratio_mean
    approx_kl             mean of (log r)^2 / 2 (Schulman, "Approximating KL Divergence", k2); exact where
                          `objective: divergence-masked`
    clipfrac              share of transitions whose gradient the clip range (or the mask) has cut off, in [0, 1]
    kl_loss               mean KL to the base policy, not multiplied by beta; only where beta > 0. Gaussian, whatever
                          `kl_units`; Flow-GRPO's number of this name is in its own units
    grad_norm             norm of all gradients before they are clipped, mean over the step's updates
    learning_rate         of the step's last update; only where it varies
    images_per_second     rollouts of the step / seconds of all its stages
    seconds/STAGE         wall-clock

    rollouts_per_prompt/min, /mean, /max     over the prompts of the step
    chosen_steps/share_T                     share of prompts for which denoising step T explores and learns
    chosen_steps/per_prompt                  chosen steps of a prompt, the mean
    signal/NAME/mean                         over all that is known of a signal, in its own units
    signal/NAME/step_T                       over the step's prompts, at denoising step T

The first names are those of TRL, DDPO and Flow-GRPO and mean there what they mean here; where ours differ, it is said.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aegpo.core.records import Signal
from aegpo.core.reports import Evaluation, StepReport

STANDARD = {"reward_std": "reward_std_mean", "ratio": "ratio_mean", "clipped": "clipfrac", "kl": "kl_loss"}
_REWARD = "reward/"


def step_numbers(report: StepReport) -> dict[str, float]:
    """Every number of a training step by its name at services; what is not known is left out."""
    metrics = report.metrics
    found = {_told(name): float(value) for name, value in metrics.items()}
    found |= {other: float(metrics[name]) for name, other in STANDARD.items() if name in metrics}
    found |= {name: float(value) for name, value in report.unrecorded.items()}
    seconds = sum(report.seconds.values())
    if seconds > 0:
        found["images_per_second"] = float(report.counts.sum()) / seconds
    found |= {f"seconds/{stage}": float(value) for stage, value in report.seconds.items()}
    found |= _decisions(report)
    for name, signal in report.signals.items():
        found |= _signal(f"signal/{name}", signal)
    return found


def _told(name: str) -> str:
    return f"reward_{name.removeprefix(_REWARD)}" if name.startswith(_REWARD) else name


def _decisions(report: StepReport) -> dict[str, float]:
    """What allocator and selector decided."""
    counts, chosen = report.counts, report.selected  # (P,), (P, T)
    if len(counts) == 0:
        return {}
    found = {"min": counts.min(), "mean": counts.mean(), "max": counts.max()}
    shares = {f"chosen_steps/share_{step}": float(share) for step, share in enumerate(chosen.mean(axis=0))}
    rollouts = {f"rollouts_per_prompt/{name}": float(value) for name, value in found.items()}
    return {**rollouts, **shares, "chosen_steps/per_prompt": float(chosen.sum(axis=1).mean())}


def _signal(name: str, signal: Signal) -> dict[str, float]:
    """The means of a signal over what is known of it."""
    found = {f"{name}/mean": _mean(signal.values)}
    if signal.per != "prompt":
        found |= {f"{name}/step_{step}": _mean(signal.values[..., step]) for step in range(signal.values.shape[-1])}
    return {key: value for key, value in found.items() if value is not None}


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def evaluation_numbers(evaluation: Evaluation) -> dict[str, float]:
    """Means over the held-out prompts: of the policy's scores, of the base's, and of what was gained, by reward."""
    found: dict[str, float] = {}
    for label, scores in evaluation.scores.items():
        base = evaluation.base_scores[label]
        found |= {f"evaluation/{label}": float(scores.mean()), f"evaluation_base/{label}": float(base.mean())}
        found[f"evaluation_gain/{label}"] = float((scores - base).mean())
    return {**found, "seconds/evaluation": evaluation.seconds}


def flat(options: Mapping[str, object], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested options as services take them: by dotted keys, lists as text; what is null is the text `null`."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in options.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
            found |= flat({str(number): each for number, each in enumerate(value)}, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else _text(value)
    return found


def _text(value: object) -> str:
    return "null" if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
