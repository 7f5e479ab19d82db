"""A model, with the weights of a checkpoint, that paints prompts by the deterministic sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from aegpo.core import contracts
from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Model, Preparable, Resizable
from aegpo.core.records import Conditioning
from aegpo.errors import AegpoError
from aegpo.models.adapters import add_adapters
from aegpo.runs.opening import FoundRun, check_fits
from aegpo.train.devices import STORAGE, choose_device, make_accelerator
from aegpo.train.rollouts import Execution, sample_deterministic
from aegpo.train.weight_copies import assign

_NOISE = 4243  # keeps this start noise apart from other streams of the same seed


class Painter:
    """The policy of a run beside its base; the base alone until weights are taken."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.device = choose_device(experiment.device)
        self._accelerator = make_accelerator(experiment, self.device)
        self.model = experiment.model.build(self.device)
        add_adapters(self.model.policy, experiment.policy, experiment.model.adapter_targets)
        with self.model.base():
            pass  # the base policy is what the model is now
        self._sized = resized(self.model, experiment)
        self._weights = {name: w for name, w in self.model.policy.named_parameters() if w.requires_grad}

    def take(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Gives the policy the weights of a checkpoint; `where` names it in errors.

        Raises:
            CheckpointError: if they are not the policy's.
        """
        check_fits(where, self._weights, weights)
        assign(self._weights, weights)

    def take_run(self, run: FoundRun) -> None:
        """Gives the policy the weights of a run.

        Raises:
            CheckpointError: if the checkpoint is damaged or of another network.
        """
        self.take(run.weights(), f"the checkpoint of step {run.step} in {run.folder}")

    def prepare(self, texts: Sequence[str]) -> None:
        """Works on prompts ahead where the model can, so that no text encoder is needed in between."""
        if isinstance(self.model, Preparable):
            self.model.prepare(texts)

    def execution(self, steps: int | None = None) -> Execution:
        """How the model is executed; None: the denoising steps that evaluation takes."""
        spec = self.experiment
        steps = steps or spec.evaluation.denoising_steps or spec.rollouts.denoising_steps
        sigmas = self._sized.sigmas(steps).to(self.device)
        contracts.check_sigmas(spec.model.kind, sigmas, steps, spec.model.partial_schedule)
        batch = spec.rollouts.micro_batch
        return Execution(
            self._sized, self._velocity, spec.sampler.build(), sigmas, batch, STORAGE[spec.rollouts.storage]
        )

    def noise(self, first: int, count: int, seed: int) -> Tensor:  # (count, C, H, W)
        """Start noise of prompts `first`, `first` + 1, ...: one fixed noise for each number and seed."""
        return torch.stack([self._one_noise(seed, first + index) for index in range(count)]).to(self.device)

    def _one_noise(self, seed: int, number: int) -> Tensor:  # (C, H, W)
        own = int(np.random.SeedSequence((_NOISE, seed, number)).generate_state(1)[0])
        return torch.randn(self._sized.latent_shape, generator=torch.Generator().manual_seed(own))

    def paint(self, how: Execution, texts: Sequence[str], noise: Tensor) -> Tensor:
        """(B, 3, h, w) in [0, 1]: each of B prompts from its start noise (B, C, H, W).

        Raises:
            ContractError: if the model paints what is no image.
        """
        with contracts.blaming("model", self.experiment.model.kind):
            cond = self.model.encode(texts)
        images = sample_deterministic(how, noise, cond)
        contracts.check_images(self.experiment.model.kind, images, len(texts))
        return images

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside, the frozen base policy paints."""
        with self.model.base():
            yield

    def _velocity(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        with contracts.blaming("model", self.experiment.model.kind), self._accelerator.autocast():
            return self._sized.velocity(latents, sigma, cond).float()


def resized(model: Model, experiment: Experiment) -> Model:
    """The model at the size of evaluation images.

    Raises:
        AegpoError: if it paints another size only.
    """
    height, width = experiment.evaluation.height, experiment.evaluation.width
    if height is None or width is None:
        return model
    if not isinstance(model, Resizable):
        raise AegpoError(
            f"model {experiment.model.kind!r} paints one size only; leave out 'height' and 'width' of 'evaluation'"
        )
    return model.at(height, width)
