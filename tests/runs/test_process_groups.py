"""Several processes of one run: who is who, what each gets of the machine, what is noted, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import GaussianSpec, small_experiment

from aegpo.commands.groups import check_devices, exit_code
from aegpo.commands.launch_request import LaunchRequest
from aegpo.config.loading import load_experiment_file
from aegpo.core.processes import Place, parent, place
from aegpo.core.sections import ParallelSpec
from aegpo.errors import AegpoError, ContractError, ObserverError, ProcessLostError, SettingError
from aegpo.parallel.agent import Group, run_group
from aegpo.parallel.faults import Fault, agreed_on, fault_of, in_other_words
from aegpo.parallel.team import Team
from aegpo.parallel.watch import OtherProcess
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.rewards.clip import ClipReward
from aegpo.runs.child_processes import divide
from aegpo.runs.cutting import Cut, keep_cut, shards_of
from aegpo.runs.folders import Run
from aegpo.runs.manifest import check_manifest, open_manifest, read_manifest
from aegpo.runs.threads import thread_variables

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
FOUND = {"MASTER_ADDR": "head", "MASTER_PORT": "29500"}


# --- who is who -------------------------------------------------------------------------------------------------------


def test_a_process_that_nobody_launched_is_alone():
    assert place() == Place()
    assert place().alone


def test_what_torchrun_says_is_a_place(monkeypatch):
    told = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    for name, value in (TORCHRUN | FOUND | told).items():
        monkeypatch.setenv(name, value)
    assert place() == Place(3, 4, 1, 2, "head", 29500, True, 2)
    assert parent() is not None  # torchrun waits for it


def test_what_is_missing_of_a_place_is_named(monkeypatch):
    for name, value in (TORCHRUN | {"MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AegpoError, match=r"4 processes were launched, but not told who they are \(MASTER_ADDR\)"):
        place()


def test_only_what_is_missing_of_a_place_is_named(monkeypatch):
    for name, value in (TORCHRUN | FOUND | {"RANK": ""}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AegpoError, match=r"who they are \(RANK\)"):
        place()


def test_a_team_of_one_says_everything_to_itself():
    team = Team.joined()
    assert (team.size, team.first, list(team.cut(3).mine), team.exact) == (1, True, [0, 1, 2], True)
    assert (team.told("here", 5), team.any("here", False), team.of_first("here", lambda: 7)) == ([5], False, 7)
    with pytest.raises(KeyError), team.agreed("here"):
        raise KeyError("mine")
    with team.in_turn("here"):
        pass
    team.leave()


# --- errors that all know of ------------------------------------------------------------------------------------------


def raised(error, of, at):
    """The error of process `of` of two, as process `at` raises it."""
    fault = Fault(**json.loads(json.dumps(fault_of(error, Place(of, 2)).as_json())))
    return fault.error(Place(at, 2), error if of == at else None)


def test_an_error_of_another_process_is_the_same_with_its_place_and_told_by_the_first():
    error = SettingError("no such file", "prompts", "path")
    error.part = ("prompts", "file")
    own, other = raised(error, of=1, at=1), raised(error, of=1, at=0)
    assert own is error
    assert own.told_elsewhere
    assert (type(other), str(other)) == (SettingError, "prompts.path: no such file (process 1 of 2)")
    assert (other.part, other.told_elsewhere) == (("prompts", "file"), False)
    assert agreed_on(own)
    assert agreed_on(other)


def test_an_error_of_ours_is_told_by_the_process_that_has_its_traceback():
    other = raised(ZeroDivisionError("division by zero"), of=1, at=0)
    assert str(other) == "process 1 of 2 failed with ZeroDivisionError: division by zero"
    assert other.told_elsewhere
    assert isinstance(raised(ZeroDivisionError("division by zero"), of=1, at=1), ZeroDivisionError)


def test_what_an_observer_left_unrecorded_is_unrecorded_for_all():
    error = ObserverError("the record is full")
    error.recorded = False
    assert not raised(error, of=0, at=1).recorded


def test_an_error_in_other_words_is_known_to_as_many():
    error = in_other_words(raised(ContractError("bad"), of=1, at=0), "bad\nstep 2 is saved")
    assert (type(error), str(error)) == (ContractError, "bad\nstep 2 is saved")
    assert agreed_on(error)
    assert not agreed_on(in_other_words(ContractError("bad"), "worse"))


# --- who watches whom -------------------------------------------------------------------------------------------------

WATCHING = """
import subprocess, sys, time
from aegpo.core.processes import Place
from aegpo.parallel import watch

other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
watch.GRACE = 0.2
mine = watch.Watch(Place(0, 2), {1: other.pid}, lambda rank: %r, lambda: True)
time.sleep(1)
if %r:
    mine.stop()
other.kill()
time.sleep(%r)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("left", "over", "code"), [(False, False, 1), (True, False, 0), (False, True, 0)])
def test_a_process_ends_after_another_one_unless_that_one_left_or_all_is_done(left, over, code):
    watching = WATCHING % (left, over, 100 if code else 2)  # who is to be ended has no other end in sight
    done = subprocess.run([sys.executable, "-c", watching], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("process 1 of the 2 of this run ended amid a step" in done.stderr) == bool(code)


def test_a_process_that_is_stopped_is_known_to_be():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        other = OtherProcess(process.pid)
        assert not other.stopped()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert other.stopped()
        assert not other.gone()
        process.kill()
    assert not other.stopped()
    assert other.gone()


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_that_goes_on_has_as_many_processes(tmp_path):
    request = LaunchRequest(tmp_path / "file.yaml", gpus=2, max_restarts=0, jobs=3)
    words = ["run", str(tmp_path / "file.yaml"), "--out", "runs", "--jobs", "3", "--gpus", "2", "--max-restarts", "0"]
    assert request.command() == words
    assert (request.size, request.restarts, request.apart) == (2, 0, True)
    assert LaunchRequest(tmp_path, processes=4).command()[-2:] == ["--processes", "4"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"processes": 2, "gpus": 2}, "--gpus N is --processes N with a GPU for each: leave one out"),
        ({"max_restarts": 2}, "--max-restarts 2 is for a run of several processes; give --processes N or --gpus N"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(tmp_path, options, expected):
    with pytest.raises(AegpoError, match=expected):
        LaunchRequest(tmp_path, **options).check()


def test_gpus_that_are_not_there_are_refused_with_the_way_out(tmp_path, monkeypatch):
    request, experiment = LaunchRequest(tmp_path, gpus=4), small_experiment(GaussianSpec())
    with pytest.raises(AegpoError, match=r"computes on the CPU \('device: cpu'\); give --processes 4"):
        check_devices([experiment.model_copy(update={"device": "cpu"})], request, 4)
    anywhere = experiment.model_copy(update={"device": "auto"})
    for there, expected in (((), "there are no GPUs here"), (("0", "1"), "ask for fewer with --gpus 2, or")):
        monkeypatch.setattr("aegpo.commands.groups.usable_gpus", lambda there=there: there)
        with pytest.raises(AegpoError, match=expected):
            check_devices([anywhere], request, 4)
    monkeypatch.setattr("aegpo.commands.groups.usable_gpus", lambda: ("0", "1", "2", "3"))
    check_devices([anywhere], request, 4)


def test_one_gpu_that_all_processes_would_use_is_refused_where_it_is_named(tmp_path):
    experiment = small_experiment(GaussianSpec())
    judged = experiment.model_copy(update={"rewards": (ClipReward(device="cpu"), ClipReward(device="cuda:1"))})
    request = LaunchRequest(tmp_path, processes=2)
    with pytest.raises(SettingError, match=r"^rewards\.1\.device: cuda:1 is one GPU, which each of the 2 processes"):
        check_devices([judged], request, 2)
    with pytest.raises(SettingError, match=r"^device: cuda:0 is one GPU"):
        check_devices([experiment.model_copy(update={"device": "cuda:0"})], request, 2)
    check_devices([judged], LaunchRequest(tmp_path), 1)


def test_replicas_that_do_not_divide_the_processes_are_refused_before_anything_starts(tmp_path):
    thrice = small_experiment(GaussianSpec(), parallel=ParallelSpec(weights="sharded", replicas=3))
    with pytest.raises(SettingError, match=r"^parallel\.replicas: 3 does not divide the 4 processes.*one of 1, 2, 4"):
        check_devices([thrice], LaunchRequest(tmp_path, processes=4), 4)
    check_devices([thrice], LaunchRequest(tmp_path, processes=6), 6)
    check_devices([thrice], LaunchRequest(tmp_path), 1)  # which has all weights


# --- shares of the machine --------------------------------------------------------------------------------------------


def test_processes_of_runs_share_the_cores():
    assert divide(8, (), {"cpu"}, None, runs=15, processes=2) == [thread_variables(1)] * 4
    assert divide(8, (), {"cpu"}, 1, runs=15, processes=2) == [thread_variables(4)]
    assert divide(2, (), {"auto"}, None, runs=15, processes=4) == [thread_variables(1)]


def test_each_run_has_as_many_gpus_as_were_asked_for():
    gpus, own = ("0", "1", "4", "5", "6"), {"processes": 2, "gpu_each": True}
    shares = divide(16, gpus, {"auto"}, None, runs=9, **own)
    assert shares == [{**thread_variables(4), "CUDA_VISIBLE_DEVICES": each} for each in ("0,1", "4,5")]
    three = divide(16, gpus, {"auto"}, 3, runs=9, **own)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in three] == ["0,1", "4,5", "0,1"]


def test_processes_that_share_a_gpu_see_one():
    shares = divide(16, ("0", "1"), {"auto"}, None, runs=9, processes=4)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0", "1"]


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards_are_as_many_as_processes_of_the_first_start_and_never_fewer_than_there_are():
    free = ParallelSpec()
    assert shards_of(free, 4, None) == 4
    assert [shards_of(free, processes, Cut(4, 4)) for processes in (1, 2, 4, 8)] == [4, 4, 4, 8]
    assert shards_of(ParallelSpec(shards=8), 2, Cut(4, 4)) == 8
    with pytest.raises(SettingError, match=r"^parallel\.shards: 2 cannot be shared out among 4 processes; set it to 4"):
        shards_of(ParallelSpec(shards=2), 4, None)


@pytest.fixture
def run(tmp_path):
    run = Run("main", 0, small_experiment(GaussianSpec()), tmp_path / "run")
    run.folder.mkdir()
    open_manifest(run, (), 1)
    return run


def of(processes, shards):
    return Team(Place(0, processes), None, shards)


def test_what_a_run_is_computed_by_is_noted_and_only_what_moves_results_is_a_change(run):
    assert keep_cut(run, of(1, 4), 10, 0) is None
    assert read_manifest(run.folder)["parallel"] == {"shards": 4, "processes": 1, "sums": "exact"}
    assert keep_cut(run, of(1, 4), 10, 3) is None
    assert keep_cut(run, of(2, 4), 10, 4) == "goes on with processes 1 -> 2; the results are the same to the bit"
    assert "parallel_changed" not in read_manifest(run.folder)
    assert keep_cut(run, of(8, 8), 10, 5) == (
        "goes on with shards 4 -> 8, processes 2 -> 8: sums are split otherwise, so bits may differ from a run without "
        "the change"
    )
    assert keep_cut(run, of(3, 8), 10, 6).startswith("goes on with processes 8 -> 3: sums are split otherwise")
    manifest = read_manifest(run.folder)
    assert [change["after_step"] for change in manifest["parallel_changed"]] == [5, 6]
    assert manifest["parallel"] == {"shards": 8, "processes": 3, "sums": "rounded"}


def test_more_numbers_than_a_tree_sums_are_rounded(run):
    assert keep_cut(run, of(2, 2), 10**9, 0) is None
    assert read_manifest(run.folder)["parallel"]["sums"] == "rounded"


def test_a_run_begun_before_there_was_a_choice_was_one_process(run):
    assert Cut.noted(read_manifest(run.folder)) == Cut(1, 1)
    assert keep_cut(run, of(2, 2), 10, 1).startswith(
        "goes on with shards 1 -> 2, processes 1 -> 2: sums are split otherwise"
    )


def test_how_processes_share_the_work_may_change_between_starts(tmp_path, pytestconfig):
    path, registries = pytestconfig.rootpath / "experiments" / "smoke.yaml", load_registries(plugin_manager())
    begun, other = (
        Run("grpo", 0, load_experiment_file(path, registries, overrides).arms["grpo"], tmp_path)
        for overrides in ((), ("parallel.shards=4", "parallel.timeout_minutes=5"))
    )
    open_manifest(begun, (), 1)
    (tmp_path / "metrics.jsonl").write_text("{}\n")  # something is learned
    check_manifest(other)


# --- the group --------------------------------------------------------------------------------------------------------


def fails(message):
    """A command that fails as a user's mistake does."""

    def command():
        raise AegpoError(message)

    return exit_code(command)


@pytest.mark.slow
def test_a_group_ends_with_the_exit_code_of_its_processes_which_tell_their_errors(capfd):
    assert run_group(Group(2, 3, 60, thread_variables(1)), fails, "no such thing") == 2
    assert capfd.readouterr().err == "error: no such thing\n" * 2  # they did not agree on who tells it


def listening(argument):
    """On how many ports the agent listens."""
    fds = (Path("/proc") / str(os.getppid()) / "fd").iterdir()
    own = {str(each.readlink()) for each in fds if each.is_symlink()}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return sum(columns[3] == "0A" and f"socket:[{columns[9]}]" in own for columns in lines)


@pytest.mark.slow
def test_what_an_agent_notes_is_on_no_port_but_that_of_the_processes_store():
    """torch pickles it, and a port knows no password."""
    assert run_group(Group(2, 0, 60, thread_variables(1)), listening, None) == 1


def is_lost(message):
    def command():
        raise ProcessLostError(message)

    return exit_code(command)


@pytest.mark.slow
def test_a_group_that_loses_processes_says_so_after_its_restarts(capfd):
    with pytest.raises(
        ProcessLostError, match=r"of the 2 of this run ended with exit code 1 after 1 restart; the same"
    ):
        run_group(Group(2, 1, 60, thread_variables(1)), is_lost, "gone")
    assert capfd.readouterr().err.count("error: gone\n") in (2, 3, 4)
