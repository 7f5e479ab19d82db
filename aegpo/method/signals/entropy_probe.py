"""The entropy probe: what turns attention entropies along trajectories into signals of a training step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aegpo.attention.entropy import measure_call
from aegpo.core.digests import digest_of_told
from aegpo.core.interfaces import Policy
from aegpo.core.parts import JOINT_BLOCKS
from aegpo.core.records import AttentionCall, Conditioning, FloatArray, Prompt
from aegpo.core.sharing import Arrays, Store
from aegpo.core.signals import Measurement, Trunk
from aegpo.errors import SettingError
from aegpo.method.samplers import euler, start_latents
from aegpo.method.signals.base_entropies import BaseCurves, prompt_digest
from aegpo.method.signals.entropy_options import ENTROPY, ENTROPY_DELTA, EntropyOptions, entropy_change, filled


@dataclass(frozen=True)
class _Trajectories:
    """Curves of some prompts, and the trajectories of their first start noise."""

    curves: FloatArray  # (P, T) nats, NaN where neither measured nor interpolated
    noise: Tensor  # (P, *x)
    velocity: tuple[Tensor, ...]  # (P, *x) at the first levels, as rollouts come by them
    path: tuple[Tensor, ...] = ()  # (samples x P, *x) at each level that is tapped; empty if nobody asked for it


@dataclass
class _Kept:
    """The last curve of a prompt's policy."""

    step: int  # training step it was measured at
    curve: FloatArray  # (T,)
    base: FloatArray | None = None  # (T,) the base policy's on the same latents, if delta is asked on those


class EntropyProbe:
    """Measures Entropy(t) of prompts along deterministic trajectories.

    A prompt's start noise is fixed for the whole run, so that changes of entropy are changes of the policy. The base
    policy never changes: its entropies on its own trajectory are measured once for each prompt and kept, in files where
    there is a folder. Where there is a store, runs that ask the same prompts together share them. Those on the policy's
    latents hold as long as the policy's curve that they belong to.
    """

    def __init__(self, spec: EntropyOptions) -> None:
        self._spec = spec
        self._base = BaseCurves()
        self._kept: dict[int, _Kept] = {}
        self._store: Store | None = None

    def share(self, store: Store) -> None:
        """Asks a store for the base policy's curves before it measures them; what they cost stays what it was."""
        self._store = store

    def measure(self, step: int, prompts: Sequence[Prompt], policy: Policy) -> Measurement:
        """`entropy` (P, T) nats of a training step's prompts, and `entropy-delta` (P,), nats unless it is relative.

        Steps that are not measured are NaN: they cannot be chosen by their entropy and do not enter delta.
        """
        cond = policy.encode(prompts)
        due = self._due(step, [prompt.index for prompt in prompts])
        trunk = self._measure_due(step, prompts, cond, due, policy) if due else None
        missing = [] if self._on_policy else self._base.missing(prompts)
        if missing:
            curves = self._base_curves(prompts, cond, missing, policy)
            self._base.add(step, [prompts[row] for row in missing], curves)
        entropy = np.stack([self._kept[prompt.index].curve for prompt in prompts])
        steps = self._steps(policy)
        ours, theirs = (curves.take(steps, axis=1) for curves in (entropy, self.base_entropies(prompts)))
        delta = entropy_change(ours, theirs, self._spec.delta)
        each = self._spec.cost(len(policy.sigmas) - 1)
        spent = len(due) * (each.policy + each.base_again) + len(missing) * each.base
        return Measurement({ENTROPY: entropy, ENTROPY_DELTA: delta}, spent, trunk)

    def _measure_due(
        self, step: int, prompts: Sequence[Prompt], cond: Conditioning, due: Sequence[int], policy: Policy
    ) -> Trunk | None:
        """Measures the policy at the prompts in `due`; what rollouts may start from."""
        handed_on = self._spec.source == "rollout"

        def work(rows: slice) -> list[Tensor]:
            found = self._trajectories(prompts, cond, due[rows], policy, path=self._on_policy)
            on_path = [self._base_on_path(found, cond, due[rows], policy)] if self._on_policy else []
            curves = [torch.from_numpy(each).to(found.noise.device) for each in (found.curves, *on_path)]
            return [*curves, *([found.noise, *found.velocity] if handed_on else [])]

        curves, *others = policy.shared_out(len(due), work)
        on_path = others.pop(0).cpu().numpy() if self._on_policy else [None] * len(due)
        fresh = zip((prompts[row].index for row in due), curves.cpu().numpy(), on_path, strict=True)
        self._kept.update({prompt: _Kept(step, curve, base) for prompt, curve, base in fresh})
        return Trunk(np.array(due, dtype=np.int64), others[0], tuple(others[1:])) if handed_on else None

    def _base_curves(
        self, prompts: Sequence[Prompt], cond: Conditioning, rows: Sequence[int], policy: Policy
    ) -> FloatArray:  # (len(rows), T)
        """The base policy's entropies of the prompts in `rows`, measured here or in another run.

        Which prompts go through the network together changes last bits, so what is shared is of all of them: the curves
        are those that would be measured here, and a policy that has not moved differs from its base by nothing at all.
        """

        def depends_on() -> dict[str, Any]:
            index = torch.tensor(list(rows), device=cond.text.device)
            together = [prompt_digest(prompts[row]).hex() for row in rows]
            told = digest_of_told(cond.select(index))
            return {"probe": self._how(), "prompts": together, "told": told, "micro_batch": policy.micro_batch}

        def measure() -> Arrays:
            with policy.base():
                return {"entropy": self._curves(prompts, cond, rows, policy)}

        found = measure() if self._store is None else self._store.known("entropy", depends_on, measure)
        return found["entropy"]

    def _curves(
        self, prompts: Sequence[Prompt], cond: Conditioning, rows: Sequence[int], policy: Policy
    ) -> FloatArray:  # (len(rows), T)
        """Entropies of the prompts in `rows` along their trajectories."""

        def work(some: slice) -> list[Tensor]:
            return [torch.from_numpy(self._trajectories(prompts, cond, rows[some], policy).curves)]

        curves: FloatArray = policy.shared_out(len(rows), work)[0].numpy()
        return curves

    def base_entropies(self, prompts: Sequence[Prompt]) -> FloatArray:  # (P, T)
        """The base policy's curves of prompts that were measured, in nats; NaN at steps that are not measured."""
        if not self._on_policy:
            return self._base.get(prompts)
        kept = [self._kept[prompt.index].base for prompt in prompts]
        return np.stack([curve for curve in kept if curve is not None])

    @property
    def _on_policy(self) -> bool:
        return self._spec.base_on == "policy"

    def _steps(self, policy: Policy) -> tuple[int, ...]:
        return self._spec.measured(len(policy.sigmas) - 1)

    def _tapped(self, policy: Policy) -> tuple[int, ...]:
        return self._spec.tapped(len(policy.sigmas) - 1)

    def _filled(self, curves: FloatArray) -> FloatArray:  # (P, T)
        """With a stride, the curves between the levels that were measured as well."""
        return filled(curves) if self._spec.stride > 1 else curves

    def _due(self, step: int, index: Sequence[int]) -> list[int]:
        """Rows of the prompts that have no curve, or one that no longer holds; each prompt once."""
        first = {prompt: row for row, prompt in reversed(list(enumerate(index)))}
        old = step - self._spec.refresh
        return sorted(
            row for prompt, row in first.items() if prompt not in self._kept or self._kept[prompt].step <= old
        )

    @torch.no_grad()
    def _trajectories(
        self, prompts: Sequence[Prompt], cond: Conditioning, rows: Sequence[int], policy: Policy, path: bool = False
    ) -> _Trajectories:
        """Follows every sample of the prompts in `rows`, all of them abreast; `path`: keeps where they came by."""
        samples, count, levels = self._spec.samples, len(rows), self._spec.evaluated(len(policy.sigmas) - 1)
        chosen = [prompts[row] for row in rows]
        noise = torch.cat([policy.start_noise(chosen, self._spec.seed, sample) for sample in range(samples)])
        every = self._each_sample(cond, rows, noise.device)
        latents = start_latents(noise, policy.sigmas).to(policy.storage)
        curves = np.full((count, len(policy.sigmas) - 1), np.nan)
        velocities, passed = list[Tensor](), list[Tensor]()
        for level in levels:
            velocity, entropy = self._evaluate(policy, level, latents.float(), every)
            if entropy is not None:
                curves[:, level] = self._over_samples(entropy)
                passed += [latents] if path else []
            if self._spec.stride == 1 or level == 0:  # the levels at which rollouts come by the same latents
                velocities.append(velocity[:count])
            ends = level, min(level + self._spec.stride, len(policy.sigmas) - 1)
            sigma, sigma_next = (policy.sigmas[place].expand(len(latents)) for place in ends)
            latents = euler(latents, velocity, sigma, sigma_next).to(policy.storage)
        return _Trajectories(self._filled(curves), noise[:count], tuple(velocities), tuple(passed))

    @torch.no_grad()
    def _base_on_path(
        self, found: _Trajectories, cond: Conditioning, rows: Sequence[int], policy: Policy
    ) -> FloatArray:  # (len(rows), T)
        """The base policy's curves on the latents that the policy came by; NaN at steps that are not measured."""
        every, curves = self._each_sample(cond, rows, found.noise.device), np.full_like(found.curves, np.nan)
        with policy.base():
            for level, latents in zip(self._tapped(policy), found.path, strict=True):
                _, entropy = self._evaluate(policy, level, latents.float(), every)
                assert entropy is not None, "the level is measured"
                curves[:, level] = self._over_samples(entropy)
        return self._filled(curves)

    def _each_sample(self, cond: Conditioning, rows: Sequence[int], device: torch.device) -> Conditioning:
        """What the network is told of every sample of some prompts, sample by sample."""
        return cond.select(torch.tensor(list(rows) * self._spec.samples, device=device))

    def _over_samples(self, entropy: Tensor) -> FloatArray:  # (samples x P,) -> (P,)
        """The mean of each prompt's samples."""
        mean: FloatArray = entropy.view(self._spec.samples, -1).mean(dim=0).double().cpu().numpy()
        return mean

    def _evaluate(
        self, policy: Policy, level: int, latents: Tensor, cond: Conditioning
    ) -> tuple[Tensor, Tensor | None]:
        """Velocity (B, *x) at a level, and entropies (B,) where it is measured."""
        sigma, velocities, entropies = policy.sigmas[level], [], []
        measured = level in self._tapped(policy)
        for rows in torch.split(torch.arange(len(latents), device=latents.device), policy.micro_batch):
            tap = _LayerMean(self._spec)
            with policy.tap_attention(tap.see) if measured else nullcontext():
                velocities.append(policy.velocity(latents[rows], sigma.expand(len(rows)), cond.select(rows)))
            if measured:
                entropies.append(tap.mean())
        return torch.cat(velocities), torch.cat(entropies) if entropies else None

    def open(self, folder: Path, step: int, identity: Mapping[str, Any]) -> None:
        """Takes back the base policy's curves of a run that goes on after a training step, and keeps new ones there.

        Raises:
            CheckpointError: if a file is damaged or of another probe.
        """
        if self._on_policy:
            return  # the policy's latents are never the same again
        self._base.open(folder, step, {"probe": self._how(), **identity})

    def _how(self) -> dict[str, Any]:
        """The options that the base policy's curves depend on, as JSON."""
        free = {"refresh", "source", "base_on", "delta"}
        exact = {"stride"} if self._spec.stride == 1 else set()  # as the files of runs before there was a stride
        return self._spec.model_dump(mode="json", exclude=free | exact)

    def write(self, step: int) -> None:
        """Puts the base policy's new curves on disk."""
        self._base.write(step)

    def state_dict(self) -> dict[str, Any]:
        """What is known of the base, and the policy's last curves by prompt where they outlast their own step."""
        noted: dict[str, Any] = {"known": self._base.known()}
        if not self._kept or self._spec.refresh == 1:
            return noted
        kept = list(self._kept.items())
        state = noted | {
            "prompt": torch.tensor([prompt for prompt, _ in kept]),
            "step": torch.tensor([each.step for _, each in kept]),
            "entropy": torch.from_numpy(np.stack([each.curve for _, each in kept])),
        }
        base = [each.base for _, each in kept if each.base is not None]
        return {**state, "base": torch.from_numpy(np.stack(base))} if base else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; the base's curves are in files, which `open` reads."""
        self._base.expect(state.get("known"))  # versions before 0.2 noted nothing
        self._kept = {}
        if "prompt" in state:
            prompts, steps, curves = state["prompt"].tolist(), state["step"].tolist(), state["entropy"].numpy()
            base = state["base"].numpy() if "base" in state else [None] * len(prompts)
            rows = zip(prompts, steps, curves, base, strict=True)
            self._kept = {prompt: _Kept(step, curve, on_path) for prompt, step, curve, on_path in rows}


class _LayerMean:
    """Sees the attention calls of one evaluation and gives their mean entropy."""

    def __init__(self, spec: EntropyOptions) -> None:
        self._spec = spec
        self._values: list[Tensor] = []  # (B,) each
        self._seen: dict[str, str] = {}  # layer -> kind
        self._measured: set[str] = set()  # layers

    def see(self, call: AttentionCall) -> None:
        """Measures a call of a chosen layer, if it has the block."""
        self._seen[call.layer] = call.kind
        if any(fnmatchcase(call.layer, pattern) for pattern in self._spec.layers):
            wanted = (self._spec.block,)
            found = measure_call(call, wanted, rows=self._spec.rows, seed=self._spec.seed, masses=False)
            if self._spec.block in found:
                self._values.append(found[self._spec.block].entropy.mean(dim=1))
                self._measured.add(call.layer)

    def mean(self) -> Tensor:  # (B,)
        """The mean over layers.

        Raises:
            SettingError: if no call was measured, or none of a layer that one of the patterns names; the message says
                why.
        """
        if idle := without_layer(self._spec.layers, self._measured):
            raise SettingError(nothing_measured(self._spec.block, idle, self._seen), "signals", "entropy")
        return torch.stack(self._values).mean(dim=0)


def without_layer(patterns: Sequence[str], layers: Collection[str]) -> list[str]:
    """The patterns that name none of the layers."""
    return [pattern for pattern in patterns if not any(fnmatchcase(layer, pattern) for layer in layers)]


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
