"""One run in several processes: a group that this command starts, or one that a launcher started for it."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.streams import lenient
from aegpo.commands.telling import telling
from aegpo.core.experiment import Experiment
from aegpo.core.phases import replicas_refused
from aegpo.core.processes import DISK_REFUSED, PARENT
from aegpo.errors import AegpoError, ProcessLostError, SettingError
from aegpo.parallel.agent import Group, run_group
from aegpo.parallel.team import Team
from aegpo.runs.child_processes import devices_of, named_gpus, usable_cores, usable_gpus
from aegpo.runs.folders import Run
from aegpo.runs.manifest import begun_threads
from aegpo.runs.threads import allowed, thread_variables

_SEEN = 1.0  # seconds that a process lives on after another was lost, so that its agent sees first which one that was


def check_devices(experiments: Sequence[Experiment], request: LaunchRequest, processes: int) -> None:
    """Refuses a group of processes that cannot have the GPUs they would use, or the weights as often as is asked.

    Args:
        experiments: of the chosen runs.
        request: what the command line asked for.
        processes: of each run.

    Raises:
        AegpoError: if there are fewer GPUs than were asked for, or all processes would use one that is named, or
            `replicas` do not divide them.
    """
    for experiment in experiments:
        if (refused := replicas_refused(experiment.parallel, processes)) is not None:
            raise SettingError(refused, "parallel", "replicas")
    for experiment in experiments if processes > 1 else ():
        for location, device in named_gpus(experiment):
            raise SettingError(
                f"{device} is one GPU, which each of the {processes} processes would use; let each have its own with "
                "'cuda', or serve a reward once with 'aegpo serve-reward' and name it as 'remote'",
                *location,
            )
    if request.gpus is None:
        return
    if all(devices_of(experiment) == {"cpu"} for experiment in experiments):
        raise AegpoError(
            f"--gpus {request.gpus}: the experiment computes on the CPU ('device: cpu'); give --processes "
            f"{request.gpus}"
        )
    if request.cluster in ("slurm", "ray"):  # whose nodes have them
        return
    there = len(usable_gpus())
    if there < request.gpus:
        few = f"fewer with --gpus {there}, or " if there else ""
        raise AegpoError(
            f"--gpus {request.gpus}: there {'is' if there == 1 else 'are'} {there or 'no'} "
            f"GPU{'' if there == 1 else 's'} here that torch can use; ask for {few}processes that share what there is "
            f"with --processes {request.gpus}"
        )


@contextmanager
def together() -> Iterator[Team]:
    """The processes that were launched for this command, or this one alone; what one raises all raise, and all leave.

    Raises:
        ProcessLostError: if one of them is gone.
    """
    team, failed = Team.joined(), list[Exception]()
    try:
        try:
            with team.agreed("the command"):
                yield team
        except ProcessLostError:
            raise
        except Exception as error:
            failed.append(error)
        while True:
            try:
                team.leave()
                break
            except ProcessLostError:
                raise
            except AegpoError as error:  # of a process that had more to do
                failed.append(error)
    except ProcessLostError as error:
        error.told_elsewhere = not team.tells_of_loss()
        raise
    if failed:
        raise failed[0]


def run_in_group(request: LaunchRequest, run: Run, entry: Callable[[LaunchRequest], int]) -> int:
    """Runs or resumes one run in as many processes as were asked for; the exit code.

    Raises:
        ProcessLostError: if a process was lost, and is not to be started again.
    """
    one = request.of_one(run.arm, run.seed)
    alone = replace(one, processes=None, gpus=None, max_restarts=None)
    threads = begun_threads(run) or max(1, usable_cores() // request.size)
    patience = 60 * run.experiment.parallel.timeout_minutes
    group = Group(request.size, request.restarts, patience, thread_variables(allowed(threads)))
    code = run_group(group, entry, alone)
    return 2 if code == DISK_REFUSED and PARENT not in os.environ else code


def exit_code(command: Callable[[], int]) -> int:
    """The exit code of a process in a group, its mistakes told; where the others do not know of it, it ends at once."""
    agreed, code = True, 1
    with lenient():
        try:
            with telling():
                try:
                    return command()
                except (ProcessLostError, KeyboardInterrupt):
                    agreed = False
                    raise
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
    if not agreed:
        time.sleep(_SEEN)
        os._exit(code or 1)
    return code
