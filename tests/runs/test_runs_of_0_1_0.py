"""Folders that version 0.1.0 wrote: every command of now opens them.

`tests/data/run-0.1.0` was made by that version, in that folder, so that the model's path is relative to it: two arms
under two seeds, LoRA of a tiny network, three steps each.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from aegpo.commands.cli import app
from aegpo.commands.evaluate import evaluate
from aegpo.commands.evaluate_request import EvaluateRequest
from aegpo.commands.export import ExportRequest, export
from aegpo.commands.profile_entropy import ProfileRequest, profile
from aegpo.commands.sample import SampleRequest, sample
from aegpo.errors import AegpoError
from aegpo.models.shapes import ShapesSpec
from aegpo.report import write_report
from aegpo.runs.manifest import read_manifest

MADE = Path(__file__).parents[1] / "data" / "run-0.1.0"
ARM = Path("small/aegpo")
RUN = ARM / "seed-1"


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    """A copy, seen from where it was made."""
    shutil.copytree(MADE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def test_its_manifests_are_of_0_1_0_and_name_nothing_that_came_later():
    manifest = read_manifest(RUN)
    assert manifest["versions"]["aegpo"] == "0.1.0"
    assert "rules" not in manifest
    assert "dirty" not in manifest


def test_it_is_reported():
    page = write_report(Path("small"), Console(quiet=True))
    summary = json.loads(Path("small/report/summary.json").read_text())
    assert summary["arms"] == ["grpo", "aegpo"]
    assert summary["notes"] == []
    assert summary["scores"][0]["seeds"] == [0, 1]
    assert page.stat().st_size > 10_000


def test_it_is_evaluated_with_all_its_seeds_and_scores_near_the_recorded_ones():
    out, found = evaluate(EvaluateRequest(ARM, out=Path("evaluated")))
    rows = [(ARM / f"seed-{seed}" / "evaluations.jsonl").read_text().splitlines()[-1] for seed in (0, 1)]
    recorded = [json.loads(row)["scores"]["palette"] for row in rows]
    assert found.seeds == 2
    # other start noises than training's evaluation has, but the same two prompts and a policy that hardly moved
    assert found.lines[0].policy == pytest.approx(sum(map(sum, recorded)) / 4, rel=0.2)
    assert (out / "policy-seed-1" / "held-out" / "00001.jpg").exists()


def test_it_is_sampled():
    out = sample(SampleRequest(RUN, ("two red circles",)))
    assert out == Path("samples/small-aegpo-seed-1-step-000003")
    assert (out / "base" / "00000.png").read_bytes() != (out / "policy" / "00000.png").read_bytes()


def test_its_lora_is_refused_with_the_way_out_and_the_whole_model_is_exported(tmp_path):
    with pytest.raises(AegpoError, match=r"nothing could load its LoRA; write the whole model instead \(--full\)"):
        export(ExportRequest(RUN, tmp_path / "lora"))
    assert not (tmp_path / "lora").exists()
    export(ExportRequest(RUN, tmp_path / "whole", full=True, card=True))
    assert ShapesSpec(weights=tmp_path / "whole").build("cpu").latent_shape == (3, 24, 24)
    assert json.loads((tmp_path / "whole" / "aegpo.json").read_text())["versions"]["aegpo"] == "0.1.0"
    assert (
        "rewards by `aegpo` 0.1.0. Written from the records of the run." in (tmp_path / "whole/README.md").read_text()
    )


def test_its_entropies_are_profiled_against_its_base():
    folder = profile(ProfileRequest(RUN, layers=("transformer_blocks.0.*",)), Console(quiet=True), Console(quiet=True))
    assert folder == Path("profiles/small-aegpo-seed-1-step-000003")
    policies = {line.partition(",")[0] for line in (folder / "entropy.csv").read_text().splitlines()[1:]}
    assert policies == {"base", "policy"}


@pytest.mark.parametrize("words", [["small.yaml", "--out", "."], ["small"], ["small/aegpo"], [str(RUN)]])
def test_it_is_known_as_finished_and_reported_without_a_step(words):
    before = (RUN / "metrics.jsonl").read_bytes()
    done = CliRunner().invoke(app, ["run", *words], catch_exceptions=False)
    assert done.exit_code == 0
    assert "aegpo seed 1: finished before, skipped" in done.stdout
    assert (RUN / "metrics.jsonl").read_bytes() == before
    assert Path("small/report.html").exists()


@pytest.fixture
def _embedded():
    """As if its runs had been of the weights that came with 0.1.0."""
    for path in Path("small").rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        manifest["experiment"]["model"]["weights"] = None
        path.write_text(json.dumps(manifest))


@pytest.mark.usefixtures("_embedded")
@pytest.mark.parametrize(
    "words",
    [
        ["sample", str(RUN), "--prompt", "two red circles"],
        ["export", str(RUN), "--to", "exported", "--full"],
        ["evaluate", str(ARM)],
        ["profile-entropy", str(RUN)],
    ],
    ids=lambda words: words[0],
)
def test_a_run_of_the_weights_that_came_with_it_is_not_opened_with_others(words, tmp_path):
    with pytest.raises(AegpoError, match=r"was begun by aegpo 0\.1\.0 from the weights that came with it; .*--fresh"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert {path.name for path in tmp_path.iterdir()} == {"small", "small.yaml", "weights"}


@pytest.mark.usefixtures("_embedded")
def test_a_run_of_the_weights_that_came_with_it_is_reported():
    done = CliRunner().invoke(app, ["run", "small"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "aegpo seed 1: finished before, skipped" in done.stdout
    assert json.loads(Path("small/report/summary.json").read_text())["arms"] == ["grpo", "aegpo"]
