"""What is asked of a network once it is loaded: which one it is, and whether it paints another size."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from torch import nn

from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Model, Resizable
from aegpo.errors import AegpoError

_SAMPLE = 16  # values of each weight that tell one network from another


def fingerprint(network: nn.Module, without: Collection[str] = ()) -> str:
    """Tells networks apart by names, shapes and a few values of every weight; cheap for billions of them.

    Args:
        network: the network.
        without: names of weights that do not count.
    """
    digest = hashlib.sha256()
    for name, weight in network.state_dict().items():
        if name in without:
            continue
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:_SAMPLE].float().cpu().numpy().tobytes())
    return digest.hexdigest()


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
