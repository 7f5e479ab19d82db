"""A model of videos from a plugin, with every command: trained, evaluated, reported, painted, profiled and resumed."""

from __future__ import annotations

import base64
import json
import shutil
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import video_world
from command_line import Done, aegpo
from PIL import Image

from aegpo.runs.checkpoints import load_latest

EXPERIMENT = """
name: videos
training_steps: 3
device: cpu
model: tiny-videos
prompts: {train_count: 8, evaluation_count: 4}
rollouts: {prompts_per_step: 2, rollouts_per_step: 8, denoising_steps: 4, micro_batch: 3}
rewards:
  - motion
  - {kind: redness, frames: mean, weight: 0.5}
allocator: {kind: entropy, low: 2, high: 6}
selector: {kind: entropy-peak, top_k: 2}
tree: branching
objective: {kind: clipped, clip: 0.01}
optimizer: {learning_rate: 0.01}
signals: {entropy: {block: self}}
evaluation: {every: 2, images: 4, rewards: [{kind: redness, name: worst, frames: min}, light]}
checkpoint: {every: 1}
"""
RED = (255, 26, 26)


def here(folder: Path, *words: str) -> Done:
    """A command with the plugin, in a folder."""
    with chdir(folder):
        done = aegpo(*words, "--plugin", "video_world")
    assert done.code == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a finished run and its report."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "videos.yaml").write_text(EXPERIMENT)
    assert here(folder, "check", "videos.yaml").stderr == ""
    here(folder, "run", "videos.yaml")
    return folder


@pytest.fixture(scope="module")
def run(folder) -> Path:
    return folder / "runs" / "videos" / "main" / "seed-0"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_learns_and_scores_what_each_reward_reads(run):
    metrics = [row["metrics"] for row in lines(run / "metrics.jsonl")]
    assert [row["updated_edges"] > 0 for row in metrics] == [True] * 3
    assert metrics[0]["reward"] == pytest.approx(metrics[0]["reward/motion"] + 0.5 * metrics[0]["reward/redness"])
    evaluations = lines(run / "evaluations.jsonl")
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert list(evaluations[0]["scores"]) == ["motion", "redness", "worst", "light"]
    assert evaluations[0]["scores"] == evaluations[0]["base_scores"] != evaluations[2]["scores"]
    assert (np.array(evaluations[2]["scores"]["worst"]) < evaluations[2]["scores"]["redness"]).all()
    still, moving = (evaluations[0]["prompts"].index(f"a {words}") for words in STILL_AND_MOVING)
    assert evaluations[0]["scores"]["motion"][still] < evaluations[0]["scores"]["motion"][moving]


STILL_AND_MOVING = ("blue dot moves right", "white dot moves left")


def test_its_grid_shows_the_frames_of_a_video_side_by_side(run):
    assert [path.name for path in sorted((run / "images").iterdir())] == [f"step-{step:06d}.png" for step in (0, 2, 3)]
    grid = np.asarray(Image.open(run / "images" / "step-000000.png")).astype(int)
    strip = 3 * 96 + 2
    assert grid.shape == (2 * 96 + 8, 2 * strip + 8, 3)
    assert video_world.CAPTIONS[3] == "a red dot moves down"  # the first that is held out
    for frame, row in enumerate((1, 3, 5)):
        square = grid[12 * row : 12 * (row + 2), frame * 97 + 36 : frame * 97 + 60]
        assert abs(square.mean(axis=(0, 1)) - RED).max() < 40
    assert (grid[:96, [96, 193]] == 255).all()  # seams between frames
    assert (grid[:, strip : strip + 8] == 255).all()  # between videos


def test_its_report_shows_the_first_and_the_last_grid(folder, run):
    page = (folder / "runs" / "videos" / "report.html").read_text()
    for step in (0, 3):
        assert base64.b64encode((run / "images" / f"step-{step:06d}.png").read_bytes()).decode() in page


def test_a_broken_run_goes_on_to_the_bit(folder, run, tmp_path):
    shutil.copytree(run.parent, tmp_path / "broken" / "videos" / "main")
    broken = tmp_path / "broken" / "videos" / "main" / "seed-0"
    for path in broken.glob("checkpoints/step-000003"):
        shutil.rmtree(path)
    (broken / "finished.json").unlink()
    shutil.copy(folder / "videos.yaml", tmp_path)
    here(tmp_path, "run", "videos.yaml", "--out", "broken", "--no-report")
    for name in ("metrics.jsonl", "evaluations.jsonl", "images/step-000003.png"):
        assert (broken / name).read_bytes() == (run / name).read_bytes(), name
    ends = [load_latest(each / "checkpoints") for each in (run, broken)]
    assert [end.step for end in ends] == [3, 3]
    assert all(tensor.equal(ends[1].tensors[name]) for name, tensor in ends[0].tensors.items())


def test_samples_are_animated_and_the_sheet_shows_their_frames(folder, run, tmp_path):
    out = tmp_path / "painted"
    here(folder, "sample", str(run), "--prompt", "a red dot moves left", "--out", str(out))
    with Image.open(out / "base" / "00000.png") as video:
        assert (video.n_frames, video.size) == (3, (8, 8))
        for frame, column in enumerate((5, 3, 1)):
            video.seek(frame)
            shown = np.asarray(video.convert("RGB")).astype(int)
            assert abs(shown[3:5, column : column + 2].mean(axis=(0, 1)) - RED).max() < 40
    sheet = Image.open(out / "grid.png")
    assert sheet.size[0] == 2 * 16 + 2 * (3 * 160 + 2) + 8  # margins, two strips of three enlarged frames, a gap


def test_it_is_evaluated_with_rewards_of_ones_choice(folder, run, tmp_path):
    out = tmp_path / "evaluated"
    rewards = ("--rewards", "motion", "--rewards", "{kind: redness, frames: first}")
    here(folder, "evaluate", str(run), *rewards, "--out", str(out))
    recorded = lines(run / "evaluations.jsonl")[0]["base_scores"]["motion"]
    summary = json.loads((out / "summary.json").read_text())
    assert [line["reward"] for line in summary["scores"]] == ["motion", "redness"]
    assert summary["scores"][0]["base"] == pytest.approx(np.mean(recorded), rel=0.1)  # of another start noise
    assert Image.open(out / "policy" / "held-out" / "00003.jpg").size == (3 * 8 + 2, 8)
    with chdir(folder):
        refused = aegpo("evaluate", str(run), "--rewards", "redness", "--plugin", "video_world")
    assert refused.code == 2
    assert "reward 'redness' reads images, but model 'tiny-videos' paints videos; say what becomes" in refused.stderr


@pytest.mark.slow
def test_its_entropies_are_profiled_without_maps(folder, run, tmp_path):
    out = tmp_path / "profile"
    here(folder, "profile-entropy", str(run), "--validate", "--out", str(out))
    assert {path.name for path in out.iterdir()} >= {"entropy.csv", "entropy.png", "steps.csv", "profile.html"}
    assert not (out / "maps.png").exists()


def test_its_export_says_what_the_model_lacks(folder, run):
    with chdir(folder):
        refused = aegpo("export", str(run), "--to", "exported", "--plugin", "video_world")
    assert refused.code == 2
    assert "model 'tiny-videos' cannot be exported: it has no save_adapters(folder) and save_pipe" in refused.stderr
