"""The engine: one class for every method; `step` names each stage in the paper's order."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aegpo.core import contracts, promises, untouched
from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Advantage, Curriculum, Reporting, Stateful
from aegpo.core.memory import enough_memory, lower
from aegpo.core.records import Edges, IntArray, Prompt, RolloutPlan, Rollouts, Scores
from aegpo.core.reports import StepReport
from aegpo.core.sharing import Store
from aegpo.core.signatures import built
from aegpo.errors import CheckpointError
from aegpo.method.advantages.credit import crediting
from aegpo.method.costs import gradient_rows_of, update_work
from aegpo.method.dealing import Deals
from aegpo.method.planning import Planner, table_of
from aegpo.method.residual_noise import residual_noise
from aegpo.method.scored_levels import scored_levels
from aegpo.parallel.team import Team
from aegpo.prompts.lists import read_list, refuse_few, refuse_lacking, refuse_shared
from aegpo.train import batch_sizes
from aegpo.train.findings import SPREAD
from aegpo.train.held_out import Evaluator
from aegpo.train.learning import Learner
from aegpo.train.noise import StepNoise
from aegpo.train.pieces import refuse_memories
from aegpo.train.policy import Policy
from aegpo.train.sampled import Sampled
from aegpo.train.sampling import Asked, Sampling
from aegpo.train.scoring import build_scorers
from aegpo.train.signals import Known, Sources
from aegpo.train.stopwatch import Stopwatch
from aegpo.train.tally import Tally

_CURRICULUM = 6151  # keeps the draws of curricula apart from the stream of decisions


class Engine:
    """One arm under one seed: its parts, and a training step."""

    def __init__(self, experiment: Experiment, team: Team | None = None) -> None:
        self.experiment = experiment
        self.policy = Policy(experiment, team)
        self.team = self.policy.team
        self.rewards = build_scorers(experiment.rewards, self.policy.device)
        self.guards = build_scorers(experiment.evaluation.rewards, self.policy.device)
        self.sampling = Sampling(self.policy, self.rewards)
        self.planner = Planner.build(experiment)
        self.advantage = built("advantage", experiment.advantage.kind, experiment.advantage.build, Advantage)
        lists = read_list(experiment, "train"), read_list(experiment, "evaluation")
        training, held_out = (each.prompts for each in lists)
        self.unused = tuple(line for each in lists for line in each.unused)  # of datasets of prompts
        refuse_shared(training, held_out)
        refuse_lacking(experiment.rewards, training, "train")
        refuse_lacking((*experiment.rewards, *experiment.evaluation.rewards), held_out, "evaluation")
        refuse_few(len(training), experiment.rollouts.prompts_per_step)
        self.prompts = training
        curriculum, per_step = experiment.curriculum, experiment.rollouts.prompts_per_step
        build = partial(curriculum.build, len(training), per_step, experiment.seed)
        self.curriculum = built("curriculum", curriculum.kind, build, Curriculum)
        with contracts.blaming("curriculum", curriculum.kind):
            asked = [training[row] for row in self.curriculum.candidates(experiment.training_steps)]
        self.policy.prepare([*asked, *held_out])
        self.policy.check(asked[0])
        experiment = self.experiment = self.policy.use(batch_sizes.settled(self.policy, experiment, asked[0]))
        self.learner = Learner.build(self.policy, experiment)
        self.sources = Sources(experiment, self.policy)
        self.evaluator = Evaluator(self.policy, self.rewards + self.guards, held_out)
        self._reward_weights = torch.tensor([spec.weight for spec in experiment.rewards], device=self.policy.device)
        refuse_memories(self.team, self._stateful())
        self._reporting = {name: part for name, part in self._stateful().items() if isinstance(part, Reporting)}

    @classmethod
    def build(cls, experiment: Experiment, team: Team | None = None) -> Engine:
        """Builds every part of an experiment on its device.

        Args:
            experiment: one arm under one seed.
            team: the processes that do the run together; None: this one alone.

        Raises:
            AegpoError: if a part cannot be built, or breaks its contract on a first latent.
        """
        remedy = "load the model in a smaller 'dtype', train LoRA adapters, or use a device with more memory"
        with enough_memory("the parts were built", remedy):
            return cls(experiment, team)

    def share(self, store: Store) -> None:
        """Asks a store before anything is measured that other runs measure too; called before anything is learned."""
        self.sources.share(store)
        self.evaluator.share(store)

    # --- one training step ---------------------------------------------------------------------------------------

    def step(self, number: int) -> StepReport:
        """Training step `number`, counted from 1; a pure function of the weights, the parts' state and (seed, step)."""
        spec, watch = self.experiment, Stopwatch()
        rng, noise = self._randomness(number)
        prompts = self.asked(number)
        with watch("signals"), self._sampling("signals were measured"):
            cond = self.policy.encode(prompts)
            known = self.sources.measure(number, prompts)
        with watch("plan"), self._few_rollouts("rollouts were planned"):
            planned = self.planner.plan(known.signals, rng)  # allocator: counts; selector: steps; tree: the forest
            plan, levels = planned.plan, scored_levels(spec, self.advantage, planned.plan)
            deals = self.learner.deals(plan, rng)
        keep = partial(self.learner.keeping, deals=deals)
        sampled = self.sampling.sample(plan, Asked(prompts, cond, noise, known.trunk, levels, keep), watch)
        with watch("reward"):
            credit = self._credit(sampled.scores, sampled.whole)
            self.team.same("plan, scores and credit", partial(sampled.digest, credit))
            sampled = sampled.scored()
        fewer = lower("optimizer.micro_batch", spec.optimizer.states_at_once)
        with watch("update"), enough_memory("the policy was updated", fewer):
            learned = self.learner.update(sampled, credit, cond, deals, noise)
            self.learner.end_step(number)
        unrecorded = _unrecorded((sampled.scores.leaves * self._reward_weights).sum(dim=1), plan, learned)
        metrics = self._metrics(sampled, known, levels, learned, deals)
        shown = (planned.counts, planned.selected, known.signals.known)
        return StepReport(number, metrics, prompts, *shown, watch.seconds, unrecorded)

    def _metrics(
        self, sampled: Sampled, known: Known, levels: IntArray, learned: Tally, deals: Deals
    ) -> dict[str, float]:
        """What a step measured, and what it spent."""
        spec, plan, parts = self.experiment, sampled.whole.plan, sampled.partition.parts
        spent = sum(part.forwards - (0 if known.trunk is None else known.trunk.saved(part)) for part in parts)
        images = sum(len(part.prompt[int(level)]) for part in parts for level in levels)
        rows = gradient_rows_of(spec, plan, deals)
        tally = _describe(sampled.scores.leaves, [scorer.label for scorer in self.rewards], self._reward_weights, plan)
        tally.merge(learned)
        return {
            **tally,
            "residual_noise": residual_noise(plan, table_of(spec, plan), spec.sigmas, self.policy.how.predicted_clean),
            "forwards": spent,
            "signal_forwards": known.forwards,
            "trained_edges": plan.trained_edges,
            "gradient_rows": rows,
            **({"predicted_images": images} if images else {}),
            "work": spent + known.forwards + update_work(spec, plan, rows),
            **self._reports(),
        }

    def asked(self, number: int) -> tuple[Prompt, ...]:  # P
        """The prompts of training step `number`, as far as is known now."""
        spec, count = self.experiment, self.experiment.rollouts.prompts_per_step
        rng = np.random.default_rng((_CURRICULUM, spec.seed, number))
        known = self.sources.known(number, self.prompts, spec.curriculum.reads)
        with contracts.blaming("curriculum", spec.curriculum.kind, once=True):
            chosen = self.curriculum.choose(known, count, rng)
            contracts.check_choice(spec.curriculum.kind, chosen, len(self.prompts), count)
        return tuple(self.prompts[row] for row in chosen)

    def _credit(self, scores: Scores, rollouts: Rollouts) -> Tensor:  # (E,)
        """The credit of each trained edge; what prompts brought is remembered."""
        kind = self.experiment.advantage.kind
        shown = (*_tensors(scores), *_tensors(rollouts), *_tensors(rollouts.edges))
        before = untouched.versions(*shown)
        with self._few_rollouts("credit was given"), crediting(kind):
            with untouched.sparing("advantage", kind, rollouts.plan):
                credit = self.advantage.estimate(scores, self._reward_weights, rollouts)
            contracts.check_credit(kind, credit, rollouts.plan.trained_edges)
            untouched.check_untouched("advantage", kind, before, *shown)
        credit = credit.to(self.policy.device)
        self.sources.rewarded(rollouts.prompts, scores.leaves @ self._reward_weights, rollouts.plan.group)
        return credit

    def _randomness(self, number: int) -> tuple[np.random.Generator, StepNoise]:
        """Decisions and noise of a step, and the global generators that foreign parts may use."""
        rng = np.random.default_rng((self.experiment.seed, number))
        common = int(rng.integers(2**31))
        torch.manual_seed(common)
        np.random.seed(common)
        random.seed(common)
        return rng, StepNoise(self.experiment.seed, number)

    def _sampling(self, doing: str) -> AbstractContextManager[None]:
        """Inside, `rollouts.micro_batch` latents at a time go through the network."""
        return enough_memory(doing, lower("rollouts.micro_batch", self.policy.micro_batch))

    def _few_rollouts(self, doing: str) -> AbstractContextManager[None]:
        """Inside, all rollouts of a step are looked at together."""
        return enough_memory(doing, lower("rollouts.rollouts_per_step", self.experiment.rollouts.rollouts_per_step))

    # --- state ---------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, object]:
        """Every part with a contract of its own, by kind and name as messages call it."""
        spec = self.experiment.algorithm()
        named: dict[str, object] = {f"reward {each.label!r}": each.reward for each in self.rewards + self.guards}
        named |= {f"signals {kind!r}": source for kind, source in self.sources.built.items()}
        return named | {f"{axis} {spec[axis].kind!r}": part for axis, part in self._algorithm().items()}

    def _algorithm(self) -> dict[str, object]:
        """The parts that make up the method, by field."""
        plans, learner = self.planner, self.learner
        parts: dict[str, object] = {"curriculum": self.curriculum, "allocator": plans.allocator}
        parts |= {"selector": plans.selector, "tree": plans.tree}
        parts |= {"sampler": self.policy.how.sampler, "advantage": self.advantage, "objective": learner.objective}
        return parts

    def _reports(self) -> dict[str, float]:
        """What parts with memory say of it, by their name in checkpoints: `advantage/known_prompts`."""
        reports: dict[str, float] = {}
        for name, part in self._reporting.items():
            axis, kind = self._called(name)
            with contracts.blaming(axis, kind):
                found = part.report()
                contracts.check_report(axis, kind, found)
            reports |= {f"{name}/{what}": float(value) for what, value in found.items()}
        return reports

    def snapshot(self) -> Snapshot:
        """All that a step may change before it has learned anything: what parts remember, and the generator."""
        parts = {}
        for name, part in self._stateful().items():
            with contracts.blaming(*self._called(name)):
                state = part.state_dict()
                promises.check_state(*self._called(name), state)
                parts[name] = copy.deepcopy(state)
        return Snapshot(parts, torch.get_rng_state())

    def state_dict(self, earlier: Snapshot | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON that `load_state_dict` takes back; of parts that remember, `earlier` or now."""
        snapshot = earlier or self.snapshot()
        tensors = self.learner.state_dict() | {"rng/torch": snapshot.generator}
        scaler = self.policy.precision.scaler  # of float16 gradients
        state: dict[str, Any] = {"updates": self.learner.updates, "parts": {}}
        state["scaler"] = None if scaler is None else scaler.state_dict()
        for name, remembered in snapshot.parts.items():
            for key, value in remembered.items():
                if isinstance(value, Tensor):
                    tensors[f"part/{name}/{key}"] = value
                else:
                    state["parts"].setdefault(name, {})[key] = value
        return tensors, state

    def load_state_dict(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; the next step is the one after it.

        Raises:
            CheckpointError: if it is of another network, or lacks what every state has.
        """
        if (
            "rng/torch" not in tensors
            or type(state.get("updates")) is not int
            or not isinstance(state.get("parts"), dict)
        ):
            raise CheckpointError("the checkpoint lacks the generator's state, 'updates' or 'parts'")
        self.learner.load_state_dict(tensors, state["updates"])
        if self.policy.precision.scaler is not None:
            self.policy.precision.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(tensors["rng/torch"].cpu())
        for name, part in self._stateful().items():
            prefix = f"part/{name}/"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            with contracts.blaming(*self._called(name)):
                part.load_state_dict(own | state["parts"].get(name, {}))

    def _called(self, name: str) -> tuple[str, str]:
        """Kind and name of a part, from its name in checkpoints."""
        axis, _, label = name.partition("-")  # a label only of signals and rewards
        if not label:
            return axis, self.experiment.algorithm()[axis].kind
        return "signals" if axis == "signal" else axis, label

    def _stateful(self) -> dict[str, Stateful]:
        """Parts with memory, by their name in checkpoints."""
        parts: dict[str, object] = {f"signal-{kind}": source for kind, source in self.sources.built.items()}
        parts |= {f"reward-{each.label}": each.reward for each in self.rewards + self.guards}
        parts |= self._algorithm()
        stateful = {name: part for name, part in parts.items() if isinstance(part, Stateful)}
        # A scorer that is a module has weights, but they are not what the run has learned.
        return {name: part for name, part in stateful.items() if not isinstance(part, nn.Module)}


@dataclass(frozen=True)
class Snapshot:
    """What a step may change before it has learned anything."""

    parts: Mapping[str, Mapping[str, Any]]  # of every part with a state
    generator: Tensor  # torch's global one


def _tensors(record: Scores | Rollouts | Edges) -> list[Tensor]:
    """What a part may read of a record and must not write into."""
    nodes = list(record.nodes.values()) if isinstance(record, Scores) else []
    return nodes + [value for value in vars(record).values() if isinstance(value, Tensor)]


def _describe(scores: Tensor, labels: Sequence[str], weights: Tensor, plan: RolloutPlan) -> Tally:
    """Training rewards of a step, every prompt counted once, and the spread inside groups that learning lives on."""
    total = (scores * weights).sum(dim=1)
    group = torch.from_numpy(plan.group).to(total.device)
    members = [group == prompt for prompt in torch.unique(group)]

    tally = Tally()

    def add(name: str, of_prompts: list[Tensor]) -> None:
        mean = float(torch.stack(of_prompts).mean())
        tally.add(name, mean * len(members), len(members))  # exact: a float32 times a count

    add("reward", [total[rows].mean() for rows in members])
    add("reward_std", [total[rows].std() for rows in members])
    for label, values in zip(labels, scores.unbind(dim=1), strict=True):
        add(f"reward/{label}", [values[rows].mean() for rows in members])
    return tally


def _unrecorded(total: Tensor, plan: RolloutPlan, learned: Tally) -> dict[str, float]:
    """What trackers are told of a step beside its metrics, and the record leaves out.

    Args:
        total: (N,) the weighted rewards.
        plan: of the step.
        learned: gives up what is not to be recorded.

    Returns:
        zero_std_ratio: the share of prompts whose rollouts all have the same reward, so that none has any credit.
        ratio_std: sqrt(E[(r - 1)^2] - (E[r] - 1)^2) of the ratio r, averaged as the loss is; where one is reported.
    """
    group = torch.from_numpy(plan.group).to(total.device)
    groups = [total[group == prompt] for prompt in torch.unique(group)]
    alike = torch.stack([each.amax() == each.amin() for each in groups]).double().mean()
    found, spread = {"zero_std_ratio": float(alike)}, learned.take(SPREAD)
    if spread is not None:
        found["ratio_std"] = math.sqrt(max(0.0, spread - (learned["ratio"] - 1) ** 2))
    return found
