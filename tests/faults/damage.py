"""Runs to damage, ways to damage a file, and how what comes of it is judged."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm import Ended, Warm

ARMS, SEEDS = ("grpo", "aegpo"), (0, 1)
FLIPS = 6  # bits that are flipped in each file, one at a time
STOPPED = 77  # exit code of a run that the plugin below ends
RECORDS = ("metrics.jsonl", "evaluations.jsonl")
WAY_OUT = re.compile(r"put .* back|--fresh|--out|delete|move|take .* out|remove|give the same command again")

STOP = """
import os
import aegpo

@aegpo.hookimpl
def aegpo_on_checkpoint(run, step, path):
    if step == int(os.environ.get("STOP", 0)):
        os._exit(77)
"""
CHANGES: Mapping[str, Any] = {
    "seeds": list(SEEDS),
    "prompts": {"train_count": 6, "evaluation_count": 4},
    "optimizer": {"learning_rate": 1e-3, "rollouts_per_update": 4, "inner_epochs": 2},
    "checkpoint": {"every": 1, "keep": 2},
    "arms": {
        "grpo": {},
        "aegpo": {
            "allocator": {"kind": "entropy", "low": 2, "high": 6},
            "selector": {"kind": "entropy-peak", "top_k": 2},
            "tree": "branching",
        },
    },
}


@dataclass(frozen=True)
class Made:
    """Two arms under two seeds: whole, and stopped after step 2 of 4."""

    warm: Warm
    folder: Path

    @property
    def whole(self) -> Path:
        """Where runs without a break are."""
        return self.folder / "whole"

    @property
    def stopped(self) -> Path:
        """Where the runs are that stopped after step 2."""
        return self.folder / "stopped"

    def go(self, out: Path, arm: str = "aegpo", seed: int = 0, *, stop: int = 0, report: bool = False) -> Ended:
        """Gives the command of one run."""
        words = ["run", self.folder / "tiny.yaml", "--out", out, "--arm", arm, "--seed", seed]
        words += ["--plugin", self.folder / "stop.py", *([] if report else ["--no-report"])]
        return self.warm(words, self.folder, memory=12e9, environment={"STOP": str(stop)})


def make(warm: Warm, tiny: Mapping[str, Any], folder: Path) -> Made:
    """The runs, made once."""
    made = Made(warm, folder)
    (folder / "tiny.yaml").write_text(json.dumps({**tiny, **CHANGES}, indent=1))
    (folder / "stop.py").write_text(STOP)
    for arm in ARMS:
        for seed in SEEDS:
            done = made.go(made.whole, arm, seed)
            assert done.code == 0, done.out
            done = made.go(made.stopped, arm, seed, stop=2)
            assert done.code == STOPPED, done.out
    return made


def run_folder(out: Path, arm: str = "aegpo", seed: int = 0) -> Path:
    """Where a run is."""
    return out / "tiny" / arm / f"seed-{seed}"


def result(out: Path, arm: str = "aegpo", seed: int = 0) -> dict[str, str]:
    """What a run is for, by name: rows, the last checkpoint, images."""
    run = run_folder(out, arm, seed)
    paths = [run / name for name in RECORDS]
    paths += [*(run / "checkpoints" / "step-000004").glob("*"), *(run / "images").glob("step-*.png")]
    return {str(path.relative_to(run)): digest(path) for path in sorted(paths) if path.is_file()}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def judge(made: Made, ended: Ended, out: Path, named: str, arm: str = "aegpo", seed: int = 0) -> str:
    """`same` or `refused`; anything else fails.

    Args:
        made: with the reference.
        ended: the command over the damage.
        out: where the damaged runs are.
        named: a pattern: what a refusal has to name.
        arm: of the run.
        seed: of the run.
    """
    assert_no_crash(ended)
    if ended.code == 2:
        message = ended.out[ended.out.index("error: ") :]
        assert re.search(named, message), f"{named!r} is not named: {message}"
        assert WAY_OUT.search(message), f"no way out: {message}"
        return "refused"
    assert ended.code == 0, ended.out
    mine, reference = result(out, arm, seed), result(made.whole, arm, seed)
    differing = [name for name in sorted(mine | reference) if mine.get(name) != reference.get(name)]
    assert not differing, f"SILENT: {differing}: {ended.out}"
    return "same"


def assert_no_crash(ended: Ended) -> None:
    """Neither a traceback nor a hang."""
    assert not ended.hangs
    assert not ended.traceback, ended.out


# --- ways to damage a file --------------------------------------------------------------------------------------------


def _write(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.write_bytes(content(path.read_bytes()))

    return damage


def _folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: Mapping[str, Callable[[Path], None]] = {
    "emptied": _write(lambda data: b""),
    "cut in half": _write(lambda data: data[: len(data) // 2]),
    "cut by a byte": _write(lambda data: data[:-1]),
    "deleted": Path.unlink,
    "zeros": _write(lambda data: b"\0" * len(data)),
    "random bytes": _write(lambda data: random.Random(1).randbytes(len(data))),
    "zeros at the end": _write(lambda data: data + b"\0" * 4096),
    "a folder instead": _folder_instead,
}
OF_JSON: Mapping[str, Callable[[Path], None]] = {
    "null": _write(lambda data: b"null\n"),
    "{}": _write(lambda data: b"{}\n"),
    "[]": _write(lambda data: b"[]\n"),
    "deep": _write(lambda data: b"[" * 100_000),
    "doubled": _write(lambda data: data + data),
    "latin-1": _write(lambda data: b"\xe9\xff" + data),
}


def damages(name: str) -> list[str]:
    """The ways in which a file of a name is damaged."""
    flips = [f"bit flipped {number}" for number in range(FLIPS)]
    return [*DAMAGES, *(OF_JSON if name.endswith((".json", ".jsonl")) else ()), *flips]


def damage(path: Path, how: str, seed: int) -> None:
    """Damages a file; which bit is flipped depends on its name and the seed."""
    if not how.startswith("bit flipped"):
        (DAMAGES | OF_JSON)[how](path)
        return
    rng, content = random.Random(f"{seed} {path.parent.name} {path.name} {how}"), bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)


def replace(source: Path, target: Path) -> None:
    """Puts a copy of a folder in the place of another."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def sign(checkpoint: Path) -> None:
    """Writes the checksums of what is there."""
    sums = {path.name: digest(path) for path in sorted(checkpoint.iterdir()) if path.name != "checksums.json"}
    (checkpoint / "checksums.json").write_text(json.dumps({"format": 1, "sha256": sums}))
