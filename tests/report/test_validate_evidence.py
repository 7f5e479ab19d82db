"""`aegpo profile-entropy --validate`: its plans are proper plans of any size, and its documented command works."""

from __future__ import annotations

import csv
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner
from worlds import small_experiment

from aegpo.commands.cli import app
from aegpo.core import contracts
from aegpo.errors import ContractError
from aegpo.prompts.lists import numbered
from aegpo.report.profile.evidence import CHILDREN, branch_plan, measure_reward_std
from aegpo.train.engine import Engine

PROMPTS = numbered(("a red circle", "two blue squares", "three green triangles"))


@pytest.fixture
def root(pytestconfig) -> Path:
    return pytestconfig.rootpath


@pytest.fixture
def workplace(root, tmp_path, monkeypatch) -> Path:
    """A folder in which the documented commands mean what they say."""
    (tmp_path / "experiments").symlink_to(root / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documented(root) -> list[list[str]]:
    """The words of every command of the page that says what `--validate` found."""
    block = re.search(r"^```bash\n(.*?)^```$", (root / "experiments" / "ENTROPY.md").read_text(), re.M | re.S)
    assert block is not None
    return [shlex.split(line)[1:] for line in block[1].replace("\\\n", "").splitlines()]


def correlations(out: Path) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    with (out / "correlations.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = ("question", "predictor", "outcome")
    return {tuple(row[key] for key in keys): tuple(float(row[key]) for key in ("rho", "low", "high")) for row in rows}


@pytest.mark.parametrize("prompts", [1, 3, 8])
def test_the_plan_of_the_evidence_passes_the_contract_of_every_plan(prompts):
    steps = np.arange(9)
    plan, branched = branch_plan(prompts, 10, steps, CHILDREN)
    counts = np.full(prompts, 1 + CHILDREN * len(steps))
    contracts.check_plan("any", plan, counts, np.zeros((prompts, 10), dtype=bool))
    for prompt in range(prompts):
        assert np.bincount(branched[plan.group == prompt] + 1).tolist() == [1] + [CHILDREN] * len(steps)


def test_a_plan_whose_children_are_in_another_order_is_refused_with_the_way_out():
    plan, _ = branch_plan(2, 3, np.arange(2), children=2)
    order = np.argsort(plan.noisy[0], kind="stable")  # the trunks' own children first
    fields = {field: (vars(plan)[field][0][order], *vars(plan)[field][1:]) for field in ("parent", "noisy", "trained")}
    other = replace(plan, prompt=(plan.prompt[0], plan.prompt[1][order], *plan.prompt[2:]), **fields)
    with pytest.raises(ContractError, match="'mine' planned children at denoising step 0 in another order than their "):
        contracts.check_forest("'mine'", other, np.full(2, 5), 3)


def test_the_spread_of_rewards_does_not_depend_on_how_many_nodes_are_worked_on_at_once(tiny_spec):
    experiment, found = small_experiment(tiny_spec), []
    for micro_batch in (64, 5):  # a level in one piece, and in many
        rollouts = experiment.rollouts.model_copy(update={"micro_batch": micro_batch})
        engine = Engine.build(experiment.model_copy(update={"rollouts": rollouts}))
        found.append(measure_reward_std(engine, PROMPTS, np.arange(3), 8, lambda line: None))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_documented_command_on_the_base_finds_the_documented_correlations(root, workplace):
    words = documented(root)[0]
    assert words == ["profile-entropy", "experiments/ablation.yaml", "--validate"]
    done = CliRunner().invoke(app, [*words, "--out", "profile"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "192 prompts" in done.output
    found = correlations(Path("profile"))
    text = (root / "experiments" / "ENTROPY.md").read_text()
    for block in ("joint", "image-image", "image-text", "text-image", "text-text"):
        row = re.search(rf"^\| {block} \| ([-+.\d]+) \[([-+.\d]+), ([-+.\d]+)\]", text, re.M)
        assert row is not None, "the page has a row for each block"
        given = [float(number) for number in row.groups()]
        np.testing.assert_allclose(found["steps", block, "std of rewards"], given, atol=0.015)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_documented_command_on_a_run_answers_about_all_its_prompts(root, workplace):
    """The documented run, of two steps and an eighth of the prompts."""
    run = documented(root)[1]
    assert run[:4] == ["run", "experiments/ablation.yaml", "--arm", "aegpo"]
    short = [
        *("--set", "training_steps=2", "--set", "checkpoint.every=1"),
        *("--set", "evaluation.rewards=[]", "--set", "prompts.evaluation_count=24"),
        "--no-report",
    ]
    done = CliRunner().invoke(app, [*run[:4], "--seed", "0", *short], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    words = documented(root)[2]
    assert words == ["profile-entropy", "runs/ablation/aegpo/seed-0", "--checkpoint", "10", "--validate"]
    words = ["1" if word == "10" else word for word in words]
    done = CliRunner().invoke(app, [*words, "--out", "profile"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "against its base; 24 prompts" in done.output
    questions = {question for question, _, _ in correlations(Path("profile"))}
    assert questions == {"steps", "steps, own deviation", "prompts"}
