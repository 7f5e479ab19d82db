"""What each option of the entropy probe costs, and how well it keeps the exact probe's choices.

A policy is trained for some steps; then every setting measures the same prompts, a training step's at a time, and is
compared with the exact probe: all steps, all rows. Costs are processor time, so that a busy machine does not matter
much, as a share of a training step with that probe. The frontier of price and agreement is drawn, too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from probe_frontier import Point, draw
from probe_of_flux import flux_lines

from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Policy
from aegpo.core.records import BoolArray, FloatArray, Prompt, Signal
from aegpo.core.signals import Measurement, Signals
from aegpo.method.planning import LATE, Planner
from aegpo.method.signals import EntropySignal
from aegpo.method.signals.entropy_options import ENTROPY, ENTROPY_DELTA
from aegpo.report.statistics import spearman
from aegpo.train.engine import Engine

EXACT = EntropySignal()
ALL_STEPS = tuple(range(10))
SETTINGS: Mapping[str, EntropySignal] = {
    "exact: all steps, all rows": EXACT,
    "rows 25": EntropySignal(rows=25),
    "rows 12": EntropySignal(rows=12),
    "rows 6": EntropySignal(rows=6),
    "steps 0-6": EntropySignal(steps=ALL_STEPS[:7]),
    "steps 0-4": EntropySignal(steps=ALL_STEPS[:5]),
    "steps 0-3": EntropySignal(steps=ALL_STEPS[:4]),
    "steps 0, 3, 5, 8": EntropySignal(steps=(0, 3, 5, 8)),
    "stride 2": EntropySignal(stride=2),
    "stride 3": EntropySignal(stride=3),
    "stride 4": EntropySignal(stride=4),
    "stride 2, rows 25": EntropySignal(stride=2, rows=25),
    "source rollout": EntropySignal(source="rollout"),
    "source rollout, stride 2": EntropySignal(source="rollout", stride=2),
    "source rollout, stride 3": EntropySignal(source="rollout", stride=3),
    "source rollout, steps 0-4": EntropySignal(source="rollout", steps=ALL_STEPS[:5]),
    "source rollout, steps 0-4, rows 12": EntropySignal(source="rollout", steps=ALL_STEPS[:5], rows=12),
    "samples 2": EntropySignal(samples=2),
    "samples 4": EntropySignal(samples=4),
    "the exact one from other noise": EntropySignal(seed=1),
}
DELTAS: Mapping[str, EntropySignal] = {  # other readings of the paper's words, against the default
    "absolute, the base on its own latents": EXACT,
    "signed": EntropySignal(delta="signed"),
    "relative": EntropySignal(delta="relative"),
    "the base on the policy's latents": EntropySignal(base_on="policy"),
    "signed, the base on the policy's latents": EntropySignal(delta="signed", base_on="policy"),
    "absolute from other noise": EntropySignal(seed=1),
}
PICTURE = Path(__file__).with_name("probe-frontier.png")
AGES = (2, 5, 10)  # training steps since a curve was measured
TARGET_SHARE, TARGET_AGREEMENT = 0.05, 0.9


@dataclass
class Result:
    """One setting over all training steps tried."""

    forwards_first: float = 0.0  # of a training step whose prompts were never measured
    forwards_again: float = 0.0  # of one whose base entropies are known
    saved: float = 0.0  # forwards that the rollouts need not make
    seconds_first: float = 0.0
    seconds_again: float = 0.0
    spearman: list[float] = field(default_factory=list)
    halves: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


class Bench:
    """A trained engine, and the exact probe's answers on the prompts that come next."""

    def __init__(self, experiment: Experiment, train: int, batches: int) -> None:
        self.engine = Engine.build(experiment.model_copy(update={"signals": {"entropy": EXACT}}))
        self.planner = Planner.build(experiment)
        self.snapshots: dict[int, dict[str, torch.Tensor]] = {}
        self.rest = [0.0, 0.0]  # processor seconds of steps without the probe, and steps
        for number in range(1, train + 1):
            self._train(number)
        self.batches = [self.engine.asked(train + 1 + each) for each in range(batches)]
        self.exact, _ = self.run(EXACT)
        self.per_forward = self._per_forward()

    def _train(self, number: int) -> None:
        sources = self.engine.sources.built
        probe = sources["entropy"]
        spent = [0.0]
        measure = probe.measure

        class Timed:
            """The probe with a clock."""

            def measure(self, step: int, prompts: Sequence[Prompt], policy: Policy) -> Measurement:
                begin = time.process_time()
                found = measure(step, prompts, policy)
                spent[0] += time.process_time() - begin
                return found

        sources["entropy"] = Timed()
        begin = time.process_time()
        self.engine.step(number)
        whole = time.process_time() - begin
        sources["entropy"] = probe
        if number > 2:  # after warming up
            self.rest = [self.rest[0] + whole - spent[0], self.rest[1] + 1]
        self.snapshots[number] = {name: value.clone() for name, value in self.engine.learner.state_dict().items()}

    @property
    def step_seconds(self) -> float:
        """Processor seconds of a training step without its probe."""
        return self.rest[0] / self.rest[1]

    def run(self, spec: EntropySignal) -> tuple[list[Measurement], tuple[float, float]]:
        """What a setting measures for every batch, and its seconds: with the base unknown, and known."""
        first = again = 0.0
        found: list[Measurement] = []
        for batch in self.batches:
            probe = spec.build(self.engine.experiment)
            begin = time.process_time()
            found.append(probe.measure(1, batch, self.engine.policy))
            middle = time.process_time()
            probe.measure(2, batch, self.engine.policy)
            first, again = first + middle - begin, again + time.process_time() - middle
        return found, (first / len(found), again / len(found))

    def _per_forward(self) -> float:
        """Processor seconds of one velocity evaluation in a batch of the rollout's size."""
        how = self.engine.policy.how
        cond = self.engine.policy.encode(self.batches[0])
        rows = torch.arange(how.micro_batch) % len(self.batches[0])
        latents = torch.randn(how.micro_batch, *self.engine.policy.model.latent_shape)
        begin = time.process_time()
        for level in range(3):
            with torch.no_grad():
                how.velocity(latents, how.sigmas[level].expand(len(latents)), cond.select(rows))
        return (time.process_time() - begin) / (3 * how.micro_batch)

    def compare(self, found: Sequence[Measurement], result: Result) -> None:
        """Adds how well each batch agrees with the exact probe."""
        for one, exact in zip(found, self.exact, strict=True):
            mine, theirs = self.decide(one), self.decide(exact)
            delta, wanted_delta = (each.by_prompt(ENTROPY_DELTA) for each in (mine, theirs))
            result.spearman.append(spearman(delta, wanted_delta))
            result.halves.append(float((upper(delta) == upper(wanted_delta)).mean()))
            chosen, wanted = self.steps(mine), self.steps(theirs)
            result.steps.append(float((chosen & wanted).sum() / wanted.sum()))

    def decide(self, probed: Measurement) -> Signals:
        """What the parts are told, after any warm-up."""
        entropy, delta = probed.values[ENTROPY], probed.values[ENTROPY_DELTA]
        known = {ENTROPY: Signal("prompt-step", entropy), ENTROPY_DELTA: Signal("prompt", delta)}
        return Signals(LATE, len(entropy), self.engine.experiment.sigmas, known)

    def steps(self, signals: Signals) -> BoolArray:  # (P, T)
        """The steps the arm's selector chooses."""
        return self.planner.selector.select(signals, np.random.default_rng(0))

    def saved(self, found: Sequence[Measurement]) -> float:
        """Forwards of the rollouts that the probe's trunks make superfluous, mean over batches."""
        plans = [self.planner.plan(self.decide(each), np.random.default_rng(0)).plan for each in found]
        return float(np.mean([each.trunk.saved(p) if each.trunk else 0 for each, p in zip(found, plans, strict=True)]))

    def measure(self, spec: EntropySignal) -> Result:
        """One setting."""
        found, (first, again) = self.run(spec)
        base = sum(each.forwards for each in found) / len(found)
        result = Result(base, base / 2, self.saved(found), first, again)
        self.compare(found, result)
        return result

    def share(self, result: Result, again: bool) -> float:
        """The probe's part of a training step, net of the forwards it saves the rollouts."""
        seconds = (result.seconds_again if again else result.seconds_first) - result.saved * self.per_forward
        return seconds / (self.step_seconds + seconds)

    def aged(self, age: int, train: int) -> Result:
        """Curves of the policy as it was some training steps ago, against those of now."""
        learner, now = self.engine.learner, learner_state(self.engine)
        learner.load_state_dict(self.snapshots[train - age], learner.updates)
        found, _ = self.run(EXACT)
        learner.load_state_dict(now, learner.updates)
        result = Result()
        self.compare(found, result)
        return result


def learner_state(engine: Engine) -> dict[str, torch.Tensor]:
    """A copy of what was learned."""
    return {name: value.clone() for name, value in engine.learner.state_dict().items()}


def upper(delta: FloatArray) -> BoolArray:  # (P,)
    """The half that the entropy allocator gives more."""
    above = np.zeros(len(delta), dtype=np.bool_)
    above[np.argsort(delta, kind="stable")[len(delta) // 2 :]] = True
    return above


def agreeing(results: Mapping[str, Result]) -> list[str]:
    """The settings that keep the median split and the chosen steps."""
    return [name for name, result in results.items() if agreement_of(result) >= TARGET_AGREEMENT]


def agreement_of(result: Result) -> float:
    """The lower of the two that decide: prompts on the same side of the median, and chosen steps in common."""
    return float(min(np.mean(result.halves), np.mean(result.steps)))


def row(name: str, result: Result, bench: Bench) -> str:
    """A line of the table."""
    cells = [f"{result.forwards_first:.0f}", f"{result.forwards_again:.0f}", f"{result.saved:.0f}"]
    cells += [f"{1000 * result.seconds_first:.0f}", f"{1000 * result.seconds_again:.0f}"]
    cells += [f"{100 * bench.share(result, again):.1f} %" for again in (False, True)]
    return f"| {name} | {' | '.join([*cells, *agreement(result)])} |"


def agreement(result: Result) -> list[str]:
    """Means over training steps."""
    return [f"{np.mean(values):.3f}" for values in (result.spearman, result.halves, result.steps)]


def bench_probe(experiment: Experiment, train: int, batches: int) -> tuple[list[tuple[str, float, float]], list[str]]:
    """Figures with the most they should be, and the section's lines."""
    bench = Bench(experiment, train, batches)
    results = {name: bench.measure(spec) for name, spec in SETTINGS.items()}
    aged = {age: bench.aged(age, train) for age in AGES if age < train}
    prompts = sum(len(batch) for batch in bench.batches)
    spec = experiment.rollouts
    exact = results[next(iter(results))]
    figures = [
        (f"share of a step: the exact probe, base entropies {known}", bench.share(exact, again), TARGET_SHARE)
        for again, known in ((False, "unknown"), (True, "known"))
    ]
    cheapest = min(agreeing(results), key=lambda name: bench.share(results[name], again=True))
    points = [Point(name, bench.share(each, again=True), agreement_of(each)) for name, each in results.items()]
    draw(points, (TARGET_SHARE, TARGET_AGREEMENT), PICTURE)
    what = f"share of a step: cheapest that agrees ({cheapest}), base entropies known"
    figures.append((what, bench.share(results[cheapest], again=True), TARGET_SHARE))
    return figures, [
        f"Policy after {train} training steps; {prompts} prompts it has not met, {spec.prompts_per_step} at a time; "
        f"{spec.rollouts_per_step} rollouts of {spec.denoising_steps} steps. A step without its probe takes "
        f"{1000 * bench.step_seconds:.0f} ms of processor time. First: prompts whose base entropies are not known yet; "
        "again: those whose are. Saved: forwards the rollouts take over; shares are net of them. Agreement with the "
        "exact probe within a training step: rank correlation of delta, prompts on the same side of the median, and "
        f"chosen steps in common. Target: at most {100 * TARGET_SHARE:.0f} % with at least {TARGET_AGREEMENT} of the "
        "last two.",
        "",
        "| probe | forwards, first | again | saved | ms, first | again | share of a step, first | again | Spearman of "
        "delta | same half | same steps |",
        "| --- |" + " ---: |" * 10,
        *(row(name, result, bench) for name, result in results.items()),
        "",
        f"Settings that agree well enough: {'; '.join(agreeing(results))}.",
        "",
        f"![Price of the probe's settings against what they keep of the exact one's choices]({PICTURE.name})",
        "",
        "`refresh`: curves of the policy as it was n training steps ago. They cost nothing between, if prompts come "
        "again within n steps; in `ablation.yaml` none does.",
        "",
        "| n | forwards of the policy | Spearman of delta | same half | same steps |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *(f"| {age} | 1/{age} | {' | '.join(agreement(result))} |" for age, result in aged.items()),
        "",
        *flux_lines(experiment),
    ]


def bench_delta(experiment: Experiment, train: int, batches: int) -> list[str]:
    """The lines of a section: what else delta may be, and how often that moves a prompt across the median."""
    bench = Bench(experiment, train, batches)
    spec, prompts = experiment.rollouts, sum(len(batch) for batch in bench.batches)
    lines = [
        f"Policy after {train} training steps; {prompts} prompts it has not met, {spec.prompts_per_step} at a time, "
        "each compared with the default. Crossed: prompts on the other side of the median of their training step, with "
        "the 95 % interval of Wilson. In all: mean and standard deviation over prompts.",
        "",
        "| delta | forwards a step, again | crossed | Spearman within a step | in all | mean | sd |",
        "| --- |" + " ---: |" * 6,
    ]
    default = np.concatenate([found.values[ENTROPY_DELTA] for found in bench.exact])
    for name, entropy in DELTAS.items():
        found, _ = bench.run(entropy)
        result = Result()
        bench.compare(found, result)
        delta = np.concatenate([each.values[ENTROPY_DELTA] for each in found])
        crossed = round(sum((1 - same) * len(batch) for same, batch in zip(result.halves, bench.batches, strict=True)))
        again = entropy.cost(spec.denoising_steps)
        cells = [f"{spec.prompts_per_step * (again.policy + again.base_again)}"]
        cells += [f"{crossed} of {prompts} = {100 * crossed / prompts:.0f} % [{wilson(crossed, prompts)}]"]
        cells += [f"{np.mean(result.spearman):.2f}", f"{spearman(delta, default):.2f}"]
        lines.append(f"| {name} | {' | '.join([*cells, f'{delta.mean():.5f}', f'{delta.std():.5f}'])} |")
    return lines


def wilson(count: int, total: int) -> str:
    """The 95 % interval of a share, in per cent (Wilson 1927)."""
    share, z = count / total, 1.959964
    middle, half = share + z**2 / (2 * total), z * np.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2)
    return ", ".join(f"{100 * (middle + sign * half) / (1 + z**2 / total):.0f}" for sign in (-1, 1))
