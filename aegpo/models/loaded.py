"""What is asked of a network once it is loaded: which one it is, and whether it paints another size."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import nn

from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Model, Resizable
from aegpo.errors import AegpoError
from aegpo.parallel.dtensors import whole

_SAMPLE = 16  # values of each weight that tell one network from another


Values = Mapping[str, bytes]  # of every weight, by name, what tells networks apart


def sampled_values(network: nn.Module) -> dict[str, bytes]:
    """Name, shape and a few values of every weight, by name; cheap for billions of them.

    Of sharded weights, which are put together one after another, all processes ask.
    """
    return {
        name: f"{name} {tuple(weight.shape)}".encode()
        + whole(weight.detach()).flatten()[:_SAMPLE].float().cpu().numpy().tobytes()
        for name, weight in network.state_dict().items()
    }


def fingerprint(network: nn.Module | Values, without: Collection[str] = ()) -> str:
    """Tells networks apart by names, shapes and a few values of every weight.

    Args:
        network: the network, or its `sampled_values`.
        without: names of weights that do not count.
    """
    values = sampled_values(network) if isinstance(network, nn.Module) else network
    digest = hashlib.sha256()
    for name, told in values.items():
        if name not in without:
            digest.update(told)
    return digest.hexdigest()


def main_dtype(network: nn.Module) -> torch.dtype:
    """The dtype of most of a network's weights; loaders keep some modules in float32."""
    counts: dict[torch.dtype, int] = {}
    for weight in network.parameters():
        counts[weight.dtype] = counts.get(weight.dtype, 0) + weight.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def resized(model: Model, experiment: Experiment) -> Model:
    """The model at the size of evaluation images."""
    height, width = experiment.evaluation.height, experiment.evaluation.width
    if height is None or width is None:
        return model
    if not isinstance(model, Resizable):
        raise AegpoError(
            f"model {experiment.model.kind!r} paints one size only; leave out 'height' and 'width' of 'evaluation'"
        )
    return model.at(height, width)
