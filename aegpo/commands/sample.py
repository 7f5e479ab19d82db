"""`aegpo sample`: what a policy paints beside its base, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.commands.telling import tell_missing
from aegpo.core.files import whole_folder, write_json
from aegpo.core.processes import refuse_several_processes
from aegpo.core.records import Prompt
from aegpo.errors import AegpoError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.files import read_file
from aegpo.prompts.lists import numbered
from aegpo.runs.opening import find_run

if TYPE_CHECKING:
    from aegpo.report.picture_sheet import Picture
    from aegpo.train.policy import Policy

BASE, POLICY = "base", "policy"


@dataclass(frozen=True)
class SampleRequest:
    """What the command line asked for."""

    run: Path
    prompts: tuple[str, ...] = ()
    file: Path | None = None  # of more prompts
    checkpoint: int | None = None  # None: the newest
    seed: int | None = None  # None: of the run's evaluations
    steps: int | None = None  # denoising steps; None: as evaluation
    out: Path | None = None
    plugins: tuple[str, ...] = ()


def sample(request: SampleRequest) -> Path:
    """Paints every prompt with the policy and with the base.

    Returns:
        The folder, which is whole or absent: `grid.png`, `base/00000.png`, `policy/00000.png`, ... and `samples.json`.

    Raises:
        AegpoError: if there is no such run or prompt, or the folder cannot be made.
    """
    refuse_several_processes()
    registries = load_registries(plugin_manager(request.plugins))
    run = find_run(request.run, registries, request.checkpoint, only_policy=True)
    tell_missing(run.missing)
    prompts = numbered((*request.prompts, *(() if request.file is None else read_file(request.file))))
    if not prompts:
        raise AegpoError("there is nothing to paint; give --prompt TEXT (as often as you like) or --prompts FILE")
    name = f"{run.experiment.name}-{run.arm}-seed-{run.seed}-step-{run.step:06d}"
    out = request.out or Path("samples") / name

    from aegpo.report.picture_sheet import Row, save_pictures, sheet
    from aegpo.train.policy import Policy

    with whole_folder(out) as made:
        policy, seed = Policy(run.experiment), run.experiment.evaluation.seed if request.seed is None else request.seed
        policy.weights.take(run.weights(), run.where)
        base, trained = paint_both(policy, prompts, seed, request.steps)
        for folder, images in ((BASE, base), (POLICY, trained)):
            save_pictures(images, made / folder)
        texts = [prompt.text for prompt in prompts]
        rows = [Row(*each) for each in zip(texts, zip(base, trained, strict=True), strict=True)]
        sheet(rows, (BASE, f"{POLICY}, step {run.step}")).save(made / "grid.png")
        how = {"run": str(run.folder), "step": run.step, "seed": seed, "prompts": texts}
        write_json(made / "samples.json", how | {"denoising_steps": len(policy.painting(request.steps).sigmas) - 1})
    return out


def paint_both(
    policy: Policy, prompts: Sequence[Prompt], seed: int, steps: int | None
) -> tuple[list[Picture], list[Picture]]:
    """Each prompt as the base and the policy paint it from one noise."""
    from aegpo.report.picture_sheet import pictures

    policy.prepare(prompts)
    how = policy.painting(steps)
    base: list[Picture] = []
    trained: list[Picture] = []
    for first in range(0, len(prompts), how.micro_batch):
        part = prompts[first : first + how.micro_batch]
        noise = policy.evaluation_noise(part, seed)
        with policy.base():
            base += pictures(policy.images(part, noise, how))
        trained += pictures(policy.images(part, noise, how))
    return base, trained
