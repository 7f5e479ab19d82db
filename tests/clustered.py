"""A tiny experiment as jobs of a cluster: its command, what its runs come to, and what unbroken ones come to."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from command_line import aegpo

PATIENCE = 300  # seconds
STEPS = 40
TINY = """
name: tiny
training_steps: {steps}
seeds: [0, 1]
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
checkpoint: {{every: 4}}
evaluation: {{every: 2000, images: 2}}
"""
# Seconds for each step beyond the third, as long as a file is there: what a test does amid a run takes its time.
PACE = """
import time
from pathlib import Path

import aegpo


@aegpo.hookimpl
def aegpo_on_step_end(report):
    if report.step > 3 and Path("slow").exists():
        time.sleep(2)
"""


def write_tiny(folder: Path, weights: Path) -> None:
    """The experiment's file, and the plugin that every command on it names."""
    (folder / "tiny.yaml").write_text(TINY.format(weights=weights, steps=STEPS))
    (folder / "pace.py").write_text(PACE)


class Experiment:
    """A command on the experiment, and its runs."""

    def __init__(self, folder: Path, *words: str, out: str = "out") -> None:
        self.folder, self.out = folder, folder / out / "tiny"
        self.words = ("run", "tiny.yaml", "--plugin", "pace.py", "--out", out, *words)

    def command(self) -> list[str]:
        """After the interpreter's name."""
        return ["-m", "aegpo", *self.words]

    def start(self) -> subprocess.Popen[bytes]:
        """The command in a process of its own; it is no terminal's."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, *self.command()]
        with (self.folder / "log").open("ab") as log:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            return subprocess.Popen(command, cwd=self.folder, env=environment, start_new_session=True, **pipes)

    def slow(self) -> None:
        """From now on its runs last longer than whatever a test does amid them."""
        (self.folder / "slow").touch()

    def fast(self) -> None:
        """From now on its runs hurry to their end."""
        (self.folder / "slow").unlink()

    @property
    def log(self) -> str:
        """What its commands have printed by now."""
        return (self.folder / "log").read_text()

    def ended(self, process: subprocess.Popen[bytes]) -> int:
        """Its exit code."""
        return process.wait(PATIENCE)

    def interrupted(self, process: subprocess.Popen[bytes]) -> int:
        """Its exit code after Ctrl-C."""
        process.send_signal(signal.SIGINT)
        return self.ended(process)

    def run(self, seed: int = 0) -> Path:
        """The folder of a run."""
        return self.out / "main" / f"seed-{seed}"

    def steps(self, seed: int = 0) -> int:
        """Recorded by now."""
        metrics = self.run(seed) / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def after(self, steps: int, seed: int = 0) -> None:
        """Returns once so many steps are recorded, and not all."""
        until(lambda: self.steps(seed) >= steps)
        assert self.steps(seed) < STEPS, "the run was too fast to be broken"

    def digests(self, seed: int = 0) -> list[str]:
        """Of what was learned and of the record."""
        found = [*sorted((self.run(seed) / "checkpoints").glob("step-*/policy.safetensors"))[-1:]]
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in (*found, self.run(seed) / "metrics.jsonl")]

    def processes(self) -> dict[int, list[str]]:
        """The words of the processes that work in its folder: of its commands, of jobs and of what these start."""
        found = {}
        for path in Path("/proc").iterdir():
            if path.name.isdigit():
                try:
                    words = (path / "cmdline").read_bytes().decode().split("\0")
                    there = (path / "cwd").readlink()
                except OSError:
                    continue
                if there == self.folder and words != [""]:  # else it has ended, and nobody has asked how
                    found[int(path.name)] = words
        return found

    def computing(self, seed: int = 0) -> list[int]:
        """The processes that compute a run."""
        found = self.processes().items()
        runs = [
            number for number, words in found if "aegpo" in words and "--cluster" not in words and str(seed) in words
        ]
        return sorted(runs)


def until(happened: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Waits."""
    begin = time.monotonic()
    while not happened():
        assert time.monotonic() - begin < patience
        time.sleep(0.05)


def unbroken(folder: Path, monkeypatch, *words: str, seeds: tuple[int, ...] = (0,)) -> Experiment:
    """The experiment's runs in this process, one after another."""
    monkeypatch.chdir(folder)
    found = Experiment(folder, *words, out="unbroken")
    for seed in seeds:
        done = aegpo(*found.words, "--seed", str(seed), "--no-report")
        assert done.code == 0, done.stderr
    return found


def parent_of(process: int) -> int:
    """The process that started one."""
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
