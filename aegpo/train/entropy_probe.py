"""The entropy probe: what turns attention entropies along trajectories into the signals of a training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from aegpo.attention.entropy import measure_call
from aegpo.core.parts import JOINT_BLOCKS
from aegpo.core.records import AttentionCall, Conditioning, FloatArray, Prompt
from aegpo.core.sections import ProbeSpec
from aegpo.errors import SettingError
from aegpo.method.samplers import euler
from aegpo.train.base_entropies import BaseCurves
from aegpo.train.execution import Execution, Trunk
from aegpo.train.rollouts import start_latents

_SEEDS = 1_000_003  # keeps the start noises of prompts apart under neighbouring seeds


@dataclass(frozen=True)
class Probed:
    """What the probe found out about a step's prompts, and what that took."""

    entropy: FloatArray  # (P, T) nats, current policy; NaN at steps that are not measured
    base_entropy: FloatArray  # (P, T) nats, base policy
    forwards: int  # velocity evaluations
    trunk: Trunk | None  # of the prompts that were measured now; None unless rollouts start from it


@dataclass(frozen=True)
class _Trajectories:
    """Curves of some prompts, and the trajectories of their first start noise."""

    curves: FloatArray  # (P, T) nats, NaN where not measured
    noise: Tensor  # (P, C, H, W)
    velocity: tuple[Tensor, ...]  # (P, C, H, W) at each level up to the last measured


@dataclass
class _Kept:
    """The last curve of a prompt's policy."""

    step: int  # training step it was measured at
    curve: FloatArray  # (T,)


class EntropyProbe:
    """Measures Entropy(t) of prompts along deterministic trajectories.

    A prompt's start noise is fixed for the whole run, so that changes of entropy are changes of the policy. The base
    policy never changes: its entropies are measured once for each prompt and kept in `base`.
    """

    def __init__(self, how: Execution, spec: ProbeSpec, base: BaseCurves | None = None) -> None:
        self._how, self._spec = how, spec
        self._steps = spec.measured(len(how.sigmas) - 1)
        self.base = base or BaseCurves()
        self._kept: dict[int, _Kept] = {}

    @property
    def _cost(self) -> int:
        """Velocity evaluations of one prompt."""
        return self._spec.samples * (self._steps[-1] + 1)

    def measure(self, step: int, prompts: Sequence[Prompt], cond: Conditioning) -> Probed:
        """Entropies of a training step's prompts, of the policy and of the base."""
        index = [prompt.index for prompt in prompts]
        due = self._due(step, index)
        found = self._trajectories(prompts, cond, due, base=False) if due else None
        if found is not None:
            fresh = zip((index[row] for row in due), found.curves, strict=True)
            self._kept.update({prompt: _Kept(step, curve) for prompt, curve in fresh})
        missing = self.base.missing(index)
        if missing:
            curves = self._trajectories(prompts, cond, missing, base=True).curves
            self.base.add(step, [index[row] for row in missing], curves)
        entropy = np.stack([self._kept[prompt].curve for prompt in index])
        trunk = None
        if found is not None and self._spec.source == "rollout":
            trunk = Trunk(np.array(due, dtype=np.int64), found.noise, found.velocity)
        return Probed(entropy, self.base.get(index), (len(due) + len(missing)) * self._cost, trunk)

    def _due(self, step: int, index: Sequence[int]) -> list[int]:
        """Rows of the prompts that have no curve, or one that no longer holds; each prompt once."""
        first = {prompt: row for row, prompt in reversed(list(enumerate(index)))}
        old = step - self._spec.refresh
        return sorted(
            row for prompt, row in first.items() if prompt not in self._kept or self._kept[prompt].step <= old
        )

    @torch.no_grad()
    def _trajectories(
        self, prompts: Sequence[Prompt], cond: Conditioning, rows: Sequence[int], base: bool
    ) -> _Trajectories:
        """Follows every sample of the prompts in `rows`, all of them abreast."""
        samples, device = self._spec.samples, cond.text.device
        starts = [self._start(prompts[row], sample) for sample in range(samples) for row in rows]
        noise, every = torch.stack(starts).to(device), cond.select(torch.tensor(list(rows) * samples, device=device))
        latents, count = start_latents(noise, self._how.sigmas).to(self._how.storage), len(rows)
        curves = np.full((count, len(self._how.sigmas) - 1), np.nan)
        velocities: list[Tensor] = []
        for level in range(self._steps[-1] + 1):
            with self._how.model.base() if base else nullcontext():
                velocity, entropy = self._evaluate(level, latents.float(), every)
            if entropy is not None:
                curves[:, level] = entropy.view(samples, count).mean(dim=0).double().cpu().numpy()
            velocities.append(velocity[:count])
            sigma, sigma_next = (self._how.sigmas[place].expand(len(latents)) for place in (level, level + 1))
            latents = euler(latents, velocity, sigma, sigma_next).to(self._how.storage)
        return _Trajectories(curves, noise[:count], tuple(velocities))

    def _evaluate(self, level: int, latents: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Velocity (B, C, H, W) at a level, and entropies (B,) where it is measured."""
        sigma, velocities, entropies = self._how.sigmas[level], [], []
        for rows in torch.split(torch.arange(len(latents), device=latents.device), self._how.micro_batch):
            tap, measured = _LayerMean(self._spec), level in self._steps
            with self._how.model.tap_attention(tap.see) if measured else nullcontext():
                velocities.append(self._how.velocity(latents[rows], sigma.expand(len(rows)), cond.select(rows)))
            if measured:
                entropies.append(tap.mean())
        return torch.cat(velocities), torch.cat(entropies) if entropies else None

    def _start(self, prompt: Prompt, sample: int) -> Tensor:  # (C, H, W)
        return start_noise(self._how.model.latent_shape, self._spec.seed, prompt.index, sample)

    def state_dict(self) -> dict[str, Tensor]:
        """The last curves of the policy by prompt, where they hold for longer than their own step."""
        if not self._kept or self._spec.refresh == 1:
            return {}
        kept = list(self._kept.items())
        return {
            "prompt": torch.tensor([prompt for prompt, _ in kept]),
            "step": torch.tensor([each.step for _, each in kept]),
            "entropy": torch.from_numpy(np.stack([each.curve for _, each in kept])),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state_dict` returned."""
        self._kept = {}
        if state:
            rows = zip(state["prompt"].tolist(), state["step"].tolist(), state["entropy"].numpy(), strict=True)
            self._kept = {prompt: _Kept(step, curve) for prompt, step, curve in rows}


class _LayerMean:
    """Sees the attention calls of one evaluation and gives their mean entropy."""

    def __init__(self, spec: ProbeSpec) -> None:
        self._spec = spec
        self._values: list[Tensor] = []  # (B,) each
        self._seen: dict[str, str] = {}  # layer -> kind

    def see(self, call: AttentionCall) -> None:
        """Measures a call of a chosen layer, if it has the block."""
        self._seen[call.layer] = call.kind
        if any(fnmatchcase(call.layer, pattern) for pattern in self._spec.layers):
            wanted = (self._spec.block,)
            found = measure_call(call, wanted, rows=self._spec.rows, seed=self._spec.seed, masses=False)
            if self._spec.block in found:
                self._values.append(found[self._spec.block].entropy.mean(dim=1))

    def mean(self) -> Tensor:  # (B,)
        """The mean over layers.

        Raises:
            SettingError: if no call was measured; the message says why.
        """
        if not self._values:
            raise SettingError(nothing_measured(self._spec.block, self._spec.layers, self._seen), "probe")
        return torch.stack(self._values).mean(dim=0)


def nothing_measured(block: str, patterns: Sequence[str], seen: Mapping[str, str]) -> str:
    """Why none of the layers that were seen, by name with their kind, could be measured; and what could."""
    if not seen:
        return (
            "the network made no softmax attention call that can be watched, so it has no attention entropy; "
            "choose parts that read none"
        )
    if not any(fnmatchcase(layer, pattern) for layer in seen for pattern in patterns):
        return f"no layer matches {', '.join(map(repr, patterns))}; layers are {_abridged(list(seen))}"
    kinds = dict.fromkeys(kind for layer, kind in seen.items() if any(fnmatchcase(layer, each) for each in patterns))
    blocks = [name for kind in kinds for name in (JOINT_BLOCKS if kind == "joint" else (kind,))]
    return f"the network has no {block!r} attention in these layers; it has {', '.join(blocks)}"


def _abridged(names: Sequence[str]) -> str:
    shown = [*names[:3], "...", names[-1]] if len(names) > 5 else names
    return ", ".join(shown)


def start_noise(shape: tuple[int, int, int], seed: int, prompt: int, sample: int = 0) -> Tensor:  # (C, H, W)
    """The start noise of a prompt's probe trajectory, the same whenever it is asked for."""
    own = seed * _SEEDS + prompt
    if sample > 0:  # the CPU's generator reads 32 bits of a seed, so that samples cannot just be far apart
        own = int(np.random.SeedSequence((own % 2**64, sample)).generate_state(1)[0])
    return torch.randn(shape, generator=torch.Generator().manual_seed(own))
