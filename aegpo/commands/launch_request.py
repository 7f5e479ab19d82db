"""What `aegpo run` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

OUT = Path("runs")


@dataclass(frozen=True)
class LaunchRequest:
    """What the command line asked for."""

    path: Path  # of an experiment file, or of a folder of runs to go on with
    overrides: tuple[str, ...] = ()  # key=value
    plugins: tuple[str, ...] = ()
    arms: tuple[str, ...] = ()  # empty: every arm of the file
    seeds: tuple[int, ...] = ()  # empty: every seed of the file
    out: Path = OUT
    jobs: int | None = None  # runs at a time; None: one for each GPU, or for each core
    fresh: bool = False
    report: bool = True

    @property
    def of_folder(self) -> bool:
        """True if what was begun goes on by its manifests, without the file."""
        return self.path.is_dir()

    def command(self) -> list[str]:
        """The command line that goes on with this request (never `--fresh`: that would throw away what is done)."""
        words = ["run", str(self.path)]
        words += [word for arm in self.arms for word in ("--arm", arm)]
        words += [word for seed in self.seeds for word in ("--seed", str(seed))]
        words += [word for override in self.overrides for word in ("--set", override)]
        words += [word for plugin in self.plugins for word in ("--plugin", plugin)]
        words += [] if self.of_folder else ["--out", str(self.out)]
        words += [] if self.jobs is None else ["--jobs", str(self.jobs)]
        return words if self.report else [*words, "--no-report"]
