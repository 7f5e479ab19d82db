"""A plugin: a reward that reads the metadata of prompts; importable without torch, as every spec must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import aegpo

if TYPE_CHECKING:
    from torch import Tensor


class WantedBrightness(aegpo.RewardSpec):
    """Minus the distance of the mean of all pixels to the `brightness` of the prompt."""

    kind: Literal["wanted-brightness"] = "wanted-brightness"
    needs_metadata: ClassVar[tuple[str, ...]] = ("brightness",)

    def score(self, images: Tensor, prompts: Sequence[aegpo.Prompt]) -> Tensor:
        wanted = images.new_tensor([prompt.metadata["brightness"] for prompt in prompts])
        return -(images.mean(dim=(1, 2, 3)) - wanted).abs()


@aegpo.hookimpl
def aegpo_register_rewards(registry: aegpo.Registry[aegpo.RewardSpec]) -> None:
    registry.add(WantedBrightness)
