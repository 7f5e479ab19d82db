"""`aegpo check`: what a file says, what its arms differ in, what each costs; loads no model but rewards to be tried."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.commands import begun_runs, describe
from aegpo.commands.footprints import footprints, gpu_memory, holdings
from aegpo.config.loading import ExperimentFile, load_experiment_file
from aegpo.core.footprint import Footprint
from aegpo.core.phases import replicas_refused
from aegpo.core.processes import Place
from aegpo.core.sections import GIB
from aegpo.core.sheets import print_sheet
from aegpo.core.terminals import say
from aegpo.errors import SettingError
from aegpo.method.balance import balances
from aegpo.method.costs import costs, unread_prompts
from aegpo.parallel.team import MOST_SUMMED_BY_TREE, Team
from aegpo.plugin.manager import load_registries, plugin_manager

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class CheckRequest:
    """What the command line asked for."""

    file: Path
    overrides: tuple[str, ...] = ()  # KEY=VALUE each
    out: Path = Path("runs")
    plugins: tuple[str, ...] = ()
    gpus: int | None = None  # of one run; None: nothing is said of several
    rewards: bool = False  # each is tried on images, for which it is loaded
    gpu_memory: float | None = None  # GiB of a GPU that is not here; None: those of the first one that is


def check(request: CheckRequest, console: Console) -> None:
    """Prints tables and, on standard error, warnings and notes.

    Raises:
        AegpoError: if the file, or a part that it names, has mistakes.
    """
    registries = load_registries(plugin_manager(request.plugins))
    loaded = load_experiment_file(request.file, registries, request.overrides)
    for warning in loaded.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    _check_replicas(loaded, request.gpus or 1)
    for warning in uneven_shards(loaded, request.gpus or 1):
        print(f"warning: {warning}", file=sys.stderr)
    for label in dict.fromkeys(label for arm in loaded.arms.values() for label in unread_prompts(arm)):
        print(f"note: the prompts of {label} are read when a run starts, not here", file=sys.stderr)
    for note in begun_runs.notes(loaded, request.out):
        print(f"note: {note}", file=sys.stderr)
    for line in describe.about(loaded):
        console.print(line, markup=False, highlight=False)
    if len(loaded.arms) > 1:
        print_sheet(describe.differences(loaded), console)
    print_sheet(describe.costs(loaded, costs(loaded.arms)), console)
    needs, room = footprints(loaded), None
    if needs:
        room = gpu_memory() if request.gpu_memory is None else int(request.gpu_memory * GIB)
        decided = needs if room is None else {arm: each.on(room) for arm, each in needs.items()}
        print_sheet(describe.memory(decided, room), console)
    if request.gpus is not None:
        _print_gpus(loaded, request.gpus, needs, room, console)
    if request.rewards:
        from aegpo.commands.try_rewards import try_rewards

        try_rewards(loaded, console)
    if loaded.measured is not None:
        say(console, f"measured: {loaded.measured}")


def uneven_shards(file: ExperimentFile, gpus: int) -> Iterator[str]:
    """A line for each number of shards that so many GPUs cannot share out evenly, or not with the same bits."""
    arms: dict[int, list[str]] = {}
    for arm, experiment in file.arms.items():
        if experiment.parallel.shards is not None:
            arms.setdefault(experiment.parallel.shards, []).append(arm)
    for shards, names in arms.items():
        where = "" if len(names) == len(file.arms) else f" of {', '.join(names)}"
        multiple = gpus * (-(-shards // gpus))
        if shards < gpus:
            yield (
                f"'parallel.shards: {shards}'{where} leaves {gpus - shards} of {gpus} GPUs without work; use at most "
                f"{shards} GPUs, or set a multiple of {gpus}: 'parallel.shards: {multiple}'"
            )
        elif shards % gpus:
            yield (
                f"'parallel.shards: {shards}'{where} cannot be shared out evenly among {gpus} GPUs, and results are "
                "those of one GPU to rounding only; use a number of GPUs that divides them, or set a multiple of "
                f"{gpus}: 'parallel.shards: {multiple}'"
            )
        elif not Team(Place(size=gpus), None, shards).exact:
            yield (
                f"'parallel.shards: {shards}'{where} has the same results, to the bit, on numbers of GPUs that are "
                f"powers of two, on {gpus} to rounding only; use such a number where the bits matter"
            )


def _check_replicas(file: ExperimentFile, gpus: int) -> None:
    for arm, experiment in file.arms.items():
        if (refused := replicas_refused(experiment.parallel, gpus)) is not None:
            where = () if len(file.arms) == 1 else (arm,)
            raise SettingError(refused, *where, "parallel", "replicas")


def _print_gpus(
    file: ExperimentFile, gpus: int, needs: dict[str, Footprint], room: int | None, console: Console
) -> None:
    shards = {arm: experiment.parallel.shards or gpus for arm, experiment in file.arms.items()}
    figures = {arm: balances(experiment, [(gpus, shards[arm])])[0] for arm, experiment in file.arms.items()}
    print_sheet(describe.on_gpus(file, gpus, figures), console)
    if held := holdings(file, gpus, needs, room):
        print_sheet(describe.by_phase(gpus, held, room), console)
    say(
        console,
        "parallel.shards: the same results, to the bit, on any number of GPUs that is a power of two and divides it "
        f"(of at most {MOST_SUMMED_BY_TREE:,} trained weights); null: the number of the first start",
    )
