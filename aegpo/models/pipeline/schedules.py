"""Noise levels of published schedulers, as numbers; imports no torch.

Two families. Flow matching: sigma is what the scheduler says. Variance preserving (SD 1.x, SDXL): x = a x0 + s noise
with a = sqrt(abar), s = sqrt(1 - abar); with c = a + s the flow coordinates are x / c and sigma = s / c, and a
deterministic DDIM step (arXiv 2010.02502, Eq. 12) is the Euler step there, because both keep x0 and noise and change
only their shares. Such a schedule begins below 1 and ends above 0: `rollouts.start_latents` and `final_latents` say
what stands for noise and for the image at its ends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

from aegpo.core.records import FloatArray
from aegpo.errors import AegpoError

S = TypeVar("S", "FlowSchedule", "DdimSchedule")


@dataclass(frozen=True)
class FlowSchedule:
    """diffusers' FlowMatchEulerDiscreteScheduler (0.42): its settings, by their names there."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: str = "exponential"

    def from_one_to_least(self, steps: int, tokens: int) -> FloatArray:  # (steps+1,)
        """Equal times from 1 to the least level the scheduler knows, shifted: what SD3's pipeline does.

        With a static shift the least level is already shifted when the scheduler is made, and is shifted again here:
        shift 3 is applied twice (METHODS: SD 3.5's table).
        """
        least = 1 / self.num_train_timesteps
        if not self.use_dynamic_shifting:
            least = self.shift * least / (1 + (self.shift - 1) * least)
        return self._shifted(np.linspace(1.0, least, steps), tokens)

    def from_one_to_part(self, steps: int, tokens: int) -> FloatArray:  # (steps+1,)
        """Equal times from 1 to 1 / steps, shifted: what FLUX's pipeline does."""
        return self._shifted(np.linspace(1.0, 1 / steps, steps), tokens)

    def _shifted(self, times: FloatArray, tokens: int) -> FloatArray:
        sigmas = self._dynamic(times, tokens) if self.use_dynamic_shifting else _static(self.shift, times)
        if self.shift_terminal:
            sigmas = 1 - (1 - sigmas) * (1 - self.shift_terminal) / (1 - sigmas[-1])
        return np.append(sigmas, 0.0)

    def _dynamic(self, times: FloatArray, tokens: int) -> FloatArray:
        """The shift grows with the number of image tokens, on a line through (256, 0.5) and (4096, 1.15) for FLUX."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = self.base_shift + slope * (tokens - self.base_image_seq_len)
        weight = math.exp(mu) if self.time_shift_type == "exponential" else mu
        shifted: FloatArray = weight / (weight + (1 / times - 1))
        return shifted


def _static(shift: float, times: FloatArray) -> FloatArray:
    shifted: FloatArray = shift * times / (1 + (shift - 1) * times)
    return shifted


@dataclass(frozen=True)
class DdimSchedule:
    """diffusers' DDIMScheduler (0.42) made from any scheduler of the same noise: its settings, by their names there."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    def abar(self) -> FloatArray:  # (num_train_timesteps,)
        """The share of the image's variance that is left at each training time."""
        betas = self._betas()
        return np.asarray(np.cumprod(1.0 - betas), dtype=np.float64)

    def _betas(self) -> FloatArray:
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, dtype=np.float64)
        if self.beta_schedule == "scaled_linear":
            roots = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps)
            return np.asarray(roots**2, dtype=np.float64)
        return np.linspace(self.beta_start, self.beta_end, self.num_train_timesteps, dtype=np.float64)

    def table(self) -> FloatArray:  # (num_train_timesteps,) rising
        """The noise level of each training time."""
        return _level(self.abar())

    def sigmas(self, steps: int) -> FloatArray:  # (steps+1,)
        """The levels of the scheduler's times, and last the level it ends at.

        The next level of each step is that of the next time, as in the paper. diffusers goes to the time
        num_train_timesteps // steps below instead, which is the same with `leading` spacing, and with `trailing`
        where steps divide the training times.
        """
        table = self.table()
        last = 0.0 if self.set_alpha_to_one else table[0]
        return np.append(table[self.times(steps)], last)

    def times(self, steps: int) -> np.ndarray[Any, np.dtype[np.int64]]:  # (steps,) falling
        """The training times of a trajectory.

        Raises:
            AegpoError: if there are fewer.
        """
        most = self.num_train_timesteps
        there = most - self.steps_offset if self.timestep_spacing == "leading" else most
        if steps > there:
            raise AegpoError(
                f"{steps} denoising steps need as many times, but the scheduler has {there} of its "
                f"{most} ({self.timestep_spacing!r} spacing); at most {there}"
            )
        if self.timestep_spacing == "leading":
            return np.arange(steps)[::-1] * (most // steps) + self.steps_offset
        if self.timestep_spacing == "trailing":
            return np.round(np.arange(most, 0, -most / steps)).astype(np.int64)[:steps] - 1
        return np.linspace(0, most - 1, steps).round().astype(np.int64)[::-1]


def _level(abar: FloatArray) -> FloatArray:
    image, noise = np.sqrt(abar), np.sqrt(1 - abar)
    level: FloatArray = noise / (image + noise)
    return level


def flow_schedule(kind: str, config: Mapping[str, Any], default: FlowSchedule) -> FlowSchedule:
    """The schedule of a scheduler_config.json; `default` where there is none at hand.

    Raises:
        AegpoError: if the config asks for what is not supported.
    """
    if not config:
        return default
    _refuse(kind, config, ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"))
    _refuse(kind, config, ("stochastic_sampling",))
    return _from(FlowSchedule, config)


def ddim_schedule(kind: str, config: Mapping[str, Any], default: DdimSchedule) -> DdimSchedule:
    """The schedule of a scheduler_config.json; `default` where there is none at hand.

    Raises:
        AegpoError: if the config asks for what is not supported.
    """
    if not config:
        return default
    _refuse(kind, config, ("thresholding", "clip_sample", "rescale_betas_zero_snr"))
    schedule = _from(DdimSchedule, config)
    known = {
        "beta_schedule": ("linear", "scaled_linear"),
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": ("leading", "trailing", "linspace"),
    }
    for name, values in known.items():
        given = config.get(name, values[0])
        if given not in values:
            raise AegpoError(
                f"model {kind!r}: its scheduler_config.json has {name!r} {given!r}; supported: {', '.join(values)}"
            )
    return schedule


def _refuse(kind: str, config: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if config.get(name):
            raise AegpoError(
                f"model {kind!r}: its scheduler_config.json turns {name!r} on, which is not supported; set it to false"
            )


def _from(cls: type[S], config: Mapping[str, Any]) -> S:
    known = {item.name for item in fields(cls)}
    return cls(**{name: value for name, value in config.items() if name in known})
