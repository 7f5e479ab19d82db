"""The policy: one network with its base, averaged and lagging weights, which samples plans and paints images."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aegpo.core import contracts, untouched
from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Model, Preparable, Sampler
from aegpo.core.memory import enough_memory, free_bytes, lower
from aegpo.core.parts import ModelSpec
from aegpo.core.places import named_places
from aegpo.core.processes import refuse_several_processes
from aegpo.core.records import AttentionCall, Conditioning, Prompt
from aegpo.core.sections import GIB
from aegpo.core.shardable import Shardable, Unread
from aegpo.core.signatures import built
from aegpo.models.adapters import add_adapters
from aegpo.models.loaded import Values, fingerprint, main_dtype, resized, sampled_values
from aegpo.models.unread import given_room, is_unread
from aegpo.parallel.sharding import Sharding
from aegpo.parallel.team import Team
from aegpo.train.asking import Answers, decoded, log_prob, transition
from aegpo.train.devices import STORAGE, choose_device
from aegpo.train.execution import Execution, Show, Velocity, unseen
from aegpo.train.noise import prompt_noise
from aegpo.train.pieces import shared_out, shares
from aegpo.train.precision import Precision
from aegpo.train.rollouts import sample_deterministic
from aegpo.train.weights import Weights
from aegpo.train.who_holds import who_holds

_WORTHWHILE = 32  # the share of a micro-batch below which fewer latents hardly cost less
_READ_TOGETHER = 16  # prompts that are never parted, since text encoders may read so many at a time


class Policy:
    """The network of an experiment: what is trained, beside the frozen base that it was when it was loaded."""

    def __init__(self, experiment: Experiment, team: Team | None = None) -> None:
        """Loads the network onto the experiment's device and puts adapters into it.

        Args:
            experiment: what it is of.
            team: the processes that work on it together; None: this one alone.

        Raises:
            AegpoError: if it cannot be built, or paints no images of the size that evaluation asks for.
        """
        if team is None:
            refuse_several_processes()
        self.team = team or Team.alone()
        self.experiment, self.device = experiment, choose_device(experiment.device, self.team.place)
        self.precision = Precision(experiment.precision, self.device, experiment.tf32)
        torch.manual_seed(experiment.seed)  # adapters, and foreign parts that start at random
        spec = self._settled(experiment)
        build = spec.build_unread if self._shared == "sharded" else spec.build
        self.model = built("model", spec.kind, partial(build, self.device), Model)
        computes_in = main_dtype(self.model.policy)
        add_adapters(self.model.policy, experiment.policy, experiment.model.adapter_targets)
        with contracts.blaming("model", experiment.model.kind), self.model.frozen("base"):
            pass  # the base policy is what the model is now
        self._values: Values = {}  # of weights that are sharded now, as they were
        self.sharding = self._sharded(computes_in)
        self.weights = Weights(self.model.policy, *(() if self.sharding is None else (self.sharding.changing,)))
        self._sized = resized(self.model, experiment)
        self._probe: Prompt | None = None  # that `check` tried
        self.how = self._execution(self.model, experiment.rollouts.denoising_steps)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """x: (C, H, W), with frames (C, F, H, W), or of any other rank."""
        return self.model.latent_shape

    @property
    def sigmas(self) -> Tensor:
        """(T+1,) the noise levels of training."""
        return self.how.sigmas

    @property
    def storage(self) -> torch.dtype:
        """In which dtype rollouts keep latents from one step to the next."""
        return self.how.storage

    @property
    def micro_batch(self) -> int:
        """How many latents go through the network at once."""
        return self.how.micro_batch

    def use(self, experiment: Experiment) -> Experiment:
        """Takes the experiment with its micro-batches as numbers, and gives it back."""
        self.experiment = experiment
        self.how = replace(self.how, micro_batch=experiment.rollouts.latents_at_once)
        return experiment

    def _settled(self, experiment: Experiment) -> ModelSpec:
        """The model with what it leaves to the machine decided; `choices` says what was chosen."""
        given, free = experiment.model, free_bytes(self.device)
        if self.device.type == "cpu":
            free //= self.team.place.local_size
        with contracts.blaming("model", given.kind):
            self._shared, room = who_holds(experiment, self.team, free)
            settled = given.settled(experiment, room)
        before, now = given.model_dump(mode="json"), settled.model_dump(mode="json")
        chosen = {f"model.{name}": (before[name], value) for name, value in now.items() if value != before[name]}
        if self.team.size > 1 and experiment.parallel.weights == "auto":
            chosen["parallel.weights"] = "auto", self._shared
        self.choices = tuple(
            f"{name}: {json.dumps(old)} -> {json.dumps(new)}, with {free / GIB:.1f} GiB free"
            for name, (old, new) in chosen.items()
        )
        return settled

    def _sharded(self, computes_in: torch.dtype) -> Sharding | None:
        """The networks' weights spread over the processes; None: each has them whole."""
        if self._shared == "whole":
            return None
        parallel, model = self.experiment.parallel, self.model
        sharding = Sharding(self.team, self.team.mesh(parallel.replicas), parallel.gather)

        def spread(name: str, network: nn.Module) -> None:
            read = partial(self._read, model) if is_unread(network) and isinstance(model, Unread) else None
            sharding.spread(name, network, computes_in, read)

        with contracts.blaming("model", self.experiment.model.kind):
            spread("policy", model.policy)
            if isinstance(model, Shardable):
                model.shard_base(partial(spread, "base"))
        self._values = sampled_values(model.policy)
        return sharding

    def _read(self, model: Unread, network: nn.Module) -> None:
        given_room(network, self.device)
        model.read_weights(network)

    # --- what it says ------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:  # P
        """What the network is told about prompts."""
        return self._encoded(self.model, prompts)

    def told(self, prompts: Sequence[Prompt]) -> Conditioning:  # P
        """The same, when it paints images of the size of evaluation."""
        return self._encoded(self._sized, prompts)

    def velocity(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """(B, *x), (B,) -> (B, *x) float32, in the run's precision."""
        return self.how.velocity(latents, sigma, cond)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, *x) -> images (B, [F,] 3, h, w) in [0, 1]."""
        return decoded(self.how, latents)

    def tap_attention(self, tap: Callable[[AttentionCall], None]) -> AbstractContextManager[None]:
        """Inside, `tap` sees every attention call; the network's output does not change."""
        return self.model.tap_attention(tap)

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """Works on prompts ahead where the model can, so that no text encoder is needed in between."""
        if not isinstance(self.model, Preparable):
            return
        share = shares(-(-len(prompts) // _READ_TOGETHER), self.team.size)[self.team.place.rank]
        own = prompts[share.start * _READ_TOGETHER : share.stop * _READ_TOGETHER]
        with contracts.blaming("model", self.experiment.model.kind):
            if len(own) < len(prompts):
                self.model.prepare(own)
        self.team.told("prompts were prepared")  # each finds on disk what the others did
        with contracts.blaming("model", self.experiment.model.kind):
            self.model.prepare(prompts)

    def painting(self, steps: int | None = None) -> Execution:
        """How deterministic images are painted, at the size of evaluation; None: the denoising steps it takes."""
        spec = self.experiment
        return self._execution(self._sized, steps or spec.evaluation.denoising_steps or spec.rollouts.denoising_steps)

    def images(
        self, prompts: Sequence[Prompt], noise: Tensor, how: Execution | None = None, show: Show = unseen
    ) -> Tensor:
        """(B, [F,] 3, h, w) in [0, 1]: each of B prompts from its start noise (B, *x), deterministic sampler.

        Args:
            prompts: B of them.
            noise: of `evaluation_noise`.
            how: of `painting`; None: as evaluation paints.
            show: sees images as soon as they are painted.

        Raises:
            ContractError: if the model paints what is no image.
            MemoryShortageError: if memory runs out.
        """
        remedy = lower("rollouts.micro_batch", self.micro_batch)
        with enough_memory("images were painted", remedy):
            how = how or self.painting()
            images = sample_deterministic(how, noise, self._encoded(how.model, prompts), show)
        kind = self.experiment.model.kind
        with contracts.blaming("model", kind):
            contracts.check_images(kind, images, len(prompts), self.experiment.model.media)
        return images

    def evaluation_noise(self, prompts: Sequence[Prompt], seed: int | None = None, images: int = 1) -> Tensor:
        """(P * images, *x) start noise of each prompt's images, which are neighbours; the same whoever paints them.

        `seed` is by default the experiment's. The first images have the same noise however many there are.
        """
        seed, shape = self.experiment.evaluation.seed if seed is None else seed, self._sized.latent_shape
        each = [prompt_noise(shape, seed, prompts, "evaluation", sample) for sample in range(images)]
        return torch.stack(each, dim=1).flatten(0, 1).to(self.device)

    def shared_out(self, count: int, work: Callable[[slice], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """What `work` finds out about `count` things, some of which each process does; all processes get all of it.

        Args:
            count: at least 1.
            work: is asked about neighbours, at least one; gives tensors with a row for each, as many each time.
        """
        least = -(-self.micro_batch // _WORTHWHILE)
        return shared_out(self.team, "signals", count, work, least)

    def start_noise(self, prompts: Sequence[Prompt], seed: int, sample: int = 0) -> Tensor:  # (P, *x)
        """Start noise for signals: one fixed noise for each prompt, seed and sample, whenever it is asked for."""
        return prompt_noise(self.latent_shape, seed, prompts, "signal", sample).to(self.device)

    def in_lockstep(self) -> AbstractContextManager[None]:
        """Inside, all processes ask for gradients as often, which sharded weights need; of whole ones, as they like."""
        return nullcontext() if self.sharding is None else self.sharding.in_lockstep(0, lambda: None)

    # --- whose weights it has ----------------------------------------------------------------------------------------

    def base(self) -> AbstractContextManager[None]:
        """Inside, the frozen base policy speaks; base inside base is the base."""
        return self.model.frozen("base")

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, it has its averaged weights, if the run keeps any."""
        return self.weights.active(self.weights.average)

    def lagging(self) -> AbstractContextManager[None]:
        """Inside, it has the weights that sample rollouts: its own, unless the objective keeps older ones."""
        return self.weights.active(self.weights.old)

    def identity(self) -> dict[str, Any]:
        """What the base policy's answers depend on, as JSON; asked before anything is learned.

        Where its weights are is not part of it: they may be moved, and what is in them is.
        """
        spec = self.experiment
        how = {"storage": spec.rollouts.storage, "precision": spec.precision, "sigmas": self.sigmas.tolist()}
        tf32 = {} if spec.tf32 is None else {"tf32": spec.tf32}
        model = spec.model.model_dump(mode="json")
        places = {"revision", *(str(place.location[0]) for place in named_places(type(spec.model), model))}
        told = {name: value for name, value in model.items() if name not in places}
        return {**how, **tf32, "model": told, "weights": self.fingerprint()}

    def fingerprint(self, without: Collection[str] = ()) -> str:
        """Tells its network from others before anything is learned; `without`: names of weights that do not count."""
        return fingerprint(self._values or self.model.policy, without)

    # --- how it is executed ------------------------------------------------------------------------------------------

    def _encoded(self, model: Model, prompts: Sequence[Prompt]) -> Conditioning:
        """What a model is told: at another size it may be told more than the words."""
        kind = self.experiment.model.kind
        with contracts.blaming("model", kind, once=True):
            cond = model.encode(prompts)
            contracts.check_conditioning(kind, cond, prompts)
        return cond

    def _execution(self, model: Model, steps: int) -> Execution:
        spec = self.experiment
        with contracts.blaming("model", spec.model.kind):
            sigmas = model.sigmas(steps)
            contracts.check_sigmas(spec.model.kind, sigmas, steps, spec.model.partial_schedule)
        return Execution(
            model,
            self._velocity_of(model),
            built("sampler", spec.sampler.kind, spec.sampler.build, Sampler),
            sigmas.to(self.device),
            spec.rollouts.latents_at_once,
            STORAGE[spec.rollouts.storage],
            keep_velocity=spec.objective.needs_old and spec.objective.process == "reverse",
            predicted_clean=spec.rollouts.decode == "predicted-clean",
            model_kind=spec.model.kind,
            sampler_kind=spec.sampler.kind,
            diverged=self._diverged,
        )

    def _velocity_of(self, model: Model) -> Velocity:
        """What a model says, in the run's precision; evaluation may take it at another size than training."""

        kind = self.experiment.model.kind

        def velocity(latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            before = untouched.versions(latents)
            with contracts.blaming("model", kind):
                with self.precision.autocast():
                    found = model.velocity(latents, sigma, cond)
                contracts.check_velocity(kind, found, latents)
                untouched.check_untouched("model", kind, before, latents)
            return found.float()

        return velocity

    @torch.no_grad()
    def _diverged(self) -> bool:
        """True if the network says nothing finite of noise of which its base does: training did that, and no part."""
        if self._probe is None:
            return False
        cond = self.model.encode([self._probe])
        latents = prompt_noise(self.latent_shape, 0, [self._probe], "signal", 0).to(self.device)
        for sigma in self.sigmas[:-1]:
            said = self.model.velocity(latents, sigma.expand(1), cond)
            with self.model.frozen("base"):
                base = self.model.velocity(latents, sigma.expand(1), cond)
            if bool(base.isfinite().all()) and not bool(said.isfinite().all()):
                return True
        return False

    @torch.no_grad()
    def check(self, prompt: Prompt) -> None:
        """Tries model and sampler on one latent, so that a foreign part is blamed before any work is done.

        Raises:
            ContractError: if one of them fails or returns what it must not.
        """
        spec, cond = self.experiment, self.encode([prompt])
        sigma, sigma_next = self.how.sigmas[:1], self.how.sigmas[1:2]
        latents = torch.zeros((1, *self.model.latent_shape), device=self.device)
        velocity, answers = self.how.velocity(latents, sigma, cond), Answers(self.how)
        answers.velocity(velocity)
        answers.verify()
        with contracts.blaming("model", spec.model.kind):
            contracts.check_images(spec.model.kind, decoded(self.how, latents), 1, spec.model.media)
        gaussian = transition(self.how, latents, velocity, sigma, sigma_next)
        density = log_prob(self.how, gaussian, gaussian.mean.clone())
        with contracts.blaming("sampler", spec.sampler.kind):
            contracts.check_transition(spec.sampler.kind, gaussian, latents)
            contracts.check_log_prob(spec.sampler.kind, density, latents)
        self._probe = prompt
