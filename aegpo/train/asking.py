"""Models and samplers are asked here while a run is under way, and what they answer is checked without slowing it.

Shapes and types are known at once. Values are summed up on the device and looked at once for each batch of images,
where the device is waited for anyway: a sum is finite only if all of it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aegpo.core import contracts, untouched
from aegpo.core.records import Conditioning, Gaussian
from aegpo.errors import AegpoError, ContractError
from aegpo.parallel.dtensors import local
from aegpo.train.execution import Execution

DIVERGED = (
    "training diverged: the policy's outputs or gradients are not finite; lower 'optimizer.learning_rate', or raise "
    "'sampler.noise_level', and start over with --fresh"
)
_VELOCITY = "a velocity that is not finite"
_TRANSITION = "a transition that is not finite, or whose std is below 0"
_LOSS = "a loss that is not finite"
_DENSITY = "log-probabilities that are not finite"


class Answers:
    """Whether all that a model, a sampler and an objective have said is finite."""

    def __init__(self, how: Execution) -> None:
        self._how = how
        self._sums: list[Tensor] = []
        self._of: list[tuple[str, str, str]] = []  # kind, name, and what was said

    def velocity(self, velocity: Tensor) -> None:
        """What a model said."""
        self._note("model", self._how.model_kind, _VELOCITY, velocity.sum())

    def transition(self, gaussian: Gaussian) -> None:
        """What a sampler said of the next states; the root of a negative std is not finite."""
        self._note("sampler", self._how.sampler_kind, _TRANSITION, gaussian.mean.sum() + gaussian.std.sqrt().sum())

    def density(self, log_prob: Tensor, std: Tensor) -> None:
        """What a sampler said of the states that were reached, (B,) and (B, 1, ...); without noise there is none."""
        total = torch.where(std.reshape(len(log_prob), -1).amin(1) > 0, log_prob, 0).sum()
        self._note("sampler", self._how.sampler_kind, _DENSITY, total)

    def loss(self, objective: str, loss: Tensor) -> None:
        """What an objective, by its name, said of some edges."""
        self._note("objective", objective, _LOSS, loss.sum())

    def _note(self, part: str, name: str, what: str, total: Tensor) -> None:
        self._of.append((part, name, what))
        self._sums.append(total)

    def verify(self) -> None:
        """Looks at everything that was said since the last look.

        Raises:
            ContractError: if some of it is not finite; the first who said so is blamed.
            AegpoError: if training ruined the network.
        """
        if not self._sums:
            return
        finite = torch.stack(self._sums).isfinite()
        self._sums.clear()
        of, self._of = self._of, []
        if not bool(finite.all()):
            part, name, what = of[int((~finite).nonzero()[0])]
            refuse(self._how, part, name, what)


def refuse(how: Execution, part: str, name: str, what: str) -> None:
    """Says whose fault it is that a value is not finite.

    Raises:
        ContractError: that of the part.
        AegpoError: if training ruined the network, so that it is no part's fault.
    """
    if part == "model" and ruined(how):
        raise AegpoError(DIVERGED)
    raise contracts.blamed(ContractError(f"{part} {name!r} returned {what}; finite numbers were asked"), part, name)


def ruined(how: Execution) -> bool:
    """True if the network's weights are not finite, or what it says where the base policy makes sense is not."""
    return not all(bool(local(weight).isfinite().all()) for weight in how.model.policy.parameters()) or how.diverged()


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


def transition(how: Execution, latents: Tensor, velocity: Tensor, *span: Tensor) -> Gaussian:
    """The distribution of the next latents: (B, *x) twice, and sigma, the next and perhaps a scale, (B,) each."""
    before = untouched.versions(latents, velocity)
    with contracts.blaming("sampler", how.sampler_kind):
        gaussian = how.sampler.transition(latents, velocity, *span)
        contracts.check_transition(how.sampler_kind, gaussian, latents, values=False)
        untouched.check_untouched("sampler", how.sampler_kind, before, latents, velocity)
    return gaussian


def log_prob(how: Execution, gaussian: Gaussian, reached: Tensor) -> Tensor:  # (B,)
    """The log-density of the states (B, *x) that were reached."""
    before = untouched.versions(gaussian.mean, gaussian.std, reached)
    with contracts.blaming("sampler", how.sampler_kind):
        found = how.sampler.log_prob(gaussian, reached)
        contracts.check_log_prob(how.sampler_kind, found, reached, values=False)
        untouched.check_untouched("sampler", how.sampler_kind, before, gaussian.mean, gaussian.std, reached)
    return found


def decoded(how: Execution, latents: Tensor) -> Tensor:  # (b, [F,] 3, h, w)
    """Images of clean latents (b, *x)."""
    before = untouched.versions(latents)
    with contracts.blaming("model", how.model_kind):
        images = how.model.decode(latents)
        if not isinstance(images, Tensor) or len(images) != len(latents):
            given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ContractError(
                f"model {how.model_kind!r} decoded {given} from {len(latents)} latents; one image of each"
            )
        untouched.check_untouched("model", how.model_kind, before, latents)
    return images
