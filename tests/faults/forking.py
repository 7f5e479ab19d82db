"""What `warm.py` starts: imports everything once, then forks for each line of its standard input, one at a time."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback

IMPORTED = ("aegpo.commands.run", "aegpo.commands.evaluate", "aegpo.commands.export", "aegpo.commands.sample")
IMPORTED += ("aegpo.commands.profile_entropy", "aegpo.commands.describe", "aegpo.train.engine", "aegpo.report.page")
IMPORTED += (
    "aegpo.report.figures",
    "aegpo.runs.loop",
    "aegpo.runs.trackers",
    "aegpo.rewards.remote",
    "aegpo.models.shapes",
)
IMPORTED += ("diffusers", "transformers", "matplotlib.pyplot", "requests", "safetensors.torch", "peft")


def main() -> None:
    """Answers "ready", then each job with how its command ended."""
    for name in IMPORTED:
        __import__(name)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        begin = time.monotonic()
        child = os.fork()
        if child == 0:
            run(job)
        print(json.dumps(wait(child, begin, job["seconds"])), flush=True)


def run(job: dict) -> None:
    """Becomes the command; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        redirect(job["out"], job["environment"].get("PYTHONIOENCODING") or "utf-8")
        limit(job["seconds"], job["memory"])
        for name, value in job["environment"].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.chdir(job["folder"])
        sys.argv = ["aegpo", *job["words"]]
        code = call()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code & 255)


def redirect(path: str, encoding: str) -> None:
    """Points the standard streams at nothing and at a file."""
    out, nothing = os.open(path, os.O_WRONLY | os.O_TRUNC), os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(1), "wb"), encoding=encoding, write_through=True)
    errors = io.TextIOWrapper(
        os.fdopen(os.dup(2), "wb"), encoding=encoding, errors="backslashreplace", write_through=True
    )
    sys.stderr = errors


def limit(seconds: float, memory: int) -> None:
    """Bounds processor time, and address space where asked."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 2))
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def call() -> int:
    """The exit code of the entry point, as an interpreter would give it."""
    from aegpo.commands.cli import main as entry_point

    try:
        entry_point()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()
    except BaseException:
        traceback.print_exc()
    return code


def wait(child: int, begin: float, seconds: float) -> dict[str, object]:
    """How a child ended; what takes too long is killed."""
    hangs, deadline = False, begin + 10 * seconds + 60
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline and not hangs:
            hangs = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
    took = time.monotonic() - begin
    return {"code": code, "hangs": hangs or killed, "seconds": took, "memory": usage.ru_maxrss * 1024}


if __name__ == "__main__":
    main()
