"""What a model can write of its policy, for others to use."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Exportable(Protocol):
    """A model whose policy can be written for others to use."""

    def save_adapters(self, folder: Path) -> None:
        """Writes the policy's LoRA so that diffusers' `pipe.load_lora_weights(folder)` gives this policy."""

    def save_pipeline(self, folder: Path) -> None:
        """Writes a whole pipeline with the policy in it, adapters merged."""


@runtime_checkable
class ExportableToComfyui(Protocol):
    """A model whose LoRA can be written as ComfyUI loads it."""

    def save_for_comfyui(self, file: Path) -> None:
        """Writes the policy's LoRA as one safetensors file."""
