"""A network whose weights no process reads whole: built without values, then given this process's part of each file.

Where weights are sharded, each process reads the rows of every weight that are its own, so that neither the memory of a
machine nor that of a GPU has to hold a whole network anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from aegpo.core.weights import brief
from aegpo.errors import AegpoError
from aegpo.models.pipeline.loading import DTYPES, check_keys
from aegpo.models.pipeline.options import PipelineOptions
from aegpo.parallel.dtensors import local, own_slices

_STEM = "diffusion_pytorch_model"  # of a network's files, as diffusers names them
_ADAPTED = ".base_layer."  # in names of weights beside which LoRA stands, and not in files


class UnreadNetwork:
    """A network on torch's meta device, and the safetensors files of its weights."""

    def __init__(self, spec: PipelineOptions, folder: Path, cls: Any) -> None:
        """Reads the config and the names of weights.

        Args:
            spec: of the model.
            folder: of its pipeline, in which `has_files`.
            cls: diffusers' class of the network.

        Raises:
            AegpoError: if names or shapes are not those of the config.
        """
        self._where = f"model {spec.kind!r}: {spec.network!r} of {spec.path!r}"
        self._files = _files(folder / spec.network, spec.variant)
        dtype = DTYPES[spec.dtype]
        with init_empty_weights(include_buffers=False), _default(dtype):
            network = cls.from_config(cls.load_config(folder / spec.network))
        buffers = {name: tensor for name, tensor in network.named_buffers() if name in self._files}
        for name, tensor in {**dict(network.named_parameters()), **buffers}.items():
            kept = any(part in (cls._keep_in_fp32_modules or ()) for part in name.split("."))
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if kept else dtype)
        self.network: nn.Module = network.requires_grad_(False).eval()
        self._check()

    def read_into(self, network: nn.Module) -> None:
        """Gives a network of these weights their values: each process what it has of them, and buffers whole.

        Args:
            network: with the names of `network`, adapters put in or not; on its device, in any dtype.

        Raises:
            AegpoError: if a file cannot be read.
        """
        tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        there = {name: tensor for name, tensor in tensors.items() if _in_file(name) in self._files}
        for file in sorted(set(self._files.values())):
            try:
                with safe_open(file, framework="pt") as opened, torch.no_grad():
                    for name, tensor in there.items():
                        if self._files[_in_file(name)] == file:
                            part = opened.get_slice(_in_file(name))[own_slices(tensor)]
                            local(tensor).copy_(part)
            except (OSError, SafetensorError) as error:
                raise AegpoError(f"{self._where} cannot be loaded: {brief(error)}") from error

    def _check(self) -> None:
        wanted, found = self.network.state_dict(), dict[str, list[int]]()
        for file in set(self._files.values()):
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
        other = [name for name in wanted if name in found and list(wanted[name].shape) != found[name]]
        missing, unexpected = [*wanted.keys() - found.keys()], [*found.keys() - wanted.keys()]
        check_keys(self._where, {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": other})


def has_files(spec: PipelineOptions, folder: Path) -> bool:
    """True if the weights are in safetensors, of which a part can be read."""
    return bool(_files(folder / spec.network, spec.variant))


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _files(folder: Path, variant: str | None) -> Mapping[str, Path]:
    """The file of each weight; nothing where there are none in safetensors."""
    suffix = "" if variant is None else f".{variant}"
    index, single = folder / f"{_STEM}.safetensors.index{suffix}.json", folder / f"{_STEM}{suffix}.safetensors"
    if single.is_file():
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    return {}


def _in_file(name: str) -> str:
    return name.replace(_ADAPTED, ".")
