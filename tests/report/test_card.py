"""The model card says what the run recorded, as far as the exported step, and what nobody tested."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from studies import AEGPO, RANDOM, World, write_run

from aegpo.report.card import write_card
from aegpo.report.card_text import Exported
from aegpo.report.recorded_run import read_run
from aegpo.report.statistics import mean_interval

SPEC = {
    "model": {"kind": "sd3", "path": "/home/somebody/base", "height": 512, "width": 512},
    "policy": {"train": "lora", "rank": 8, "alpha": 16, "ema": 0.9},
    "optimizer": {"kind": "adamw", "learning_rate": 3e-4},
    "prompts": {"train": "/home/somebody/mine.txt", "train_count": 512, "evaluation": None, "evaluation_count": 48},
}


WORLD = World()


def recorded(folder, arm=AEGPO, world=WORLD, **manifest):
    """A run whose manifest says what a card reads, and the export of its last step."""
    run = write_run(folder, arm, 0, world, world.training_steps)
    told = json.loads((run / "manifest.json").read_text())
    told["experiment"] |= SPEC
    (run / "manifest.json").write_text(json.dumps(told | manifest))
    return Exported(run, arm.name, 0, world.training_steps, whole=False, library="diffusers", use="Load it.")


def card(exported, folder):
    folder.mkdir()
    write_card(exported, folder)
    return ModelCard.load(folder / "README.md")


def test_the_gains_and_intervals_are_those_of_the_records(tmp_path):
    exported = recorded(tmp_path)
    text = card(exported, tmp_path / "to").text
    last = read_run("aegpo", 0, exported.run).evaluations[-1]
    gain = last.scores["palette"] - last.base_scores["palette"]
    found = re.search(
        r"\| palette \| palette \| trained on, weight 1 \| ([\d.]+) \| ([\d.]+) \| (\S+) \| (\S+ \S+) ", text
    )
    ends = mean_interval(gain)
    numbers = [float(found[1]), float(found[2]), float(found[3]), *json.loads(found[4].replace("+", ""))]
    expected = [last.base_scores["palette"].mean(), last.scores["palette"].mean(), gain.mean(), ends.low, ends.high]
    assert np.allclose(numbers, expected, atol=6e-4)


def test_a_guard_that_fell_is_the_first_of_the_limits(tmp_path):
    fallen = card(recorded(tmp_path, replace(RANDOM, gains={"palette": 0.05, "scene": -0.2})), tmp_path / "to").text
    assert re.search(
        r"## Limits\n\n\* The guard scene fell: -0\.\d+ \[-0\.\d+, -0\.\d+\], a sign of reward hacking", fallen
    )
    shutil.rmtree(tmp_path / "random-steps")
    held = card(recorded(tmp_path, replace(RANDOM, gains={"palette": 0.05, "scene": 0.2})), tmp_path / "again").text
    assert "fell" not in held


def test_what_was_trained_and_did_not_rise_is_said_and_that_nothing_guards_it(tmp_path):
    text = card(recorded(tmp_path, replace(AEGPO, gains={"palette": -0.1})), tmp_path / "to").text
    assert "* The trained palette did not rise beyond doubt: -0." in text
    assert "* Every score was trained on, so that reward hacking would not show in any of them." in text


@pytest.mark.parametrize(("step", "evaluated"), [(10, 10), (13, 10)])
def test_what_came_after_the_exported_step_is_not_told(step, evaluated, tmp_path):
    exported = replace(recorded(tmp_path), step=step)
    text = card(exported, tmp_path / "to").text
    assert re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE) == ["0", "5", "10"]
    assert f"at step {evaluated}, from the same noise" in text
    assert f"* Taken at step {step} of the 40 that the run was to have." in text
    assert ("itself was not evaluated: the scores are those of step 10" in text) == (step == 13)
    assert f"{420 * step + 160 * step:,} forwards" in text


def test_it_has_curves_and_the_pictures_of_the_exported_step(tmp_path):
    exported = replace(recorded(tmp_path), step=13)
    text = card(exported, tmp_path / "to").text
    assert (tmp_path / "to" / "curves.png").read_bytes().startswith(b"\x89PNG")
    picture = (exported.run / "images" / "step-000010.png").read_bytes()
    assert (tmp_path / "to" / "pictures.png").read_bytes() == picture
    assert "](curves.png)" in text
    assert "](pictures.png)" in text


def test_a_run_without_evaluations_has_a_card_that_says_so(tmp_path):
    exported = recorded(tmp_path)
    (exported.run / "evaluations.jsonl").write_text("")
    text = card(exported, tmp_path / "to").text
    assert "No evaluation of it was recorded: nothing is known of what it learned." in text
    assert "## Course" not in text


def test_no_place_of_this_machine_is_named_and_no_text_is_taken_for_html(tmp_path):
    world = World(texts=tuple(f"<script>alert({number})</script> | a\nline" for number in range(4)))
    text = card(recorded(tmp_path, world=world), tmp_path / "to").text
    assert "somebody" not in text
    assert str(tmp_path) not in text
    assert "file `mine.txt`, at most 512" in text
    assert "1. &lt;script>alert(0)&lt;/script> \\| a line" in text


def test_the_metadata_name_the_base_of_the_hub_and_inherit_its_license(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: community\nlicense_link: LICENSE.md\n---\nHello\n"
    )
    exported = recorded(tmp_path, base={"hub": "org/tiny", "commit": "9f2a" * 10})
    data = card(replace(exported, base_folder=base), tmp_path / "to").data.to_dict()
    inherited = {"license": "other", "license_name": "community", "license_link": "LICENSE.md"}
    assert data == inherited | {
        "base_model": "org/tiny",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["aegpo", "reinforcement-learning", "text-to-image", "lora"],
    }


def test_a_license_that_is_not_known_is_not_invented(tmp_path):
    exported = recorded(tmp_path)
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: [unclosed\n---\nHello\n")
    found = card(replace(exported, base_folder=base, whole=True, video=True), tmp_path / "to")
    assert "license" not in found.data.to_dict()
    assert "base_model" not in found.data.to_dict()
    assert found.data.pipeline_tag == "text-to-video"
    assert "* The license of the base model is not recorded here; it may bind what is derived from it" in found.text
