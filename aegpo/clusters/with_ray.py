"""Jobs of Ray: each is an actor, which Ray starts again wherever there is room when its process or its node is lost.

Actors and not tasks: a task ends with the program that submitted it, so nobody could leave it and come back.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from aegpo.clusters.interface import State
from aegpo.clusters.jobs import Job, Work
from aegpo.clusters.settings import Value
from aegpo.errors import AegpoError

_NAMES = "aegpo"  # Ray's namespace of our actors
_PATIENCE = 5.0  # seconds that an actor may take to answer


class Worker:
    """What Ray starts: a job, in a thread of its own, so that it can be asked how it stands."""

    def __init__(self, job: Job) -> None:
        self._work, self._over = Work(job), threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def over(self) -> bool:
        """True once the command has ended."""
        return self._over.is_set()

    def stop(self) -> None:
        """Asks the command to save its state and end."""
        self._work.stop()

    def _run(self) -> None:
        try:
            self._work.run()
        finally:
            self._over.set()


class Ray:
    """Jobs of a Ray cluster."""

    def __init__(self, settings: Mapping[str, Value], processes: int, gpus: int | None) -> None:
        """Joins the cluster.

        Args:
            settings: see `settings.KNOWN`.
            processes: of each job.
            gpus: of each job; None: none.

        Raises:
            AegpoError: if Ray or its cluster is not here.
        """
        try:
            import ray
        except ImportError as error:
            raise AegpoError(f'--cluster ray needs {error.name}; run  pip install "aegpo[ray]"') from error
        address = str(settings.get("address", "auto"))
        try:
            _reach(address)
            ray.init(address=address, namespace=_NAMES, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            raise AegpoError(
                f"--cluster ray: no cluster of Ray at {address!r} ({_first_line(error)}); start one with 'ray start "
                "--head', or name its address with --cluster-set address=HOST:PORT"
            ) from error
        self._ray = ray
        self._options: dict[str, Any] = {
            "num_cpus": settings.get("num_cpus", processes),
            "num_gpus": gpus or 0,
            "max_restarts": settings.get("max_restarts", -1),
            **({"accelerator_type": settings["accelerator_type"]} if "accelerator_type" in settings else {}),
        }

    def submit(self, job: Job, label: str) -> str:
        """As `Cluster.submit`."""
        name = f"{label} {job.number[:8]}"
        # Methods are answered by other threads than the one that started the actor.
        made = self._ray.remote(Worker).options(
            name=name, lifetime="detached", max_concurrency=4, get_if_exists=True, **self._options
        )
        made.remote(job)
        return name

    def poll(self, jobs: Sequence[str]) -> Mapping[str, State]:
        """As `Cluster.poll`."""
        asked = {}
        for job in jobs:
            actor = self._actor(job)
            if actor is not None:
                asked[actor.over.remote()] = job
        answered, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=_PATIENCE) if asked else ([], [])
        found = dict.fromkeys(jobs, State("over", "Ray does not know it")) | dict.fromkeys(
            asked.values(), State("pending")
        )
        for answer in answered:
            found[asked[answer]] = self._state(answer, asked[answer])
        return found

    def cancel(self, job: str) -> None:
        """As `Cluster.cancel`; one that waits for room is taken back."""
        actor = self._actor(job)
        if actor is None:
            return
        answered, _ = self._ray.wait([actor.stop.remote()], timeout=_PATIENCE)
        if not answered:
            self._ray.kill(actor)

    def leave(self) -> None:
        """Leaves the cluster, and its jobs to it."""
        self._ray.shutdown()

    def _actor(self, job: str) -> Any | None:
        try:
            return self._ray.get_actor(job)
        except ValueError:
            return None

    def _state(self, answer: Any, job: str) -> State:
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

        try:
            over = self._ray.get(answer)
        except ActorUnavailableError:
            return State("pending")
        except ActorDiedError as error:
            return State("over", _first_line(error))
        except RayError as error:
            return State("unknown", _first_line(error))
        if over:
            self._ray.kill(self._ray.get_actor(job))  # which would keep its resources
            return State("over")
        return State("running")


def _reach(address: str) -> None:
    """Returns if somebody is there; ray itself asks a dead address for minutes.

    Raises:
        OSError: if nobody is.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_PATIENCE).close()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
