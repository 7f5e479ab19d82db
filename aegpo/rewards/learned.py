"""Rewards with weights: the fields they share, where they run, and how a batch is cut into pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from aegpo.core.parts import RewardSpec
from aegpo.core.records import Prompt
from aegpo.core.sections import Positive
from aegpo.errors import AegpoError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Score = Callable[["Tensor", Sequence[str]], "Tensor"]  # (b, 3, h, w) in [0, 1] and b texts -> (b,)


class LearnedRewardSpec(RewardSpec):
    """A reward with weights, on a device of its own if wanted."""

    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] | None = Field(
        None, description="where it runs, e.g. cuda:1; null: where the model does"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights; scores are computed from the features in float32"
    )
    micro_batch: Positive = Field(32, description="images scored at once; never changes scores beyond rounding")
    offload: bool = Field(False, description="keep the weights in main memory between uses")

    @property
    def lane(self) -> str:
        """Rewards on a device of their own score while others do."""
        return self.device or ""

    @property
    def early(self) -> int:
        """Weights that are fetched for every use are fetched once for all images."""
        return 0 if self.offload else 1


class LearnedReward:
    """Scores with a network: in pieces, on its device, in main memory between uses if wanted."""

    def __init__(self, spec: LearnedRewardSpec, network: nn.Module, score: Score, device: torch.device) -> None:
        """`score` works on whatever device and dtype the network has; `device` is the run's."""
        import torch

        if spec.device is not None and spec.device.startswith("cuda"):
            index, there = int(spec.device.removeprefix("cuda").lstrip(":") or 0), torch.cuda.device_count()
            if index >= there:
                raise AegpoError(
                    f"reward {spec.label!r}: device {spec.device!r} was asked for, but torch sees {there} CUDA "
                    "devices; choose another 'device', or none for the run's own"
                )
        self.network = network.requires_grad_(False).eval().to(getattr(torch, spec.dtype))
        self._score, self._micro_batch, self._offload = score, spec.micro_batch, spec.offload
        self._device = device if spec.device is None else torch.device(spec.device)
        if not spec.offload:
            self.network.to(self._device)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(N, 3, h, w) in [0, 1] and N prompts -> (N,) float32 on the images' device."""
        import torch

        with torch.no_grad(), self._at_work():
            pieces = [
                self._score(piece.to(self._device, torch.float32), texts).float()
                for piece, texts in self._pieces(images, [prompt.text for prompt in prompts])
            ]
        return torch.cat(pieces).to(images.device)

    def _pieces(self, images: Tensor, texts: Sequence[str]) -> Iterator[tuple[Tensor, Sequence[str]]]:
        for start in range(0, len(texts), self._micro_batch):
            rows = slice(start, start + self._micro_batch)
            yield images[rows], texts[rows]

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        if not self._offload:
            yield
            return
        self.network.to(self._device)
        try:
            yield
        finally:
            self.network.to("cpu")
