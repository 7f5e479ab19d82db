import dataclasses
import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from aegpo.core.records import Prompt, Signal
from aegpo.core.reports import Evaluation, RunInfo, StepReport
from aegpo.errors import AegpoError, CheckpointError
from aegpo.runs.progress import Pace, Record, Standing, display
from aegpo.runs.trackers import (
    ConsoleObserver,
    ConsoleTracker,
    JsonlTracker,
    TensorboardTracker,
    grid_png,
)

EVALUATED = (0, 2, 4)


def an_evaluation(step):
    """Two prompts and three images."""
    scores = {"scene": np.array([0.5, 0.25]) + step / 16}
    images = torch.linspace(0, 1, 3 * 3 * 24 * 24).reshape(3, 3, 24, 24) * (step / 4)
    base = {"scene": np.array([0.5, 0.25])}
    return Evaluation(("a red circle", "two squares"), scores, base, images, seconds=1.5)


DELTA = np.array([0.1, 0.2])


def a_report(step, entropy=True):
    """A step of two prompts, six rollouts and three denoising steps."""
    return StepReport(
        step,
        {"reward": 0.1 * step, "forwards": 18, "signal_forwards": 6},
        (Prompt(5, "a red circle"), Prompt(2, "two squares")),
        np.array([2, 4]),
        np.array([[True, False, True], [False, True, False]]),
        {"entropy": Signal("prompt-step", np.full((2, 3), 0.1) * step), "entropy-delta": Signal("prompt", DELTA)}
        if entropy
        else {},
        {"rollout": 0.5, "update": 0.25},
    )


def test_steps_that_were_not_measured_are_null_in_the_record(tmp_path):
    (observer := JsonlTracker().build(tmp_path)).aegpo_on_run_start(a_run(tmp_path))
    report = a_report(1)
    report.signals["entropy"].values[:, 1] = np.nan
    observer.aegpo_on_step_end(a_run(tmp_path), report)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text)["signals"]["entropy"] == [[0.1, None, 0.1]] * 2


def a_run(folder, first_step=0):
    return RunInfo("grpo", 3, folder, first_step, 4, evaluated_steps=(0, 2, 4))


def observe(observer, run, last=4):
    observer.aegpo_on_run_start(run)
    for step in range(run.first_step, last + 1):
        if step > run.first_step:
            observer.aegpo_on_step_end(run, a_report(step))
        if step in EVALUATED and (step > run.first_step or step == 0):
            observer.aegpo_on_evaluation(run, step, an_evaluation(step))


def record(folder, first_step=0, last=4):
    observe(JsonlTracker().build(folder), a_run(folder, first_step), last)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- jsonl ------------------------------------------------------------------------------------------------------------


def test_metrics_have_a_row_for_each_training_step(tmp_path):
    record(tmp_path)
    recorded = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in recorded] == [1, 2, 3, 4]
    assert list(recorded[0])[-1] == "crc32"
    assert {key: value for key, value in recorded[0].items() if key != "crc32"} == {
        "step": 1,
        "metrics": {"reward": 0.1, "forwards": 18.0, "signal_forwards": 6.0},
        "prompts": [5, 2],
        "counts": [2, 4],
        "selected": [[0, 2], [1]],
        "signals": {"entropy": [[0.1] * 3] * 2, "entropy-delta": [0.1, 0.2]},
    }


def test_there_are_no_signals_where_nothing_reads_them(tmp_path):
    observer, run = JsonlTracker().build(tmp_path), a_run(tmp_path)
    observer.aegpo_on_run_start(run)
    observer.aegpo_on_step_end(run, a_report(1, entropy=False))
    row = rows(tmp_path / "metrics.jsonl")[0]
    assert row["signals"] == {}


def test_evaluations_images_and_timings_have_files_of_their_own(tmp_path):
    record(tmp_path)
    evaluations = rows(tmp_path / "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    assert {key: value for key, value in evaluations[1].items() if key != "crc32"} == {
        "step": 2,
        "scores": {"scene": [0.625, 0.375]},
        "base_scores": {"scene": [0.5, 0.25]},
        "prompts": ["a red circle", "two squares"],
        "image_sha256": hashlib.sha256((tmp_path / "images" / "step-000002.png").read_bytes()).hexdigest(),
    }
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["step-000000.png", "step-000002.png", "step-000004.png"]
    timing = rows(tmp_path / "timing.jsonl")
    assert [row["step"] for row in timing] == [0, 1, 2, 2, 3, 4, 4]
    assert timing[1]["seconds"] == {"rollout": 0.5, "update": 0.25}
    assert timing[3]["seconds"] == {"evaluation": 1.5}


def test_a_number_that_is_not_finite_is_recorded_as_such(tmp_path):
    observer, run = JsonlTracker().build(tmp_path), a_run(tmp_path)
    observer.aegpo_on_run_start(run)
    observer.aegpo_on_step_end(run, dataclasses.replace(a_report(1), metrics={"loss": float("nan")}))
    assert rows(tmp_path / "metrics.jsonl")[0]["metrics"]["loss"] == {"float": "NaN"}


@pytest.mark.parametrize("checkpointed", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("reached", [1, 2, 3, 4])
def test_a_resumed_record_has_the_bytes_of_one_without_a_break(tmp_path, checkpointed, reached):
    if checkpointed > reached:
        reached = checkpointed
    record(tmp_path / "straight")
    record(tmp_path / "broken", last=reached)
    record(tmp_path / "broken", first_step=checkpointed)
    assert contents(tmp_path / "broken") == contents(tmp_path / "straight")


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "timing.jsonl"])
@pytest.mark.parametrize("half", [b'{"step": 3, "met', b'{"step": 3}', b"\0" * 40 + b"\n", b"7\n"])
def test_a_half_written_row_is_cut_off(tmp_path, name, half):
    record(tmp_path / "straight")
    record(tmp_path / "broken", last=2)
    with (tmp_path / "broken" / name).open("ab") as file:
        file.write(half)
    record(tmp_path / "broken", first_step=2)
    assert contents(tmp_path / "broken") == contents(tmp_path / "straight")


def test_a_run_without_a_checkpoint_forgets_even_its_first_evaluation(tmp_path):
    record(tmp_path, last=0)
    record(tmp_path, last=0)
    assert [row["step"] for row in rows(tmp_path / "evaluations.jsonl")] == [0]


def test_rows_that_the_checkpoint_counts_but_the_record_lacks_are_an_error(tmp_path):
    record(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:1] + lines[2:]))
    with pytest.raises(CheckpointError, match=r"after step 4, but .* holds 1 of the 4 rows .*\(line 2 .*--fresh"):
        record(tmp_path, first_step=4)


@pytest.mark.parametrize(
    ("kept", "lost"),
    [
        ((), "the evaluation before training and the evaluations after steps 2, 4"),
        ((1, 2), r"the evaluation before training and the evaluations after steps 2, 4 \(line 1 was changed, .*\)"),
        ((0,), "the evaluations after steps 2, 4"),
        ((0, 2), r"the evaluations after steps 2, 4 \(line 2 was changed, .*\)"),
    ],
)
def test_evaluations_that_the_checkpoint_counts_but_the_record_lacks_are_an_error(kept, lost, tmp_path):
    record(tmp_path)
    path = tmp_path / "evaluations.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    path.write_text("".join(lines[row] for row in kept))
    message = rf"written after step 4, but .*evaluations\.jsonl lacks {lost}; put the file back, or .*--fresh"
    with pytest.raises(CheckpointError, match=message):
        record(tmp_path, first_step=4)


def test_a_record_with_every_evaluation_up_to_the_checkpoint_is_whole(tmp_path):
    record(tmp_path, last=3)
    record(tmp_path, first_step=3)
    assert [row["step"] for row in rows(tmp_path / "evaluations.jsonl")] == [0, 2, 4]


def test_a_grid_shows_every_image_enlarged_without_blur():
    images = torch.zeros(5, 3, 24, 24)
    images[4, 0, 0, 0] = 1.0
    picture = np.asarray(Image.open(io.BytesIO(grid_png(images))))
    assert picture.shape == (2 * 96 + 2, 3 * 96 + 4, 3)
    assert (
        picture[98:102, 98:102] == (255, 0, 0)
    ).all()  # the second image of the second row, pixels four times as wide
    assert (picture[102:194, 98:194] == 0).all()
    assert (picture[98:, 196:] == 255).all()  # there is no sixth image


def test_a_grid_leaves_large_images_as_they_are():
    picture = Image.open(io.BytesIO(grid_png(torch.rand(1, 3, 64, 200))))
    assert picture.size == (200, 64)


def test_a_grid_shows_the_frames_of_a_video_side_by_side_and_of_a_long_one_some():
    videos = torch.zeros(2, 3, 3, 24, 24)
    videos[1, 2, 0] = 1.0
    picture = np.asarray(Image.open(io.BytesIO(grid_png(videos))))
    strip = 3 * 96 + 2  # with seams of a pixel
    assert picture.shape == (96, 2 * strip + 8, 3)
    assert (picture[:, -96:] == (255, 0, 0)).all()
    assert (picture[:, [96, 193]] == 255).all()
    assert (picture[:, strip + 8 : -97] < 255).any()
    long = torch.linspace(0, 1, 81)[:, None, None, None].expand(1, 81, 3, 96, 96)
    picture = np.asarray(Image.open(io.BytesIO(grid_png(long))))
    assert picture.shape == (96, 8 * 97 - 1, 3)
    assert (picture[0, 0, 0], picture[0, -1, 0]) == (0, 255)  # the first and the last frame


# --- console ----------------------------------------------------------------------------------------------------------


def printed(folder, first_step=0, terminal=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    observer, run = ConsoleObserver(console), a_run(folder, first_step)
    observe(observer, run)
    observer.aegpo_on_run_end(run, "finished")
    return console.file.getvalue()


def test_outside_of_a_terminal_every_step_is_a_line(tmp_path):
    lines = printed(tmp_path).splitlines()
    assert lines[0] == "grpo seed 3: step 0/4  forwards 0  evaluation scene 0.375"
    assert lines[1].startswith("grpo seed 3: step 1/4  eta 0:00:0")
    assert lines[1].endswith("  reward 0.100  forwards 24")
    assert lines[2].endswith("  reward 0.200  forwards 48")
    assert lines[3] == "grpo seed 3: step 2/4  evaluation scene 0.500"
    assert lines[-1] == "grpo seed 3: finished"
    assert len(lines) == 8


def test_a_resumed_run_counts_the_forwards_it_spent_before(tmp_path):
    record(tmp_path)
    lines = printed(tmp_path, first_step=2).splitlines()
    assert lines[0] == "grpo seed 3: step 2/4  reward 0.200  forwards 48  evaluation scene 0.500"
    assert lines[2].endswith("  reward 0.400  forwards 96")
    assert lines[3] == "grpo seed 3: step 4/4  evaluation scene 0.625"


def test_in_a_terminal_there_is_a_bar(tmp_path):
    text = printed(tmp_path, terminal=True)
    assert "4/4" in text
    assert "\u2501" in text  # the bar
    assert "reward 0.400" in text
    assert "\x1b[?25h" in text  # the cursor is back


def test_several_runs_get_a_bar_each_and_one_for_all():
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with display(console, every_step=False, runs=2) as shown:
        shown.show("grpo seed 0", Standing(4, 4, 0.5, 96))
        shown.show("aegpo seed 0", Standing(1, 4, 0.25, 24))
        shown.end("grpo seed 0", "finished")
    text = console.file.getvalue()
    assert "all runs" in text
    assert "5/8" in text
    assert "forwards 120" in text
    assert "grpo seed 0: finished" in text


def test_the_standing_of_a_run_is_read_while_it_grows(tmp_path):
    reader = Record(tmp_path, 4)
    assert reader.read() == Standing(0, 4)
    observer, run = JsonlTracker().build(tmp_path), a_run(tmp_path)
    observer.aegpo_on_run_start(run)
    seen = []
    for step in range(4):
        if step > 0:
            observer.aegpo_on_step_end(run, a_report(step))
        if step in EVALUATED:
            observer.aegpo_on_evaluation(run, step, an_evaluation(step))
        seen.append(reader.read())
    assert [standing.step for standing in seen] == [0, 1, 2, 3]
    assert [standing.forwards for standing in seen] == [0, 24, 48, 72]
    assert [standing.evaluated for standing in seen] == [0, 0, 2, 2]
    record(tmp_path, first_step=2, last=2)  # step 3 is forgotten
    assert reader.read() == seen[2]


def test_a_half_written_row_is_read_once_it_is_whole(tmp_path):
    path, reader = tmp_path / "metrics.jsonl", Record(tmp_path, 4)
    path.write_text('{"step": 1, "metrics": {"rew')
    assert reader.read().step == 0
    path.write_text('{"step": 1, "metrics": {"reward": 0.5}}\n')
    assert reader.read().reward == 0.5


def test_the_time_left_is_unknown_before_a_step_is_done():
    pace = Pace(10)
    assert pace.left(10, 40) is None
    assert pace.left(40, 40) == 0.0
    assert pace.left(20, 40) == pytest.approx(2 * pace.left(30, 50), abs=1.0)


def test_the_console_tracker_prints_to_standard_output(tmp_path, capsys):
    observe(ConsoleTracker().build(tmp_path), a_run(tmp_path), last=0)
    assert "grpo seed 3: step 0/4" in capsys.readouterr().out


# --- tensorboard ------------------------------------------------------------------------------------------------------


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard"))
    accumulator.Reload()
    return {
        tag: [(e.step, round(e.value, 6)) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_has_curves_and_a_resumed_run_repeats_no_point(tmp_path):
    for first_step, last in ((0, 3), (2, 4)):
        observer, run = TensorboardTracker().build(tmp_path), a_run(tmp_path, first_step)
        observe(observer, run, last)
        observer.aegpo_on_run_end(run, "interrupted" if last < 4 else "finished")
    curves = scalars(tmp_path)
    assert curves["reward"] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert curves["evaluation/scene"] == [(0, 0.375), (2, 0.5), (4, 0.625)]
    assert curves["seconds/rollout"] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5)]


def test_without_tensorboard_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(AegpoError, match=r'pip install "aegpo\[tensorboard\]"'):
        TensorboardTracker().build(tmp_path)


def test_tracker_specs_import_neither_torch_nor_rich():
    code = "import sys, aegpo.runs.trackers; print([name for name in ('torch', 'rich', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
