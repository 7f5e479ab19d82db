"""What the runs of an experiment share of the policy before it was trained: measured by one, read by the others.

    OUT/NAME/.base/entropy/<key>.safetensors       attention entropies of the prompts that were measured together
    OUT/NAME/.base/evaluation/<key>.safetensors    scores of held-out prompts, of the untrained policy also its images

A key is SHA-256 of everything the numbers depend on: the base by its contents, the model's settings, a sample of its
weights, what the network is told, noise levels, precision, batches, shards, threads, processor, library versions and
the source code of the parts. So what is read is what the run would have measured itself, to the bit, and a run records
and counts it as if it had. Nothing here is needed: what is missing, damaged or of something else is measured again, and
all of it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from aegpo.core.digests import checksum
from aegpo.core.files import write_atomically
from aegpo.core.sharing import Arrays, Shared
from aegpo.parallel.team import Team
from aegpo.runs.bases import Base
from aegpo.runs.folders import Run, run_folder
from aegpo.runs.software import computing_on, source_sha256, versions

if TYPE_CHECKING:
    from aegpo.train.policy import Policy

FOLDER = ".base"  # no arm has such a name
LARGEST = 2**28  # bytes that are kept of one thing, such as images
_FORMAT = "1"
_PATIENCE, _LOOK_EVERY = 600.0, 0.05  # seconds at most: for a run that measures the same, and between looks at it


def open_store(run: Run, common: Mapping[str, Any], team: Team, say: Callable[[str], None]) -> BaseStore:
    """The store of a run's experiment, beside its arms."""
    others = 30 * run.experiment.parallel.timeout_minutes  # half of what the run's other processes wait
    return BaseStore(run.folder.parents[1] / FOLDER, common, team, say, min(_PATIENCE, others))


def common_identity(
    run: Run, policy: Policy, base: Base | None, plugins: Sequence[tuple[str, str]]
) -> dict[str, Any] | None:
    """What everything depends on that the runs of an experiment share, as JSON, before anything is learned.

    None: it is not known, so nothing is shared. That is where a run is not at OUT/NAME/ARM/seed-S, the model's weights
    are in no folder, or the source of a part is in no file.
    """
    from aegpo.train.untrained import of_base

    spec, folder = run.experiment, run.folder.resolve()
    if base is None or folder != run_folder(folder.parents[2], spec.name, run.arm, run.seed):
        return None
    classes = [type(part) for part in (run, spec.model, *spec.rewards, *spec.evaluation.rewards)]
    code = {part.__module__.partition(".")[0]: source_sha256(part) for part in classes}
    if None in code.values():
        return None
    made = {"versions": versions(), "plugins": [list(each) for each in plugins], "code": code}
    return {"base": dict(base), "policy": of_base(policy), **made, "computes": computing_on(policy.device)}


class BaseStore:
    """Files of what was measured; all processes of a run ask it together, and the first of them keeps it."""

    def __init__(
        self,
        folder: Path,
        common: Mapping[str, Any],
        team: Team,
        say: Callable[[str], None],
        patience: float = _PATIENCE,
    ) -> None:
        """Opens it; nothing need be there.

        Args:
            folder: of all files.
            common: what all of it depends on, as JSON.
            team: the processes of the run.
            say: gets a line of what was wrong, once.
            patience: seconds to wait for another run that measures the same.
        """
        self._folder, self._common, self._team, self._say = folder, common, team, say
        self._patience, self._told = patience, False

    def known(self, what: Shared, depends_on: Callable[[], Mapping[str, Any]], measure: Callable[[], Arrays]) -> Arrays:
        """What `measure` would find: read, or measured and kept, while other runs that want the same wait for it."""
        own = {"what": what, "shards": self._team.shards, **self._common, **depends_on()}
        key = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        key = self._team.told(f"which {what} is asked for", key)[0]
        path = self._folder / what / f"{key[:32]}.safetensors"
        found = self._read(path, key)
        if found is None:
            with self._turn(path):
                found = self._read(path, key)  # another run may have measured it meanwhile
                if found is None:
                    found = self._measured(path, key, measure)
        return found

    def _measured(self, path: Path, key: str, measure: Callable[[], Arrays]) -> Arrays:
        """What is measured here; it is kept, unless a part drew by chance for it: then it is no function of the key."""
        before = _generators()
        found = measure()
        if self._team.first and _generators() == before and sum(each.nbytes for each in found.values()) <= LARGEST:
            from safetensors.numpy import save

            told = {"format": _FORMAT, "key": key, "sha256": checksum(found)}
            arrays = {name: np.ascontiguousarray(each) for name, each in found.items()}
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, save(arrays, metadata=told))
            except OSError as error:
                self._warn(f"{path} cannot be written to: {error.strerror}; other runs measure it again")
        return found

    # --- reading -----------------------------------------------------------------------------------------------------

    def _read(self, path: Path, key: str) -> Arrays | None:
        """What is kept, if every process can read the same; the first one decides whether they look."""
        there = os.path.isfile(path)  # noqa: PTH113  (Path.is_file fails in a folder that others may not enter)
        found = self._intact(path, key) if self._team.told("what is kept", there)[0] else None
        sums = self._team.told("what is read", None if found is None else checksum(found))
        return found if len(set(sums)) == 1 else None

    def _intact(self, path: Path, key: str) -> Arrays | None:
        """The arrays of a file; None: it is damaged, or of something else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                told = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
            self._warn(f"{path} is damaged ({error}); it is measured again")
            return None
        if told != {"format": _FORMAT, "key": key, "sha256": checksum(found)}:
            self._warn(f"{path} is damaged, or of something else; it is measured again")
            return None
        return found

    def _warn(self, line: str) -> None:
        """Says what is wrong with the store, once: it is no reason for a run to end."""
        if self._team.first and not self._told:
            self._say(f"warning: {line}")
            self._told = True

    # --- one measures, the others wait -------------------------------------------------------------------------------

    @contextmanager
    def _turn(self, path: Path) -> Iterator[None]:
        """Inside, no other run measures this, unless it took too long or the disk has no locks.

        The operating system lets go of the lock of a process that ends, however it ends.
        """
        lock = _opened(path.with_suffix(".lock")) if self._team.first else None
        if lock is None:
            yield
            return
        with lock:
            held = self._waited(lock)
            try:
                yield
            finally:
                if held:
                    _unlock(lock, path.with_suffix(".lock"))

    def _waited(self, lock: IO[bytes]) -> bool:
        """True once the lock is this run's; False: it goes on without."""
        from filelock import lock_descriptor

        end = time.monotonic() + self._patience
        while time.monotonic() < end:
            try:
                if lock_descriptor(lock.fileno(), blocking=False):
                    return True
            except OSError:
                return False
            time.sleep(_LOOK_EVERY)
        return False


def _opened(path: Path) -> IO[bytes] | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    except OSError:
        return None


def _unlock(lock: IO[bytes], path: Path) -> None:
    """Lets others on, who read what is there now; whoever waits for the file has it open and needs no name."""
    from filelock import unlock_descriptor

    with suppress(OSError):
        path.unlink()
    with suppress(OSError):
        unlock_descriptor(lock.fileno())


def _generators() -> tuple[bytes, ...]:
    """The state of all global generators."""
    import torch

    name, numbers, *place = np.random.get_state()
    legacy = np.asarray(numbers).tobytes() + repr((name, place)).encode()
    return torch.get_rng_state().numpy().tobytes(), repr(random.getstate()).encode(), legacy
