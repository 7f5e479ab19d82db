"""Reward `aesthetic`: LAION's aesthetic predictor, a small head on CLIP's image features."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from aegpo.core.places import LocalOrHub
from aegpo.errors import AegpoError
from aegpo.rewards.clip_family import OPENAI_LARGE, Clip, cropped_by_torchvision, load_clip
from aegpo.rewards.learned import LearnedReward, LearnedRewardSpec
from aegpo.rewards.weights import find_file, load_strictly, read_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_LAYER = re.compile(r"(?:layers\.(?P<place>\d+)\.)?(?P<part>weight|bias)")


class AestheticReward(LearnedRewardSpec):
    """How much people like the look of an image, about 1 to 10, higher is better; the prompt is not read.

    The head of `improved-aesthetic-predictor` (768-1024-128-64-16-1, no activations between its layers) or the single
    layer of LAION's first predictor: which one is seen from the file. It was trained on normalised features of
    OpenAI's ViT-L/14 and ratings from 1 to 10, and on nothing else will its numbers mean that. Images are cropped as by
    OpenAI's code, which that predictor used; where a margin is odd, ddpo-pytorch's scorer may be off by a pixel.
    """

    kind: Literal["aesthetic"] = "aesthetic"
    path: LocalOrHub = Field(
        "trl-lib/ddpo-aesthetic-predictor", description="the head: a file or a repository of the hub"
    )
    filename: str = Field("aesthetic-model.pth", description="the head's file in a folder or repository")
    clip: LocalOrHub = Field(OPENAI_LARGE, description="the CLIP network: a folder or a repository of the hub")

    def build(self, device: torch.device) -> LearnedReward:
        """Loads network and head.

        Raises:
            AegpoError: if they cannot be had or do not fit.
        """
        from torch import nn

        who = f"reward {self.label!r}"
        network = load_clip(who, self.clip)
        head = linear_layers(who, read_tensors(who, find_file(who, self.path, self.filename)))
        first, wanted = head[0].in_features, network.config.projection_dim
        if first != wanted:
            raise AegpoError(f"{who}: the head takes {first} features, but {self.clip!r} has {wanted}; pair them")
        eye = Clip(network, None, cropped_by_torchvision)

        def score(images: Tensor, texts: Sequence[str]) -> Tensor:  # (b, 3, h, w), b texts -> (b,)
            rated: Tensor = head(eye.see(images).to(network.dtype))
            return rated.squeeze(1)

        return LearnedReward(self, nn.ModuleList([network, head]), score, device)


def linear_layers(who: str, tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """A chain of linear layers from `layers.N.weight` and `layers.N.bias`, or `weight` and `bias` of a single one.

    Dropouts, which have no weights, leave gaps in the numbers.

    Raises:
        AegpoError: if there are other keys, a layer lacks its part, or the layers do not chain up to one number.
    """
    from torch import nn

    places: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            raise AegpoError(
                f"{who}: the head has an unknown key {name!r}; 'layers.N.weight' and '.bias' were expected"
            )
        places.setdefault(int(match["place"] or 0), {})[match["part"]] = tensor
    ordered = {str(number): parts for number, (_, parts) in enumerate(sorted(places.items()))}
    widths = [tuple(parts["weight"].shape) for parts in ordered.values() if "weight" in parts]
    chained = all(below[0] == above[1] for below, above in pairwise(widths))
    if len(widths) != len(ordered) or not widths or widths[-1][0] != 1 or not chained:
        raise AegpoError(f"{who}: the head's layers {widths} do not lead to one number; each takes what the last gives")
    head = nn.Sequential(*(nn.Linear(inward, outward, device="meta") for outward, inward in widths))
    load_strictly(who, head, {f"{place}.{part}": t for place, parts in ordered.items() for part, t in parts.items()})
    return head
