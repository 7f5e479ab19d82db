import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import chdir
from pathlib import Path

import pytest
from command_line import Done, aegpo, start
from repository import ROOT
from rich.console import Console

from aegpo.commands.run import LaunchRequest, launch, select_runs
from aegpo.config.loading import load_experiment_file
from aegpo.errors import AegpoError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs.child_processes import Child, StopSignals, divide, run_children, usable_cores
from aegpo.runs.progress import Lines

ABLATION = ROOT / "experiments" / "ablation.yaml"
TINY = """
name: tiny
training_steps: 3
seeds: [4]
model: shapes
prompts: {train_count: 2, evaluation_count: 4}
rollouts: {prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 3}
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
evaluation: {every: 2, images: 2}
arms:
  grpo: {}
  plain: {optimizer: {weight_decay: 0}}
"""
PATIENCE = 240  # seconds


# --- which runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ablation():
    return load_experiment_file(ABLATION, load_registries(plugin_manager()), ("seeds=[3, 1]",))


def chosen(file, **request):
    return [(run.arm, run.seed) for run in select_runs(file, LaunchRequest(ABLATION, **request))]


def test_runs_go_seed_by_seed_in_the_order_of_the_file(ablation):
    arms = list(ablation.arms)
    assert chosen(ablation) == [(arm, seed) for seed in (3, 1) for arm in arms]


def test_arms_and_seeds_can_be_chosen_and_keep_the_order_of_the_file(ablation):
    assert chosen(ablation, arms=("aegpo", "grpo", "grpo"), seeds=(1,)) == [("grpo", 1), ("aegpo", 1)]


def test_a_run_gets_its_own_seed_and_folder(ablation):
    run = select_runs(ablation, LaunchRequest(ABLATION, arms=("grpo",), seeds=(1,), out=Path("somewhere")))[0]
    assert run.experiment.seed == 1
    assert run.folder == Path("somewhere/ablation/grpo/seed-1")


def test_an_unknown_arm_is_an_error_with_the_nearest_name(ablation):
    with pytest.raises(AegpoError, match=r"ablation\.yaml has no arm 'gpro'; did you mean 'grpo'\?"):
        chosen(ablation, arms=("gpro",))


def test_an_unknown_seed_is_an_error_with_the_known_ones(ablation):
    with pytest.raises(AegpoError, match=r"has no seed 7; known: 3, 1; add it to 'seeds'"):
        chosen(ablation, seeds=(7,))


def test_the_command_to_go_on_is_the_same_command_but_never_starts_over():
    request = LaunchRequest(
        Path("my file.yaml"), ("a.b=1",), ("mine",), ("grpo",), (0, 1), Path("out"), jobs=2, fresh=True, report=False
    )
    line = "run 'my file.yaml' --arm grpo --seed 0 --seed 1 --set a.b=1 --plugin mine --out out --jobs 2 --no-report"
    assert shlex.join(request.command()) == line


# --- shares of the machine --------------------------------------------------------------------------------------------


def threads(count):
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(count))


def test_by_default_every_core_has_a_run_of_one_thread():
    assert divide(4, (), {"auto"}, None, runs=15) == [threads(1)] * 4


def test_fewer_runs_than_cores_share_all_of_them():
    assert divide(8, (), {"cpu"}, None, runs=3) == [threads(2)] * 3


def test_more_jobs_than_cores_have_a_thread_each():
    assert divide(2, (), {"auto"}, 5, runs=15) == [threads(1)] * 5


def test_every_gpu_has_a_run_and_more_jobs_go_round():
    by_default = divide(16, ("2", "5"), {"auto"}, None, runs=15)
    assert by_default == [{**threads(8), "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("2", "5")]
    three = divide(16, ("2", "5"), {"cuda"}, 3, runs=15)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in three] == ["2", "5", "2"]


def test_a_gpu_named_by_number_is_left_alone_and_holds_one_run():
    assert divide(16, ("0", "1"), {"cuda:1"}, None, runs=15) == [threads(16)]


def test_there_is_at_least_one_core():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


# --- children ---------------------------------------------------------------------------------------------------------


def python(folder, label, code):
    return Child(label, [sys.executable, "-c", code], folder / label, folder / label / "run.log", 4)


def run_all(children, shares):
    console = Console(file=io.StringIO())
    failures, interrupted = run_children(children, shares, Lines(console, every_step=False))
    return failures, interrupted, console.file.getvalue().splitlines()


STAMP = "import time; print(time.time()); time.sleep(0.2); print(time.time())"


def spans(children):
    """Begin and end of each child, from its log."""
    return [[float(line) for line in child.log.read_text().splitlines()[1:]] for child in children]


def test_children_run_in_order_and_never_more_at_a_time_than_there_are_slots(tmp_path):
    children = [python(tmp_path, f"child-{index}", STAMP) for index in range(5)]
    failures, interrupted, lines = run_all(children, [{}, {}])
    assert (failures, interrupted) == ([], False)
    times = spans(children)
    begins = [begin for begin, _ in times]
    assert begins[0] < begins[2] < begins[4]
    for begin, _ in times:
        assert sum(other <= begin < end for other, end in times) <= 2
    assert sorted(lines) == [f"child-{index}: finished" for index in range(5)]


def test_a_child_has_its_share_and_writes_both_streams_to_its_log(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); print('to stderr', file=sys.stderr)"
    child = python(tmp_path, "one", code)
    run_all([child], [{"OMP_NUM_THREADS": "3"}])
    lines = child.log.read_text().splitlines()
    assert lines[0] == f"--- {shlex.join(child.command)}"
    assert lines[1:] == ["3", "to stderr"]


def test_a_failing_child_is_told_with_its_last_lines_and_the_others_go_on(tmp_path):
    code = "import sys; [print('line', i) for i in range(30)]; sys.exit('boom')"
    children = [python(tmp_path, "bad", code), python(tmp_path, "good", STAMP)]
    failures, interrupted, lines = run_all(children, [{}])
    assert not interrupted
    assert lines == ["bad: failed", "good: finished"]
    (failure,) = failures
    text = str(failure).splitlines()
    assert text[0] == f"bad failed: exit code 1; the end of {children[0].log}:"
    assert len(text) == 16
    assert text[-2:] == ["  | line 29", "  | boom"]


def test_a_child_that_was_killed_is_told_with_the_signal(tmp_path):
    failures, _, _ = run_all([python(tmp_path, "bad", "import os; os.kill(os.getpid(), 9)")], [{}])
    assert str(failures[0]).startswith("bad failed: killed by SIGKILL; the end of")


@pytest.mark.parametrize(("own", "expected"), [(None, "2"), ("1", "1"), ("3", "2"), ("1,2", "1")])
def test_a_child_has_no_more_threads_than_the_users_environment_allows(tmp_path, monkeypatch, own, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    child = python(tmp_path, "threads", "import os; print(os.environ['OMP_NUM_THREADS'])")
    assert run_all([child], [{"OMP_NUM_THREADS": "2"}])[0] == []
    assert child.log.read_text().splitlines()[-1] == expected


OBEDIENT = """
import time
from aegpo.runs.child_processes import INTERRUPTED, StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while not stop.wanted():
        time.sleep(0.01)
raise SystemExit(INTERRUPTED)
"""


def interrupt_once(happened, times=1):
    """Sends Ctrl-C to this process as soon as something happened."""

    def send():
        while not happened():
            time.sleep(0.01)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.0)

    threading.Thread(target=send, daemon=True).start()


def ready(child):
    return lambda: child.log.exists() and "\nready" in child.log.read_text()


def test_ctrl_c_tells_the_children_waits_for_them_and_starts_no_other(tmp_path):
    children = [python(tmp_path, "first", OBEDIENT), python(tmp_path, "second", STAMP)]
    interrupt_once(ready(children[0]))
    failures, interrupted, lines = run_all(children, [{}])
    assert (failures, interrupted) == ([], True)
    assert lines[0].startswith("stopping: each run saves its state")
    assert lines[1:] == ["first: interrupted"]
    assert not children[1].log.exists()


DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_second_ctrl_c_kills_the_children(tmp_path):
    child = python(tmp_path, "deaf", DEAF)
    interrupt_once(ready(child), times=2)
    with pytest.raises(KeyboardInterrupt):
        run_all([child], [{}])
    pid = int(child.log.read_text().split()[-1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


PARENT = """
import io, sys
from pathlib import Path
from rich.console import Console
from aegpo.runs.child_processes import Child, run_children
from aegpo.runs.progress import Lines
folder = Path(sys.argv[1])
child = Child("orphan", [sys.executable, "-c", sys.argv[2]], folder, folder / "run.log", 4)
run_children([child], [{}], Lines(Console(file=io.StringIO()), every_step=False))
"""


def test_a_child_stops_when_the_process_that_waits_for_it_is_gone(tmp_path):
    log = tmp_path / "run.log"
    code = OBEDIENT.replace("raise", "print('stopped', flush=True)\nraise")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), code])
    wait_until(lambda: log.exists() and "\nready" in log.read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: log.read_text().endswith("\nstopped\n"))


def wait_until(happened):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_first_signal_asks_to_stop_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert not stop.wanted()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# --- the whole command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_weights):
    """A folder with both runs of the file, finished."""
    folder = tmp_path_factory.mktemp("launching")
    model = f"model: {{kind: shapes, weights: {tiny_weights}}}"
    (folder / "tiny.yaml").write_text(TINY.replace("model: shapes", model))
    with chdir(folder):
        for arm in ("grpo", "plain"):
            assert run("--arm", arm, "--no-report").code == 0
    return folder


def run(*words) -> Done:
    return aegpo("run", "tiny.yaml", "--out", "out", *words)


def finished(folder):
    return sorted(str(path.parent.relative_to(folder / "out" / "tiny")) for path in folder.rglob("finished.json"))


EVERY_RUN = ["grpo/seed-4", "plain/seed-4"]


def test_several_runs_can_be_interrupted_and_resumed_and_end_in_a_report(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(TINY)
    process = start("run", "tiny.yaml", "--out", "out", "--jobs", "1", folder=tmp_path)
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("grpo seed 4: step"):
            process.send_signal(signal.SIGINT)
            break
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 130, "".join(seen) + output
    assert "interrupted; to go on:  aegpo run tiny.yaml --out out --jobs 1\n" in output
    assert EVERY_RUN[1] not in finished(tmp_path)
    log = (tmp_path / "out" / "tiny" / "grpo" / "seed-4" / "run.log").read_text()
    assert log.startswith(f"--- {sys.executable} -m aegpo run tiny.yaml --arm grpo --seed 4 --out out --no-report\n")

    monkeypatch.chdir(tmp_path)
    done = run("--jobs", "2")
    assert done.code == 0, done.stdout + done.stderr
    assert finished(tmp_path) == EVERY_RUN
    assert json.loads((tmp_path / "out" / "tiny" / "order.json").read_text()) == {
        "arms": ["grpo", "plain"],
        "seeds": [4],
    }
    assert (tmp_path / "out" / "tiny" / "report.html").exists()


def test_a_run_that_cannot_go_on_fails_alone_and_starting_over_mends_it(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    broken, sound = (tmp_path / "out" / "tiny" / arm / "seed-4" for arm in ("grpo", "plain"))
    for each in (broken, sound):
        (each / "finished.json").unlink()
    for state in broken.glob("checkpoints/*/state.json"):
        state.unlink()
    done = run("--jobs", "1", "--no-report")
    assert done.code == 1, done.stdout + done.stderr
    assert "grpo seed 4: failed\n" in done.stdout
    assert "plain seed 4: finished\n" in done.stdout
    told = f"error: grpo seed 4 failed: exit code 2; the end of {Path('out/tiny/grpo/seed-4/run.log')}:\n"
    assert told in done.stderr
    assert "state.json is missing" in done.stderr
    done = run("--arm", "grpo", "--fresh", "--no-report")
    assert done.code == 0, done.stdout + done.stderr
    assert finished(tmp_path) == EVERY_RUN


def test_every_run_is_checked_before_the_first_one_starts(folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = finished(folder)
    assert before == EVERY_RUN
    with pytest.raises(AegpoError, match=r"(?s)grpo seed 4 was begun .*optimizer\.epsilon: 1e-08 -> 0\.5"):
        launch(LaunchRequest(Path("tiny.yaml"), overrides=("optimizer.epsilon=0.5",), out=Path("out")))
    assert finished(folder) == before


def test_an_out_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(AegpoError, match=r"--out .*file: cannot be written to: .*; choose another folder"):
        launch(LaunchRequest(ABLATION, out=tmp_path / "file"))
