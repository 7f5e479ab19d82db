"""What a cluster can be asked: three verbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from aegpo.clusters.jobs import Job

Where = Literal["pending", "running", "over", "unknown"]


@dataclass(frozen=True)
class State:
    """How a job stands."""

    where: Where
    why: str = ""  # as the cluster says it


class Cluster(Protocol):
    """A cluster."""

    def submit(self, job: Job, label: str) -> str:
        """Hands over a job, which from then on needs nobody here; what the cluster calls it.

        Raises:
            AegpoError: if the cluster refuses it.
        """

    def poll(self, jobs: Sequence[str]) -> Mapping[str, State]:
        """How jobs stand; of one that the cluster does not know (any more): over."""

    def cancel(self, job: str) -> None:
        """Asks for the end of a job, which saves its state first if the cluster lets it; one that is over stays so."""
