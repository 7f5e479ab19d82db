"""Whether one run has the same results on other numbers of processes, to the bit, on this machine.

    python tools/same_bits.py experiments/smoke.yaml [--processes 2 --processes 4] [--shards 4] [--arm aegpo]
                              [--plugin FILE] [--set KEY=VALUE]

Every arm runs under the first seed, with one process and with each of the numbers, in as many shards. Compared are the
rows of metrics and evaluations, the images, and SHA-256 of every tensor of the last checkpoint. On CPUs with one thread
a process. On GPUs (`--set device=cuda`) processes share what there is, and `--plugin tools/deterministic.py` goes with
it.
Exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from same_numbers import THREADS, digests


def run(given: argparse.Namespace, processes: int, out: Path) -> str:
    """Runs what was asked for with a number of processes; the name of the experiment."""
    words = [sys.executable, "-m", "aegpo", "run", str(given.file), "--out", str(out), "--no-report", "--jobs", "1"]
    words += ["--processes", str(processes), "--seed", str(given.seed), "--set", f"parallel.shards={given.shards}"]
    words += [word for plugin in given.plugin for word in ("--plugin", plugin)]
    words += [word for arm in given.arm for word in ("--arm", arm)]
    words += [word for setting in given.set for word in ("--set", setting)]
    environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        raise SystemExit(f"{processes} processes ended with {done.returncode}:\n{said}")
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder.name


def main() -> int:
    """Runs and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="an experiment file")
    parser.add_argument("--processes", type=int, action="append", help="compared with one; default: 2")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--arm", action="append", default=[], help="default: every one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plugin", action="append", default=[], help="as of aegpo run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of aegpo run")
    given, differing = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as scratch:
        name = run(given, 1, Path(scratch, "1"))
        alone = digests(Path(scratch, "1"), [name])
        for processes in given.processes or [2]:
            run(given, processes, Path(scratch, str(processes)))
            found = digests(Path(scratch, str(processes)), [name])
            others = [each for each in sorted(alone.keys() | found.keys()) if alone.get(each) != found.get(each)]
            print(f"{processes} processes: {len(found)} values, {len(others)} differ from those of one")
            for each in others[:20]:
                print(f"  {each}")
            differing += len(others) + (not found)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
