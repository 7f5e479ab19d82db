"""Entropies of the base policy by prompt, on disk in the run's folder: the base never changes, so they are kept.

    probe/<key>/step-000010.safetensors    what was measured up to a checkpoint and not in an earlier file

The key names everything the numbers depend on: the model and a sample of its weights, the prompts, the noise levels
and the probe's own options. A file belongs to the checkpoint of its step: what was written for a later one than a run
starts from is deleted, so that the resumed run measures, and counts, what one without a break does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aegpo.core.files import write_atomically
from aegpo.core.records import FloatArray
from aegpo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from aegpo.core.experiment import Experiment

_FORMAT = "1"
_NAME = re.compile(r"step-(\d{6,})\.safetensors")
_SAMPLE = 16  # values of each weight that tell one network from another


class BaseCurves:
    """Curves (T,) in nats by the index of their prompt: in memory, and on disk once a folder is given."""

    def __init__(self, depends_on: Mapping[str, Any] | None = None) -> None:
        text = json.dumps(depends_on or {}, sort_keys=True)
        self._key = hashlib.sha256(text.encode()).hexdigest()
        self._curves: dict[int, FloatArray] = {}
        self._unwritten: dict[int, int] = {}  # prompt -> training step it was measured at
        self._folder: Path | None = None

    def missing(self, prompts: Sequence[int]) -> list[int]:
        """The places in `prompts` of those that are not known, each prompt once."""
        first = {prompt: place for place, prompt in reversed(list(enumerate(prompts)))}
        return sorted(place for prompt, place in first.items() if prompt not in self._curves)

    def add(self, step: int, prompts: Sequence[int], curves: FloatArray) -> None:
        """Keeps (n, T) curves of n prompts, measured in a training step."""
        self._curves.update(zip(prompts, curves, strict=True))
        self._unwritten.update(dict.fromkeys(prompts, step))

    def get(self, prompts: Sequence[int]) -> FloatArray:  # (P, T)
        """The curves of known prompts."""
        return np.stack([self._curves[prompt] for prompt in prompts])

    def open(self, folder: Path, step: int) -> None:
        """Takes back what was on disk when the checkpoint of `step` was written, and will write there.

        Raises:
            CheckpointError: if a file is damaged or of another probe.
        """
        self._folder = folder / self._key[:16]
        found = sorted(self._folder.glob("step-*.safetensors")) if self._folder.is_dir() else []
        for path in found:
            match = _NAME.fullmatch(path.name)
            if match is not None and int(match[1]) > step:
                path.unlink()
            elif match is not None:
                index, curves = self._read(path)
                self._curves.update(zip(index.tolist(), curves, strict=True))

    def write(self, checkpoint: int) -> None:
        """Puts what was measured in steps up to a checkpoint's on disk; nothing without a folder."""
        new = [prompt for prompt, step in self._unwritten.items() if step <= checkpoint]
        if self._folder is None or not new:
            return
        from safetensors.numpy import save

        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{checkpoint:06d}.safetensors"
        prompts = [*(self._read(path)[0].tolist() if path.exists() else ()), *new]
        tensors = {"prompt": np.array(prompts, dtype=np.int64), "entropy": self.get(prompts)}
        write_atomically(path, save(tensors, metadata={"format": _FORMAT, "key": self._key}))
        self._unwritten = {prompt: step for prompt, step in self._unwritten.items() if step > checkpoint}

    def _read(self, path: Path) -> tuple[np.ndarray, FloatArray]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                known = file.metadata() or {}
                if known.get("key") != self._key or known.get("format") != _FORMAT:
                    raise CheckpointError(f"{path} holds entropies of another probe; delete it: they are measured anew")
                return file.get_tensor("prompt"), file.get_tensor("entropy")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it: its entropies are measured anew, which costs forwards and "
                "may move their last digits"
            ) from error


def depends_on(experiment: Experiment, sigmas: Tensor, network: nn.Module, texts: Sequence[str]) -> dict[str, Any]:
    """What the base policy's entropies depend on."""
    probe = experiment.probe.model_dump(mode="json", exclude={"refresh", "source"})
    how = {"sigmas": sigmas.tolist(), "storage": experiment.rollouts.storage, "precision": experiment.precision}
    base = {"model": experiment.model.model_dump(mode="json"), "weights": fingerprint(network)}
    return {"probe": probe, "prompts": list(texts), **how, **base}


def fingerprint(network: nn.Module) -> str:
    """Tells networks apart by names, shapes and a few values of every weight; cheap for billions of them."""
    digest = hashlib.sha256()
    for name, weight in network.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().flatten()[:_SAMPLE].float().cpu().numpy().tobytes())
    return digest.hexdigest()
