"""The learning rate over the updates of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from aegpo.core.problems import Problem
from aegpo.core.registry import Spec, Where


class ScheduleSpec(Spec):
    """The learning rate over the optimizer updates of a run, as a share of its peak; `optimizer.learning_rate` is that.

    Updates are counted, not training steps. How many a run makes at most is known before it starts, so the rate is a
    function of the update's number alone, and a resumed run needs no more than its counter.
    """

    read_where: ClassVar[Mapping[str, Where]] = {"final": Where("kind", ("cosine", "linear"))}

    kind: Literal["constant", "cosine", "linear"] = Field(
        default="constant",
        description="after the warm-up: the peak (Flow-GRPO), or down to `final` along half a cosine (SGDR, arXiv "
        "1608.03983, Eq. 5, without restarts) or a straight line",
    )
    warmup: Annotated[int, Field(ge=0, le=1_000_000)] = Field(
        default=0,
        description="optimizer updates below the peak: number n of them has n / (warmup + 1) of it (Goyal et al., "
        "arXiv 1706.02677, Sec. 2.2: a gradual warm-up; our choice: none, and no update at rate 0)",
    )
    final: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="cosine, linear: share of the peak that the run's last update has (SGDR: 0)",
    )

    @property
    def varies(self) -> bool:
        """False if every update has the peak."""
        return self.kind != "constant" or self.warmup > 0

    def share(self, update: int, updates: int) -> float:
        """The share of the peak in an update, counted from 1, of a run of at most `updates`; later ones keep the last.

        With w = `warmup`, f = `final` and p = (update - w - 1) / (updates - w - 1), the part of the way from the first
        update at the peak to the last one: f + (1 - f) (1 + cos(pi p)) / 2, or f + (1 - f) (1 - p).
        """
        peak = self.warmup + 1
        if update < peak:
            return update / peak
        if self.kind == "constant":
            return 1.0
        way = min(1.0, (update - peak) / (updates - peak))
        left = (1 + math.cos(math.pi * way)) / 2 if self.kind == "cosine" else 1 - way
        return self.final + (1 - self.final) * left

    def problems(self, updates: int) -> Iterator[Problem]:
        """What does not go together, in a run of at most `updates`."""
        place, made = ("optimizer", "schedule"), f"the run makes {updates} optimizer updates at most"
        if self.kind == "constant":
            if self.warmup >= updates:
                message = f"the learning rate never reaches its peak: {made}; lower it to {updates - 1} or less"
                yield Problem((*place, "warmup"), message, warning=True)
        elif self.warmup + 2 > updates:
            message = (
                f"no way down for {self.kind!r} after a warm-up of {self.warmup}: {made}, and it takes "
                f"{self.warmup + 2} or more; lower 'warmup', raise 'training_steps', or use constant"
            )
            yield Problem(place, message)
