"""The profile as tidy CSV: one observation a row, units in the column's name, empty where there is no value.

`entropy.csv`: a row for each policy, prompt, denoising step, layer and block.

    policy          base, or policy: that of the run at the profiled checkpoint
    prompt          the prompt's number, counted from 0; its text is in prompts.csv
    step            denoising step, counted from 0 at pure noise
    sigma           noise level before the step, 1 (noise) to 0 (image)
    layer           name of the module in the network
    kind            joint, self or cross
    block           joint: rows over all keys; image-text and its like: the first's rows, renormalised over the second's
                    keys; self, cross: as the layer
    entropy_nats    mean over heads and rows
    error_nats      standard error of that mean from measuring some rows only; 0 if all were measured
    normalised      entropy_nats / ln(valid_keys), in [0, 1]; empty for one key
    mass            mean probability that the rows give to the block's keys, in [0, 1]
    valid_keys      keys of the block that are not padding

`prompts.csv`: a row for each prompt.

    prompt          its number
    delta_nats      mean over steps of |policy - base| in the block that the experiment reads; empty for a base alone
    entropy_nats    mean over steps of the profiled policy in that block
    rollouts        what the experiment's allocator would give it; empty if that reads no entropy
    steps           denoising steps that would be chosen, separated by spaces
    text            the prompt
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from aegpo.report.csv_files import write_csv
from aegpo.report.profile.analysis import Analysis
from aegpo.report.profile.measure import Profile

ENTROPY = (
    *("policy", "prompt", "step", "sigma", "layer", "kind", "block"),
    *("entropy_nats", "error_nats", "normalised", "mass", "valid_keys"),
)
PROMPTS = ("prompt", "delta_nats", "entropy_nats", "rollouts", "steps", "text")


def write_csvs(analysis: Analysis, folder: Path) -> None:
    """Writes both files."""
    profiles = [("base", analysis.base)]
    profiles += [("policy", analysis.policy)] if analysis.policy is not None else []
    rows = (row for name, profile in profiles for row in _entropies(analysis, name, profile))
    write_csv(folder / "entropy.csv", ENTROPY, rows)
    write_csv(folder / "prompts.csv", PROMPTS, _prompts(analysis))


def _entropies(analysis: Analysis, name: str, profile: Profile) -> Iterator[Sequence[object]]:
    for block, values in profile.blocks.items():
        prompts, steps, layers = values.entropy.shape
        for prompt, step, layer in np.ndindex(prompts, steps, layers):
            place = (prompt, step, layer)
            entropy, keys = float(values.entropy[place]), float(values.valid_keys[place])
            if math.isnan(keys):
                continue  # this layer does not have the block
            where = (
                name,
                prompt,
                step,
                float(analysis.sigmas[step]),
                profile.layers[layer],
                profile.kinds[layer],
                block,
            )
            normalised = entropy / math.log(keys) if keys > 1 else math.nan
            yield *where, entropy, float(values.standard_error[place]), normalised, float(values.mass[place]), int(keys)


def _prompts(analysis: Analysis) -> Iterator[Sequence[object]]:
    delta, counts = analysis.delta(analysis.block), analysis.counts
    entropy = analysis.shown.curves(analysis.block).mean(axis=1)
    for prompt, text in enumerate(analysis.texts):
        moved = None if delta is None else float(delta[prompt])
        given = None if counts is None or not counts[prompt] else int(counts[prompt])
        steps = " ".join(str(step) for step in np.flatnonzero(analysis.chosen[prompt]))
        yield prompt, moved, float(entropy[prompt]), given, steps, text
