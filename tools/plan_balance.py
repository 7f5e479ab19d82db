"""How evenly the plans of an experiment can be shared out among processes, as a table for tools/BENCHMARKS.md.

    python tools/plan_balance.py experiments/flux_aegpo.yaml --arm aegpo
    python tools/plan_balance.py experiments/ablation.yaml --arm grpo --arm aegpo --gpus 2 4 8 --shards 64

Exact arithmetic on the plans that `aegpo check` makes, for one shard a process unless `--shards` says how many there
are in all; nothing is loaded or timed. Dearest: forwards of the process with most, in those of an even share of the
plan's. Repeated: forwards that one process would not make, in those that it would. Ranges are over plans.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from aegpo.config.loading import load_experiment_file
from aegpo.core.experiment import Experiment
from aegpo.method.balance import balances
from aegpo.plugin.manager import load_registries, plugin_manager

GPUS = (2, 4, 8, 16, 32, 64)


def table(experiments: Iterable[tuple[str, Experiment]], gpus: Sequence[int], shards: int | None) -> list[str]:
    """Two rows for each experiment of a name: dearest, and repeated in per cent."""
    lines = ["| plan | " + " | ".join(map(str, gpus)) + " |", "| --- |" + " ---: |" * len(gpus)]
    for name, experiment in experiments:
        found = balances(experiment, [(number, shards or number) for number in gpus])
        percent = [(f"{100 * each.repeated.low:.0f}", f"{100 * each.repeated.high:.0f}") for each in found]
        cells = [f"{low} %" if low == high else f"{low}-{high} %" for low, high in percent]
        lines.append(f"| {name}: dearest | " + " | ".join(str(each.dearest) for each in found) + " |")
        lines.append(f"| {name}: repeated | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="+", help="an experiment file")
    parser.add_argument("--arm", action="append", help="may be repeated; default: every arm of the files")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, metavar="N", help="numbers of processes")
    parser.add_argument("--shards", type=int, help="default: as many as processes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of aegpo run")
    given = parser.parse_args()
    registries, found = load_registries(plugin_manager()), list[tuple[str, Experiment]]()
    for path in given.file:
        arms = load_experiment_file(path, registries, tuple(given.set)).arms
        found += [(f"{path.stem} {arm}", each) for arm, each in arms.items() if not given.arm or arm in given.arm]
    if not found or min([*given.gpus, given.shards or 1]) < 1:
        parser.error("no such arm in these files" if not found else "--gpus and --shards are at least 1")
    print("\n".join(table(found, given.gpus, given.shards)))


if __name__ == "__main__":
    main()
