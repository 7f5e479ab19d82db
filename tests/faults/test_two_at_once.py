"""Two starts at once, experiments of one name, clocks that jump, and folders that are taken away while a run writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from surroundings import Surroundings, results_in, rows
from test_odd_paths import rows_written, wait_for
from warm import Ended, Warm

RUN = Path("tiny", "main", "seed-0")
SEVERAL = ("--set", "seeds=[0, 1]")


def at_once(
    surroundings: Surroundings, words: Sequence[object], count: int = 2, delay: float = 0
) -> tuple[list[int], str]:
    """Starts a command several times; the exit codes in their order, and all output."""
    started = []
    for _ in range(count):
        started.append(surroundings.start(*words))
        time.sleep(delay)
    text = "\n".join(process.communicate(timeout=400)[0] for process in started)
    assert "Traceback (most recent" not in text, text
    return sorted(process.returncode for process in started), text


@pytest.mark.parametrize("delay", [0, 1, 3], ids=lambda delay: f"twice at once, {delay} s apart")
def test_one_of_two_is_refused_or_waits_for_nothing(surroundings: Surroundings, tmp_path, delay):
    codes, text = at_once(surroundings, ("run", "spec.yaml", "--out", tmp_path), delay=delay)
    assert codes in ([0, 2], [0, 0]), text
    assert results_in(tmp_path) == surroundings.results


def test_three_at_once_several_runs(surroundings: Surroundings, tmp_path):
    words = ("run", "spec.yaml", "--out", tmp_path, *SEVERAL, "--jobs", "1")
    codes, text = at_once(surroundings, words, count=3, delay=0.5)
    assert codes[0] == 0, text
    assert set(codes) <= {0, 1, 2}, text
    assert results_in(tmp_path) == surroundings.results


def test_two_fresh_at_once(surroundings: Surroundings, tmp_path):
    codes, text = at_once(surroundings, ("run", "spec.yaml", "--out", tmp_path, "--fresh"), delay=0.1)
    assert codes in ([0, 2], [0, 0]), text
    assert results_in(tmp_path) == surroundings.results


def test_lock(warm: Warm, surroundings: Surroundings, tmp_path):
    """`--fresh` of a run under way is refused and deletes nothing; after SIGKILL the folder is free."""
    out, long = tmp_path / "out", ("--set", "training_steps=200")
    process = surroundings.start("run", "spec.yaml", "--out", out, *long)
    try:
        wait_for((out / RUN / "metrics.jsonl").exists)
        fresh = warm(["run", "spec.yaml", "--out", out, "--fresh", *long], surroundings.folder)
        surroundings.expect(fresh, 2, words=["is running"])
        assert (out / RUN / "metrics.jsonl").exists()
        words = ["sample", out / RUN, "--prompt", "a red circle", "--out", tmp_path / "s"]
        surroundings.expect(warm(words, surroundings.folder), 0, 2)
    finally:
        process.kill()
        process.wait()
    again = warm(["run", "spec.yaml", "--out", out, "--fresh", "--no-report"], surroundings.folder)
    surroundings.expect(again, same=out)


@pytest.fixture(scope="module")
def other(surroundings: Surroundings) -> Path:
    """Another experiment of the same name: another arm, seed and learning rate."""
    text = surroundings.spec.read_text().replace("seeds: [0]", "seeds: [5]")
    text = text.replace("training_steps: 3", "training_steps: 2")
    path = surroundings.folder / "other.yaml"
    path.write_text(text + "arms:\n  main: {optimizer: {learning_rate: 1.0e-3}}\n  extra: {}\n")
    return path


def test_same_name_another_experiment_is_refused_and_order_json_is_as_it_was(
    warm: Warm, surroundings: Surroundings, tmp_path, other
):
    shutil.copytree(surroundings.finished, tmp_path / "same")
    before = (tmp_path / "same" / "tiny" / "order.json").read_bytes()
    ended = warm(["run", other, "--out", tmp_path / "same", "--set", "seeds=[0]"], surroundings.folder)
    surroundings.expect(ended, 2, words=["begun with another experiment"])
    assert (tmp_path / "same" / "tiny" / "order.json").read_bytes() == before


def test_same_name_another_experiment_with_other_arms_and_seeds_is_refused_or_told(
    warm: Warm, surroundings: Surroundings, tmp_path, other
):
    shutil.copytree(surroundings.finished, tmp_path / "same")
    ended = warm(["run", other, "--out", tmp_path / "same"], surroundings.folder)
    told = "other" in ended.out.lower() and "left out" in ended.out
    assert ended.code == 2 or told, ended.out


CLOCK = """
#define _GNU_SOURCE
#include <time.h>
#include <sys/time.h>
#include <dlfcn.h>
static int n;
static long off(void) { n++; return (n % 7 < 3) ? -400000000L : (n % 7) * 500000000L; }
int clock_gettime(clockid_t c, struct timespec *t) {
  static int (*r)(clockid_t, struct timespec *);
  if (!r) r = dlsym(RTLD_NEXT, "clock_gettime");
  int e = r(c, t);
  if (c == CLOCK_REALTIME) t->tv_sec += off();
  return e;
}
time_t time(time_t *p) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  if (p) *p = t.tv_sec;
  return t.tv_sec;
}
int gettimeofday(struct timeval *v, void *z) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  v->tv_sec = t.tv_sec;
  v->tv_usec = t.tv_nsec / 1000;
  return 0;
}
"""


@pytest.fixture(scope="module")
def clock(tmp_path_factory) -> Path:
    """A library by whose clock years pass between two looks, to and fro."""
    folder = tmp_path_factory.mktemp("clock")
    (folder / "clock.c").write_text(CLOCK)
    build = ["gcc", "-shared", "-fPIC", "-o", "clock.so", "clock.c", "-ldl"]
    try:
        built = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no gcc, which builds the clock")
    if built.returncode:
        pytest.skip(f"the clock cannot be built here: {built.stderr.strip()[-200:]}")
    return folder / "clock.so"


def test_clock_that_jumps_by_years_at_every_look(surroundings: Surroundings, tmp_path, clock):
    ended = surroundings.run("run", "spec.yaml", "--out", tmp_path, environment={"LD_PRELOAD": str(clock)})
    surroundings.expect(ended, same=tmp_path)
    timing = rows(tmp_path / RUN / "timing.jsonl")
    assert all(0 <= seconds < 1000 for row in timing for seconds in row["seconds"].values())


def test_clock_that_jumps_several(surroundings: Surroundings, tmp_path, clock):
    words = ("run", "spec.yaml", "--out", tmp_path, *SEVERAL)
    surroundings.expect(surroundings.run(*words, environment={"LD_PRELOAD": str(clock)}), same=tmp_path)


# of the first edition was `probe`: the entropies of the base, which are below `signals` now
@pytest.mark.parametrize(
    "what", ["checkpoints", "images", "signals", "."], ids=lambda what: f"deleted in mid-run: {what}"
)
def test_what_is_deleted_while_a_run_writes(surroundings: Surroundings, tmp_path, what):
    options = ("--set", "training_steps=40", "--set", "evaluation.every=1", "--no-report")
    process = surroundings.start("run", "spec.yaml", "--out", tmp_path, *options)
    wait_for(lambda: rows_written(tmp_path) >= 3)
    shutil.rmtree(tmp_path / RUN / what, ignore_errors=True)
    text = process.communicate(timeout=400)[0]
    ended = Ended(process.returncode, text, 0, 0, hangs=False)
    surroundings.expect(ended, 0, 2)
    if ended.code == 0:
        assert json.loads((tmp_path / RUN / "finished.json").read_text()) == {"step": 40}


def test_waiting_ends(monkeypatch):
    """The judge itself: what never comes is waited for no longer than said."""
    never: Callable[[], bool] = lambda: False  # noqa: E731
    with pytest.raises(AssertionError, match="too long"):
        wait_for(never, seconds=0.3)
