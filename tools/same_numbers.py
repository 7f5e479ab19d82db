"""Whether another commit and this checkout compute the same numbers, to the bit, on this machine.

    python tools/same_numbers.py [--against REV] [--file NAME ...] [--keep FOLDER]

Runs three training steps of every arm of the given experiments (default: smoke, baselines and controls) from a
worktree of REV and from this checkout, one thread each, both at once. Compared are the rows of metrics and
evaluations, the images, and SHA-256 of every tensor of the last checkpoint. No digest is kept: processors differ.
Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
FILES = ("smoke", "baselines", "controls")
REFERENCE = "c60d2e6"  # the last commit that changed numbers: siblings share an evaluation
CHECKSUMS = ("crc32", "image_sha256")  # of rows since 0.2: they follow from what is compared
SETTINGS = (
    "training_steps=3",
    "evaluation.every=2",
    "checkpoint.every=3",
    "prompts.evaluation_count=8",
    "evaluation.images=4",
)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def command(file: str, out: Path) -> list[str]:
    """Three steps of every arm under the first seed."""
    words = [sys.executable, "-m", "aegpo", "run", f"experiments/{file}.yaml", "--out", str(out), "--no-report"]
    words += ["--jobs", "1", "--seed", "0"]
    return words + [word for setting in SETTINGS for word in ("--set", setting)]


def run_all(tree: Path, out: Path, files: list[str]) -> subprocess.Popen[bytes]:
    """Starts every experiment of one tree, one after the other, in the background."""
    script = " && ".join(" ".join(command(file, out)) for file in files)
    environment = {**os.environ, **dict.fromkeys(THREADS, "1"), "PYTHONPATH": str(tree)}
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(["bash", "-c", script], cwd=tree, env=environment, stdout=log, stderr=log)


def digests(out: Path, files: list[str]) -> dict[str, str]:
    """What the runs of some experiments left, by name: rows, images, tensors."""
    found = (each for file in files for each in contents(out, file))
    return {name: hashlib.sha256(content).hexdigest() for name, content in found}


def contents(out: Path, file: str) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of all that must be the same."""
    for path in sorted((out / file).rglob("*")):
        name = str(path.relative_to(out))
        if path.name in ("metrics.jsonl", "evaluations.jsonl"):
            for number, row in enumerate(path.read_bytes().splitlines()):
                for key, value in json.loads(row).items():
                    if key not in CHECKSUMS:
                        yield f"{name}:{number}:{key}", json.dumps(value).encode()
        elif path.suffix == ".png":
            yield name, path.read_bytes()
        elif path.suffix == ".safetensors" and "checkpoints" in path.parts:
            with safe_open(path, framework="numpy") as tensors:
                for key in sorted(tensors.keys()):
                    yield f"{name}:{key}", tensors.get_tensor(key).tobytes()


def main() -> int:
    """Runs both and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", default=REFERENCE)
    parser.add_argument("--file", metavar="NAME", action="append", help="of experiments/, without .yaml")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="keep the runs of REV there and use them again")
    options = parser.parse_args()
    files = options.file or list(FILES)
    with tempfile.TemporaryDirectory() as scratch:
        before, after = options.keep or Path(scratch, "before"), Path(scratch, "after")
        running = [run_all(ROOT, after, files)]
        if not before.is_dir():
            tree = Path(scratch, "tree")
            subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", tree, options.against], check=True)
            before.parent.mkdir(parents=True, exist_ok=True)
            running.append(run_all(tree, before, files))
        codes = [process.wait() for process in running]
        subprocess.run(["git", "-C", ROOT, "worktree", "prune"], check=True)
        if any(codes):
            for log in (before.with_suffix(".log"), after.with_suffix(".log")):
                print(log.read_text()[-3000:] if log.exists() else f"no {log}", file=sys.stderr)
            return 1
        old, new = digests(before, files), digests(after, files)
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    print(f"{len(old)} values against {options.against}: {len(differing)} differ")
    for name in differing[:40]:
        print(f"  {name}" + (" (before only)" if name not in new else " (now only)" if name not in old else ""))
    return int(bool(differing) or not old)


if __name__ == "__main__":
    sys.exit(main())
