"""Prompt embeddings: computed once, kept on disk, the text encoders loaded only for what is missing."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aegpo.core.places import cache_folder
from aegpo.core.records import Conditioning
from aegpo.errors import AegpoError
from aegpo.models.pipeline.loading import load_pipeline
from aegpo.models.pipeline.options import PipelineOptions
from aegpo.models.pipeline.texts import joined, unpadded

Embed = Callable[[Any, list[str | None], torch.device], Conditioning]
AT_ONCE = 16  # prompts the text encoders read at a time
_EXTRA = "extra/"  # begins the names of `Conditioning.extra` in a file


class PromptEncoder:
    """Conditioning of texts; None stands for the absence of a prompt, which guidance steers away from.

    Each embedding is a safetensors file named by a hash of the text, the pipeline's path, revision and text encoder
    files, the sequence length and the dtype. Whatever is missing is computed with the pipeline's own `encode_prompt`;
    the text encoders are freed when it is done.
    """

    def __init__(
        self,
        spec: PipelineOptions,
        folder: Path,
        length: int | None,
        network: nn.Module,
        embed: Embed,
        device: torch.device,
    ) -> None:
        """`embed(pipeline, texts, device)` gives the conditioning of texts, or of [None]."""
        self._spec, self._folder, self._network, self._embed, self._device = spec, folder, network, embed, device
        self._cache = cache_folder(spec.cache) / "prompts"
        self._identity = {
            "kind": spec.kind,
            "path": spec.path,
            "revision": spec.revision,
            "variant": spec.variant,
            "dtype": spec.dtype,
            "length": length,
            "files": _text_files(folder),
        }

    def __call__(self, texts: Sequence[str | None]) -> Conditioning:
        """The conditioning of texts, on the device, in their order; padded to the longest of them."""
        self.prepare(texts)
        rows = {text: load_file(self._file(text)) for text in dict.fromkeys(texts)}
        cond = joined([_from_columns(rows[text]) for text in texts])
        return _from_columns({name: value.to(self._device) for name, value in _columns(cond).items()})

    def prepare(self, texts: Sequence[str | None]) -> None:
        """Computes the embeddings that are not on disk yet."""
        missing = [text for text in dict.fromkeys(texts) if not self._kept(text)]
        if not missing:
            return
        given: dict[str, nn.Module | None] = dict.fromkeys(("vae", *self._spec.unneeded))
        pipeline = load_pipeline(self._spec, self._folder, given | {self._spec.network: self._network})
        others = [each for each in pipeline.components.values() if each is not self._network]  # which may be sharded
        for part in others:
            if isinstance(part, nn.Module):
                part.to(self._device)
        named = [text for text in missing if text is not None]
        batches: list[list[str | None]] = [[*named[i : i + AT_ONCE]] for i in range(0, len(named), AT_ONCE)]
        if None in missing:
            batches.append([None])
        with torch.no_grad():
            for batch in batches:
                self._keep(batch, self._embed(pipeline, batch, self._device))
        del pipeline
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _keep(self, texts: Sequence[str | None], cond: Conditioning) -> None:
        for row, text in enumerate(texts):
            one = unpadded(cond, row)
            _write(self._file(text), {name: value.cpu().contiguous() for name, value in _columns(one).items()})

    def _kept(self, text: str | None) -> bool:
        """Whether the embedding is on disk and whole; of its file only the head and the length are looked at."""
        try:
            with safe_open(self._file(text), framework="pt"):
                return True
        except (FileNotFoundError, SafetensorError):
            return False

    def _file(self, text: str | None) -> Path:
        negative = self._spec.negative_prompt if text is None else None
        key = json.dumps({**self._identity, "text": text, "negative": negative}, sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._cache / name[:2] / f"{name}.safetensors"


def _columns(cond: Conditioning) -> dict[str, Tensor]:
    """What a file of the cache has, by name."""
    columns = {"text": cond.text, "pooled": cond.pooled, "mask": cond.mask}
    columns |= {_EXTRA + name: value for name, value in cond.extra.items()}
    return {name: value for name, value in columns.items() if value is not None}


def _from_columns(columns: Mapping[str, Tensor]) -> Conditioning:
    """What `_columns` was given."""
    extra = {name.removeprefix(_EXTRA): value for name, value in columns.items() if name.startswith(_EXTRA)}
    return Conditioning(columns["text"], columns.get("pooled"), columns.get("mask"), extra)


def _text_files(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file that decides an embedding: another checkpoint in the same folder shows."""
    parts = [part for part in sorted(folder.iterdir()) if part.name.startswith(("text_encoder", "tokenizer"))]
    files = [file for part in parts for file in sorted(part.rglob("*")) if file.is_file()]
    return [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Whole or not at all, also with several processes at it."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        save_file(tensors, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors tells a full disk by its own error
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise AegpoError(
            f"prompt embeddings cannot be kept in {path.parent.parent}: {error}; make room, or choose another folder "
            "with 'model.cache' or $AEGPO_CACHE"
        ) from error
