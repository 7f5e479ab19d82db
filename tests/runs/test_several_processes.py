"""One run over several processes, started, broken, stopped and gone on with: it ends soon, says why, and loses nothing.

Every launch costs about ten seconds, so each test breaks one and looks at all that follows.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
PATIENCE = 120  # seconds
SOON = 60  # seconds; less than any wait that a fault must not last: a sleep of ten minutes, a timeout of an hour
LONG = 2000  # steps of a run that is broken before its end
TINY = """
name: tiny
training_steps: 8
device: cpu
model: {{kind: shapes, weights: {weights}}}
prompts: {{train_count: 2, evaluation_count: 2}}
rollouts: {{prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 3}}
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
checkpoint: {{every: 2}}
evaluation: {{every: 2000, images: 2}}
parallel: {{shards: 2}}
"""
# A reward that breaks where a file says: at once, or as often as it was asked by then (evaluation counts too). Who dies
# empties the file: started again, it lives.
PLUGIN = """
import os, time
from pathlib import Path
from typing import Literal

import aegpo

ASKED = []


class Odd(aegpo.RewardSpec):
    '''The mean, until a file says otherwise.'''

    kind: Literal["odd"] = "odd"

    def score(self, images, prompts):
        how = Path(os.environ["HOW"]).read_text() if Path(os.environ["HOW"]).exists() else ""
        if how == "fail" and os.environ["RANK"] == "1":
            raise ValueError("broken here")
        ASKED.append(how)
        if how == f"sleep when asked {len(ASKED)} times":
            Path(os.environ["HOW"]).with_suffix(f".{os.environ['RANK']}").touch()
            time.sleep(600)
        if how == f"die {os.environ.get('RANK')} when asked {len(ASKED)} times":
            Path(os.environ["HOW"]).write_text("")
            os.kill(os.getpid(), 9)
        return images.mean(dim=(1, 2, 3))


@aegpo.hookimpl
def aegpo_register_rewards(registry):
    registry.add(Odd)
"""


class Launched:
    """A command in a folder, and the processes of the run it computes."""

    def __init__(self, folder: Path, *words: object, launcher: tuple[str, ...] = (), steps: int = LONG) -> None:
        self.folder, self.run = folder, folder / "out" / "tiny" / "main" / "seed-0"
        asked = ["--out", "out", "--no-report", "--set", f"training_steps={steps}", *map(str, words)]
        command = [sys.executable, *launcher, "-m", "aegpo", "run", "tiny.yaml", *asked]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOW": str(folder / "how")}
        with (folder / "log").open("ab") as log:  # its session is its own, as a terminal's is
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        for rank in self.ranks:
            os.kill(rank, signal.SIGKILL)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def steps(self) -> int:
        """Recorded by now."""
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    @property
    def ranks(self) -> list[int]:
        """The processes that compute, in the order they were started."""
        numbers = (path.name for path in Path("/proc").iterdir())
        return sorted(pid for pid in map(int, filter(str.isdigit, numbers)) if self._computes(pid))

    def _computes(self, pid: int) -> bool:
        try:
            status = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
            told = (Path("/proc") / str(pid) / "environ").read_bytes()
            command = (Path("/proc") / str(pid) / "cmdline").read_bytes()
        except OSError:
            return False
        ours = f"HOW={self.folder / 'how'}".encode() in told
        return ours and status[0] != "Z" and pid != self.process.pid and b"resource_tracker" not in command

    def after(self, steps: int) -> list[int]:
        """The processes, once so many steps are recorded."""
        self.until(lambda: self.steps >= steps)
        return self.ranks

    def until(self, happened, patience: float = PATIENCE) -> float:
        """Waits, and says for how long."""
        begin = time.monotonic()
        while not happened():
            assert time.monotonic() - begin < patience, self.log
            time.sleep(0.05)
        return time.monotonic() - begin

    def gone(self, patience: float = PATIENCE) -> float:
        """Waits until no process computes; how long that took."""
        return self.until(lambda: not self.ranks, patience)

    def code(self) -> int:
        """How the command ends."""
        return self.process.wait(PATIENCE)

    @property
    def saved(self) -> int:
        """The step of the newest checkpoint."""
        return max(int(path.name.removeprefix("step-")) for path in (self.run / "checkpoints").glob("step-*"))


@pytest.fixture
def folder(tmp_path, tiny_weights) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY.format(weights=tiny_weights))
    (tmp_path / "odd.py").write_text(PLUGIN)
    return tmp_path


ODD = ("--plugin", "odd.py", "--set", "rewards=[odd]")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_an_error_of_one_process_is_told_once_and_what_was_learned_before_is_saved(folder):
    with Launched(folder, "--processes", 2, *ODD) as launched:
        launched.after(3)
        (folder / "how").write_text("fail")
        assert launched.code() == 2
        assert launched.log.count("error:") == 1
        assert "error: reward 'odd' failed with ValueError: broken here (process 1 of 2)" in launched.log
        assert f"step {launched.saved} and all before it are saved" in launched.log
        assert launched.log.count("Traceback") == 1  # of the reward, for its author
        assert launched.saved >= 2
        done = launched.steps
    (folder / "how").unlink()
    with Launched(folder, *ODD, steps=LONG) as again:
        again.after(done + 1)
        again.process.terminate()
        assert again.code() == 130


def test_a_process_that_is_killed_amid_a_step_ends_all_and_the_run_starts_again(folder):
    (folder / "how").write_text("sleep when asked 5 times")
    with Launched(folder, "--processes", 2, "--max-restarts", 1, *ODD, steps=8) as launched:
        launched.until(lambda: (folder / "how.0").exists())
        first, second = launched.ranks
        (folder / "how").write_text("")
        os.kill(second, signal.SIGKILL)
        launched.until(lambda: first not in launched.ranks, SOON)
        assert launched.code() == 0
        assert launched.steps == 8
        assert "the others end too; the run goes on from its newest checkpoint" in launched.log
        assert "main seed 0: a process was lost; goes on from step 2" in launched.log
    broken = outcome(launched.run)
    with Launched(folder, "--fresh", *ODD, steps=8) as unbroken:
        assert unbroken.code() == 0
        assert outcome(unbroken.run) == broken


def outcome(run: Path) -> dict[str, object]:
    """What a run was worth: its rows, and the tensors and state of its newest checkpoint."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = max((run / "checkpoints").glob("step-*"))
    state = json.loads((newest / "state.json").read_text())
    return {"rows": rows, "state": state, **{path.name: path.read_bytes() for path in newest.glob("*.safetensors")}}


def test_a_run_that_is_killed_and_goes_on_with_one_process_has_the_bits_of_one_that_is_not(folder):
    (folder / "how").write_text("die 0 when asked 5 times")
    with Launched(folder, "--processes", 2, "--max-restarts", 0, *ODD, steps=8) as launched:
        assert launched.code() == 1
        assert 0 < launched.steps < 8
    with Launched(folder, *ODD, steps=8) as again:
        assert again.code() == 0
        assert "goes on with processes 2 -> 1" in again.log
    broken = outcome(again.run)
    with Launched(folder, "--fresh", *ODD, steps=8) as unbroken:
        assert unbroken.code() == 0
        assert outcome(unbroken.run) == broken


def test_a_process_that_is_killed_ends_the_command_if_it_is_not_to_start_again(folder):
    with Launched(folder, "--processes", 2, "--max-restarts", 0) as launched:
        ranks = launched.after(3)
        os.kill(ranks[1], signal.SIGKILL)
        begin = time.monotonic()
        assert launched.code() == 1
        assert launched.gone() + time.monotonic() - begin < SOON
        assert "error: process 1 of the 2 of this run was killed by SIGKILL; the same command goes on" in launched.log
        assert "Traceback" not in launched.log


@pytest.mark.parametrize("to", ["command", "terminal"])
def test_a_run_that_is_stopped_saves_and_one_process_goes_on_with_it(folder, to):
    with Launched(folder, "--processes", 2) as launched:
        launched.after(3)
        if to == "command":
            launched.process.terminate()
        else:
            os.killpg(launched.process.pid, signal.SIGINT)  # as Ctrl-C does
        assert launched.code() == 130
        assert launched.ranks == []
        assert launched.log.count("interrupted; to go on:  aegpo run tiny.yaml") == 1
        assert "--processes 2" in launched.log
        done = launched.steps
        assert launched.saved == done
    if to == "command":
        with Launched(folder, steps=LONG) as again:
            again.after(done + 1)
            again.process.terminate()
            assert again.code() == 130
            assert "goes on with processes 2 -> 1; the results are the same to the bit" in again.log
        manifest = json.loads((again.run / "manifest.json").read_text())
        assert manifest["parallel"] == {"shards": 2, "processes": 1, "sums": "exact"}


def test_processes_whose_agent_is_killed_save_and_end(folder):
    with Launched(folder, "--processes", 2) as launched:
        launched.after(3)
        launched.process.kill()
        launched.gone(SOON)
        assert launched.saved == launched.steps


def test_a_process_that_hangs_is_named_when_the_others_waited_long_enough(folder):
    asked = ("--max-restarts", 0, "--set", "parallel.timeout_minutes=0.2")
    with Launched(folder, "--processes", 2, *asked) as launched:
        first, second = launched.after(3)
        os.kill(second, signal.SIGSTOP)
        launched.until(lambda: first not in launched.ranks, SOON)
        assert "error: process 1 of the 2 of this run did not answer for 0.2 minutes" in launched.log
        assert launched.code() == 1
        assert launched.ranks == []


def test_a_launcher_of_its_own_restarts_a_run_and_trains_several_one_after_another(folder):
    (folder / "how").write_text("die 1 when asked 5 times")
    asked = (*ODD, "--set", "seeds=[0,1]")
    with Launched(folder, *asked, launcher=(*TORCHRUN, "--max-restarts", "1"), steps=8) as launched:
        assert launched.code() == 0
        assert launched.steps == 8
        assert "main seed 0: a process was lost; goes on from step" in launched.log
        assert (launched.run.parent / "seed-1" / "finished.json").exists()
        assert "error: process 1 of the 2 of this run ended" in launched.log


def test_options_that_start_processes_are_refused_once_in_what_a_launcher_started(folder):
    with Launched(folder, "--processes", 2, launcher=TORCHRUN) as launched:
        assert launched.code() != 0
        assert launched.log.count("error: --processes, --gpus, --max-restarts and --cluster are for a command") == 1


def test_several_runs_at_a_time_have_as_many_processes_each(folder):
    with Launched(folder, "--processes", 2, "--jobs", 1, "--set", "seeds=[0,1]", steps=2) as launched:
        assert launched.code() == 0
        for seed in (0, 1):
            run = launched.run.parent / f"seed-{seed}"
            assert json.loads((run / "manifest.json").read_text())["parallel"]["processes"] == 2
            assert (run / "finished.json").exists()
