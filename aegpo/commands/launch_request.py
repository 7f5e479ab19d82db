"""What `aegpo run` is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from aegpo.clusters.settings import Kind, read_settings
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
    cluster: Kind | None = None  # where runs are jobs; None: they happen here
    cluster_set: tuple[str, ...] = ()  # key=value
    nodes: int | None = None  # of each run
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
        alone = self.processes is None and self.gpus is None and self.cluster is None
        if self.max_restarts is not None and alone:
            raise AegpoError(
                f"--max-restarts {self.max_restarts} is for a run of several processes; give --processes N or --gpus N "
                "too, or leave it out"
            )
        self._check_cluster()

    def _check_cluster(self) -> None:
        if self.cluster is None:
            for option, given in (("--cluster-set", self.cluster_set), ("--nodes", self.nodes)):
                if given:
                    raise AegpoError(f"{option} is for jobs of a cluster; give --cluster slurm too, or leave it out")
            return
        if self.jobs is not None:
            instead = f"give --cluster-set jobs={self.jobs}" if self.cluster == "local" else "leave it out"
            raise AegpoError(
                f"--jobs {self.jobs} is for runs that this command computes; jobs of a cluster wait in its queue: "
                f"{instead}"
            )
        if self.nodes is not None and self.cluster != "slurm":
            raise AegpoError(f"--nodes {self.nodes}: only --cluster slurm gives a run several nodes; leave it out")
        settings = read_settings(self.cluster, self.cluster_set)
        if self.gpus is not None and "gpus_per_node" in settings:
            raise AegpoError(
                f"--gpus {self.gpus} asks for as many GPUs of each node; leave out --cluster-set gpus_per_node="
                f"{settings['gpus_per_node']}"
            )

    def of_one(self, arm: str, seed: int) -> LaunchRequest:
        """What goes on with one of the runs, in a process of its own or several."""
        one = replace(self, arms=(arm,), seeds=(seed,), jobs=None, fresh=False, report=False)
        one = replace(one, cluster=None, cluster_set=(), nodes=None)
        if self.cluster is None or (self.size > 1 and not self.over_nodes):
            return one
        one = replace(one, max_restarts=None)  # the job sees to that
        return replace(one, processes=None, gpus=None) if self.over_nodes else one

    @property
    def over_nodes(self) -> bool:
        """True if a run has processes on several machines."""
        return self.nodes is not None and self.nodes > 1

    def command(self) -> list[str]:
        """The command line that goes on with this request (never `--fresh`: that would throw away what is done)."""
        words = ["run", str(self.path)]
        words += [word for arm in self.arms for word in ("--arm", arm)]
        words += [word for seed in self.seeds for word in ("--seed", str(seed))]
        words += [word for override in self.overrides for word in ("--set", override)]
        words += [word for plugin in self.plugins for word in ("--plugin", plugin)]
        words += [] if self.of_folder else ["--out", str(self.out)]
        words += [word for setting in self.cluster_set for word in ("--cluster-set", setting)]
        for option in ("jobs", "processes", "gpus", "max_restarts", "cluster", "nodes"):
            given = vars(self)[option]
            words += [] if given is None else [f"--{option.replace('_', '-')}", str(given)]
        return words if self.report else [*words, "--no-report"]
