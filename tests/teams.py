"""Processes of a team, started for tests: each calls the same functions."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.multiprocessing as mp
from ports import free_port

from aegpo.errors import ProcessLostError
from aegpo.parallel.team import Team

Check = Callable[[Team, Path], None]


def failures_in_team(size: int, checks: Sequence[Check], folder: Path) -> dict[str, list[str]]:
    """Calls functions of a module, one after another, in every process of a team.

    Returns:
        The tracebacks of those that raise, by the function's name.
    """
    mp.spawn(_in_team, (size, free_port(), list(checks), folder), nprocs=size)
    found: dict[str, list[str]] = {}
    for rank in range(size):
        for name, told in json.loads((folder / f"failed-{rank}.json").read_text()).items():
            found.setdefault(name, []).append(f"process {rank}: {told}")
    return found


def _in_team(rank: int, size: int, port: int, checks: Sequence[Check], folder: Path) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    team = Team.joined()
    team.use(1, torch.device("cpu"))
    failed: dict[str, str] = {}
    for check in checks:
        try:
            check(team, folder)
        except BaseException:  # `pytest.fail` raises none that is an `Exception`
            failed[check.__name__] = traceback.format_exc()
    (folder / f"failed-{rank}.json").write_text(json.dumps(failed))
    with suppress(ProcessLostError):
        team.leave()
    os._exit(0)  # gloo's threads cannot always be joined
