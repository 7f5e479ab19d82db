"""What a job is and may be asked for, and how runs are followed by jobs, with a cluster that is a list of threads."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from clustered import until, write_tiny
from command_line import aegpo
from repository import ROOT
from rich.console import Console
from worlds import GaussianSpec, small_experiment

from aegpo.clusters import notes
from aegpo.clusters.following import Following
from aegpo.clusters.interface import State
from aegpo.clusters.jobs import Job, Node, Work
from aegpo.clusters.settings import KINDS, KNOWN, read_settings
from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run_on_cluster import told
from aegpo.errors import AegpoError, CheckpointError
from aegpo.runs.child_processes import Child
from aegpo.runs.folders import Run
from aegpo.runs.progress import Lines

# --- what is asked for ------------------------------------------------------------------------------------------------


def test_settings_are_read_as_what_they_are():
    given = ("partition=gpu", "time=240", "setup=module load cuda", "setup=ulimit -n 4096")
    read = {"partition": "gpu", "time": 240, "setup": ["module load cuda", "ulimit -n 4096"]}
    assert read_settings("slurm", given) == read
    assert read_settings("ray", ("num_cpus=0.5",)) == {"num_cpus": 0.5}


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("slurm", "partitoin=gpu", "slurm has no setting 'partitoin'; did you mean 'partition'"),
        ("local", "address=x", "local has no setting 'address'; known: jobs, setup"),
        ("slurm", "partition", "expected KEY=VALUE, such as partition=gpu"),
        ("slurm", "time=4h", "time=4h: a whole number from 1 on was expected for 'time'"),
        ("ray", "num_cpus=-1", "a number from 0 on was expected"),
    ],
)
def test_a_setting_that_a_cluster_does_not_have_is_refused_by_name(kind, given, expected):
    with pytest.raises(AegpoError, match=expected):
        read_settings(kind, (given,))


def test_a_setting_that_is_given_twice_is_refused():
    with pytest.raises(AegpoError, match="names 'time' twice: 1 and 2"):
        read_settings("slurm", ("time=1", "time=2"))


def test_every_setting_of_slurm_is_one_that_submitit_takes_and_every_setting_is_told():
    from submitit.slurm.slurm import _make_sbatch_string

    page = (ROOT / "docs" / "tutorial" / "several-gpus.md").read_text(encoding="utf-8")
    for kind in KINDS:
        assert not [key for key in KNOWN[kind] if f"`{key}`" not in page]
    values = {key: 1 if reading.expected.startswith("a whole") else "x" for key, reading in KNOWN["slurm"].items()}
    written = _make_sbatch_string("true", "folder", **(values | {"setup": ["module load x"]}))
    assert "#SBATCH --partition=x" in written


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"nodes": 2}, "--nodes is for jobs of a cluster; give --cluster slurm too"),
        ({"cluster_set": ("time=1",)}, "--cluster-set is for jobs of a cluster"),
        ({"cluster": "slurm", "jobs": 2}, "--jobs 2 is for runs that this command computes.*: leave it out"),
        ({"cluster": "local", "jobs": 2}, "give --cluster-set jobs=2"),
        ({"cluster": "ray", "nodes": 2}, "--nodes 2: only --cluster slurm gives a run several nodes"),
        (
            {"cluster": "slurm", "gpus": 2, "cluster_set": ("gpus_per_node=4",)},
            "leave out --cluster-set gpus_per_node=4",
        ),
    ],
)
def test_options_that_make_no_sense_together_are_refused(tmp_path, options, expected):
    with pytest.raises(AegpoError, match=expected):
        LaunchRequest(tmp_path, **options).check()


def test_the_same_command_attaches_and_a_job_computes_one_run_here(tmp_path):
    asked = {"cluster": "slurm", "cluster_set": ("partition=gpu",), "gpus": 8, "nodes": 2}
    request = LaunchRequest(tmp_path / "file.yaml", **asked)
    request.check()
    assert request.command()[4:] == [
        "--cluster-set",
        "partition=gpu",
        "--gpus",
        "8",
        "--cluster",
        "slurm",
        "--nodes",
        "2",
    ]
    alone = ["--arm", "main", "--seed", "3", "--out", "runs", "--no-report"]
    assert request.of_one("main", 3).command()[2:] == alone
    assert replace(request, nodes=None).of_one("main", 3).command()[2:] == [*alone[:-1], "--gpus", "8", alone[-1]]


def test_a_cluster_that_is_not_there_is_told_with_the_way_out(tmp_path, tiny_weights, monkeypatch):
    write_tiny(tmp_path, tiny_weights)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    done = aegpo("run", "tiny.yaml", "--cluster", "slurm")
    assert done.code == 2
    assert "there is no 'srun' here; give the command where Slurm's are" in " ".join(done.stderr.split())


# --- a job ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path) -> Job:
    """One whose command counts its starts, and sees how often it is to be killed."""
    return Job("number", ("-c", "pass"), str(tmp_path), str(tmp_path / "run.log"), str(tmp_path / "end.json"))


def test_a_command_that_is_killed_is_started_again_as_often_as_was_asked(job):
    dies = ("-c", "import os; print('here'); os.kill(os.getpid(), 9)")
    assert Work(replace(job, words=dies, restarts=2)).run() == -signal.SIGKILL
    assert Path(job.log).read_text().count("\nhere\n") == 3
    assert json.loads(Path(job.end).read_text()) == {"number": "number", "code": -9}


def test_lines_of_a_shell_come_before_the_command_and_one_that_fails_ends_the_job(job):
    words = ("-c", "import os; print(os.environ['SAID'])")
    assert Work(replace(job, words=words, setup=("export SAID=here", "cd ."))).run() == 0
    assert Path(job.log).read_text().splitlines()[-1] == "here"
    assert Work(replace(job, words=words, setup=("no-such-program",), restarts=2)).run() == 127


def test_a_command_that_fails_is_not_started_again(job):
    assert Work(replace(job, words=("-c", "raise SystemExit(2)"), restarts=2)).run() == 2
    assert Path(job.log).read_text().count("--- ") == 1


def test_a_command_finds_its_environment_and_waits_for_a_lock_that_is_held(job, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    names = ["AEGPO_WAIT_FOR_LOCK", "RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "AEGPOPARENT"]
    words = ("-c", f"import os; print([os.environ.get(name) for name in {names}])")
    shares = ((("OMP_NUM_THREADS", "7"),),)
    made = replace(job, words=words, environment=(("CUDA_VISIBLE_DEVICES", None),), shares=shares, slots=job.directory)
    assert Work(made).run() == 0
    said = Path(job.log).read_text().splitlines()[-1]
    assert said == str(["300", None, None, "7", str(os.getpid())])


def test_a_job_that_is_told_to_stop_passes_it_on_and_says_so(job):
    work = Work(replace(job, words=("-c", "import time; time.sleep(600)"), restarts=3))
    threading.Timer(1.0, work.stopped).start()
    assert work.run() == 130


def test_jobs_of_one_machine_take_turns_in_its_slots(job):
    share, begin = ((("OMP_NUM_THREADS", "1"),),), time.monotonic()
    made = replace(job, words=("-c", "import time; time.sleep(0.5)"), shares=share, slots=f"{job.directory}/slots")
    threads = [threading.Thread(target=Work(made).run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - begin >= 1.0


# --- following --------------------------------------------------------------------------------------------------------


class Threads:
    """A cluster whose jobs are threads of this process."""

    def __init__(self) -> None:
        self.interrupted = False  # amid every submission
        self.works: dict[str, Work] = {}
        self.threads: dict[str, threading.Thread] = {}

    def submit(self, job: Job, label: str) -> str:
        name = f"job-{len(self.works)}"
        self.works[name] = Work(job)
        if self.interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        self.threads[name] = threading.Thread(target=self.works[name].run)
        self.threads[name].start()
        return name

    def poll(self, jobs):
        return {
            job: State("running" if job in self.threads and self.threads[job].is_alive() else "over") for job in jobs
        }

    def cancel(self, job: str) -> None:
        self.works[job].stop()


class Experiment:
    """Runs whose command is a line of Python, and what is said of them."""

    def __init__(self, folder: Path, line: str, cluster: Threads) -> None:
        experiment = small_experiment(GaussianSpec())
        self.said, self.submitted = io.StringIO(), list[Run]()
        self.shown = Lines(Console(file=self.said, width=200), every_step=False)
        self.cluster, self._line = cluster, line
        self.runs = [Run("main", seed, experiment, folder / "out" / "main" / f"seed-{seed}") for seed in (0, 1)]

    def following(self) -> Following:
        children = [(run, Child(run.label, [], run.folder, run.log, 1)) for run in self.runs]
        following = Following("local", self.cluster, children)
        self.begun = following.begin(self.job, self.shown.say, lambda: str(len(self.submitted)))
        return following

    def job(self, run: Run, number: str) -> Job:
        self.submitted.append(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        steps = run.experiment.training_steps
        words = ("-c", self._line.format(finished=str(run.folder / "finished.json"), steps=steps))
        return Job(number, words, str(run.folder), str(run.log), str(notes.end_of(run)))


FINISHES = "from pathlib import Path; Path({finished!r}).write_text('{{\"step\": {steps}}}')"


def test_runs_are_followed_until_they_are_finished_and_their_notes_go(tmp_path):
    experiment = Experiment(tmp_path, FINISHES, Threads())
    following = experiment.following()
    assert notes.kept(experiment.runs[0]).job == "job-0"
    assert following.follow(experiment.shown)
    assert (following.failures, following.interrupted) == ([], False)
    assert "main seed 1: finished" in experiment.said.getvalue()
    assert [notes.kept(run) for run in experiment.runs] == [None, None]


def test_a_failing_run_is_told_with_the_end_of_its_log_and_does_not_stop_the_others(tmp_path):
    experiment = Experiment(tmp_path, "print('error: no such thing'); raise SystemExit(2)", Threads())
    following = experiment.following()
    assert following.follow(experiment.shown)
    assert [failure.code for failure in following.failures] == [2, 2]
    assert "  | error: no such thing" in str(following.failures[0])
    experiment.following()
    assert len(experiment.submitted) == 4  # the same command submits them again


def test_the_same_command_finds_the_jobs_again_and_cancels_them(tmp_path):
    experiment = Experiment(tmp_path, "import time; time.sleep(600)", Threads())
    experiment.following()
    again = experiment.following()
    assert len(experiment.submitted) == 2
    assert "main seed 0: job job-0 of local was submitted before" in experiment.said.getvalue()
    request, said = LaunchRequest(tmp_path / "file.yaml", cluster="local"), io.StringIO()
    assert told(request, again, False, Console(file=said, width=200)) == 130
    again.cancel()
    assert told(request, again, False, Console(file=said, width=200)) == 130
    detached, left = said.getvalue().splitlines()
    assert detached.startswith("detached: 2 jobs go on; to follow them again:  aegpo run")
    assert left.startswith("left: 2 cancelled jobs are still ending, and save their state; to go on once they are over")
    assert again.follow(experiment.shown)
    assert again.interrupted
    assert again.failures == []


def test_a_signal_amid_submission_leaves_no_job_without_its_note(tmp_path):
    experiment = Experiment(tmp_path, FINISHES, Threads())
    experiment.cluster.interrupted = True
    following = experiment.following()
    assert not experiment.begun
    assert following.jobs == ["job-0"]
    assert [run.seed for run in experiment.runs if notes.kept(run) is not None] == [0]
    experiment.cluster.interrupted = False
    assert experiment.following().follow(experiment.shown)
    assert experiment.begun
    assert all(run.finished for run in experiment.runs)


def test_a_job_that_was_lost_is_told_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr("aegpo.clusters.following._LATE", 0.5)
    experiment = Experiment(tmp_path, FINISHES, Threads())
    for run in experiment.runs:
        notes.keep(run, notes.Handle("local", "gone", "before"))
    experiment.cluster.submit = lambda job, label: "nothing"
    following = experiment.following()
    assert following.follow(experiment.shown)
    assert "its job nothing of local was ended before its command was" in str(following.failures[0])


def test_a_job_of_another_cluster_is_not_submitted_twice_and_a_damaged_note_is_told(tmp_path):
    experiment = Experiment(tmp_path, FINISHES, Threads())
    notes.keep(experiment.runs[1], notes.Handle("slurm", "12", "before"))
    with pytest.raises(AegpoError, match="job 12 of slurm computes it; give the command with --cluster slurm"):
        experiment.following()
    assert experiment.submitted == []
    notes.note_of(experiment.runs[1]).write_text('{"cluster": 1}')
    with pytest.raises(CheckpointError, match="does not say which job computes the run"):
        experiment.following()


# --- several nodes ----------------------------------------------------------------------------------------------------

SAYS = "import os, torch.distributed as d; d.init_process_group('gloo'); print(d.get_rank(), d.get_world_size())"


@pytest.mark.slow
def test_the_nodes_of_a_job_meet_at_the_first(job, tmp_path):
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    made = replace(job, words=(str(script),), nodes=2, processes=1, meeting=f"{tmp_path}/meeting")
    threads = [threading.Thread(target=Work(made, Node(rank, "127.0.0.1")).run) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [Path(f"{tmp_path}/run{part}.log").read_text() for part in ("", "-node-1")]
    assert sorted(text.split("\n")[-2] for text in told) == ["0 2", "1 2"]
    assert json.loads(Path(job.end).read_text())["code"] == 0


GOES = "import os, time, pathlib; pathlib.Path(f'goes-{os.getpid()}').touch(); time.sleep(600)"


@pytest.mark.slow
def test_torchrun_and_what_it_starts_end_with_the_process_that_started_them(job, tmp_path):
    (tmp_path / "goes.py").write_text(GOES)
    made = replace(job, words=("goes.py",), nodes=2, meeting=f"{tmp_path}/meeting")
    (tmp_path / "job.py").write_text(f"from aegpo.clusters.jobs import *\nWork({made!r}).run()\n")
    other = Work(made, Node(1))
    thread = threading.Thread(target=other.run)
    thread.start()
    with subprocess.Popen([sys.executable, "job.py"], cwd=tmp_path) as first:
        until(lambda: len(goers(tmp_path)) == 2, 120)
        first.kill()
    other.stopped()
    thread.join()
    until(lambda: not goers(tmp_path), 60)


def goers(folder: Path) -> list[str]:
    """The processes whose command is GOES, once they have begun."""
    numbers = [path.name.removeprefix("goes-") for path in folder.glob("goes-*")]
    return [number for number in numbers if Path(f"/proc/{number}").exists()]
