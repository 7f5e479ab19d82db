"""A plan under way: one velocity evaluation for each unique node, and the first images as early as possible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import BoolArray, Conditioning, IntArray, RolloutPlan
from aegpo.core.signals import Trunk
from aegpo.core.steps import last_steps
from aegpo.method.samplers import start_latents
from aegpo.method.trained_edges import TrainedEdges
from aegpo.train.asking import Answers, batched_velocity
from aegpo.train.execution import Execution, Look
from aegpo.train.noise import StepNoise
from aegpo.train.places import Places, asked_nodes, on_device, on_trunk
from aegpo.train.retained import Retention
from aegpo.train.stepping import Steps, children, deterministic, followed


@dataclass(frozen=True)
class _States:
    """Some states of a level, in the plan's order."""

    latents: Tensor  # (b, *x) storage dtype
    previous: Tensor | None = None  # (b, *x) float32, what was predicted of the image one level before

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows: slice) -> _States:
        return _States(self.latents[rows], None if self.previous is None else self.previous[rows])

    def __add__(self, others: _States) -> _States:
        if self.previous is None or others.previous is None:
            return _States(torch.cat([self.latents, others.latents]))
        return _States(torch.cat([self.latents, others.latents]), torch.cat([self.previous, others.previous]))


class _Queue:
    """States of a level, which arrive as their parents are done and go on in batches of fixed sizes."""

    def __init__(self, sizes: IntArray) -> None:
        self._sizes, self._gone = sizes.tolist(), 0
        self._states: _States | None = None

    @property
    def exhausted(self) -> bool:
        """True once every batch has gone on."""
        return not self._sizes

    @property
    def ready(self) -> bool:
        """True if all of the next batch is there."""
        return not self.exhausted and self._states is not None and len(self._states) >= self._sizes[0]

    def add(self, states: _States) -> None:
        """The next states, in the plan's order."""
        self._states = states if self._states is None else self._states + states

    def take(self) -> tuple[slice, _States]:
        """The next batch, and which nodes of the level it is."""
        assert self._states is not None, "only what is ready is taken"
        size = self._sizes.pop(0)
        batch, rest = self._states[:size], self._states[size:]
        self._states = rest if len(rest) else None
        self._gone += size
        return slice(self._gone - size, self._gone), batch


class Walk:
    """A plan under way: of all micro-batches whose states are there, the deepest goes first.

    Which nodes go through the network together does not depend on that order: they are `micro_batch` neighbours of a
    level. So the images are those of a walk level by level, and the first are there long before the last.
    """

    def __init__(
        self,
        how: Execution,
        plan: RolloutPlan,
        cond: Conditioning,
        noise: StepNoise,
        trunk: Trunk | None = None,
        look: Look | None = None,
        retention: Retention | None = None,
    ) -> None:
        self._how, self._plan, self._cond, self._trunk, self._noise = how, plan, cond, trunk, noise
        self._look, self._retention, self.answers = look, retention, Answers(how)
        self.log_probs: list[list[Tensor]] = [[] for _ in range(plan.num_steps)]  # of each level, batch by batch
        self.known, device = TrainedEdges.of(plan), how.sigmas.device
        shape = how.model.latent_shape
        self.states = torch.empty((self.known.states, *shape), dtype=how.storage, device=device)
        kept = (self.known.begins, *shape)
        self.velocity = torch.empty(kept, device=device) if how.keep_velocity else None
        self._last, self._nodes = last_steps(plan), plan.nodes
        asked = [*asked_nodes(plan, trunk), np.ones(plan.num_rollouts, dtype=np.bool_)]
        sizes = [_batch_sizes(each, how.micro_batch) for each in asked]
        keep = None if retention is None else retention.worthwhile(asked, sizes, how.micro_batch)
        self._queues = [_Queue(each) for each in sizes]
        self._places = Places.of(plan, self.known, device, trunk, keep)
        self._steps = [Steps.of(how, plan, level, self._places) for level in range(plan.num_steps)]
        self._looks_back = plan.tail is not None and plan.tail.solver != "euler"
        first = start_latents(_start(how, plan, trunk, noise), how.sigmas).to(how.storage)
        self._store(0, slice(0, len(first)), first)
        self._queues[0].add(_States(first))

    def leaves(self) -> Iterator[Tensor]:
        """States (b, *x) of the last level, `micro_batch` at a time, in the order of rollouts."""
        level, last = 0, self._plan.num_steps
        while not self._queues[last].exhausted:
            while not self._queues[level].ready:
                level -= 1
            nodes, states = self._queues[level].take()
            if level == last:
                yield states.latents
            else:
                self._queues[level + 1].add(self._step(level, nodes, states))
                level += 1

    def _step(self, level: int, nodes: slice, states: _States) -> _States:
        """The children of some nodes."""
        how, plan = self._how, self._plan
        first, end = np.searchsorted(plan.parent[level], [nodes.start, nodes.stop])
        reached = slice(int(first), int(end))
        parent = self._places.parent[level][reached] - nodes.start
        velocity = self._velocity(level, nodes, states.latents)
        if self.velocity is not None:
            rows, numbers = self._places.begins[level].among(nodes)
            self.velocity[numbers] = velocity[rows]
        clean = states.latents.float() - how.sigmas[level] * velocity
        if self._look is not None:
            self.answers.verify()
            self._look(level, clean)
        following = followed(how, plan, level, velocity, clean, states.previous)[parent]
        latents, steps = (
            states.latents[parent],
            self._steps[level].to(reached, self._places.noisy[level].within(reached)),
        )
        found = children(how, latents, following, steps, self._noise_of(level, reached), self.answers)
        self._store(level + 1, reached, found.latents)
        self.log_probs[level].append(found.log_prob)
        painted = found.latents
        if how.predicted_clean and (last := self._last[level][reached]).any():
            ended = deterministic(latents, velocity[parent], steps).to(how.storage)
            rows = torch.from_numpy(last).to(ended.device).view(-1, *(1 for _ in ended.shape[1:]))
            painted = ended if last.all() else torch.where(rows, ended, painted)
        return _States(painted, clean[parent] if self._looks_back else None)

    def _store(self, level: int, nodes: slice, latents: Tensor) -> None:
        """Keeps the states (b, *x) of some nodes that are learned from."""
        rows, numbers = self._places.stored[level].among(nodes)
        self.states[numbers] = latents[rows]

    def _velocity(self, level: int, nodes: slice, latents: Tensor) -> Tensor:  # (b, *x)
        """What the network says at some nodes of a level, evaluated only where the trunk does not know it.

        0 at nodes that pass through.
        """
        rows, prompt = self._places.plain[level].among(nodes)
        if len(rows) == len(latents):
            return self._ask(latents, level, prompt)
        velocity = torch.zeros_like(latents, dtype=torch.float32)
        if self._trunk is not None and level < len(self._trunk.velocity):
            there, known = self._places.trunk[level].among(nodes)
            velocity[there] = self._trunk.velocity[level][known]
        if len(rows):
            velocity[rows] = self._ask(latents[rows], level, prompt)
        if self._retention is not None:
            self._retain(self._retention, level, nodes, latents, velocity)
        return velocity

    def _ask(self, latents: Tensor, level: int, prompt: Tensor) -> Tensor:  # (b, *x)
        """What the network says at some nodes; where memory ends, again once graphs that were kept are dropped."""
        ask = partial(batched_velocity, self._how, latents, level, self._cond, prompt, self.answers)
        return ask() if self._retention is None else self._retention.room.spared(ask)

    def _retain(self, retention: Retention, level: int, nodes: slice, latents: Tensor, velocity: Tensor) -> None:
        """Writes what the network says where graphs are kept."""
        how, kept = self._how, self._places.kept[level]
        rows, prompts = kept.among(nodes)
        chosen = kept.nodes[kept.within(nodes)]
        for first in range(0, len(chosen), retention.most):
            part = slice(first, first + retention.most)
            there, cond = rows[part], self._cond.select(prompts[part])
            ask = partial(how.velocity, latents[there].float(), how.sigmas[level].expand(len(there)), cond)
            velocity[there] = said = retention.evaluate(level, chosen[part], ask)
            self.answers.velocity(said)

    def _noise_of(self, level: int, children: slice) -> Tensor:
        """Noise of the noisy ones among some children."""
        nodes = self._nodes[level + 1][children][self._plan.noisy[level][children]]
        noise = self._noise.level(level, nodes, self._how.model.latent_shape)
        return noise.to(self._how.sigmas.device)


def _batch_sizes(asked: BoolArray, most: int) -> IntArray:
    """Cuts the nodes of a level so that the network is asked about `most` of each batch, and about the rest last."""
    ends = np.flatnonzero(asked)[most - 1 :: most] + 1
    cuts = np.unique(np.concatenate([[0], ends, [len(asked)]]))
    sizes: IntArray = np.diff(cuts).astype(np.int64)
    return sizes


def _start(how: Execution, plan: RolloutPlan, trunk: Trunk | None, noise: StepNoise) -> Tensor:
    """Start noise (N_0, *x) of every root; roots may share it, or have it from the trunk."""
    device, roots = how.sigmas.device, np.arange(len(plan.prompt[0])) if plan.start is None else plan.start
    start = noise.start(roots, how.model.latent_shape).to(device)
    if trunk is not None:
        rows = on_trunk(plan, trunk, trunk.alone(plan) > 0, 0)
        nodes = np.flatnonzero(rows >= 0)
        places, known = on_device([nodes, rows[nodes]], device)
        start[places] = trunk.noise[known]
    return start
