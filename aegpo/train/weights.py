"""The weights of a policy: those that train, and the copies that are averaged, lag or stay the base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from aegpo.errors import CheckpointError
from aegpo.parallel.dtensors import own_part

Changing = Callable[[bool], None]  # see `Sharding.changing`


def _nobody_minds(said: bool) -> None:
    """Weights that are whole may change at any time."""


class Weights:
    """What is trained of a network, by name, and the copies of it that a run keeps."""

    def __init__(self, network: nn.Module, changing: Changing = _nobody_minds) -> None:
        """`changing` is called before weights are given other values, but for the optimizer's steps."""
        self._changing = changing
        self.trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        self.average: WeightCopy | None = None  # the running average, which evaluation uses
        self.old: WeightCopy | None = None  # of the policy that samples while it lags behind

    def keep(self, averaged: bool, lagging: bool) -> None:
        """Starts the copies that a run needs, as what the weights are now."""
        self.average = WeightCopy(self.trained, self._changing) if averaged else None
        self.old = WeightCopy(self.trained, self._changing) if lagging else None

    def active(self, chosen: WeightCopy | None) -> AbstractContextManager[None]:
        """Inside, the network has the weights of a copy; None: its own."""
        return nullcontext() if chosen is None else chosen.active()

    def take(self, values: Mapping[str, Tensor], where: str) -> None:
        """Gives the network the weights of a checkpoint; `where` names it in errors.

        Raises:
            CheckpointError: if they are not this network's.
        """
        _check_fits(where, self.trained, values)
        self._changing(True)
        assign(self.trained, values)

    def state_dict(self) -> dict[str, Tensor]:
        """Trained weights and their copies, by name with the prefix policy/, ema/ or old/."""
        state = {f"policy/{name}": weight.detach() for name, weight in self.trained.items()}
        for prefix, kept in self._copies().items():
            state |= {prefix + name: value for name, value in kept.values.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` returned.

        Raises:
            CheckpointError: if they are not this network's.
        """
        expected = self.state_dict()
        found = {name: value for name, value in state.items() if name.split("/", 1)[0] in ("policy", "ema", "old")}
        _check_fits("the checkpoint", expected, found)
        self._changing(True)
        assign(self.trained, {name: state[f"policy/{name}"] for name in self.trained})
        for prefix, kept in self._copies().items():
            for name, value in kept.values.items():
                value.copy_(own_part(state[prefix + name], value))

    def _copies(self) -> dict[str, WeightCopy]:
        return {prefix: kept for prefix, kept in (("ema/", self.average), ("old/", self.old)) if kept is not None}


class WeightCopy:
    """Trained weights as they were, by name; starts as what they are now."""

    def __init__(self, weights: Mapping[str, nn.Parameter], changing: Changing) -> None:
        """`changing`: of `Weights`."""
        self._weights, self._changing = weights, changing
        self.values = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def approach(self, decay: float) -> None:
        """Keeps `decay` of the copy and takes the rest from the trained weights."""
        torch._foreach_lerp_(list(self.values.values()), list(self._weights.values()), 1 - decay)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the policy has the weights of this copy."""
        current = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self._changing(True)
        assign(self._weights, self.values)
        try:
            yield
        except BaseException:
            self._changing(False)  # the others are somewhere else
            assign(self._weights, current)
            raise
        self._changing(True)
        assign(self._weights, current)


@torch.no_grad()
def assign(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Copies values into weights of the same names, in place; of weights that are sharded, this process's part."""
    for name, weight in weights.items():
        weight.copy_(own_part(values[name], weight))


def _check_fits(where: str, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """The weights of a checkpoint are those of the policy, by name and shape; the message names a few that are not."""
    missing = [name for name in wanted if name not in given]
    unknown = [name for name in given if name not in wanted]
    other = [name for name in wanted if name in given and wanted[name].shape != given[name].shape]
    faults = {"lacks": missing, "has weights the policy has no place for:": unknown, "has other shapes for": other}
    for fault, names in faults.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{where} {fault} {', '.join(names[:3])}{more}; was the model at 'model.path' or 'model.weights' "
                "replaced after the run began? put back the one it began with"
            )
