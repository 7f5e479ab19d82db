"""Whether entropy means anything: what is measured for it, how it is compared, and what is said about it."""

from __future__ import annotations

import csv
import math
import re

import numpy as np
import pytest
from command_line import aegpo
from repository import ROOT
from typer.testing import CliRunner
from worlds import BrightnessReward, small_experiment

from aegpo.commands.cli import app
from aegpo.prompts.lists import numbered
from aegpo.report.profile import evidence as evidence_module
from aegpo.report.profile.evidence import (
    NOISE_STD,
    STEP_NUMBER,
    Correlation,
    Evidence,
    PromptEvidence,
    branch_plan,
    checkpoint_pair,
    measure_reward_std,
    rewards_at,
    step_evidence,
)
from aegpo.report.profile.wording import evidence_tables, findings
from aegpo.report.statistics import Interval
from aegpo.train.engine import Engine

PROMPTS = numbered(("a red circle", "two blue squares", "three green triangles"))
STEPS = np.arange(3)


@pytest.fixture
def engine(tiny_spec):
    return Engine.build(small_experiment(tiny_spec))


def silent(line: str) -> None:
    pass


# --- what is measured ------------------------------------------------------------------------------------------------


def test_children_branch_off_the_trunk_at_every_step_and_nowhere_else():
    plan, branched = branch_plan(2, 4, STEPS, children=3)
    assert np.bincount(plan.group).tolist() == [10, 10]
    for step in range(4):
        assert np.array_equal(plan.prompt[step + 1], plan.prompt[step][plan.parent[step]])
        quiet = plan.parent[step][~plan.noisy[step]]
        assert np.array_equal(quiet, np.arange(len(plan.prompt[step])))  # every node goes on, once, without noise
    assert np.bincount(branched + 1).tolist() == [2, 6, 6, 6]
    assert plan.forwards == 2 * (1 + 4 + 7 + 10)
    assert plan.trained_edges == 0
    noises = np.zeros(2, dtype=int)  # on the way to each leaf
    for step in range(4):
        assert not noises[plan.parent[step][plan.noisy[step]]].any()  # only trunks have noisy children
        noises = noises[plan.parent[step]] + plan.noisy[step]
    assert np.array_equal(noises, branched >= 0)


def test_noise_that_comes_late_moves_the_reward_less(engine):
    spread = measure_reward_std(engine, PROMPTS, STEPS, 8, silent)
    assert spread.shape == (3, 3)
    assert (spread > 0).all()
    again = measure_reward_std(engine, PROMPTS, STEPS, 8, silent)
    assert np.array_equal(spread, again)


def test_rewards_come_from_the_same_noise_whenever_they_are_asked_for(engine):
    first = rewards_at(engine, PROMPTS)
    assert first.shape == (evidence_module.NOISES, 3)
    assert np.array_equal(first, rewards_at(engine, PROMPTS))
    assert first.std(axis=0).min() > 0


def test_weights_of_rewards_count(tiny_spec):
    rewards = (BrightnessReward(), BrightnessReward(name="less", weight=-3.0))
    two = Engine.build(small_experiment(tiny_spec, rewards=rewards))
    one = Engine.build(small_experiment(tiny_spec))
    np.testing.assert_allclose(rewards_at(two, PROMPTS), -2 * rewards_at(one, PROMPTS), rtol=1e-5)


@pytest.mark.parametrize(
    ("step", "steps", "pair"), [(10, (5, 10, 20), (10, 20)), (20, (5, 10, 20), (10, 20)), (5, (5,), (0, 5))]
)
def test_delta_is_measured_before_the_gain_where_there_are_two_checkpoints(step, steps, pair):
    assert checkpoint_pair(step, steps) == pair


# --- how it is compared ----------------------------------------------------------------------------------------------


def by_step(entropy, spread, chosen=None):
    chosen = np.tile([True, True, False, False, False], (len(spread), 1)) if chosen is None else chosen
    return step_evidence(spread, np.arange(5), {"joint": entropy}, np.array([0.9, 0.7, 0.5, 0.3, 0.1]), chosen)


def test_curves_that_fall_together_agree_but_say_no_more_than_the_step_number():
    rng = np.random.default_rng(3)
    fall = np.linspace(1, 0, 5)
    entropy, spread = (fall + 0.01 * rng.random((20, 5)) for _ in range(2))
    found = by_step(entropy, spread)
    known = {each.predictor: each for each in found.along}
    assert known["joint"].rho == known[STEP_NUMBER].rho == known[NOISE_STD].rho == pytest.approx(1)
    assert known["joint"].interval.low == pytest.approx(1)
    (own,) = found.own
    assert abs(own.rho) < 0.4
    assert not own.interval.excludes_zero
    assert (found.overlap, found.chance, found.fixed) == (1.0, 0.4, 1.0)
    words = findings(Evidence("joint", 20, found, None))
    assert words[0] == (
        "Steps: rewards spread more where Entropy(t) is high (block joint: mean rank correlation over steps +1.00 "
        "[+1.00, +1.00], 20 prompts)."
    )
    assert words[1].endswith("entropy tells no more than that.")
    assert "there is no evidence that it tells where its rewards spread more than usual" in words[2]
    assert words[3] == (
        "The chosen steps hold 100 % of the steps with the largest spread; random steps would hold 40 %, the best "
        "fixed ones 100 %."
    )
    assert words[4].startswith("Prompts: not asked.")


def test_what_is_particular_to_a_prompt_is_found_where_it_is_there():
    entropy = np.random.default_rng(0).random((20, 5))
    chosen = np.argsort(np.argsort(-entropy, axis=1), axis=1) < 2
    found = by_step(entropy, entropy**2, chosen)
    (own,) = found.own
    assert own.rho > 0.9
    assert found.overlap == 1.0
    assert found.fixed < 0.8
    words = findings(Evidence("joint", 20, found, None))
    assert words[1].endswith("entropy tells more.")
    assert ", it tells where its rewards spread more than usual" in words[2]


def test_no_relation_is_called_no_evidence_and_an_opposite_one_by_its_name():
    rng = np.random.default_rng(1)
    unrelated = by_step(rng.random((30, 5)), rng.random((30, 5)))
    assert findings(Evidence("joint", 30, unrelated, None))[0].startswith("Steps: no evidence that rewards spread more")
    entropy = rng.random((30, 5))
    assert findings(Evidence("joint", 30, by_step(entropy, -entropy), None))[0].startswith("Steps: rewards spread less")


def test_a_flat_curve_has_no_correlation():
    found = by_step(np.ones((5, 5)), np.random.default_rng(0).random((5, 5)))
    assert math.isnan(found.along[0].rho)
    assert found.along[0].interval is None
    assert "undefined not possible" in findings(Evidence("joint", 5, found, None))[0]


def prompts_that(*correlations: Correlation) -> Evidence:
    step = by_step(np.tile(np.linspace(1, 0, 5), (4, 1)), np.random.default_rng(0).random((4, 5)))
    outcomes, halves = {"reward gain": np.zeros(4)}, {"reward gain": 0.5}
    found = PromptEvidence(10, 20, 10, outcomes, halves, correlations, 0.05, Interval(0.02, 0.08))
    return Evidence("joint", 4, step, found)


def test_the_verdict_on_prompts_goes_by_corrected_p():
    weak = Correlation("delta joint", "reward gain", 0.3, Interval(0.05, 0.5), 0.2)
    strong = Correlation("delta image-text", "reward gain", -0.6, Interval(-0.8, -0.4), 0.001)
    words = findings(prompts_that(weak, strong))[4:]
    assert words == (
        "Prompts: no evidence that delta-entropy of block joint at step 10 tells a prompt's learning value; rank "
        "correlations from +0.05 to +0.50 are not excluded.",
        "reward gain: +0.30 [+0.05, +0.50], p 0.2.",
        "Other pairs that hold once corrected for 2 comparisons: delta image-text with reward gain (-0.60).",
        "Rank correlation of two halves of each measurement, which bounds what could be seen: reward gain +0.50.",
        "Gradients of two halves of a group have a cosine of +0.05 [+0.02, +0.08] on average; without noise it would "
        "be 1.",
    )
    sure = Correlation("delta joint", "reward gain", 0.5, Interval(0.3, 0.7), 0.01)
    words = findings(prompts_that(sure))
    assert words[4] == "Prompts: a higher delta-entropy of block joint at step 10 goes with more reward gain."
    tables = list(evidence_tables(prompts_that(sure)))
    assert tables[1].rows == (("delta joint and reward gain", "+0.50", "[+0.30, +0.70]", "0.01"),)


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_validate_writes_and_says_everything(tiny_weights, tmp_path, monkeypatch):
    for name, few in (("evidence.CHILDREN", 3), ("evidence.NOISES", 2), ("groups.GROUP", 4)):
        monkeypatch.setattr(f"aegpo.report.profile.{name}", few)
    monkeypatch.setattr("aegpo.report.statistics.RESAMPLES", 60)
    (tmp_path / "x.yaml").write_text(f"""
name: x
training_steps: 2
model: {{kind: shapes, weights: {tiny_weights}}}
prompts: {{train_count: 4, evaluation_count: 4}}
rollouts: {{prompts_per_step: 2, rollouts_per_step: 8, denoising_steps: 4}}
rewards: [palette]
allocator: {{kind: entropy, low: 2, high: 6}}
selector: {{kind: entropy-peak, top_k: 2}}
tree: branching
sampler: flow-sde
advantage: group
objective: clipped
evaluation: {{every: 2, images: 2}}
checkpoint: {{every: 1}}
""")
    for words in (["run", str(tmp_path / "x.yaml"), "--out", str(tmp_path), "--no-report"],):
        assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    out = tmp_path / "profile"
    words = ["profile-entropy", str(tmp_path / "x"), "--checkpoint", "1", "--validate", "--out", str(out)]
    words += ["--plugin", str(ROOT / "tests" / "settling.py")]
    words += [word for name in ("change", "restlessness", "step-noise") for word in ("--signal", name)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "Steps: " in done.stdout
    assert "delta-entropy of block joint at step 1" in done.stdout
    assert re.search(r"^Signal change: .* over steps, .* of a prompt's own\.$", done.stdout, re.MULTILINE)
    assert "signal restlessness and reward gain" in done.stdout
    with (out / "steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["prompt"], row["step"]) for row in rows] == [(str(p), str(s)) for p in range(4) for s in range(3)]
    with (out / "correlations.csv").open(newline="") as file:
        asked = [row["question"] for row in csv.DictReader(file)]
    assert (asked.count("steps"), asked.count("steps, own deviation"), asked.count("prompts")) == (9, 7, 21)
    page = (out / "profile.html").read_text()
    assert "Does the signal mean anything here?" in page
    assert {"steps-evidence.png", "prompts-evidence.png"} <= {path.name for path in out.glob("*.png")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--signal", "step-noise"), "--signal step-noise is validated beside entropy; it needs --validate"),
        (("--validate", "--signal", "entropi"), "--signal entropi: no source provides it; did you mean 'entropy'?"),
        (
            ("--validate", "--signal", "reward-mean"),
            "--signal reward-mean has values by prompt, which are compared with what prompts bring in a run; give the "
            "folder of one",
        ),
    ],
)
def test_a_signal_that_cannot_be_validated_says_why(words, message, tiny_weights, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence_module, "CHILDREN", 2)
    path = tmp_path / "x.yaml"
    path.write_text(
        f"model: {{kind: shapes, weights: {tiny_weights}}}\nrewards: [palette]\n"
        "prompts: {train_count: 4, evaluation_count: 4}\n"
        "rollouts: {prompts_per_step: 2, rollouts_per_step: 8, denoising_steps: 4}\n"
    )
    done = aegpo("profile-entropy", str(path), *words, "--out", str(tmp_path / "profile"))
    assert done.code == 2
    assert message in done.stderr
