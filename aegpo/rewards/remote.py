"""Reward `remote`: any reward, computed by a server; `aegpo serve-reward` is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from aegpo.core.records import Prompt
from aegpo.core.sections import Positive
from aegpo.errors import AegpoError
from aegpo.rewards import wire
from aegpo.rewards.servers import Server, ServerRewardSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LARGEST = 3.4028234663852886e38  # float32 has none that is larger


class RemoteReward(ServerRewardSpec):
    """What a server at `url` answers, in its own scale; higher must be better.

    The server answers POST `url`/score with ``{"scores": [...]}`` (aegpo/rewards/wire.py has both kinds of body) and
    GET `url`/health with ``{"protocol": 3}``. Prompts are sent with their metadata and the bytes of their images;
    videos whole, or frame by frame where `frames` says what becomes of the scores. With `body: safetensors` it gets
    every bit that a reward in the run would. If it is away for longer than the retries wait, the run ends with its
    state saved; no score is ever made up.
    """

    kind: Literal["remote"] = "remote"
    media: ClassVar[Literal["image", "video", "both"]] = "both"  # what its server reads, the server says
    body: Literal["safetensors", "json"] = Field(
        "safetensors", description="float32 tensors, or JSON with PNG images of 8 bits"
    )
    micro_batch: Positive = Field(32, description="images or videos in a request")
    health: bool = Field(True, description="ask for `url`/health before the run begins")

    def build(self, device: torch.device) -> RemoteScorer:
        """Asks the server how it is.

        Raises:
            AegpoError: if it does not answer or takes another protocol, or the token's variable is not set.
        """
        server = Server(self)
        if self.health:
            answer = server.get("/health")
            protocol = answer.get("protocol", 1) if isinstance(answer, dict) else 1
            if protocol != wire.PROTOCOL:
                raise _other_protocol(server, protocol)
        return RemoteScorer(self, server)


class RemoteScorer:
    """Sends images in pieces and puts the scores together again."""

    def __init__(self, spec: RemoteReward, server: Server) -> None:
        self._spec, self._server = spec, server

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(N, [F,] 3, h, w) in [0, 1] and N prompts -> (N,) float32."""
        import torch

        starts = range(0, len(prompts), self._spec.micro_batch)
        pieces = [
            (images[at : at + self._spec.micro_batch], prompts[at : at + self._spec.micro_batch]) for at in starts
        ]
        scores = self._server.each(self._ask, pieces)
        return torch.tensor([score for piece in scores for score in piece], dtype=torch.float32, device=images.device)

    def _ask(self, piece: tuple[Tensor, Sequence[Prompt]]) -> list[float]:
        body = wire.pack(*piece, self._spec.body)
        try:
            answer = self._server.post("/score", body, wire.CONTENT_TYPES[self._spec.body])
        except AegpoError as error:  # a server that was not asked how it is, or was exchanged since
            if wire.STRINGS_WANTED in error.message:
                raise _other_protocol(self._server, 1) from None
            raise
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or not all(type(score) in (int, float) for score in scores):
            raise AegpoError(
                f"{self._server.who}: the server answered {self._server.shown(repr(answer))}; "
                '{"scores": [...]} was expected'
            )
        if len(scores) != len(piece[1]):
            raise AegpoError(f"{self._server.who}: the server answered {len(scores)} scores for {len(piece[1])} images")
        wrong = next((place for place, score in enumerate(scores) if not -_LARGEST <= score <= _LARGEST), None)
        if wrong is not None:
            raise AegpoError(
                f"{self._server.who}: the server answered {self._server.shown(scores[wrong]):.30} for prompt "
                f"{piece[1][wrong].text!r}; a finite number of float32 was expected"
            )
        return [float(score) for score in scores]


def _other_protocol(server: Server, protocol: object) -> AegpoError:
    age = " (aegpo 0.1, whose prompts were strings)" if protocol == 1 else ""
    return AegpoError(
        f"{server.who}: the server at {server.url} takes protocol {protocol!r:.20}{age}, this run sends "
        f"{wire.PROTOCOL}: use the same version of aegpo for both"
    )
