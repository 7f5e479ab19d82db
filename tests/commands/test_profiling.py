"""`aegpo profile-entropy`: what it prints and writes for a spec and a run, and what it says to wrong input."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import worlds
from PIL import Image
from typer.testing import CliRunner
from worlds import GaussianSpec, asked, execution, restore

from aegpo.commands.cli import app, main
from aegpo.config.loading import parse_experiment
from aegpo.core.records import Prompt
from aegpo.errors import AegpoError
from aegpo.method.signals import EntropySignal
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.report.profile import csvs
from aegpo.report.profile.measure import measure_profile
from aegpo.report.profile.tables import SPARKS, sparkline
from aegpo.runs import checkpoints
from aegpo.runs.manifest import read_manifest
from aegpo.train.engine import Engine

GOLDEN = Path(__file__).parents[1] / "data" / "profile-spec.txt"
SPEC = """
name: small
training_steps: 3
model: {model}
prompts: {{train_count: 8, evaluation_count: 4}}
rollouts: {{prompts_per_step: 2, rollouts_per_step: 12, denoising_steps: 5}}
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
optimizer: {{learning_rate: 1e-3}}
evaluation: {{every: 3, images: 2}}
checkpoint: {{every: 1, keep: 5}}
trackers: []
arms:
  grpo: {{}}
  aegpo:
    allocator: {{kind: entropy, low: 4, high: 8}}
    selector: {{kind: entropy-peak, top_k: 2}}
    tree: branching
"""
PNGS = {"entropy.png", "layers.png", "delta.png", "blocks.png", "maps.png"}
BLOCKS = ("joint", "image-image", "image-text", "text-image", "text-text")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_weights):
    """A folder with a spec of the tiny network and a run of three steps, each with its checkpoint."""
    folder = tmp_path_factory.mktemp("profiling")
    (folder / "small.yaml").write_text(SPEC.format(model=f"{{kind: shapes, weights: {tiny_weights}}}"))
    words = ["run", str(folder / "small.yaml"), "--arm", "aegpo", "--out", str(folder / "runs"), "--no-report"]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def run(workplace):
    return workplace / "runs" / "small" / "aegpo" / "seed-0"


@pytest.fixture(scope="module")
def profiled(workplace, run):
    """The output and the folder of a profile of the run at step 2."""
    return profile(run, "--checkpoint", "2", "--out", workplace / "profile"), workplace / "profile"


def profile(*words) -> str:
    done = CliRunner().invoke(app, ["profile-entropy", *map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- a spec ----------------------------------------------------------------------------------------------------------


def test_a_spec_shows_the_shipped_base_word_for_word(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SPEC.format(model="shapes"))
    Path("prompts.txt").write_text("a red circle\ntwo blue squares and a green triangle\nthree yellow circles\n")
    output = profile("small.yaml", "--prompts", "prompts.txt")
    assert "\n".join(line.rstrip() for line in output.splitlines()) + "\n" == GOLDEN.read_text()
    folder = Path("profiles/small-aegpo")
    assert {path.name for path in folder.iterdir()} == {"profile.html", "entropy.csv", "prompts.csv", *PNGS} - {
        "delta.png"
    }
    assert {row["policy"] for row in rows_of(folder / "entropy.csv")} == {"base"}


def test_a_base_alone_is_the_base_of_its_runs(workplace, profiled, tmp_path):
    profile(workplace / "small.yaml", "--out", tmp_path)
    of_run = [row for row in rows_of(profiled[1] / "entropy.csv") if row["policy"] == "base"]
    assert rows_of(tmp_path / "entropy.csv") == of_run


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_is_compared_with_its_base(profiled):
    output, folder = profiled
    lines = output.splitlines()
    assert lines[0] == "small, arm aegpo, seed 0, step 2: against its base; 4 prompts"
    assert [line.split()[0] for line in lines[2:7]] == list(BLOCKS)
    assert lines[2].endswith("<- what this experiment reads")
    assert re.search(
        r"^Delta-entropy is 0\.\d{4} nats on average, \d+\.\d\d % of the base's entropy; from ", output, re.M
    )
    for title in ("Entropy(t), block joint", "Delta-entropy of each prompt", "Layers, block joint"):
        assert title in lines or any(line.startswith(title) for line in lines)
    assert lines[-1] == f"profile: {folder / 'profile.html'}"


def test_delta_and_steps_are_what_the_probe_of_a_training_run_finds(profiled, run):
    manager = plugin_manager()
    experiment = parse_experiment(read_manifest(run)["experiment"], load_registries(manager))
    engine = Engine.build(experiment)
    restore(engine, checkpoints.load_step(run / "checkpoints", 2))
    rows = rows_of(profiled[1] / "prompts.csv")
    prompts = [Prompt(index, row["text"]) for index, row in enumerate(rows)]
    found = EntropySignal().build(experiment).measure(1, prompts, engine.policy)
    entropy, delta = found.values["entropy"], found.values["entropy-delta"]
    signals = worlds.signals(9, *entropy.shape, entropy=entropy, entropy_delta=delta)
    np.testing.assert_allclose([float(row["delta_nats"]) for row in rows], delta, rtol=2e-3, atol=2e-6)
    np.testing.assert_allclose([float(row["entropy_nats"]) for row in rows], entropy.mean(axis=1), rtol=1e-5)
    chosen = experiment.selector.select(signals, np.random.default_rng(0))
    assert [row["steps"] for row in rows] == [" ".join(map(str, np.flatnonzero(steps))) for steps in chosen]
    for first in (0, 2):  # a training step has two prompts
        more = int(delta[first + 1] > delta[first])
        assert [int(row["rollouts"]) for row in rows[first : first + 2]] == ([4, 8] if more else [8, 4])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"base_on": "policy", "delta": "signed"},
            "They are given by delta 'signed' with the base on the latents 'policy'",
        ),
        ({"stride": 2}, None),
    ],
    ids=["signed_on_the_policys_latents", "in_strides"],
)
def test_rollouts_are_those_of_the_delta_that_the_experiment_asks_for(workplace, tmp_path, options, told):
    words = ["run", str(workplace / "small.yaml"), "--arm", "aegpo", "--out", str(tmp_path), "--no-report"]
    words += ["--set", "training_steps=2", "--set", f"signals.entropy={json.dumps(options)}"]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    run = tmp_path / "small" / "aegpo" / "seed-0"
    output = profile(run, "--out", tmp_path / "profile")
    assert told is None or told in " ".join(output.split())
    experiment = parse_experiment(read_manifest(run)["experiment"], load_registries(plugin_manager()))
    engine = Engine.build(experiment)
    restore(engine, checkpoints.load_step(run / "checkpoints", 2))
    rows = rows_of(tmp_path / "profile" / "prompts.csv")
    prompts = [Prompt(index, row["text"]) for index, row in enumerate(rows)]
    found = EntropySignal(**options).build(experiment).measure(1, prompts, engine.policy)
    delta = found.values["entropy-delta"]
    for first in (0, 2):  # a training step has two prompts
        more = int(delta[first + 1] > delta[first])
        assert [int(row["rollouts"]) for row in rows[first : first + 2]] == ([4, 8] if more else [8, 4])


@pytest.mark.slow
def test_the_newest_checkpoint_is_profiled_unless_another_is_asked_for(run, tmp_path):
    assert profile(run, "--out", tmp_path).startswith("small, arm aegpo, seed 0, step 3: ")


@pytest.mark.slow
def test_a_folder_of_runs_will_do_if_arm_and_seed_say_which(run, tmp_path):
    words = (run.parent.parent, "--arm", "aegpo", "--seed", "0", "--out", tmp_path)
    assert profile(*words).startswith("small, arm aegpo, seed 0, step 3: ")


# --- files -----------------------------------------------------------------------------------------------------------


def documented(name):
    """Column names that the module's text describes for a file."""
    text = csvs.__doc__.split(f"`{name}`")[1].split("\n`")[0]
    return tuple(re.findall(r"^    ([a-z_]+)  ", text, re.MULTILINE))


def test_the_columns_are_those_that_are_documented(profiled):
    for name, columns in (("entropy.csv", csvs.ENTROPY), ("prompts.csv", csvs.PROMPTS)):
        assert documented(name) == columns
        assert tuple(rows_of(profiled[1] / name)[0]) == columns


def test_there_is_a_row_for_every_policy_prompt_step_layer_and_block(profiled):
    rows = rows_of(profiled[1] / "entropy.csv")
    keys = {tuple(row[name] for name in ("policy", "prompt", "step", "layer", "block")) for row in rows}
    assert len(keys) == len(rows) == 2 * 4 * 5 * 2 * 5
    assert {row["block"] for row in rows} == set(BLOCKS)
    assert {row["sigma"] for row in rows} == {"1", "0.8", "0.6", "0.4", "0.2"}


def test_values_are_consistent(profiled):
    rows = rows_of(profiled[1] / "entropy.csv")
    for row in rows:
        entropy, keys = float(row["entropy_nats"]), int(row["valid_keys"])
        assert float(row["normalised"]) == pytest.approx(entropy / math.log(keys), rel=1e-4)
        assert 0 <= entropy <= math.log(keys) + 1e-5
        assert row["error_nats"] == "0"
    mass = {tuple(row[k] for k in ("policy", "prompt", "step", "layer", "block")): float(row["mass"]) for row in rows}
    for (*place, block), value in mass.items():
        rest, keys = block.split("-") if "-" in block else (None, None)
        assert value == 1 if rest is None else value + mass[(*place, f"{rest}-{'image' if keys == 'text' else 'text'}")]
        if rest is not None:
            other = mass[(*place, f"{rest}-{'image' if keys == 'text' else 'text'}")]
            assert value + other == pytest.approx(1, abs=1e-5)


def test_the_page_needs_no_other_file_and_shows_every_plot(profiled):
    text = (profiled[1] / "profile.html").read_text()
    assert not re.search(r"<script|src=\"(?!data:)|@import|<link", text)
    assert text.count("<svg ") == len(PNGS)
    for words in ("Entropy(t)", "Delta-entropy of each prompt", "Which tokens are undecided", "How it was measured"):
        assert words in text
    assert {path.name for path in profiled[1].glob("*.png")} == PNGS
    for path in profiled[1].glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 100
        assert path.stat().st_size < 200_000


def test_fewer_rows_carry_a_standard_error(run, tmp_path):
    profile(run, "--rows", "12", "--layers", "*.1.attn", "--out", tmp_path)
    rows = rows_of(tmp_path / "entropy.csv")
    assert {row["layer"] for row in rows} == {"transformer_blocks.1.attn"}
    assert all(float(row["error_nats"]) > 0 for row in rows if row["block"] == "joint")


def test_a_curve_becomes_bars_from_low_to_high():
    assert sparkline(np.array([0.0, 7.0, 3.0])) == SPARKS[0] + SPARKS[7] + SPARKS[3]
    assert sparkline(np.array([2.0, 2.0])) == SPARKS[0] * 2


# --- wrong input -----------------------------------------------------------------------------------------------------

MISTAKES = {
    "an arm that was not run": (
        ["{root}", "--arm", "grpo"],
        "--arm grpo: {root} has no run of that arm; those there are: aegpo",
    ),
    "an empty folder": (
        ["{empty}"],
        "{empty} is not the folder of a run: a run has a manifest.json; give OUT/NAME/ARM/seed-S",
    ),
    "a checkpoint that is not there": (
        ["{run}", "--checkpoint", "7"],
        "{run} has no checkpoint of step 7; those there are: 1, 2, 3",
    ),
    "a checkpoint of a spec": (
        ["{spec}", "--checkpoint", "1"],
        "--checkpoint 1: {spec} is no folder of a run, so it has no checkpoints; give OUT/NAME/ARM/seed-S instead",
    ),
    "a run with changes": (
        ["{run}", "--set", "seed=1"],
        "--set changes an experiment file; the experiment of a run is in its manifest, as it was run",
    ),
    "another arm than the run's": (
        ["{run}", "--arm", "grpo"],
        "--arm grpo: {run} has no run of that arm; those there are: aegpo",
    ),
    "an arm that is not there": (["{spec}", "--arm", "aegpoo"], "{spec} has no arm 'aegpoo'; did you mean 'aegpo'?"),
    "a pattern without a layer": (
        ["{spec}", "--layers", "block*"],
        "no layer matches 'block*'; layers are transformer_blocks.0.attn, transformer_blocks.1.attn",
    ),
    "a pattern without a layer beside one with": (
        ["{spec}", "--layers", "*.0.attn", "--layers", "*.2.attn"],
        "no layer matches '*.2.attn'; layers are transformer_blocks.0.attn, transformer_blocks.1.attn",
    ),
    "prompts that are not there": (
        ["{spec}", "--prompts", "nope.txt"],
        "prompts: cannot read nope.txt: No such file or directory",
    ),
    "too few rows": (
        ["{spec}", "--rows", "1"],
        "rows: 1 cannot stand for 2 kinds of token (image, text, other); give at least 2",
    ),
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(workplace, run, tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "empty").mkdir()
    places = {"root": run.parent.parent, "empty": tmp_path / "empty", "run": run, "spec": workplace / "small.yaml"}
    words = [word.format(**places) for word in words]
    monkeypatch.setattr(sys, "argv", ["aegpo", "profile-entropy", *words, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {message.format(**places)}")
    assert lines[-1] == errors[0]  # and no traceback after it


def test_a_network_without_softmax_attention_is_told_so():
    with pytest.raises(AegpoError) as error:
        measure_profile(execution(GaussianSpec().build(torch.device("cpu")), 4), asked(["0.5"]), seed=0)
    assert str(error.value).startswith("the network made no softmax attention call that can be watched")
