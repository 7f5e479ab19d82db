"""Executes a plan: one velocity evaluation for each unique node, and the first images as early as possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from aegpo.core.records import BoolArray, Conditioning, Edges, IntArray, Prompt, RolloutPlan, Rollouts
from aegpo.core.signals import Trunk
from aegpo.core.steps import last_steps, passing
from aegpo.method.samplers import euler, final_latents, start_latents
from aegpo.train.asking import Answers, decoded
from aegpo.train.edges import joined
from aegpo.train.execution import Execution, Look, Show, unseen
from aegpo.train.noise import StepNoise
from aegpo.train.stepping import Reached, Steps, children, deterministic, followed

_ASKED, _STILL = -1, -2  # whose velocity the network says, and whose nobody needs, for they pass through


@torch.no_grad()
def roll_out(
    how: Execution,
    plan: RolloutPlan,
    cond: Conditioning,
    noise: StepNoise,
    prompts: Sequence[Prompt] = (),
    trunk: Trunk | None = None,
    show: Show = unseen,
    look: Look | None = None,
) -> Rollouts:
    """Samples every trajectory of a plan; `show` sees images, `look` what is predicted of them, while others wait.

    Shared prefixes are one node and are computed once. Each new state is cast to the storage dtype first and its
    log-probability is that of the cast value, in float32, so that replaying a stored transition finds the same
    number. All noise is `noise`'s, by level and node, so that it does not matter in which
    order nodes are reached; a `trunk` replaces what it has.
    """
    if plan.tail is not None:
        how = replace(how, sigmas=torch.from_numpy(plan.tail.sigmas).to(how.sigmas))
    walk = _Walk(how, plan, cond, trunk, noise, look)
    latents: list[Tensor] = []
    images: list[Tensor] = []
    for leaves in walk.leaves():
        walk.answers.verify()
        latents.append(final_latents(leaves, how.sigmas).to(how.storage))
        images.append(decoded(how, latents[-1].float()))
        show(images[-1])
    log_probs = tuple(torch.cat(parts) for parts in walk.log_probs)
    edges = joined([part for level in walk.edges for part in level])
    return Rollouts(plan, torch.cat(latents), torch.cat(images), log_probs, edges, tuple(prompts))


@torch.no_grad()
def sample_deterministic(how: Execution, noise: Tensor, cond: Conditioning, show: Show = unseen) -> Tensor:
    """Euler from start noise (B, *x) to images (B, [F,] 3, h, w) in [0, 1]; row i of `cond` belongs to row i."""
    images: list[Tensor] = []
    answers = Answers(how)
    for rows in torch.split(torch.arange(len(noise), device=noise.device), how.micro_batch):
        latents = start_latents(noise[rows], how.sigmas)
        for level in range(len(how.sigmas) - 1):
            sigma, sigma_next = (how.sigmas[each].expand(len(latents)) for each in (level, level + 1))
            latents = euler(latents, batched_velocity(how, latents, level, cond, rows, answers), sigma, sigma_next)
        answers.verify()
        images.append(decoded(how, final_latents(latents, how.sigmas)))
        show(images[-1])
    return torch.cat(images)


def batched_velocity(
    how: Execution, latents: Tensor, level: int, cond: Conditioning, prompt: Tensor, answers: Answers
) -> Tensor:
    """Velocity of (B, *x) latents at one level, at most `micro_batch` at a time; `prompt`: (B,) rows of `cond`."""
    sigma, found = how.sigmas[level], []
    for rows in torch.split(torch.arange(len(latents), device=latents.device), how.micro_batch):
        chosen = cond.select(prompt[rows])
        found.append(how.velocity(latents[rows].float(), sigma.expand(len(rows)), chosen))
        answers.velocity(found[-1])
    return torch.cat(found)


# --- walking a plan --------------------------------------------------------------------------------------------------


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


class _Walk:
    """A plan under way: of all micro-batches whose states are there, the deepest goes first.

    Which nodes go through the network together does not depend on that order: they are `micro_batch` neighbours of a
    level. So the images are those of a walk level by level, and the first are there long before the last.
    """

    def __init__(
        self,
        how: Execution,
        plan: RolloutPlan,
        cond: Conditioning,
        trunk: Trunk | None,
        noise: StepNoise,
        look: Look | None,
    ) -> None:
        self._how, self._plan, self._cond, self._trunk, self._noise = how, plan, cond, trunk, noise
        self._look, self.answers = look, Answers(how)
        self.log_probs: list[list[Tensor]] = [[] for _ in range(plan.num_steps)]  # of each level, batch by batch
        self.edges: list[list[Edges]] = [[] for _ in range(plan.num_steps)]
        self._known, self._through, self._last = _known(plan, trunk), passing(plan), last_steps(plan)
        asked = [rows < 0 for rows in self._known] + [np.ones(plan.num_rollouts, dtype=np.bool_)]
        self._queues = [_Queue(_batch_sizes(each, how.micro_batch)) for each in asked]
        self._nodes = plan.nodes
        self._looks_back = plan.tail is not None and plan.tail.solver != "euler"
        first = _start(how, plan, trunk, noise)
        self._queues[0].add(_States(start_latents(first, how.sigmas).to(how.storage)))

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
        parent = _index(plan.parent[level][reached] - nodes.start, states.latents.device)
        velocity = self._velocity(level, nodes, states.latents)
        clean = states.latents.float() - how.sigmas[level] * velocity
        if self._look is not None:
            self.answers.verify()
            self._look(level, clean)
        following = followed(how, plan, level, velocity, clean, states.previous)[parent]
        latents, steps = states.latents[parent], Steps.of(how, plan, level, reached, self._through[level])
        found = children(how, latents, following, steps, self._noise_of(level, reached), self.answers)
        kept = velocity[parent] if how.keep_velocity else None
        self.edges[level].append(_trained_edges(plan, level, reached, latents, found, kept))
        self.log_probs[level].append(found.log_prob)
        painted = found.latents
        if how.predicted_clean and (last := self._last[level][reached]).any():
            ended = deterministic(latents, velocity[parent], steps).to(how.storage)
            rows = torch.from_numpy(last).to(ended.device).view(-1, *(1 for _ in ended.shape[1:]))
            painted = ended if last.all() else torch.where(rows, ended, painted)
        return _States(painted, clean[parent] if self._looks_back else None)

    def _velocity(self, level: int, nodes: slice, latents: Tensor) -> Tensor:  # (b, *x)
        """What the network says at some nodes of a level, evaluated only where the trunk does not know it.

        0 at nodes that pass through.
        """
        prompt, known = _index(self._plan.prompt[level][nodes], latents.device), self._known[level][nodes]
        asked = known == _ASKED
        if asked.all():
            return batched_velocity(self._how, latents, level, self._cond, prompt, self.answers)
        velocity = torch.zeros_like(latents, dtype=torch.float32)
        if self._trunk is not None and (known >= 0).any():
            rows, there = _pairs(known, latents.device)
            velocity[there] = self._trunk.velocity[level][rows]
        if asked.any():
            others = _index(np.flatnonzero(asked), latents.device)
            rest = (level, self._cond, prompt[others], self.answers)
            velocity[others] = batched_velocity(self._how, latents[others], *rest)
        return velocity

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


def _known(plan: RolloutPlan, trunk: Trunk | None) -> list[IntArray]:  # (N_i,) of each level
    """The row of the trunk that knows the velocity of each node; `_ASKED` where none does, or `_STILL`."""
    if trunk is None:
        return [np.where(through, _STILL, _ASKED) for through in passing(plan)]
    levels = trunk.levels(plan)
    known = [_on_trunk(plan, trunk, levels > level, level) for level in range(plan.num_steps)]
    return [np.where(through, _STILL, rows) for through, rows in zip(passing(plan), known, strict=True)]


def _on_trunk(plan: RolloutPlan, trunk: Trunk, chosen: BoolArray, level: int) -> IntArray:  # (N_i,)
    """The row of the trunk, among the `chosen` (K,), of each prompt that has a single node at a level; else -1."""
    found = np.full(len(plan.prompt[level]), _ASKED, dtype=np.int64)
    for row in np.flatnonzero(chosen):
        found[plan.prompt[level] == trunk.prompt[row]] = row
    return found


def _pairs(rows: IntArray, device: torch.device) -> tuple[Tensor, Tensor]:
    """(k,) rows of the trunk, and (k,) the nodes that they belong to."""
    nodes = np.flatnonzero(rows >= 0)
    return _index(rows[nodes], device), _index(nodes, device)


def _trained_edges(
    plan: RolloutPlan, level: int, nodes: slice, latents: Tensor, following: Reached, velocity: Tensor | None
) -> Edges:
    """The trained ones among the edges to some nodes of the next level, whose parents' states are `latents`."""
    device, within = latents.device, np.flatnonzero(plan.trained[level][nodes])
    rows, index = within + nodes.start, _index(within, latents.device)
    return Edges(
        level=torch.full((len(rows),), level, dtype=torch.int64, device=device),
        prompt=_index(plan.prompt[level + 1][rows], device),
        rollout=_index(plan.first_leaf[level + 1][rows], device),
        leaves=_index(plan.leaves[level + 1][rows], device),
        latents=latents[index],
        next_latents=following.latents[index],
        log_prob=following.log_prob[index],
        velocity=None if velocity is None else velocity[index],
        until=None if plan.until is None else _index(plan.until[level][rows], device),
        scale=None if plan.scale is None else torch.from_numpy(plan.scale[level][rows]).float().to(device),
    )


def _start(how: Execution, plan: RolloutPlan, trunk: Trunk | None, noise: StepNoise) -> Tensor:
    """Start noise (N_0, *x) of every root; roots may share it, or have it from the trunk."""
    device, roots = how.sigmas.device, np.arange(len(plan.prompt[0])) if plan.start is None else plan.start
    start = noise.start(roots, how.model.latent_shape).to(device)
    if trunk is not None:
        rows, nodes = _pairs(_on_trunk(plan, trunk, trunk.alone(plan) > 0, 0), device)
        start[nodes] = trunk.noise[rows]
    return start


def _index(array: IntArray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
