"""Entropies of the base policy by prompt, on disk in the run's folder: the base never changes, so they are kept.

    signals/entropy/<key>/step-000010.safetensors    what was measured up to a checkpoint and not in an earlier file

The key names everything the numbers depend on but the prompts: the model and a sample of its weights, the noise
levels and the probe's own options. Prompts are known by a digest of their place in the list, their text and what is in
their images. A file belongs to the checkpoint of its step: what was written for a later one than a run starts from is
deleted, so that the resumed run measures, and counts, what one without a break does. A checkpoint notes how many
prompts were known and a digest of what was known of them; a run does not go on with less, or with other files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aegpo.core.digests import checksum
from aegpo.core.files import write_atomically
from aegpo.core.records import FloatArray, Prompt
from aegpo.errors import CheckpointError
from aegpo.prompts.images import identity

_FORMAT, _UNSIGNED = "3", "2"  # the earlier one had no checksum
_NAME = re.compile(r"step-(\d{6,})\.safetensors")
_DIGEST = 16  # bytes
_PUT_BACK = "put it back as it was, or start the run over with --fresh"


class BaseCurves:
    """Curves (T,) in nats by prompt: in memory, and on disk once a folder is given."""

    def __init__(self) -> None:
        self._curves: dict[bytes, FloatArray] = {}  # by the digest of the prompt
        self._unwritten: dict[bytes, int] = {}  # digest -> training step it was measured at
        self._folder: Path | None = None
        self._key = ""
        self._digest = 0  # of all curves, whatever their order: the digests of each, combined by exclusive or
        self._noted: dict[str, Any] | None = None  # what a checkpoint says is known

    def known(self) -> dict[str, Any]:
        """What is known, for a checkpoint: how many prompts, and a digest that depends on neither order nor files."""
        return {"prompts": len(self._curves), "sha256": f"{self._digest:064x}"}

    def expect(self, noted: dict[str, Any] | None) -> None:
        """What `known` said when the checkpoint was written that `open` will be asked for; None: nothing was noted."""
        self._noted = noted

    def missing(self, prompts: Sequence[Prompt]) -> list[int]:
        """The places in `prompts` of those that are not known, each prompt once."""
        first = {prompt_digest(prompt): place for place, prompt in reversed(list(enumerate(prompts)))}
        return sorted(place for key, place in first.items() if key not in self._curves)

    def add(self, step: int, prompts: Sequence[Prompt], curves: FloatArray) -> None:
        """Keeps (n, T) curves of n prompts, measured in a training step."""
        keys = [prompt_digest(prompt) for prompt in prompts]
        self._take(keys, curves)
        self._unwritten.update(dict.fromkeys(keys, step))

    def get(self, prompts: Sequence[Prompt]) -> FloatArray:  # (P, T)
        """The curves of known prompts."""
        return np.stack([self._curves[prompt_digest(prompt)] for prompt in prompts])

    def open(self, folder: Path, step: int, depends_on: Mapping[str, Any]) -> None:
        """Takes back what was on disk when the checkpoint of `step` was written, and will write there.

        Args:
            folder: of all such files.
            step: the last training step that is done.
            depends_on: everything the curves depend on but the prompts, as JSON.

        Raises:
            CheckpointError: if a file is damaged or of another probe, or what the checkpoint notes is not there.
        """
        self._key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        self._folder = folder / self._key[:16]
        found = sorted(self._folder.glob("step-*.safetensors")) if self._folder.is_dir() else []
        for path in found:
            match = _NAME.fullmatch(path.name)
            if match is not None and int(match[1]) > step:
                path.unlink()
            elif match is not None:
                self._take(*self._read(path))
        if self._noted is not None and self.known() != self._noted:
            raise CheckpointError(
                f"{self._folder} does not hold the entropies of {self._noted.get('prompts')} prompts that the "
                f"checkpoint of step {step} counts: it has {len(self._curves)}, or of another run; put its files back, "
                "or start the run over with --fresh"
            )

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
        tensors: dict[str, np.ndarray] = {"prompt": digests, "entropy": np.stack([self._curves[key] for key in keys])}
        told = {"format": _FORMAT, "key": self._key, "sha256": checksum(tensors)}
        write_atomically(path, save(tensors, metadata=told))
        self._unwritten = {prompt: step for prompt, step in self._unwritten.items() if step > checkpoint}

    def _take(self, keys: Sequence[bytes], curves: FloatArray) -> None:
        """Keeps curves, and their digest."""
        for key, curve in zip(keys, curves, strict=True):
            if key in self._curves:
                self._digest ^= _curve_digest(key, self._curves[key])
            self._curves[key] = curve
            self._digest ^= _curve_digest(key, curve)

    def _read(self, path: Path) -> tuple[list[bytes], FloatArray]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                known = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); {_PUT_BACK}") from error
        if known.get("format") not in (_FORMAT, _UNSIGNED) or known.get("key") != self._key:
            raise CheckpointError(f"{path} holds entropies of another probe; {_PUT_BACK}")
        signed = {"sha256": checksum(found)} if known["format"] == _FORMAT else {}
        if known != {"format": known["format"], "key": self._key, **signed} or found.keys() != {"prompt", "entropy"}:
            raise CheckpointError(f"{path} is damaged (its checksum is wrong); {_PUT_BACK}")
        return [row.tobytes() for row in found["prompt"]], found["entropy"]


def _curve_digest(key: bytes, curve: FloatArray) -> int:
    return int.from_bytes(hashlib.sha256(key + np.ascontiguousarray(curve).tobytes()).digest())


def prompt_digest(prompt: Prompt) -> bytes:
    """What tells a prompt from others of its list: its text, its images, and the how-manieth asks the same."""
    return hashlib.sha256(json.dumps([prompt.occurrence, identity(prompt)]).encode()).digest()[:_DIGEST]
