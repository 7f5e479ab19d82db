"""Measures what the project promises about its own speed, as ratios, in one run.

    python tools/bench.py engine
    python tools/bench.py entropy
    python tools/bench.py probe
    python tools/bench.py delta
    python tools/bench.py methods
    python tools/bench.py rewards

print the figures and write them to tools/BENCHMARKS.md, with the command, the date and the machine. Wall-clock on a
busy machine is an upper bound; the load at the start is part of the record.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar
from unittest.mock import patch

import numpy as np
import torch

import aegpo.method.signals.entropy_probe
import aegpo.train.engine
from aegpo.config.loading import load_experiment_file
from aegpo.core.contracts import check_forest
from aegpo.core.experiment import Experiment
from aegpo.core.records import Conditioning, RolloutPlan
from aegpo.core.reports import StepReport
from aegpo.method.trees import BranchingTree, IndependentTree
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.train.engine import Engine
from aegpo.train.noise import StepNoise
from aegpo.train.precision import Precision
from aegpo.train.rollouts import roll_out
from aegpo.train.stopwatch import Stopwatch

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tools" / "BENCHMARKS.md"
ABLATION = "experiments/ablation.yaml"
MODEL_KINDS = ("forward", "backward", "reward", "decode")
OTHER_KINDS = ("entropy", "optimizer", "rest")
STAGES = ("signals", "plan", "rollout", "reward", "update", "between")
LEAVES, STEPS, SPLITS = 16, 20, (0, 3, 6, 9)
COMMANDS = (("--help",), ("check", ABLATION), ("plugins",))
MAX_OUTSIDE, MAX_BRANCHING, MAX_START = 0.05, 0.75, 0.6

P = ParamSpec("P")
V = TypeVar("V")


@dataclass(frozen=True)
class Figure:
    """One measured figure and the most it should be."""

    what: str
    value: float
    most: float

    def __str__(self) -> str:
        verdict = "reached" if self.value <= self.most else "missed"
        return f"| {self.what} | {self.value:.3f} | {self.most:.2f} | {verdict} |"


# --- where a training step spends its time -----------------------------------------------------------------------


class Clock:
    """Wall-clock seconds by stage and kind; what a nested call takes is not counted for its caller again."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._place = ("between", "rest")
        self._since = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside, time belongs to a stage."""
        with self._at((name, "rest")):
            yield

    @contextmanager
    def kind(self, name: str) -> Iterator[None]:
        """Inside, time is of a kind."""
        with self._at((self._place[0], name)):
            yield

    @contextmanager
    def _at(self, place: tuple[str, str]) -> Iterator[None]:
        self.book()
        before, self._place = self._place, place
        try:
            yield
        finally:
            self.book()
            self._place = before

    def book(self) -> None:
        """Books the time since the last booking on the present place."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._place] += now - self._since
        self._since = now

    def forget(self) -> None:
        """Starts over."""
        self.book()
        self.seconds.clear()

    def total(self, stage: str | None = None, kind: str | None = None) -> float:
        """Seconds of a stage, of a kind, of both or of all."""
        return sum(
            seconds
            for (in_stage, of_kind), seconds in self.seconds.items()
            if stage in (None, in_stage) and kind in (None, of_kind)
        )


def _timed(clock: Clock, kind: str, function: Callable[P, V]) -> Callable[P, V]:
    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> V:
        with clock.kind(kind):
            return function(*args, **kwargs)

    return call


@contextmanager
def profiled(engine: Engine, clock: Clock) -> Iterator[None]:
    """Inside, the engine's calls of the network, rewards, decoder and optimizer are booked on the clock."""

    class StageWatch(Stopwatch):
        @contextmanager
        def __call__(self, stage: str) -> Iterator[None]:
            with clock.stage(stage), super().__call__(stage):
                yield

    model = type(engine.policy.model)
    calls: set[tuple[object, str, str]] = {
        (model, "velocity", "forward"),
        (model, "encode", "forward"),
        (model, "decode", "decode"),
        (Precision, "backward", "backward"),
        (Precision, "step", "optimizer"),
        (aegpo.method.signals.entropy_probe, "measure_call", "entropy"),
    }
    calls |= {(type(each.reward), "score", "reward") for each in engine.rewards}
    with ExitStack() as stack:
        stack.enter_context(patch.object(aegpo.train.engine, "Stopwatch", StageWatch))
        for owner, name, kind in calls:
            stack.enter_context(patch.object(owner, name, _timed(clock, kind, getattr(owner, name))))
        yield


def profile_steps(experiment: Experiment, steps: int) -> tuple[Clock, list[StepReport]]:
    """Seconds of `steps` training steps of one arm, after two for warming up, and their reports."""
    engine = Engine.build(experiment)
    clock = Clock()
    with profiled(engine, clock):
        for number in (1, 2):
            engine.step(number)
        clock.forget()
        reports = [engine.step(number) for number in range(3, 3 + steps)]
        clock.book()
    return clock, reports


def profile_table(arm: str, clock: Clock, reports: Sequence[StepReport]) -> list[str]:
    """Milliseconds of a step by stage and kind."""
    scale = 1000 / len(reports)
    kinds = MODEL_KINDS + OTHER_KINDS
    forwards = [report.metrics["forwards"] + report.metrics["signal_forwards"] for report in reports]
    edges = [report.metrics["trained_edges"] for report in reports]
    lines = [
        f"Arm `{arm}`, ms of a step, mean of {len(reports)} ({np.mean(forwards):.0f} forwards, {np.mean(edges):.0f} "
        "trained edges):",
        "",
        f"| stage | {' | '.join(kinds)} | all |",
        f"| --- |{' ---: |' * (len(kinds) + 1)}",
    ]
    for stage in STAGES:
        cells = [scale * clock.total(stage, kind) for kind in kinds] + [scale * clock.total(stage)]
        lines.append(f"| {stage} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    sums = [scale * clock.total(kind=kind) for kind in kinds] + [scale * clock.total()]
    return [*lines, f"| all | {' | '.join(f'{cell:.1f}' for cell in sums)} |", ""]


def bench_profile(arms: Sequence[tuple[str, Experiment]], steps: int) -> tuple[list[Figure], list[str]]:
    """Shares of a step: outside model, reward and decode; and, where entropy is read, the probe."""
    figures: list[Figure] = []
    shares: list[str] = []
    tables: list[str] = []
    for arm, experiment in arms:
        clock, reports = profile_steps(experiment, steps)
        outside = sum(clock.total(kind=kind) for kind in OTHER_KINDS) / clock.total()
        figures.append(
            Figure(f"share of a step outside forward, backward, reward, decode: `{arm}`", outside, MAX_OUTSIDE)
        )
        if "entropy" in experiment.sources:
            probe, entropy = clock.total("signals") / clock.total(), clock.total(kind="entropy") / clock.total()
            shares.append(
                f"Entropy probe of `{arm}`: {probe:.3f} of a step with its own forwards, of which {entropy:.3f} "
                "measure entropy (counted as outside above)."
            )
        tables += profile_table(arm, clock, reports)
    return figures, [*tables, *shares, ""]


# --- what a shared prefix saves ----------------------------------------------------------------------------------


class _Counter:
    """Counts the rows the network is evaluated on."""

    def __init__(self) -> None:
        self.rows = 0


def bench_branching(experiment: Experiment, repeats: int) -> tuple[list[Figure], list[str]]:
    """Wall-clock of a branching rollout as a share of independent rollouts with the same leaves."""
    wanted = experiment.rollouts.model_copy(update={"denoising_steps": STEPS})
    engine = Engine.build(experiment.model_copy(update={"rollouts": wanted}))
    step = engine.asked(1)
    figures: list[Figure] = []
    lines: list[str] = []
    for prompts in sorted({1, len(step)}):
        cond = engine.policy.model.encode(step[:prompts])
        plans = [_plan(tree, prompts) for tree in (BranchingTree(), IndependentTree())]
        seconds = [[_execute(engine, plan, cond) for plan in plans] for _ in range(repeats + 1)][1:]
        (tree, tree_cpu), (apart, apart_cpu) = np.min(seconds, axis=0)  # (2, 2): plan, wall and processor
        what = f"rollout, {prompts} prompt{'s' * (prompts > 1)}: tree with {LEAVES} leaves / {LEAVES} independent"
        figures.append(Figure(what, tree / apart, MAX_BRANCHING))
        counts = " against ".join(f"{plan.forwards:,}" for plan in plans)
        lines.append(
            f"{prompts} prompt{'s' * (prompts > 1)}: {1000 * tree:.0f} ms against {1000 * apart:.0f} ms (best of "
            f"{repeats} each); forwards {counts}, exactly as planned: {plans[0].forwards / plans[1].forwards:.3f}; "
            f"processor time {tree_cpu / apart_cpu:.3f}."
        )
    return figures, [*lines, ""]


def _plan(tree: BranchingTree | IndependentTree, prompts: int) -> RolloutPlan:
    chosen = np.zeros((prompts, STEPS), dtype=np.bool_)
    chosen[:, SPLITS] = True
    leaves = np.full(prompts, LEAVES, dtype=np.int64)
    plan = tree.plan(leaves, chosen, np.random.default_rng(0))
    check_forest("the benchmark", plan, leaves, chosen.shape[1])
    return plan


def _execute(engine: Engine, plan: RolloutPlan, cond: Conditioning) -> tuple[float, float]:
    """Seconds of one execution, which must cost exactly the plan's forwards: on the wall, and of processor time."""
    counter = _Counter()

    def velocity(latents: torch.Tensor, sigma: torch.Tensor, chosen: Conditioning) -> torch.Tensor:
        counter.rows += len(latents)
        return engine.policy.how.velocity(latents, sigma, chosen)

    clock, begin = Clock(), time.process_time()
    rollouts = roll_out(replace(engine.policy.how, velocity=velocity), plan, cond, StepNoise(0))
    clock.book()
    processor = time.process_time() - begin
    if counter.rows != plan.forwards or len(rollouts.images) != plan.num_rollouts:
        raise SystemExit(f"{counter.rows} forwards were made, but the plan says {plan.forwards}")
    return clock.total(), processor


# --- how fast the command line answers ---------------------------------------------------------------------------


def bench_start(repeats: int) -> tuple[list[Figure], list[str]]:
    """Best wall-clock of commands that should answer at once."""
    script = str(Path(sysconfig.get_path("scripts")) / "aegpo")
    figures = []
    for words in COMMANDS:
        seconds = min(_seconds([script, *words]) for _ in range(repeats))
        figures.append(Figure(f"`{shlex.join(['aegpo', *words])}`, s, best of {repeats}", seconds, MAX_START))
    bare = min(_seconds([sys.executable, "-c", "pass"]) for _ in range(repeats))
    return figures, [f"Python alone starts in {bare:.3f} s.", ""]


def _seconds(command: Sequence[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


# --- the record --------------------------------------------------------------------------------------------------


def machine(threads: int) -> str:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        rows = [row for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")]
        cpu = rows[0].partition(":")[2].strip() if rows else cpu
    parts = [cpu, f"{os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)} used"]
    parts += [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([*parts, f"Python {platform.python_version()}", f"torch {torch.__version__}"])


def write_section(path: Path, title: str, lines: Sequence[str]) -> None:
    """Puts a section into the record, in place of one with the same title."""
    text = path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n\nWritten by `tools/bench.py`.\n"
    before, *sections = text.rstrip("\n").split("\n## ")
    sections = [section.strip("\n") for section in sections if section.partition("\n")[0] != title]
    sections.append("\n".join([title, "", *lines]).strip("\n"))
    path.write_text("\n\n## ".join([before.strip("\n"), *sections]) + "\n", encoding="utf-8")


def engine_figures(options: argparse.Namespace) -> list[tuple[list[Figure], list[str]]]:
    """What the engine costs beside the network, and how fast the command line answers."""
    file = load_experiment_file(options.file, load_registries(plugin_manager()), options.set)
    unknown = [arm for arm in options.arm if arm not in file.arms]
    if unknown:
        raise SystemExit(f"{options.file} has no arm {', '.join(unknown)}; known: {', '.join(file.arms)}")
    arms = [(arm, file.arms[arm]) for arm in options.arm]
    return [
        bench_start(options.repeats),
        bench_branching(arms[-1][1], options.repeats),
        bench_profile(arms, options.steps),
    ]


def entropy_figures(options: argparse.Namespace) -> list[tuple[list[Figure], list[str]]]:
    """What the measure of attention entropy costs, and how exact it is."""
    from bench_entropy import bench_entropy  # beside this script

    figures, lines = bench_entropy(options.repeats)
    return [([Figure(*figure) for figure in figures], lines)]


def probe_figures(options: argparse.Namespace) -> list[tuple[list[Figure], list[str]]]:
    """What the probe's options cost and keep, on the last of the chosen arms."""
    from bench_probe import bench_probe  # beside this script

    file = load_experiment_file(options.file, load_registries(plugin_manager()), options.set)
    figures, lines = bench_probe(file.arms[options.arm[-1]], options.train, options.batches)
    return [([Figure(*figure) for figure in figures], lines)]


def delta_figures(options: argparse.Namespace) -> list[tuple[list[Figure], list[str]]]:
    """What else delta-entropy may be, on the last of the chosen arms."""
    from bench_probe import bench_delta  # beside this script

    file = load_experiment_file(options.file, load_registries(plugin_manager()), options.set)
    return [([], bench_delta(file.arms[options.arm[-1]], options.train, options.batches))]


def methods_figures(options: argparse.Namespace) -> list[tuple[list[Figure], list[str]]]:
    """What a training step of every published method costs, as a ratio to GRPO's."""
    from bench_methods import methods_table  # beside this script

    return [([], methods_table(options.steps))]


def rewards_figures(options: argparse.Namespace) -> list[tuple[list[Figure], list[str]]]:
    """What scoring during the rollouts saves, on the chosen arms."""
    from bench_rewards import rewards_table  # beside this script

    file = load_experiment_file(options.file, load_registries(plugin_manager()), options.set)
    figures, lines = rewards_table({arm: file.arms[arm] for arm in options.arm}, options.steps)
    return [([Figure(*figure) for figure in figures], lines)]


BENCHMARKS = {
    "engine": engine_figures,
    "entropy": entropy_figures,
    "probe": probe_figures,
    "delta": delta_figures,
    "methods": methods_figures,
    "rewards": rewards_figures,
}


def report(options: argparse.Namespace) -> list[str]:
    """Runs everything and returns the section's lines."""
    load = os.getloadavg()[0]
    measured = BENCHMARKS[options.what](options)
    command, today = shlex.join(["python", "tools/bench.py", *sys.argv[1:]]), datetime.datetime.now(tz=datetime.UTC)
    return [
        f"`{command}`, {today:%Y-%m-%d}, {machine(options.threads)}; load average at the start {load:.1f}.",
        "",
        "| figure | measured | at most | |",
        "| --- | ---: | ---: | --- |",
        *(str(figure) for figures, _ in measured for figure in figures),
        "",
        *(line for _, lines in measured for line in lines),
    ]


def command_line() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(BENCHMARKS), help="which benchmark")
    parser.add_argument("--file", type=Path, default=ROOT / ABLATION, help="experiment that is profiled")
    parser.add_argument("--arm", action="append", help="arms that are profiled (default: grpo and aegpo)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in aegpo run")
    parser.add_argument("--steps", type=int, default=5, help="training steps profiled for each arm")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions of which the best counts")
    parser.add_argument("--train", type=int, default=15, help="probe, delta: training steps before measuring")
    parser.add_argument("--batches", type=int, default=12, help="probe, delta: training steps' prompts measured")
    parser.add_argument("--threads", type=int, default=1, help="as a run has when it shares the cores with others")
    parser.add_argument("--print-only", action="store_true", help="leave tools/BENCHMARKS.md as it is")
    return parser


def main() -> None:
    """Measures, prints and records."""
    options = command_line().parse_args()
    options.arm = options.arm or ["grpo", "aegpo"]
    torch.set_num_threads(options.threads)
    lines = report(options)
    print("\n".join(lines))
    if not options.print_only:
        write_section(RECORD, f"{options.what}, {torch.device('cuda' if torch.cuda.is_available() else 'cpu')}", lines)


if __name__ == "__main__":
    main()
