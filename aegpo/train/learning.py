"""Learns from executed plans: weighs the losses of trained edges and steps the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from aegpo.core import contracts
from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import ForwardObjective, Objective
from aegpo.core.records import BoolArray, Conditioning, Edges, IntArray, Renoised, RolloutPlan, Rollouts, Update
from aegpo.core.sections import OptimizerSpec
from aegpo.core.signatures import built
from aegpo.errors import AegpoError
from aegpo.method.dealing import Deals, deal, worth_keeping
from aegpo.method.partition import Partition
from aegpo.parallel.sharding import Sharding
from aegpo.parallel.team import Team
from aegpo.train.asking import DIVERGED
from aegpo.train.edges import edge_weights, totals
from aegpo.train.execution import Execution
from aegpo.train.findings import Findings
from aegpo.train.held_edges import HeldEdges, Lesson, Portion
from aegpo.train.micro_batches import MicroBatch, micro_batches, retained_batches
from aegpo.train.noise import StepNoise
from aegpo.train.optimizers import load_state_by_name, make_optimizer, state_by_name
from aegpo.train.pieces import piece
from aegpo.train.policy import Policy
from aegpo.train.precision import Precision
from aegpo.train.replay import Batch, noise_again, renoised, schedule_std, transitions, velocities
from aegpo.train.retained import Keeping, Retained, Retention, Room, to_keep
from aegpo.train.sampled import Sampled, sampled_of
from aegpo.train.tally import Tally, together
from aegpo.train.weights import Weights

_Work = Mapping[int, tuple[Portion, list[MicroBatch]]]  # by shard
_OWN = "optimizer/"  # names of its state in checkpoints


class Learner:
    """Optimizer and the loop over a training step's edges."""

    def __init__(
        self,
        how: Execution,
        weights: Weights,
        objective: Objective | ForwardObjective,
        objective_kind: str,
        spec: OptimizerSpec,
        ema_decay: float | None,
        precision: Precision,
        updates: int,
        team: Team | None = None,
        sharding: Sharding | None = None,
    ) -> None:
        self._team, self._sharding = team or Team.alone(), sharding
        self._how, self.weights, self._spec, self._precision = how, weights, spec, precision
        self.objective, self._kind, self._ema_decay = objective, objective_kind, ema_decay
        self._optimizer = make_optimizer(list(weights.trained.values()), spec)
        weights.keep(averaged=ema_decay is not None, lagging=objective.keeps_old)
        self.updates = 0
        self._std: float | None = None  # of ordinary plans
        self._room = Room(how.model.policy, how.sigmas.device, spec.retain, self._team.place)
        self._most_updates, self._varies = updates, spec.schedule.varies  # of the whole run; its learning rate

    @classmethod
    def build(cls, policy: Policy, experiment: Experiment) -> Learner:
        """The learner of an experiment's policy."""
        objective, ema = experiment.objective, experiment.policy.ema
        made = built("objective", objective.kind, objective.build, Objective, ForwardObjective)
        optimizer, updates = experiment.optimizer, experiment.updates
        what = (made, objective.kind, optimizer, ema, policy.precision, updates, policy.team, policy.sharding)
        return cls(policy.how, policy.weights, *what)

    def deals(self, plan: RolloutPlan, rng: np.random.Generator) -> Deals:
        """The rollouts of each optimizer step, pass by pass; known before anything is sampled."""
        return [deal(plan.group, self._spec, rng) for _ in range(self._spec.inner_epochs)]

    def keeping(self, partition: Partition, deals: Deals) -> Keeping | None:
        """What sampling keeps of each part for the first optimizer step; None: nothing."""
        if self._sharding is not None:
            return None  # graphs would hold on to gathered weights
        if not self._spec.retains(self.objective) or not worth_keeping(partition, deals[0][0]):
            return None
        self._room.refill()
        return lambda part: Retention(self._room, to_keep(part, deals[0][0]), self._spec.states_at_once)

    def update(
        self,
        rollouts: Sampled | Rollouts,
        credit: Tensor,
        cond: Conditioning,
        deals: Deals | np.random.Generator,
        noise: StepNoise,
    ) -> Tally:
        """Every inner epoch over a step's edges; returns metrics averaged as the loss is, over the edges with them.

        Args:
            rollouts: what the processes sampled of a plan, or all of it, if one did.
            credit: (E,) of its trained edges.
            cond: of the step's prompts.
            deals: of the plan, or what to deal with; the same in all processes.
            noise: of the step.
        """
        sampled = sampled_of(rollouts)
        lesson = self._lesson(sampled, credit, cond, noise)
        if lesson is None:
            return _nothing_learned()
        deals = self.deals(sampled.whole.plan, deals) if isinstance(deals, np.random.Generator) else deals
        pieces, norms = {shard: Tally() for shard in self._team.mine}, list[float]()
        rollout = lesson.held.rollout
        for epoch, parts in enumerate(deals):
            for number, members in enumerate(parts):
                rows = np.flatnonzero(np.isin(rollout, members) & lesson.kept)
                if len(rows) == 0:
                    continue  # none of these rollouts owns an edge to learn from
                first = epoch == number == 0
                work = self._cut(lesson, rows, sampled.retained if first else None)
                self._learn(lesson, work, len(parts), pieces, first and self.objective.process == "reverse")
                norms.append(self._advance())
        tally = together(self._team, pieces).counted(sum(map(len, deals)))
        if self._varies:
            tally.add("learning_rate", self._learning_rate())  # of the last update
        tally.add("grad_norm", float(np.sum(norms)), len(norms))
        tally.add("updated_edges", float(lesson.kept.sum()))
        return tally

    def _cut(self, lesson: Lesson, rows: IntArray, retained: Sequence[Sequence[Retained]] | None) -> _Work:
        """The micro-batches of an optimizer step's edges, by shard; as sampling had them, if it retained any."""
        held, device, groups = lesson.held, self._how.sigmas.device, self.objective.scope == "groups"
        most = self._spec.states_at_once
        if retained is not None:
            batches = dict(zip(self._team.mine, map(held.numbered, self._team.mine, retained), strict=True))
            return {
                shard: (portion, retained_batches(portion.begin, portion.rows, batches[shard], most, device))
                for shard, portion in held.kept(rows).items()
            }
        return {
            shard: (each, micro_batches(each.begin, each.rows, most, device, each.group if groups else None))
            for shard, each in held.portions(rows, groups).items()
        }

    def _learn(self, lesson: Lesson, work: _Work, parts: int, pieces: Mapping[int, Tally], fresh: bool) -> None:
        """Gradients of one optimizer step: those of every shard's portion of its edges, added up.

        `parts`: the optimizer steps of a pass; `fresh`: nothing was learned yet from what was sampled.
        """
        weights = list(self.weights.trained.values())

        def differentiated(shard: int, scale: int = 1) -> Findings:
            portion, micro = work[shard]
            with piece(self._team, "update", shard, self.updates):
                share = portion.of(lesson.share) * parts
                return self._accumulate([lesson.batch(portion, each) for each in micro], share, scale)

        def afresh(shard: int) -> Findings:
            _taken(weights)  # what an attempt left for which memory did not last
            return differentiated(shard)

        def of(shard: int) -> list[Tensor | None]:
            if shard in work:
                self._room.spared(partial(afresh, shard)).settle(pieces[shard], fresh)
            return _taken(weights)

        if self._sharding is not None:  # gradients come as means over the processes, each of which has its part
            batches = sum(len(micro) for _, micro in work.values())
            with self._sharding.in_lockstep(batches, partial(self._for_nothing, lesson.cond)):
                found = {shard: differentiated(shard, self._team.size) for shard in work}
            for shard, each in found.items():
                each.settle(pieces[shard], fresh)
            return
        for weight, gradient in zip(weights, self._team.summed("gradients", weights, of), strict=True):
            weight.grad = gradient

    def gradients(
        self, rollouts: Sampled | Rollouts, credit: Tensor, cond: Conditioning, noise: StepNoise
    ) -> tuple[Tensor, ...]:
        """Those of the whole loss of a step, which one process sampled, of every trained weight; nothing is learned.

        All 0 where nothing would be learned. Where those of float16 do not fit, they are scaled up less.

        Raises:
            AegpoError: if they are not finite.
        """
        weights, lesson = list(self.weights.trained.values()), self._lesson(sampled_of(rollouts), credit, cond, noise)
        if lesson is None:
            return tuple(torch.zeros_like(weight) for weight in weights)
        portion, micro = self._cut(lesson, np.flatnonzero(lesson.kept), None)[0]
        scaler = self._precision.scaler
        while True:
            self._accumulate([lesson.batch(portion, each) for each in micro], lesson.share).settle(Tally())
            scale = 1.0 if scaler is None else scaler.get_scale()
            found = [torch.zeros_like(w) if w.grad is None else w.grad.detach() / scale for w in weights]
            self._optimizer.zero_grad(set_to_none=True)
            if all(bool(gradient.isfinite().all()) for gradient in found):
                return tuple(found)
            if scaler is None or scale <= 1:
                raise AegpoError(DIVERGED)
            scaler.update(scale / 2)

    def _lesson(self, sampled: Sampled, credit: Tensor, cond: Conditioning, noise: StepNoise) -> Lesson | None:
        """What a training step has to learn from; None: nothing."""
        table, reverse = sampled.whole.edges, self.objective.process == "reverse"
        if len(table) == 0:
            return None
        kept = self._kept(table, credit)
        if not kept.any():
            return None
        own = self._edges(sampled.own, cond, noise)
        if self.objective.needs_base:
            owner = sampled.partition.edge_owner()
            wanted = [kept[owner == shard] for shard in self._team.mine]
            with self._how.model.frozen("base"):  # once: where the base is kept elsewhere, it has to be fetched
                own = [
                    replace(edges, base_velocity=velocities(self._how, edges, cond, each))
                    for edges, each in zip(own, wanted, strict=True)
                ]
        held = HeldEdges(self._team, sampled.partition, table, own, renoised=not reverse)
        dropped = None if kept.all() else torch.from_numpy(kept).to(credit.device)
        share = edge_weights(table, self._spec.reduction, dropped).float()
        std = self._schedule_std(sampled.whole.plan) if reverse else 0.0
        return Lesson(held, credit, cond, kept, share, std)

    def _schedule_std(self, plan: RolloutPlan) -> float:
        """Of `Batch`; that of ordinary plans is the same in every step."""
        if plan.until is not None or plan.scale is not None:
            return schedule_std(self._how, plan)
        if self._std is None:
            self._std = schedule_std(self._how, plan)
        return self._std

    def _edges(self, parts: Sequence[Rollouts], cond: Conditioning, noise: StepNoise) -> list[Edges]:
        """What is learned from of each part: the trained transitions, or their rollouts noised again."""
        if self.objective.process == "reverse":
            return [part.edges for part in parts]
        noised = [noise_again(self._how, part, noise, self.objective.shares_noise) for part in parts]
        if not self.objective.needs_old:
            return noised
        with self.weights.active(self.weights.old):
            return [replace(edges, velocity=velocities(self._how, edges, cond)) for edges in noised]

    def _kept(self, edges: Edges, credit: Tensor) -> BoolArray:  # (E,)
        """The edges that are learned from: all, or those with credit, or whole groups in which any edge has some."""
        if not self._spec.drop_zero_credit:
            return np.ones(len(edges), dtype=np.bool_)
        kept = credit != 0
        if self.objective.scope == "groups":
            groups, group = torch.unique(edges.group, return_inverse=True)
            kept = totals(group, kept.double(), len(groups))[group] > 0
        found: BoolArray = kept.cpu().numpy()
        return found

    def _accumulate(self, batches: Sequence[Batch], share: Tensor, scale: int = 1) -> Findings:
        """Gradients of scale * sum(share * loss) over the batches' edges; what was found waits on the device."""
        found = Findings(self._how, self._kind)
        for batch in batches:
            losses, metrics = self._losses(batch, found)
            with contracts.blaming("objective", self._kind):
                contracts.check_loss(self._kind, losses, metrics, len(batch.rows), values=False)
            weight = share[batch.rows]
            self._precision.backward((weight * losses).sum() * scale)
            found.add(weight, {"loss": losses.detach(), **metrics})
        return found

    def _for_nothing(self, cond: Conditioning) -> None:
        """Evaluates and differentiates one state, and learns nothing from it."""
        model, device = self._how.model, self._how.sigmas.device
        latents, first = torch.zeros((1, *model.latent_shape), device=device), torch.zeros(1, dtype=torch.long)
        said = self._how.velocity(latents, self._how.sigmas[:1], cond.select(first.to(device)))
        self._precision.backward(said.sum() * 0)

    def _losses(self, batch: Batch, found: Findings) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses and metrics (B,)."""
        seen: Update | Renoised
        if self.objective.process == "forward":
            seen = renoised(self._how, batch, found.answers)
            with contracts.blaming("objective", self._kind):
                learned = self.objective.loss(seen)
                contracts.check_learned(self._kind, learned)
            return learned
        seen = transitions(self._how, batch, found.answers)
        found.moved(seen)
        with contracts.blaming("objective", self._kind):
            learned = self.objective.loss(seen)
            contracts.check_learned(self._kind, learned)
        return learned

    def _advance(self) -> float:
        """One optimizer step; returns the gradient norm before clipping."""
        limit = self._spec.max_grad_norm or math.inf
        norm = self._precision.clip(self._optimizer, list(self.weights.trained.values()), limit)
        if self._precision.scaler is None and not math.isfinite(norm):
            raise AegpoError(DIVERGED)
        self.updates += 1  # counted before, so that whoever sees it fail half-way knows that weights may have changed
        if self._varies:
            for group in self._optimizer.param_groups:
                group["lr"] = self._learning_rate()
        self._precision.step(self._optimizer)
        self._optimizer.zero_grad(set_to_none=True)
        if self.weights.average is not None and self._ema_decay is not None:
            self.weights.average.approach(min(self._ema_decay, (1 + self.updates) / (10 + self.updates)))
        return norm

    def _learning_rate(self) -> float:
        """That of update `updates`: from its number alone, so that a resumed run goes on with it."""
        return self._spec.learning_rate * self._spec.schedule.share(self.updates, self._most_updates)

    def end_step(self, step: int) -> None:
        """After the updates of training step `step`: a sampling policy that lags behind comes nearer."""
        if self.weights.old is not None:
            with contracts.blaming("objective", self._kind):
                kept = self.objective.old_decay(step)
                contracts.check_decay(self._kind, kept)
            self.weights.old.approach(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Trained weights, their copies and the optimizer's moments, by name with a prefix."""
        moments = state_by_name(self._optimizer, list(self.weights.trained))
        return self.weights.state_dict() | {f"{_OWN}{name}": value for name, value in moments.items()}

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Takes back what `state_dict` returned."""
        self.weights.load_state_dict(state)
        moments = {name.removeprefix(_OWN): value for name, value in state.items() if name.startswith(_OWN)}
        load_state_by_name(self._optimizer, list(self.weights.trained), moments)
        self.updates = updates


def _taken(weights: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The gradients of weights, which have none then."""
    gradients = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    return gradients


def _nothing_learned() -> Tally:
    """What is said of a training step in which no edge was trained, or none had credit."""
    tally = Tally()
    tally.add("updated_edges", 0.0)
    return tally
