"""Model kind `shapes`: the embedded world, a small but real text-to-image flow model that ships with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from aegpo.core.interfaces import Model
from aegpo.core.parts import JOINT_BLOCKS, ModelSpec
from aegpo.core.records import FloatArray, Prompt
from aegpo.models.shapes.captions import drawn

if TYPE_CHECKING:
    import torch

WEIGHTS = Path(__file__).parent / "weights"


class ShapesSpec(ModelSpec):
    """The embedded 24 x 24 world of coloured shapes: an SD 3.5-class transformer of 2.3 M weights, no download."""

    kind: Literal["shapes"] = "shapes"
    has_captions: ClassVar[bool] = True
    caption_metadata: ClassVar[tuple[str, ...]] = ("kind",)
    attention_blocks: ClassVar[tuple[str, ...] | None] = JOINT_BLOCKS
    guidance: float = Field(
        1.0,
        ge=1,
        le=1000,
        description="classifier-free guidance in rollouts, training and evaluation; 1: none, else two forwards",
    )
    weights: Path | None = Field(None, description="folder of tools/train_shapes.py; default: the shipped weights")

    @property
    def dimensions(self) -> int | None:
        """C x H x W of the latents, which are pixels."""
        return 3 * 24 * 24

    @property
    def base_folder(self) -> Path | None:
        """The folder of the weights."""
        return self.weights or WEIGHTS

    @property
    def ships_base(self) -> bool:
        """True without `weights`: those in the package are then meant."""
        return self.weights is None

    def sigmas(self, steps: int) -> FloatArray:  # (steps+1,)
        """Equal steps from 1 to 0."""
        return np.linspace(1.0, 0.0, steps + 1)

    def captions(self, split: Literal["train", "evaluation"], count: int, seed: int) -> tuple[Prompt, ...]:
        """Captions of the world's grammar with their `Scene.kind`; evaluation captions never occur in training."""
        scenes = drawn(split, count, seed)
        return tuple(Prompt(index, each.caption, {"kind": each.kind}) for index, each in enumerate(scenes))

    def build(self, device: torch.device) -> Model:
        """Loads the weights by `from_pretrained`."""
        from aegpo.models.shapes.model import ShapesModel

        return ShapesModel(self.weights or WEIGHTS, self.sigmas, self.guidance, device)
