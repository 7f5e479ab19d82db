"""Rewards `vlm-judge` and `vlm-preference`: a vision-language model behind an OpenAI-compatible endpoint is asked."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from aegpo.core.records import Prompt
from aegpo.core.sections import Positive
from aegpo.errors import AegpoError
from aegpo.rewards.groups import rows_to_compare
from aegpo.rewards.servers import Server, ServerRewardSpec
from aegpo.rewards.verdicts import read_choice, read_grade
from aegpo.rewards.wire import png

if TYPE_CHECKING:
    import torch
    from torch import Tensor

V = TypeVar("V")
_WHOLE = "stop"  # why an answer ended that was not cut off


class VlmSpec(ServerRewardSpec):
    """What both rewards have: the endpoint, the model, and how often an answer may be no answer."""

    url: str = Field(description="base of the endpoint, e.g. http://127.0.0.1:8000/v1; asked is url/chat/completions")
    model: str = Field(min_length=1, description="the model's name at the endpoint")
    max_tokens: Positive = Field(512, description="length of an answer at most")
    attempts: Positive = Field(3, le=100, description="answers asked for until one can be read")


class VlmJudgeReward(VlmSpec):
    """A grade that a vision-language model gives each image: from `lowest` to `highest`, higher is better.

    The model sees the image and `question`, in which {prompt} stands for the prompt, at temperature 0. The one
    number of its answer's last line is the grade, the scale ("7/10", "7 out of 10", "7, from 0 to 10") aside; "7,5" is
    seven and a half. An answer that was cut off, and one whose last line has no number in the range, or several, is
    asked for again, with a reminder; if none of `attempts` has a grade, the run ends with its state saved, and no grade
    is made up.
    """

    kind: Literal["vlm-judge"] = "vlm-judge"
    question: str = Field(
        "How well does this picture show the following? {prompt}\nThink it over in a sentence or two, then end with "
        "a grade from 0 (not at all) to 10 (exactly), as a number alone in the last line.",
        description="what is asked; {prompt} stands for the prompt",
    )
    lowest: float = Field(0.0, ge=-1e6, le=1e6, description="the worst grade")
    highest: float = Field(10.0, ge=-1e6, le=1e6, description="the best grade")

    @field_validator("question")
    @classmethod
    def _has_a_place(cls, question: str) -> str:
        return _with_place(question)

    @model_validator(mode="after")
    def _is_a_range(self) -> VlmJudgeReward:
        if self.lowest >= self.highest:
            raise ValueError(f"grades from {self.lowest:g} to {self.highest:g}; 'lowest' must be below 'highest'")
        return self

    def build(self, device: torch.device) -> VlmJudge:
        """The judge; the endpoint is first asked with the first images.

        Raises:
            AegpoError: if the token's variable is not set.
        """
        return VlmJudge(self)


class VlmPreferenceReward(VlmSpec):
    """How often a vision-language model prefers an image to the others of its prompt, in [0, 1], higher is better.

    Win rates inside the prompt's group, as in Pref-GRPO (arXiv 2508.20751): every pair is shown in both orders, which
    evens out a liking for the first, and a tie counts half; n images cost n (n - 1) questions. In evaluations the
    policy's image is compared with the base's. The last line of an answer ends with A, B or TIE as its choice; another
    one, or one that was cut off, is asked for again, as by `vlm-judge`.
    """

    kind: Literal["vlm-preference"] = "vlm-preference"
    group_wise: ClassVar[bool] = True
    question: str = Field(
        "Here are picture A and picture B. Which one shows the following better? {prompt}\n"
        "Think it over in a sentence or two, then end with one word alone in the last line: A, B or TIE.",
        description="what is asked; {prompt} stands for the prompt",
    )

    @field_validator("question")
    @classmethod
    def _has_a_place(cls, question: str) -> str:
        return _with_place(question)

    def build(self, device: torch.device) -> VlmPreference:
        """The judge of pairs; the endpoint is first asked with the first images.

        Raises:
            AegpoError: if the token's variable is not set.
        """
        return VlmPreference(self)


class VlmJudge:
    """Asks for one grade an image."""

    def __init__(self, spec: VlmJudgeReward) -> None:
        self._spec, self._chat = spec, Chat(spec)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(N, 3, h, w) in [0, 1] and N prompts -> (N,) float32 from `lowest` to `highest`."""
        import torch

        asked = [self._spec.question.replace("{prompt}", prompt.text) for prompt in prompts]
        questions = [(question, (row,)) for row, question in enumerate(asked)]
        reminder = f"Answer with a number from {self._spec.lowest:g} to {self._spec.highest:g} alone."
        grades = self._chat.ask(images, questions, self._grade, reminder)
        return torch.tensor(grades, dtype=torch.float32, device=images.device)

    def _grade(self, answer: str) -> float | None:
        return read_grade(answer, self._spec.lowest, self._spec.highest)


class VlmPreference:
    """Asks which of two images is the better one, for every pair of a prompt's."""

    def __init__(self, spec: VlmPreferenceReward) -> None:
        self._spec, self._chat = spec, Chat(spec)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(N, 3, h, w) in [0, 1] and N prompts, each at least twice -> (N,) float32 shares of wins in [0, 1]."""
        import torch

        groups = rows_to_compare(prompts, self._chat.server.who)
        questions = [
            (self._spec.question.replace("{prompt}", text), pair)
            for (text, _), rows in groups.items()
            for one, other in combinations(rows, 2)
            for pair in ((one, other), (other, one))
        ]
        firsts = self._chat.ask(images, questions, read_choice, "Answer with A, B or TIE alone.")
        wins = torch.zeros(len(prompts), dtype=torch.float64)
        for (_, (one, other)), first in zip(questions, firsts, strict=True):
            wins[one] += first
            wins[other] += 1 - first
        comparisons = torch.tensor([2.0 * (len(groups[prompt.asked]) - 1) for prompt in prompts], dtype=torch.float64)
        return (wins / comparisons).float().to(images.device)


class Chat:
    """One endpoint and how it is asked about images."""

    def __init__(self, spec: VlmSpec) -> None:
        self.server, self._spec = Server(spec), spec

    def ask(
        self,
        images: Tensor,
        questions: Sequence[tuple[str, tuple[int, ...]]],
        read: Callable[[str], V | None],
        reminder: str,
    ) -> list[V]:
        """What `read` makes of the answer to each question, which is a text and the rows of the images it is about.

        Raises:
            AegpoError: if `read` makes nothing of any of the attempts, or the endpoint cannot be asked.
        """
        shown = [f"data:image/png;base64,{base64.b64encode(png(image)).decode()}" for image in images]

        def one(question: tuple[str, tuple[int, ...]]) -> V:
            text, rows = question
            content: list[Any] = [{"type": "image_url", "image_url": {"url": shown[row]}} for row in rows]
            messages: list[dict[str, Any]] = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
            for _ in range(self._spec.attempts):
                answer, reason = self._complete(messages)
                value = read(answer) if reason == _WHOLE else None
                if value is not None:
                    return value
                messages = [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": reminder}]
            raise self._unreadable(answer, reason)

        return self.server.each(one, questions)

    def _unreadable(self, answer: str, reason: object) -> AegpoError:
        cut = "" if reason == _WHOLE else f", with 'finish_reason' {self.server.shown(repr(reason)):.40}"
        way = "raise 'max_tokens', change 'question'" if reason == "length" else "change 'question'"
        last = answer.strip().rpartition("\n")[2]
        return AegpoError(
            f"{self.server.who}: {self._spec.model!r} gave no answer that can be read in {self._spec.attempts} "
            f"attempts, at last {self.server.shown(last)!r}{cut}; {way}, or take another model"
        )

    def _complete(self, messages: Sequence[dict[str, Any]]) -> tuple[str, object]:
        """An answer, and why it ended there."""
        request = {"model": self._spec.model, "messages": messages, "temperature": 0}
        request["max_tokens"] = self._spec.max_tokens
        answer = self.server.post("/chat/completions", json.dumps(request).encode(), "application/json")
        match answer:
            case {"choices": [{"message": {"content": text}} as choice]}:
                return (text if isinstance(text, str) else ""), choice.get("finish_reason")  # null: it declined
        raise AegpoError(
            f"{self.server.who}: the endpoint answered {self.server.shown(json.dumps(answer))}, no chat completion"
        )


def _with_place(question: str) -> str:
    if "{prompt}" not in question:
        raise ValueError("has no {prompt}, which stands for the prompt")
    return question
