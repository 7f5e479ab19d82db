"""What several processes, and cutting a step into shards, cost in processor time; CPUs only.

    python tools/scaling.py experiments/ablation.yaml [--arm grpo --arm aegpo] [--steps 2] [--turns 3] [--set KEY=VALUE]

Takes turns: in each, one process with one shard, one process with eight, and two processes with two. Of each it takes
the processor time of the training steps after the first, of the busiest process. Two runs of one process go on at the
same time, so that both cores are as busy as with two processes. Printed are medians over turns:

    efficiency   T(1 process) / (2 max T(2 processes)): 1 is twice as fast on two cores
    shards       T(1 process, 8 shards) / T(1 process, 1 shard), and which stage the rest goes to
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from aegpo.train.engine import Engine

SETUPS = ((1, 1), (1, 8), (2, 2))  # processes, shards
STAGES = ("signals", "rollout", "reward", "update")


def processor_watch() -> type:
    """A stopwatch of processor time, for stages that wait for the other process."""
    from aegpo.train.stopwatch import Stopwatch

    class ProcessorWatch(Stopwatch):
        @contextmanager
        def __call__(self, stage: str) -> Iterator[None]:
            begin = time.process_time()
            yield
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.process_time() - begin

    return ProcessorWatch


def child(path: Path, arm: str, settings: tuple[str, ...], shards: int, steps: int) -> None:
    """One process of a run: prints its processor time a step, and by stage."""
    import torch

    import aegpo.train.engine
    from aegpo.config.loading import load_experiment_file
    from aegpo.parallel.team import Team
    from aegpo.plugin.manager import load_registries, plugin_manager
    from aegpo.train.engine import Engine

    torch.set_num_threads(1)
    team = Team.joined().cut(shards)
    experiment = load_experiment_file(path, load_registries(plugin_manager()), settings).arms[arm]
    team.use(30, torch.device("cpu"))
    engine = Engine.build(experiment, team)
    engine.step(1)
    with patch.object(aegpo.train.engine, "Stopwatch", processor_watch()):
        told = team.told("processor time", timed(engine, steps))
    if team.first:
        print(json.dumps(told))
    team.leave()


def timed(engine: Engine, steps: int) -> dict[str, Any]:
    """Processor time of a step of this process, in all and by stage."""
    begin, stages = time.process_time(), dict.fromkeys(STAGES, 0.0)
    for number in range(2, 2 + steps):
        seconds = engine.step(number).seconds
        stages = {stage: stages[stage] + seconds.get(stage, 0.0) / steps for stage in STAGES}
    return {"spent": (time.process_time() - begin) / steps, "stages": stages}


def measured(given: argparse.Namespace, arm: str, processes: int, shards: int) -> list[dict[str, Any]]:
    """What each process says: of one run, or of two that know nothing of each other."""
    runs = [started(given, arm, processes, shards) for _ in range(2 // processes)]
    found = []
    for run in runs:
        answers = [process.communicate()[0] for process in run]
        if any(process.returncode for process in run):
            raise SystemExit(f"a process of {arm} with {shards} shards failed")
        found += json.loads(answers[0])
    return found


def started(given: argparse.Namespace, arm: str, processes: int, shards: int) -> list[subprocess.Popen[str]]:
    """The processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable,
        __file__,
        str(given.file),
        "--arm",
        arm,
        "--steps",
        str(given.steps),
        "--child",
        str(shards),
    ]
    words += [word for setting in given.set for word in ("--set", setting)]
    group = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        told = {name: str(value) for name, value in {**place, "MASTER_PORT": port, "OMP_NUM_THREADS": 1}.items()}
        environment = {**os.environ, **told, "MASTER_ADDR": "127.0.0.1"}
        group.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
    return group


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="an experiment file")
    parser.add_argument("--arm", action="append", help="default: every one")
    parser.add_argument("--steps", type=int, default=2, help="training steps that are timed, after one that is not")
    parser.add_argument("--turns", type=int, default=3, help="of which the medians are taken")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of aegpo run")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        child(given.file, given.arm[0], tuple(given.set), given.child, given.steps)
        return
    for arm in given.arm:
        turns = [{setup: measured(given, arm, *setup) for setup in SETUPS} for _ in range(given.turns)]
        spent = [{setup: max(each["spent"] for each in turn[setup]) for setup in SETUPS} for turn in turns]
        one, cut, two = (statistics.median(each[setup] for each in spent) for setup in SETUPS)
        efficiency = statistics.median(each[SETUPS[0]] / (2 * each[SETUPS[2]]) for each in spent)
        shards = statistics.median(each[SETUPS[1]] / each[SETUPS[0]] for each in spent)
        print(f"{arm}: {one:.2f} s a step; 2 processes {two:.2f} s each, efficiency {efficiency:.3f}; ", end="")
        print(f"8 shards {cut:.2f} s, x {shards:.2f}")
        for stage in STAGES:
            each = [statistics.median(turn[setup][0]["stages"][stage] for turn in turns) for setup in SETUPS]
            print(f"    {stage:8} {each[0]:6.2f} s; 8 shards {each[1]:6.2f} s; 2 processes {each[2]:6.2f} s")


if __name__ == "__main__":
    main()
