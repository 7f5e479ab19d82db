"""What `aegpo run` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aegpo.errors import AegpoError

OUT = Path("runs")
RESTARTS = 3  # of a run one of whose processes was lost, unless the user says otherwise


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
    processes: int | None = None  # of each run, sharing what there is for it
    gpus: int | None = None  # processes of each run with a GPU each
    max_restarts: int | None = None  # of the processes of a run, after one was lost
    fresh: bool = False
    report: bool = True

    @property
    def of_folder(self) -> bool:
        """True if what was begun goes on by its manifests, without the file."""
        return self.path.is_dir()

    @property
    def size(self) -> int:
        """How many processes a run has."""
        return self.gpus or self.processes or 1

    @property
    def restarts(self) -> int:
        """How often the processes of a run are started again."""
        return RESTARTS if self.max_restarts is None else self.max_restarts

    @property
    def apart(self) -> bool:
        """True if a run does not happen in this process."""
        return self.size > 1 or self.max_restarts is not None

    def check(self) -> None:
        """Refuses options that make no sense together.

        Raises:
            AegpoError: if there are some.
        """
        if self.processes is not None and self.gpus is not None:
            raise AegpoError(
                f"--gpus {self.gpus} and --processes {self.processes} were given; --gpus N is --processes N with a GPU "
                "for each: leave one out"
            )
        if self.max_restarts is not None and self.processes is None and self.gpus is None:
            raise AegpoError(
                f"--max-restarts {self.max_restarts} is for a run of several processes; give --processes N or --gpus N "
                "too, or leave it out"
            )

    def command(self) -> list[str]:
        """The command line that goes on with this request (never `--fresh`: that would throw away what is done)."""
        words = ["run", str(self.path)]
        words += [word for arm in self.arms for word in ("--arm", arm)]
        words += [word for seed in self.seeds for word in ("--seed", str(seed))]
        words += [word for override in self.overrides for word in ("--set", override)]
        words += [word for plugin in self.plugins for word in ("--plugin", plugin)]
        words += [] if self.of_folder else ["--out", str(self.out)]
        for option in ("jobs", "processes", "gpus", "max_restarts"):
            given = vars(self)[option]
            words += [] if given is None else [f"--{option.replace('_', '-')}", str(given)]
        return words if self.report else [*words, "--no-report"]
