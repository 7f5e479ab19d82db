"""Into how many shards the steps of a run are cut, and by how many processes: noted in its manifest.

"parallel": {"shards": 4, "processes": 2, "sums": "exact"}     "rounded": another number of processes rounds otherwise
                                                    beside it "weights": "sharded", where they are
"parallel_changed": [{"after_step": 8, "from": {...}, "to": {...}}]     what may have moved results since
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aegpo.core.sections import ParallelSpec
from aegpo.errors import SettingError
from aegpo.parallel.team import Team
from aegpo.runs.folders import Run
from aegpo.runs.manifest import read_manifest
from aegpo.runs.records import write_document


@dataclass(frozen=True)
class Cut:
    """How the steps of a run are computed together; what was begun before there was a choice: by one process."""

    shards: int = 1
    processes: int = 1
    exact: bool = True  # other numbers of processes, powers of two that divide the shards, have the same results
    sharded: bool = False  # weights, whose gradients are summed in another order than those of whole ones

    @classmethod
    def noted(cls, manifest: Mapping[str, Any]) -> Cut:
        """That of a manifest."""
        found = manifest.get("parallel") or {}
        exact = found.get("sums", "exact") == "exact"
        sharded = found.get("weights") == "sharded"
        return cls(int(found.get("shards", 1)), int(found.get("processes", 1)), exact, sharded)

    def plain(self) -> dict[str, Any]:
        """As the manifest has it."""
        sums = "exact" if self.exact else "rounded"
        told = {"shards": self.shards, "processes": self.processes, "sums": sums}
        return told | ({"weights": "sharded"} if self.sharded else {})

    def same_results(self, other: Cut) -> bool:
        """True if a run has the same results to the bit under both."""
        same = self.processes == other.processes or (self.exact and other.exact)
        return (self.shards, self.sharded) == (other.shards, other.sharded) and same


def shards_of(spec: ParallelSpec, processes: int, begun: Cut | None) -> int:
    """How many shards a run has now.

    Args:
        spec: the experiment's.
        processes: how many there are.
        begun: what it was computed with before; None: it starts.

    Raises:
        SettingError: if the experiment asks for fewer than there are processes.
    """
    if spec.shards is None:
        return processes if begun is None else max(begun.shards, processes)
    if processes > spec.shards:
        raise SettingError(
            f"{spec.shards} cannot be shared out among {processes} processes; set it to {processes} or a multiple of "
            f"that, leave it out, or start at most {spec.shards} processes",
            "parallel",
            "shards",
        )
    return spec.shards


def keep_cut(run: Run, team: Team, numbers: int, step: int, sharded: bool = False) -> str | None:
    """Notes in the manifest how a run is computed from a training step on.

    Args:
        run: whose manifest is there.
        team: its processes and shards.
        numbers: how many are trained.
        step: the training steps that are done.
        sharded: no process has all weights.

    Returns:
        What is to be said of it, if the run was computed in another way before.
    """
    manifest = read_manifest(run.folder)
    before, now = Cut.noted(manifest), Cut(team.shards, team.size, team.by_tree(numbers) and not sharded, sharded)
    if "parallel" in manifest and before == now:
        return None
    noted = {**manifest, "parallel": now.plain()}
    if step > 0 and not before.same_results(now):
        change = {"after_step": step, "from": before.plain(), "to": now.plain()}
        noted["parallel_changed"] = [*manifest.get("parallel_changed", []), change]
    write_document(run.folder / "manifest.json", noted)
    return _told(before, now) if step > 0 else None


def _told(before: Cut, now: Cut) -> str | None:
    weights = tuple("sharded" if each.sharded else "whole" for each in (before, now))
    pairs: dict[str, tuple[object, ...]] = {"shards": (before.shards, now.shards)}
    pairs |= {"processes": (before.processes, now.processes), "weights": weights}
    changed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new)
    if not before.same_results(now):
        return f"goes on with {changed}: sums are split otherwise, so bits may differ from a run without the change"
    return f"goes on with {changed}; the results are the same to the bit" if changed else None
