"""A finished run, or a model, on rewards and prompts of one's choice."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from aegpo.commands.cli import app
from aegpo.commands.evaluate import evaluate
from aegpo.commands.evaluate_request import EvaluateRequest
from aegpo.commands.sample import SampleRequest, sample
from aegpo.errors import AegpoError, SpecError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.lists import numbered
from aegpo.report.evaluated import StyleScores, compare
from aegpo.report.statistics import t_quantile
from aegpo.rewards.hpsv2_prompts import STYLES
from aegpo.rewards.palette import PaletteReward
from aegpo.rewards.scene import SceneReward
from aegpo.runs.opening import find_run
from aegpo.train.policy import Policy

TEXTS = (
    "two red circles on a green background",
    "four blue squares on a red background",
    "a green triangle on a blue background",
)
SPEC = """
name: small
training_steps: 2
seeds: [0, 1]
device: cpu
model: {{kind: shapes, weights: {weights}}}
prompts: {{train_count: 4, evaluation_count: 2}}
rewards: [palette]
rollouts: {{prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 4, micro_batch: 2}}
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
optimizer: {{learning_rate: 0.03}}
checkpoint: {{every: 1}}
evaluation: {{images: 2}}
"""


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(TEXTS))
    return path


def summary(folder: Path):
    return json.loads((folder / "summary.json").read_text())


def painted(run: Path, seed: int = 0):
    """What base and policy paint for TEXTS, found without the command."""
    found = find_run(run, load_registries(plugin_manager()))
    policy = Policy(found.experiment)
    policy.weights.take(found.weights(), found.where)
    how, noise = policy.painting(), policy.evaluation_noise(numbered(TEXTS), seed)
    with policy.base():
        base = policy.images(numbered(TEXTS), noise, how)
    return base, policy.images(numbered(TEXTS), noise, how)


def test_evaluate_and_sample_paint_what_the_run_evaluated(arm, tmp_path):
    """One rule of start noise: by what a prompt asks, wherever it stands."""
    out, _ = evaluate(EvaluateRequest(arm / "seed-0", out=tmp_path / "out"))
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    recorded = [json.loads(line) for line in (arm / "seed-0" / "evaluations.jsonl").read_text().splitlines()][-1]
    assert [row["prompt"] for row in rows] == recorded["prompts"]
    for label in recorded["scores"]:
        for policy, table in (("policy", "scores"), ("base", "base_scores")):
            found = [np.ravel(row[policy][label])[0] for row in rows]
            assert found == pytest.approx(recorded[table][label], abs=1e-6)
    last = recorded["prompts"][-1]
    folder = sample(SampleRequest(arm / "seed-0", prompts=(last,), out=tmp_path / "samples"))
    with Image.open(folder / "policy" / "00000.png") as picture:
        image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 255
    own = PaletteReward().build(torch.device("cpu")).score(image, numbered([last]))
    assert float(own) == pytest.approx(recorded["scores"]["palette"][-1], abs=5e-3)  # of 256 shades


def test_the_numbers_are_those_of_a_direct_computation(arm, prompts, tmp_path):
    request = EvaluateRequest(arm / "seed-0", ("palette", "scene"), str(prompts), out=tmp_path / "out")
    out, _ = evaluate(request)
    lines = {line["reward"]: line for line in summary(out)["scores"]}
    assert list(lines) == ["palette", "scene"]
    images = painted(arm / "seed-0")
    for spec in (PaletteReward(), SceneReward()):
        reward = spec.build(torch.device("cpu"))
        base, policy = (reward.score(each, numbered(TEXTS)).double().numpy() for each in images)
        line, gain = lines[spec.kind], policy - base
        assert line["style"] == "mine"
        assert line["prompts"] == 3
        assert line["base"] == pytest.approx(base.mean(), abs=1e-6)
        assert line["policy"] == pytest.approx(policy.mean(), abs=1e-6)
        assert line["gain"] == pytest.approx(gain.mean(), abs=1e-6)
        half = t_quantile(0.975, 2) * gain.std(ddof=1) / np.sqrt(3)
        ends = [line["gain_interval"]["low"], line["gain_interval"]["high"]]
        assert ends == pytest.approx([gain.mean() - half, gain.mean() + half], abs=1e-6)
        assert line["better"] == pytest.approx(((gain > 0) + (gain == 0) / 2).mean())
    rows = [json.loads(row) for row in (out / "scores.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(TEXTS)
    assert np.mean([row["policy"]["palette"] for row in rows]) == pytest.approx(lines["palette"]["policy"])


def test_rewards_read_the_metadata_of_a_file_of_prompts(arm, tmp_path):
    rows = [{"prompt": text, "brightness": number / 4} for number, text in enumerate(TEXTS)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = EvaluateRequest(arm / "seed-0", ("wanted-brightness",), str(tmp_path / "mine.jsonl"))
    out, _ = evaluate(replace(request, plugins=("wanted_brightness",), out=tmp_path / "out"))
    found = [json.loads(row) for row in (out / "scores.jsonl").read_text().splitlines()]
    for column, images in zip(("base", "policy"), painted(arm / "seed-0"), strict=True):
        wanted = -(images.mean(dim=(1, 2, 3)) - torch.arange(3) / 4).abs()
        assert [row[column]["wanted-brightness"][0][0] for row in found] == pytest.approx(wanted.tolist(), abs=1e-6)


def test_prompts_without_the_metadata_that_a_reward_needs_are_refused_before_a_model_is_loaded(arm, tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "brightness": 1}\n\n{"prompt": "b", "light": 1}\n')
    request = EvaluateRequest(
        arm / "seed-0", ("wanted-brightness",), plugins=("wanted_brightness",), out=tmp_path / "out"
    )
    line = r"mine.jsonl, line 3: reward 'wanted-brightness' needs 'brightness', but this prompt has only 'light'"
    with pytest.raises(AegpoError, match=line):
        evaluate(replace(request, prompts=str(tmp_path / "mine.jsonl")))
    with pytest.raises(
        AegpoError, match=r"prompt '.*': reward 'wanted-brightness' needs 'brightness', but this prompt "
    ):
        evaluate(request)  # on the held-out captions
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


def test_the_images_lie_as_hpsv2_evaluates_them_and_show_what_was_scored(arm, prompts, tmp_path):
    request = EvaluateRequest(arm / "seed-0", ("palette",), str(prompts), 2, out=tmp_path / "out")
    out, _ = evaluate(request)
    for folder in ("base", "policy", "base-2", "policy-2"):
        assert sorted(path.name for path in (out / folder / "mine").iterdir()) == [f"{n:05d}.jpg" for n in range(3)]
    for folder, images in zip(("base", "policy"), painted(arm / "seed-0"), strict=True):
        for number, image in enumerate(images):
            seen = np.asarray(Image.open(out / folder / "mine" / f"{number:05d}.jpg"), dtype=np.float64) / 255
            assert abs(seen - image.permute(1, 2, 0).numpy()).mean() < 0.03
    first, second = ((out / name / "mine" / "00000.jpg").read_bytes() for name in ("base", "base-2"))
    assert first != second


def test_every_seed_of_an_arm_is_evaluated_and_the_interval_is_for_seeds_too(arm, prompts, tmp_path):
    out, found = evaluate(EvaluateRequest(arm, ("palette",), str(prompts), out=tmp_path / "out"))
    assert (out / "policy-seed-0" / "mine").is_dir()
    assert (out / "policy-seed-1" / "mine").is_dir()
    singles = [
        evaluate(EvaluateRequest(arm / f"seed-{seed}", ("palette",), str(prompts), out=tmp_path / str(seed)))[1]
        for seed in range(2)
    ]
    assert found.lines[0].policy == pytest.approx(np.mean([each.lines[0].policy for each in singles]))
    assert found.lines[0].base == pytest.approx(singles[0].lines[0].base)
    assert found.seeds == 2
    interval = found.lines[0].gain_interval
    assert interval.low < found.lines[0].gain < interval.high


def test_the_benchmark_of_hpsv2_has_a_row_for_each_style_and_one_for_all(arm, tmp_path, monkeypatch):
    folder = tmp_path / "datasets" / "benchmark"
    folder.mkdir(parents=True)
    for style in STYLES:
        (folder / f"{style}.json").write_text(json.dumps(TEXTS[:2]))
    monkeypatch.setenv("HPS_ROOT", str(tmp_path))
    out, found = evaluate(EvaluateRequest(arm / "seed-0", ("palette",), "hpsv2", out=tmp_path / "out"))
    assert [line.style for line in found.lines] == [*STYLES, "all"]
    assert found.lines[-1].prompts == 8
    assert found.lines[-1].gain == pytest.approx(np.mean([line.gain for line in found.lines[:-1]]))
    assert {path.name for path in (out / "policy").iterdir()} == set(STYLES)
    first = [(out / "base" / style / "00000.jpg").read_bytes() for style in STYLES]
    assert len(set(first)) == 4, "every prompt has a start noise of its own"


def test_a_file_is_its_model_alone_and_its_rewards_and_held_out_prompts_are_the_default(experiment, tmp_path):
    out, found = evaluate(EvaluateRequest(experiment, out=tmp_path / "out", overrides=("evaluation.rewards=[scene]",)))
    assert [(line.reward, line.style, line.prompts) for line in found.lines] == [
        ("palette", "held-out", 2),
        ("scene", "held-out", 2),
    ]
    assert found.lines[0].policy is None
    assert found.lines[0].base_interval.low < found.lines[0].base < found.lines[0].base_interval.high
    assert (out / "base" / "held-out" / "00001.jpg").is_file()
    assert not (out / "policy").exists()
    assert "score</th>" in (out / "index.html").read_text()


class Page(HTMLParser):
    """The sources of a page, and what its cells say."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_the_command_prints_the_tables_and_the_page_needs_no_other_file(arm, prompts, tmp_path):
    words = [str(arm / "seed-0"), "--rewards", "palette", "--rewards", "{kind: scene, name: strict, strict: true}"]
    words += ["--prompts", str(prompts), "--checkpoint", "1", "--steps", "3", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["evaluate", *words], catch_exceptions=False)
    assert result.exit_code == 0
    assert re.search(r"mine +3 +0\.\d+ +0\.\d+ +[+-]?0\.\d+ +\[", result.stdout)
    assert "strict" in result.stdout
    assert summary(tmp_path / "out")["runs"][0]["step"] == 1
    assert summary(tmp_path / "out")["denoising_steps"] == 3
    page = Page((tmp_path / "out" / "index.html").read_text())
    assert len(page.sources) == 1
    assert page.sources[0].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (("palete",), "--rewards: rewards.0: unknown kind 'palete'; did you mean 'palette'?"),
        (("{kind: scene, strikt: true}",), "unknown key; did you mean 'strict'?"),
        (("{kind: scene, weight: much}",), "rewards.0.weight: must be a number, not 'much'"),
        (("{path: x}",), "a part needs a 'kind'"),
        (("scene", "{kind: scene, strict: true}"), "two rewards are called 'scene'; give one a 'name' of its own"),
        (("",), "there is no reward; give a kind such as 'hpsv2', or a mapping with a 'kind'"),
        (("{kind",), "not YAML"),
    ],
)
def test_mistakes_in_rewards_are_said_as_those_of_a_file(arm, rewards, message, tmp_path):
    with pytest.raises(SpecError) as error:
        evaluate(EvaluateRequest(arm / "seed-0", rewards, out=tmp_path / "out"))
    assert message in str(error.value)


def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(arm, experiment, prompts, tmp_path):
    run, out, full = arm / "seed-0", tmp_path / "out", tmp_path / "full"
    full.mkdir()
    (full / "kept.txt").write_text("kept")
    for request, message in [
        (EvaluateRequest(run, ("scene",), str(tmp_path / "none.txt"), out=out), "prompts: cannot read .*none.txt"),
        (EvaluateRequest(run, ("scene",), str(prompts), out=full), "is there already, and nothing is overwritten"),
        (EvaluateRequest(tmp_path / "none", ("scene",), out=out), "there is no folder"),
        (EvaluateRequest(experiment, ("scene",), checkpoint=1, out=out), "--checkpoint is for runs"),
        (EvaluateRequest(run, ("scene",), overrides=("seed=1",), out=out), "--set changes an experiment file"),
        (
            EvaluateRequest(experiment, ("{kind: vlm-preference, url: 'http://127.0.0.1:9/v1', model: m}",), out=out),
            "reward 'vlm-preference' compares a policy's image with the base's",
        ),
    ]:
        with pytest.raises(AegpoError, match=message):
            evaluate(request)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "mine.txt"]
    assert [path.name for path in full.iterdir()] == ["kept.txt"]


def test_a_file_whose_arms_have_several_models_has_no_one_model(experiment, tmp_path):
    path = tmp_path / "two.yaml"
    other = f"{{kind: shapes, weights: {tmp_path}}}"
    path.write_text(experiment.read_text() + f"arms:\n  one: {{}}\n  two: {{model: {other}}}\n")
    with pytest.raises(AegpoError, match="that of arm 'two' differs from that of 'one'"):
        evaluate(EvaluateRequest(path, out=tmp_path / "out"))


def test_a_reward_that_fails_leaves_nothing_behind(arm, prompts, tmp_path):
    far = "{kind: remote, url: 'http://127.0.0.1:9', retries: 0}"
    with pytest.raises(AegpoError, match="remote"):
        evaluate(EvaluateRequest(arm / "seed-0", ("palette", far), str(prompts), out=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interval_covers_the_true_gain_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(5), 0
    for _ in range(400):
        base = rng.normal(size=(1, 2, 12))
        policy = base + 0.3 + rng.normal(size=(1, 2, 12))
        interval = compare("x", [StyleScores("s", ("",) * 12, {"r": base}, {"r": policy})], ["r"], {}).lines[0]
        assert interval.gain_interval is not None
        hits += interval.gain_interval.low <= 0.3 <= interval.gain_interval.high
    assert 0.92 <= hits / 400 <= 0.98


def test_a_page_shows_a_title_as_text():
    from aegpo.report.evaluated import page

    scores = {"r<b>": np.zeros((1, 1, 2))}
    found = compare("a<b>", [StyleScores("s", ("", ""), scores, None)], ["r<b>"], {"evaluated": "<i>"})
    text = page(found, Image.open(io.BytesIO(_png())))
    assert "<b>" not in text
    assert "<i>" not in text
    assert "a&lt;b&gt;" in text


def _png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, format="PNG")
    return stream.getvalue()
