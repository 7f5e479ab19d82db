"""Learns from executed plans: deals out trained edges, weighs their losses and steps the optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from aegpo.core import contracts
from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import ForwardObjective, Objective
from aegpo.core.records import Conditioning, Edges, IntArray, Rollouts
from aegpo.core.sections import OptimizerSpec
from aegpo.core.signatures import built
from aegpo.errors import AegpoError
from aegpo.parallel.team import Team
from aegpo.train.asking import DIVERGED
from aegpo.train.execution import Execution
from aegpo.train.held_edges import HeldEdges, Portion
from aegpo.train.noise import StepNoise
from aegpo.train.optimizers import load_state_by_name, make_optimizer, state_by_name
from aegpo.train.pieces import piece
from aegpo.train.policy import Policy
from aegpo.train.precision import Precision
from aegpo.train.replay import Batch, noise_again, renoised, schedule_std, transitions, velocities
from aegpo.train.sampled import Sampled, sampled_of
from aegpo.train.tally import Tally, together
from aegpo.train.weights import Weights

_OWN = "optimizer/"  # names of its state in checkpoints


def edge_weights(edges: Edges, reduction: str, kept: Tensor | None = None) -> Tensor:
    """The share of each trained edge in a training step's loss; (E,) float64, sums to 1; 0 where not `kept`.

    An edge counts as often as rollouts pass through it, so that the steps of a tree weigh what they would weigh if its
    rollouts were independent: near the root there are few edges, but every rollout passes them. `rollout`: that, over
    the sum of all edges. `prompt`: over the sum of the edges of the same prompt, and 1 / P for the P prompts that have
    trained edges, so that a prompt with 16 rollouts weighs what one with 8 does. `edge`: every edge counts once,
    whatever passes through it (BranchGRPO).
    """
    passes = (torch.ones_like(edges.leaves) if reduction == "edge" else edges.leaves).double()
    passes = passes if kept is None else passes * kept
    if reduction in ("rollout", "edge"):
        return passes / passes.sum()
    total = torch.bincount(edges.prompt, weights=passes)
    return passes / (total[edges.prompt] * (total > 0).sum())


def deal(group: IntArray, spec: OptimizerSpec, rng: np.random.Generator) -> list[Tensor]:  # (N,)
    """The rollouts of each optimizer step of one pass; `group` is the prompt of each.

    `deal: prompts` keeps a prompt's rollouts together. Prompts are taken in a random order, those with more rollouts
    first, and each goes to the step that has the fewest rollouts so far; so with equal counts the steps differ by one
    prompt at most, and none is empty unless there are fewer prompts. The steps then come in a random order.
    """
    size = spec.rollouts_per_update or len(group)
    if spec.deal == "rollouts":
        return list(torch.split(torch.from_numpy(rng.permutation(len(group))), size))
    prompts, row, counts = np.unique(group, return_inverse=True, return_counts=True)
    order = rng.permutation(len(prompts))
    loads = np.zeros(math.ceil(len(group) / size), dtype=np.int64)
    owner = np.zeros(len(prompts), dtype=np.int64)
    for prompt in order[np.argsort(-counts[order], kind="stable")]:
        owner[prompt] = loads.argmin()
        loads[owner[prompt]] += counts[prompt]
    return [torch.from_numpy(np.flatnonzero(owner[row] == step)) for step in rng.permutation(np.flatnonzero(loads))]


def whole_groups(rows: Tensor, group: Tensor, most: int) -> list[Tensor]:  # (B,), (E,)
    """The edges `rows` in batches of whole groups, as many as fit into `most` edges; a larger group is one alone."""
    rows = rows[group[rows].argsort(stable=True)]
    batches = [0]
    for size in filter(None, torch.bincount(group[rows]).tolist()):
        if batches[-1] + size <= most or batches[-1] == 0:
            batches[-1] += size
        else:
            batches.append(size)
    return list(torch.split(rows, batches))


@dataclass(frozen=True)
class _Lesson:
    """What a training step learns from."""

    held: HeldEdges
    credit: Tensor  # (E,) float32
    cond: Conditioning
    kept: Tensor  # (E,) bool, the edges that are learned from, at least one
    share: Tensor  # (E,) float32, of the step's loss
    std: float  # of Batch

    def batch(self, portion: Portion) -> Batch:
        """The edges of a portion and what belongs to them."""
        return Batch(portion.edges, portion.of(self.credit), self.cond, portion.rows, self.std)


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
    ) -> None:
        self._team = team or Team.alone()
        self._how, self.weights, self._spec, self._precision = how, weights, spec, precision
        self.objective, self._kind, self._ema_decay = objective, objective_kind, ema_decay
        self._optimizer = make_optimizer(list(weights.trained.values()), spec)
        weights.keep(averaged=ema_decay is not None, lagging=objective.keeps_old)
        self.updates = 0
        self._most_updates, self._varies = updates, spec.schedule.varies  # of the whole run; its learning rate

    @classmethod
    def build(cls, policy: Policy, experiment: Experiment) -> Learner:
        """The learner of an experiment's policy."""
        objective, ema = experiment.objective, experiment.policy.ema
        made = built("objective", objective.kind, objective.build, Objective, ForwardObjective)
        optimizer, updates = experiment.optimizer, experiment.updates
        what = (made, objective.kind, optimizer, ema, policy.precision, updates, policy.team)
        return cls(policy.how, policy.weights, *what)

    def update(
        self,
        rollouts: Sampled | Rollouts,
        credit: Tensor,
        cond: Conditioning,
        rng: np.random.Generator,
        noise: StepNoise,
    ) -> Tally:
        """Every inner epoch over a step's edges; returns metrics averaged as the loss is, over the edges with them.

        Args:
            rollouts: what the processes sampled of a plan, or all of it, if one did.
            credit: (E,) of its trained edges.
            cond: of the step's prompts.
            rng: of decisions, the same in all processes.
            noise: of the step.
        """
        sampled = sampled_of(rollouts)
        lesson = self._lesson(sampled, credit, cond, noise)
        if lesson is None:
            return _nothing_learned()
        edges, team = lesson.held.table, self._team
        pieces, norms = {shard: Tally() for shard in team.mine}, list[float]()
        for epoch in range(self._spec.inner_epochs):
            parts = deal(sampled.whole.plan.group, self._spec, rng)
            for number, members in enumerate(parts):
                chosen = torch.isin(edges.rollout, members.to(edges.rollout.device)) & lesson.kept
                rows = chosen.nonzero().flatten()
                if len(rows) == 0:
                    continue  # none of these rollouts owns an edge to learn from
                fresh = epoch == number == 0 and self.objective.process == "reverse"
                self._learn(lesson, rows, len(parts), pieces, fresh)
                norms.append(self._advance())
        tally = together(team, pieces).counted(self._spec.inner_epochs * len(parts))
        if self._varies:
            tally.add("learning_rate", self._learning_rate())  # of the last update
        tally.add("grad_norm", float(np.sum(norms)), len(norms))
        tally.add("updated_edges", float(lesson.kept.sum()))
        return tally

    def _learn(self, lesson: _Lesson, rows: Tensor, parts: int, pieces: Mapping[int, Tally], fresh: bool) -> None:
        """Gradients of one optimizer step: those of every shard's portion of its edges, added up.

        `parts`: the optimizer steps of a pass; `fresh`: nothing was learned yet from what was sampled.
        """
        weights = list(self.weights.trained.values())
        portions = lesson.held.portions(rows, self.objective.scope == "groups")

        def of(shard: int) -> list[Tensor | None]:
            if shard in portions:
                with piece(self._team, "update", shard, self.updates):
                    batch, share = lesson.batch(portions[shard]), portions[shard].of(lesson.share)
                    deviation = self._accumulate(batch, share * parts, pieces[shard])
                if fresh:
                    pieces[shard].raise_to("ratio_error", deviation)
            return _taken(weights)

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
        batch = Batch(lesson.held.table, credit, cond, lesson.kept.nonzero().flatten(), lesson.std)
        scaler = self._scaler
        while True:
            self._accumulate(batch, lesson.share, Tally())
            scale = 1.0 if scaler is None else scaler.get_scale()
            found = [torch.zeros_like(w) if w.grad is None else w.grad.detach() / scale for w in weights]
            self._optimizer.zero_grad(set_to_none=True)
            if all(bool(gradient.isfinite().all()) for gradient in found):
                return tuple(found)
            if scaler is None or scale <= 1:
                raise AegpoError(DIVERGED)
            scaler.update(scale / 2)

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        return self._precision.scaler

    def _lesson(self, sampled: Sampled, credit: Tensor, cond: Conditioning, noise: StepNoise) -> _Lesson | None:
        """What a training step has to learn from; None: nothing."""
        if len(sampled.whole.edges) == 0:
            return None
        own = [self._edges(part, cond, noise) for part in sampled.own]
        held = HeldEdges(self._team, sampled.partition, sampled.whole.edges, own)
        kept = self._kept(held.table, credit)
        if not bool(kept.any()):
            return None
        share = edge_weights(held.table, self._spec.reduction, kept).float()
        std = schedule_std(self._how, sampled.whole.plan) if self.objective.process == "reverse" else 0.0
        return _Lesson(held, credit, cond, kept, share, std)

    def _edges(self, rollouts: Rollouts, cond: Conditioning, noise: StepNoise) -> Edges:
        """What is learned from: the trained transitions, or their rollouts noised again."""
        if self.objective.process == "reverse":
            return rollouts.edges
        edges = noise_again(self._how, rollouts, noise, self.objective.shares_noise)
        if not self.objective.needs_old:
            return edges
        with self.weights.active(self.weights.old):
            return replace(edges, velocity=velocities(self._how, edges, cond))

    def _kept(self, edges: Edges, credit: Tensor) -> Tensor:  # (E,) bool
        """The edges that are learned from: all, or those with credit, or whole groups in which any edge has some."""
        if not self._spec.drop_zero_credit:
            return torch.ones_like(credit, dtype=torch.bool)
        if self.objective.scope == "rows":
            return credit != 0
        return torch.bincount(edges.group, weights=(credit != 0).double())[edges.group] > 0

    def _accumulate(self, batch: Batch, share: Tensor, pieces: Tally) -> float:
        """Gradients of sum(share * loss) over the batch's edges; returns the largest |ratio - 1|."""
        deviation = 0.0
        whole, most = self.objective.scope == "groups", self._spec.micro_batch
        cut = whole_groups(batch.rows, batch.edges.group, most) if whole else torch.split(batch.rows, most)
        for part in cut:
            losses, metrics, off = self._losses(replace(batch, rows=part))
            with contracts.blaming("objective", self._kind):
                contracts.check_loss(self._kind, losses, metrics, len(part))
            self._precision.backward((share[part] * losses).sum())
            weight = float(share[part].sum())
            for name, values in {"loss": losses.detach(), **metrics}.items():
                pieces.add(name, float((share[part] * values).sum()), weight)
            deviation = max(deviation, off)
        return deviation

    def _losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], float]:
        """Losses and metrics (B,), and the largest |ratio - 1| of the batch (0 in the forward process)."""
        if self.objective.process == "forward":
            seen = renoised(self._how, self.objective, batch)
            with contracts.blaming("objective", self._kind):
                learned = self.objective.loss(seen)
                contracts.check_learned(self._kind, learned)
            return *learned, 0.0
        update = transitions(self._how, self.objective, batch)
        off = float((update.log_prob - update.old_log_prob).detach().expm1().abs().max())
        with contracts.blaming("objective", self._kind):
            learned = self.objective.loss(update)
            contracts.check_learned(self._kind, learned)
        return *learned, off

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
