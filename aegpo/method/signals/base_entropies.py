"""Entropies of the base policy by prompt, on disk in the run's folder: the base never changes, so they are kept.

    signals/entropy/<key>/step-000010.safetensors    what was measured up to a checkpoint and not in an earlier file

The key names everything the numbers depend on but the prompts: the model and a sample of its weights, the noise
levels and the probe's own options. Prompts are known by a digest of their place in the list, their text and what is in
their images. A file belongs to the checkpoint of its step: what was written for a later one than a run starts from is
deleted, so that the resumed run measures, and counts, what one without a break does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aegpo.core.files import write_atomically
from aegpo.core.records import FloatArray, Prompt
from aegpo.errors import CheckpointError
from aegpo.prompts.images import identity

_FORMAT = "2"
_NAME = re.compile(r"step-(\d{6,})\.safetensors")
_DIGEST = 16  # bytes


class BaseCurves:
    """Curves (T,) in nats by prompt: in memory, and on disk once a folder is given."""

    def __init__(self) -> None:
        self._curves: dict[bytes, FloatArray] = {}  # by the digest of the prompt
        self._unwritten: dict[bytes, int] = {}  # digest -> training step it was measured at
        self._folder: Path | None = None
        self._key = ""

    def missing(self, prompts: Sequence[Prompt]) -> list[int]:
        """The places in `prompts` of those that are not known, each prompt once."""
        first = {_digest(prompt): place for place, prompt in reversed(list(enumerate(prompts)))}
        return sorted(place for key, place in first.items() if key not in self._curves)

    def add(self, step: int, prompts: Sequence[Prompt], curves: FloatArray) -> None:
        """Keeps (n, T) curves of n prompts, measured in a training step."""
        keys = [_digest(prompt) for prompt in prompts]
        self._curves.update(zip(keys, curves, strict=True))
        self._unwritten.update(dict.fromkeys(keys, step))

    def get(self, prompts: Sequence[Prompt]) -> FloatArray:  # (P, T)
        """The curves of known prompts."""
        return np.stack([self._curves[_digest(prompt)] for prompt in prompts])

    def open(self, folder: Path, step: int, depends_on: Mapping[str, Any]) -> None:
        """Takes back what was on disk when the checkpoint of `step` was written, and will write there.

        Args:
            folder: of all such files.
            step: the last training step that is done.
            depends_on: everything the curves depend on but the prompts, as JSON.

        Raises:
            CheckpointError: if a file is damaged or of another probe.
        """
        self._key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        self._folder = folder / self._key[:16]
        found = sorted(self._folder.glob("step-*.safetensors")) if self._folder.is_dir() else []
        for path in found:
            match = _NAME.fullmatch(path.name)
            if match is not None and int(match[1]) > step:
                path.unlink()
            elif match is not None:
                keys, curves = self._read(path)
                self._curves.update(zip(keys, curves, strict=True))

    def write(self, checkpoint: int) -> None:
        """Puts what was measured in steps up to a checkpoint's on disk; nothing without a folder."""
        new = [prompt for prompt, step in self._unwritten.items() if step <= checkpoint]
        if self._folder is None or not new:
            return
        from safetensors.numpy import save

        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{checkpoint:06d}.safetensors"
        keys = [*(self._read(path)[0] if path.exists() else ()), *new]
        digests = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1)
        tensors = {"prompt": digests, "entropy": np.stack([self._curves[key] for key in keys])}
        write_atomically(path, save(tensors, metadata={"format": _FORMAT, "key": self._key}))
        self._unwritten = {prompt: step for prompt, step in self._unwritten.items() if step > checkpoint}

    def _read(self, path: Path) -> tuple[list[bytes], FloatArray]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                known = file.metadata() or {}
                if known.get("key") != self._key or known.get("format") != _FORMAT:
                    raise CheckpointError(f"{path} holds entropies of another probe; delete it: they are measured anew")
                return [row.tobytes() for row in file.get_tensor("prompt")], file.get_tensor("entropy")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it: its entropies are measured anew, which costs forwards and "
                "may move their last digits"
            ) from error


def _digest(prompt: Prompt) -> bytes:
    return hashlib.sha256(json.dumps([prompt.occurrence, identity(prompt)]).encode()).digest()[:_DIGEST]
