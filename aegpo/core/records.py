"""Records that travel between the stages of the engine.

Shape legend, valid in every docstring and comment of the project:

    P   prompts in a training step          B        any batch
    N   rollouts (leaves) in a step         R        rewards
    T   denoising steps                     x        a latent's own dimensions: (C, H, W), (C, F, H, W), ...
    N_i nodes at level i of the plan        h, w     image height, width; F frames of a video
    E   trained edges of the plan           L, D     text tokens, text width

Images are (N, 3, h, w); where a model paints videos they are (N, F, 3, h, w), written (N, [F,] 3, h, w).

Noise level `sigma` runs from 1 (noise) to 0 (image); a `step` counts training, a `level` or denoising step counts the
T steps of one trajectory. Entropy is in nats. Decisions (counts, steps, plans) are numpy, so that planning needs no
torch; everything that touches the network is torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Prompt:
    """One prompt and its place in its list, which for training prompts is their identity in caches and groups.

    Metadata is JSON, as other keys of its line or other columns of its dataset have it; captions of a model have its
    `caption_metadata`. Only rewards and tables read it. It does not enter the hash, so that prompts may be keys. Images
    are files that the line names, which models and rewards may open: to be edited, or to be compared with.
    """

    index: int
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    images: tuple[Path, ...] = ()
    occurrence: int = 0  # how many prompts of the list before it ask the same

    @property
    def asked(self) -> tuple[str, tuple[Path, ...]]:
        """Text and images: what is asked for, in whatever place and with whatever metadata."""
        return self.text, self.images


Media = Literal["image", "video"]  # what a model paints: images (N, 3, h, w), or videos (N, F, 3, h, w)
FrameRule = Literal["mean", "first", "min"]  # how a reward's scores of a video's frames become one
Per = Literal["prompt", "step", "prompt-step"]  # what a signal has a value for: (P,), (T,) or (P, T)


@dataclass(frozen=True)
class Signal:
    """One thing that is known, in the units of its source."""

    per: Per
    values: FloatArray  # (P,), (T,) or (P, T); NaN where nothing is known: a prompt not seen, a step not measured


@dataclass(frozen=True)
class Tail:
    """The end of a plan, without noise: a solver of its own, on noise levels of its own."""

    start: int  # the first level whose step the solver takes
    sigmas: FloatArray  # (T'+1,) noise levels of the whole plan; the run's own up to the last noisy or trained step
    solver: Literal["euler", "dpm"]


@dataclass(frozen=True)
class RolloutPlan:
    """A forest of trajectories, one or more trees a prompt, as index arrays; built before any model call.

    Level i holds the states before denoising step i; level T holds the leaves, which are the rollouts. The edge from
    level i to a node of level i+1 is denoising step i, so edges are counted by their child.

    Children are in the order of their parents, on every level: each `parent` never falls. So the descendants of
    neighbours are neighbours, and a plan can be executed in pieces; `contracts.check_forest` refuses any other order.

    A step may end later than at the next level; `core.steps` has what follows from that.
    """

    prompt: tuple[IntArray, ...]  # T+1 arrays (N_i,): the prompt of each node
    parent: tuple[IntArray, ...]  # T arrays (N_{i+1},): the node of level i each child came from
    noisy: tuple[BoolArray, ...]  # T arrays (N_{i+1},): this step adds noise
    trained: tuple[BoolArray, ...]  # T arrays (N_{i+1},): this step is learned from
    start: IntArray | None = None  # (N_0,) which start noise each root has; None: one of its own
    tail: Tail | None = None  # None: Euler steps on the run's noise levels to the end
    scale: tuple[FloatArray, ...] | None = None  # T arrays (N_{i+1},) > 0: factor of the step's noise rate; None: 1
    until: tuple[IntArray, ...] | None = None  # T arrays (N_{i+1},): the level the step ends at; None: the next

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.parent)

    @property
    def num_rollouts(self) -> int:
        """N, the leaves."""
        return len(self.prompt[-1])

    @property
    def group(self) -> IntArray:  # (N,)
        """The prompt of each rollout: rollouts of one prompt form a group."""
        return self.prompt[-1]

    @property
    def nodes(self) -> tuple[IntArray, ...]:  # T+1 arrays (N_i,)
        """The number of each node at its level, which its noise goes by; of a part of a plan, that in the whole."""
        return tuple(np.arange(len(prompt)) for prompt in self.prompt)

    @property
    def forwards(self) -> int:
        """Velocity evaluations of one execution: every node that is no leaf and not inside a longer step, once."""
        inside = sum(int((until > level + 1).sum()) for level, until in enumerate((self.until or ())[:-1]))
        return sum(len(nodes) for nodes in self.prompt[:-1]) - inside

    @property
    def trained_edges(self) -> int:
        """E, the transitions the update replays."""
        return sum(int(level.sum()) for level in self.trained)

    @cached_property
    def trunk_levels(self) -> IntArray:  # (P,)
        """How many levels, from the first, each prompt has a single node at that no noise or longer step has reached.

        What the network says there depends on nothing but the prompt and its start noise. 0 for several trees, and
        where the plan says which start noise each root has. P ends with the last prompt that has a rollout.
        """
        prompts = int(self.group.max()) + 1
        lengths: IntArray = np.zeros(prompts, dtype=np.int64)
        alone = np.full(prompts, self.start is None)
        for level in range(self.num_steps if self.tail is None else self.tail.start):
            alone &= np.bincount(self.prompt[level], minlength=prompts) == 1
            lengths += alone
            other = self.noisy[level] if self.until is None else self.noisy[level] | (self.until[level] > level + 1)
            alone[self.prompt[level + 1][other]] = False
        return lengths

    @cached_property
    def leaves(self) -> tuple[IntArray, ...]:  # T+1 arrays (N_i,)
        """How many rollouts pass through each node."""
        counts = [np.ones(self.num_rollouts, dtype=np.int64)]
        for level in reversed(range(self.num_steps)):
            size = len(self.prompt[level])
            counts.append(np.bincount(self.parent[level], weights=counts[-1], minlength=size).astype(np.int64))
        return tuple(reversed(counts))

    @cached_property
    def first_leaf(self) -> tuple[IntArray, ...]:  # T+1 arrays (N_i,)
        """The lowest rollout below each node: the rollout an edge is booked on when a step's edges are dealt out."""
        owners = [np.arange(self.num_rollouts, dtype=np.int64)]
        for level in reversed(range(self.num_steps)):
            least = np.full(len(self.prompt[level]), self.num_rollouts, dtype=np.int64)
            np.minimum.at(least, self.parent[level], owners[-1])
            owners.append(least)
        return tuple(reversed(owners))


@dataclass(frozen=True)
class Conditioning:
    """What the network is told about each prompt; every tensor's leading dimension is P (or B after `select`)."""

    text: Tensor  # (P, L, D)
    pooled: Tensor | None = None  # (P, D')
    mask: Tensor | None = None  # (P, L) bool, True at words; None where every token counts
    extra: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # (P, ...) each: what else a model's network reads, by name

    def select(self, index: Tensor) -> Conditioning:
        """The rows of `index`, (B,) int64, in its order."""
        pooled = None if self.pooled is None else self.pooled[index]
        mask = None if self.mask is None else self.mask[index]
        extra = {name: tensor[index] for name, tensor in self.extra.items()}
        return Conditioning(self.text[index], pooled, mask, extra)


@dataclass(frozen=True)
class Gaussian:
    """One stochastic denoising step: the next latents are `mean + std * noise`."""

    mean: Tensor  # (B, *x) float32
    std: Tensor  # (B,) float32, the total standard deviation, >= 0; 0 is the deterministic step


@dataclass(frozen=True)
class StepTable:
    """A sampler's steps on a schedule, by their coefficients: the next latents are A_x x + A_v v + std noise."""

    latents: FloatArray  # (T,) A_x; or (K,), of a plan's different steps
    velocity: FloatArray  # (T,) A_v
    std: FloatArray  # (T,) >= 0; 0 is a step without noise


@dataclass(frozen=True)
class Edges:
    """What a training step learns from, level by level.

    In the reverse process these are the trained transitions of the plan. In the forward process they are clean latents
    of rollouts that were noised again to the level's sigma; each then ends at the clean latents.

    A state is there once, whatever begins or ends at it: siblings, which share the state they begin at, share what the
    network says there, too.
    """

    level: Tensor  # (E,) int64, the denoising step
    prompt: Tensor  # (E,) int64, row of the step's Conditioning
    rollout: Tensor  # (E,) int64, the rollout the edge is booked on (RolloutPlan.first_leaf)
    leaves: Tensor  # (E,) int64, rollouts that pass through the edge
    begin: Tensor  # (E,) int64, row of `states`: before the step
    end: Tensor  # (E,) int64, row of `states`: after it
    states: Tensor  # (S, *x) storage dtype; edges begin at the first V
    log_prob: Tensor  # (E,) float32, mean over dimensions, under the policy that sampled
    velocity: Tensor | None = None  # (V, *x) float32, of the policy that sampled; None unless `needs_old`
    base_velocity: Tensor | None = (
        None  # (V, *x) float32, of the base policy; None until learned from with `needs_base`
    )
    until: Tensor | None = None  # (E,) int64, the level the step ends at; None: the next
    scale: Tensor | None = None  # (E,) float32, factor of the step's noise rate; None: 1

    def __len__(self) -> int:
        return len(self.level)

    @property
    def latents(self) -> Tensor:  # (E, *x) storage dtype
        """The state before each step, a copy."""
        return self.states[self.begin]

    @property
    def next_latents(self) -> Tensor:  # (E, *x) storage dtype
        """The state after each step, a copy."""
        return self.states[self.end]

    @cached_property
    def group(self) -> Tensor:  # (E,) int64
        """The group of each edge: those of one prompt at one denoising step; counted from 0, level by level."""
        import torch

        place = self.level * (self.prompt.max() + 1) + self.prompt
        number: Tensor = torch.unique(place, return_inverse=True)[1]
        return number


@dataclass(frozen=True)
class Rollouts:
    """What executing a plan produced; flat over rollouts, with the plan's groups."""

    plan: RolloutPlan
    latents: Tensor  # (N, *x) at sigma 0
    images: Tensor  # (N, [F,] 3, h, w) in [0, 1]
    log_prob: tuple[Tensor, ...]  # T tensors (N_{i+1},) float32; 0 where the step is deterministic
    edges: Edges
    prompts: tuple[Prompt, ...] = ()  # P, the rows of the plan's `prompt`; empty where a plan was executed without any


@dataclass(frozen=True)
class Scores:
    """What rewards say of a step's images: of the rollouts, and where an advantage asks, of predicted clean images.

    The predicted clean image of a node is what its state x and the velocity v there say the image will be:
    x0hat = x - sigma v. Example: `nodes[3][7]` are the scores of what was predicted at node 7 of level 3.
    """

    leaves: Tensor  # (N, R) float32, of the rollouts' images
    nodes: Mapping[int, Tensor] = field(default_factory=dict)  # level -> (N_level, R) float32; `Advantage.levels` only


@dataclass(frozen=True)
class Update:
    """One micro-batch of trained transitions as an objective of the reverse process sees it."""

    log_prob: Tensor  # (B,) float32, current policy, with gradient
    old_log_prob: Tensor  # (B,) float32, the policy that sampled
    advantage: Tensor  # (B,) float32
    mean: Tensor  # (B, *x) float32, current policy's transition mean, with gradient
    base_mean: Tensor | None  # (B, *x) float32; None unless the objective declares `needs_base`
    old_mean: Tensor | None  # (B, *x) float32, of the policy that sampled; None unless it declares `needs_old`
    std: Tensor  # (B,) float32, the total standard deviation of the transition
    delta: Tensor  # (B,) float32, sigma - sigma_next > 0
    level: Tensor  # (B,) int64
    mean_std: float  # mean transition std over all denoising steps but the last, those of the plan
    group: Tensor  # (B,) int64, rows of one prompt and level have the same number; whole if `scope` is "groups"


@dataclass(frozen=True)
class Renoised:
    """One micro-batch of clean latents, noised again, as an objective of the forward process sees it.

    latents = (1 - sigma) clean + sigma noise, with noise of its own for every row, or, if the objective `shares_noise`,
    for every group; so the flow's own target for the velocity, noise - clean, is (latents - clean) / sigma.
    """

    advantage: Tensor  # (B,) float32, of the rollout
    level: Tensor  # (B,) int64
    sigma: Tensor  # (B,) float32, > 0
    latents: Tensor  # (B, *x) float32
    clean: Tensor  # (B, *x) float32
    velocity: Tensor  # (B, *x) float32, current policy, with gradient
    old_velocity: Tensor | None  # (B, *x) float32, the policy that sampled; None unless `needs_old`
    base_velocity: Tensor | None  # (B, *x) float32; None unless `needs_base`
    group: Tensor  # (B,) int64, rows of one prompt and level have the same number; whole if `scope` is "groups"


@dataclass(frozen=True)
class AttentionCall:
    """One softmax attention of the network, after QK-norm and rotary embedding: softmax(scale q k^T + mask)."""

    layer: str  # the module's name in the network
    kind: Literal[
        "joint", "self", "cross"
    ]  # image and text in one softmax; one of them; rows of one, keys of the other
    query: Tensor  # (B, heads, queries, d)
    key: Tensor  # (B, heads, keys, d)
    scale: float
    image: slice  # the image tokens among queries and, unless kind is "cross", among keys
    text: slice  # the text tokens among keys and, unless kind is "cross", among queries; empty if there are none
    mask: Tensor | None = None  # bool (True: attend) or additive, broadcastable to (B, heads, queries, keys)
