"""A folder that anybody may enter, commands in processes of their own, and disks that are small, for odd machines."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from warm import CALM, ROOT, Ended

NAME = "tiny"
LAST_STEP = "step-000003"
NOBODY = 65534
EXPERIMENT = """
name: tiny
training_steps: 3
seeds: [0]
device: cpu
model: {{kind: shapes, weights: {weights}}}
rewards: [palette]
prompts: {{train_count: 6, evaluation_count: 4}}
rollouts: {{prompts_per_step: 2, rollouts_per_step: 8, denoising_steps: 4, micro_batch: 16}}
sampler: {{kind: flow-sde, noise_level: 0.7}}
allocator: {{kind: entropy, low: 2, high: 6}}
selector: {{kind: entropy-peak, top_k: 2}}
tree: branching
advantage: group
objective: {{kind: clipped, clip: 1.0e-3}}
policy: {{ema: 0.9}}
evaluation: {{every: 2, images: 4, rewards: [scene]}}
checkpoint: {{every: 1, keep: 2}}
"""
Results = Mapping[str, str | None]  # name -> SHA-256
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for mounts and for other users")


@dataclass
class Surroundings:
    """Where the commands of a module run; `spec.yaml` is there."""

    folder: Path
    finished: Path  # OUT of the reference
    results: Results = field(default_factory=dict)

    @property
    def spec(self) -> Path:
        """The experiment's file."""
        return self.folder / "spec.yaml"

    def write(self, name: str, text: str) -> Path:
        """Another experiment's file: this one's text and more."""
        path = self.folder / name
        path.write_text(self.spec.read_text() + text, encoding="utf-8")
        return path

    def start(self, *words: object, **options: object) -> subprocess.Popen[str]:
        """Starts a command; both streams are one pipe."""
        command = [sys.executable, "-m", "aegpo", *map(str, words)]
        piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        given = {"cwd": self.folder, "env": os.environ | CALM, **options}
        return subprocess.Popen(command, text=True, errors="replace", **piped, **given)

    def run(self, *words: object, **options: object) -> Ended:
        """Runs a command in a process of its own, as user nobody or in another environment where asked.

        Args:
            words: The command line.
            options: `before`: words of a program that starts it; `environment`: variables to set, or to take away
                where the value is None; the others are those of `subprocess.run`.
        """
        before, changes = options.pop("before", ()), options.pop("environment", {})
        command = [*before, sys.executable, "-m", "aegpo", *map(str, words)]
        return self.call(command, changes, **options)

    def shell(self, line: str, **options: object) -> Ended:
        """Runs a line of bash, in which AEGPO is the command."""
        script = line.replace("AEGPO", f"{sys.executable} -m aegpo")
        return self.call(["bash", "-c", script], {}, **options)

    def call(self, command: Sequence[str], changes: Mapping[str, str | None], **options: object) -> Ended:
        """Runs a program as `run` does."""
        environment = {key: value for key, value in (os.environ | CALM | changes).items() if value is not None}
        given = {"cwd": self.folder, "env": environment, "stdin": subprocess.DEVNULL, "timeout": 300, **options}
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, **given)
        except subprocess.TimeoutExpired as error:
            return Ended(-9, str(error), 300, 0, hangs=True)
        return Ended(done.returncode, done.stdout + done.stderr, 0, 0, hangs=False)

    def expect(
        self,
        ended: Ended,
        *codes: int,
        words: Sequence[str] = (),
        same: Path | None = None,
    ) -> None:
        """A command ended with one of the codes, said the words and no traceback; and where it is 0, as the reference.

        Args:
            ended: how it ended.
            codes: those that are right; 0 where none is given.
            words: what it has to say.
            same: OUT of a run whose results must be those of the reference.
        """
        assert not ended.hangs
        assert not ended.traceback, ended.out
        assert ended.code in (codes or (0,)), ended.out
        assert all(word in ended.out for word in words), ended.out
        if ended.code == 2:
            assert sum(line.startswith("error:") for line in ended.out.splitlines()) == 1, ended.out
        if same is not None and ended.code == 0:
            assert results_in(same) == self.results


def results_in(out: Path, arm: str = "main", seed: int = 0) -> Results:
    """Checksums of what a run recorded and of its last checkpoint."""
    run = out / NAME / arm / f"seed-{seed}"
    files = [run / "metrics.jsonl", run / "evaluations.jsonl", *sorted((run / "checkpoints" / LAST_STEP).glob("*"))]
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    return found if "checksums.json" in found else {**found, "last": None}


@contextmanager
def disk(place: Path, options: str) -> Iterator[Callable[[str], None]]:
    """A small disk in memory at a place; it gives what mounts it again with other options."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield lambda changed: remount(place, changed)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    """Gives a disk other options."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


def as_user(user: int) -> tuple[str, ...]:
    """The words that start a program as another user."""
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv, which starts programs as other users")
    words = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--")
    able = [*words, sys.executable, "-c", f"import os; os.listdir({str(ROOT)!r})"]
    if subprocess.run(able, capture_output=True, check=False).returncode:
        pytest.skip("other users cannot start this interpreter, or not read this checkout")
    return words


def rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
