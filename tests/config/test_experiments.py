"""Every experiment that ships: it loads, says what it is, and each of its numbers says where it comes from."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache

import pytest
from repository import ROOT, shipped, sized
from typer.testing import CliRunner

from aegpo.commands.cli import app
from aegpo.config.loading import load_experiment_file, parse_experiment
from aegpo.config.marks import Marked
from aegpo.config.parsing import parse
from aegpo.method.costs import cost, gradient_rows_of, update_work
from aegpo.method.planning import made_up_signals, plan_step
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.rewards.palette import PaletteReward
from aegpo.train.engine import Engine

FOLDER = ROOT / "experiments"
FILES = shipped(FOLDER, "*.yaml")
ABLATION, BASELINES = FOLDER / "ablation.yaml", FOLDER / "baselines.yaml"
VARIANTS, CONTROLS = FOLDER / "aegpo_on_variants.yaml", FOLDER / "controls.yaml"
EQUAL = 0.04  # of the mean: what whole numbers of rollouts allow
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def registries():
    return load_registries(plugin_manager())


def marked(path) -> Marked:
    document, mistakes = parse(path.read_text(), str(path))
    assert not mistakes
    return document


def numbers(value: Marked):
    """Every number below a marked value."""
    below = value.children.values() if value.children else value.value if isinstance(value.value, tuple) else ()
    if isinstance(value.value, int | float) and not isinstance(value.value, bool):
        yield value
    for child in below:
        yield from numbers(child)


def header(path) -> str:
    rows = path.read_text().splitlines()
    return "\n".join(rows[: next(i for i, row in enumerate(rows) if not row.startswith("#"))])


def test_there_are_the_experiments_that_the_readme_names():
    named = {"ablation.yaml", "smoke.yaml", "baselines.yaml", "aegpo_on_variants.yaml", "controls.yaml"}
    named |= {"flux_aegpo.yaml", "flux_dance_grpo.yaml", "sd35_aegpo.yaml", "sd35_flow_grpo.yaml"}
    named |= {"sdxl_aegpo.yaml", "sd15_ddpo.yaml"}
    assert named <= {path.name for path in FILES}
    index = (FOLDER / "README.md").read_text()
    assert all(f"`{path.name}`" in index for path in FILES)


@each_file
def test_every_arm_loads_under_every_seed(path, registries):
    file = load_experiment_file(path, registries)
    for arm in file.arms:
        for seed in file.seeds:
            assert file.experiment(arm, seed).seed == seed


@each_file
def test_every_arm_survives_the_way_through_a_manifest(path, registries):
    for experiment in load_experiment_file(path, registries).arms.values():
        written = experiment.model_dump(mode="json")
        assert parse_experiment(written, registries).model_dump(mode="json") == written


@sized(FILES)
def test_check_shows_every_arm(path, registries):
    result = CliRunner().invoke(app, ["check", str(path)], catch_exceptions=False)
    assert result.exit_code == 0
    for arm in load_experiment_file(path, registries).arms:
        assert re.search(rf"^\S {arm} ", result.stdout, re.MULTILINE)


@each_file
def test_the_file_is_named_after_its_experiment(path, registries):
    assert load_experiment_file(path, registries).name == path.stem


@each_file
def test_the_header_says_what_the_file_is_and_what_it_reproduces(path, registries):
    text = header(path)
    assert text.lower().startswith(f"# {path.stem}:")
    assert "eproduces" in text
    arms = marked(path).children.get("arms")
    for arm in arms.children if arms is not None else ():
        assert re.search(rf"^#   {arm} ", text, re.MULTILINE), f"arm {arm!r} is not in the header"


@each_file
def test_every_number_says_in_a_trailing_comment_where_it_comes_from(path):
    rows = path.read_text().splitlines()
    lines = {value.mark.line for value in numbers(marked(path))}
    silent = [f"{line}: {rows[line - 1]}" for line in sorted(lines) if not re.search(r"\s# \S+", rows[line - 1])]
    assert not silent, "\n".join(["numbers without a source", *silent])


@each_file
def test_the_file_says_what_was_run_of_it_and_its_numbers_are_where_it_says(path, registries):
    measured = load_experiment_file(path, registries).measured
    assert measured is not None
    if measured == "never":
        assert re.search(rf"`{path.name}` \|[^\n]*not run", (FOLDER / "README.md").read_text())
    else:
        assert f"experiments/{path.name}" in measured.command
        assert path.name in (ROOT / measured.numbers).read_text()


def test_the_arms_of_the_ablation_cost_the_same_rollouts(registries):
    arms = load_experiment_file(ABLATION, registries).arms
    leaves = {arm: str(cost(experiment).leaves) for arm, experiment in arms.items()}
    assert len(set(leaves.values())) == 1, leaves


def test_the_control_of_the_ablation_differs_from_aegpo_only_in_who_chooses(registries):
    arms = load_experiment_file(ABLATION, registries).arms
    aegpo, control = (arms[arm].model_dump(mode="json") for arm in ("aegpo", "control"))
    assert {key for key in aegpo if aegpo[key] != control[key]} == {"about", "allocator", "selector", "signals"}
    assert (list(aegpo["signals"]), control["signals"]) == (
        ["entropy"],
        {},
    )  # which is measured where somebody reads it
    for axis in ("allocator", "selector"):
        shared = set(control[axis]) - {"kind"}
        assert control[axis]["kind"] == "random"
        assert {key: control[axis][key] for key in shared} == {key: aegpo[axis][key] for key in shared}


def test_the_ablation_scores_palette_and_scene_whichever_it_trains_on(registries):
    file = load_experiment_file(ABLATION, registries)
    for experiment in file.arms.values():
        kinds = {spec.kind for spec in (*experiment.rewards, *experiment.evaluation.rewards)}
        assert {"palette", "scene"} <= kinds
        assert len(file.seeds) >= 3
        assert experiment.prompts.train_count >= 200


# --- baselines, variants, controls -----------------------------------------------------------------------------------


def dearest(experiment) -> float:
    """Work of a step at its dearest with the probe: entropy peaks of the embedded model lie early, where it is.

    An arm whose ending is cut short is cheap with early steps: there it is the mean over the run, with early peaks.
    """
    found = cost(experiment)
    if experiment.rollouts.tail is None:
        return found.work.high + found.signals
    early = list(made_up_signals(experiment))[1 if experiment.sources else 0]
    plans = [plan_step(experiment, replace(early, step=step)) for step in range(2, experiment.training_steps + 1)]
    learned = [update_work(experiment, plan, gradient_rows_of(experiment, plan)) for plan in plans]
    return sum(plan.forwards + each for plan, each in zip(plans, learned, strict=True)) / len(plans) + found.signals


@pytest.mark.parametrize("path", [BASELINES, VARIANTS], ids=lambda path: path.stem)
def test_arms_cost_the_same_work_in_every_step(path, registries):
    work = {arm: dearest(experiment) for arm, experiment in load_experiment_file(path, registries).arms.items()}
    middle = (min(work.values()) + max(work.values())) / 2
    off = {arm: round(each / middle - 1, 3) for arm, each in work.items()}
    assert all(abs(each) <= EQUAL for each in off.values()), off


@pytest.mark.parametrize("path", [BASELINES, VARIANTS], ids=lambda path: path.stem)
def test_every_arm_takes_two_optimizer_steps_on_the_same_prompts(path, registries):
    file = load_experiment_file(path, registries)
    first = next(iter(file.arms.values()))
    for experiment in file.arms.values():
        assert experiment.optimizer.rollouts_per_update * 2 == experiment.rollouts.rollouts_per_step
        assert experiment.optimizer.learning_rate == first.optimizer.learning_rate
        assert (experiment.prompts, experiment.evaluation) == (first.prompts, first.evaluation)
        assert experiment.rollouts.prompts_per_step == first.rollouts.prompts_per_step
        assert experiment.prompts.train_count == file.arms["aegpo"].training_steps * 4  # each prompt once
    assert len(file.seeds) >= 3


def test_every_variant_keeps_its_objective_and_sampler_and_gets_aegpos_decisions(registries):
    before, after = (load_experiment_file(path, registries).arms for path in (BASELINES, VARIANTS))
    assert before.keys() == after.keys()
    for arm, experiment in after.items():
        assert experiment.selector.kind == "entropy-peak"
        assert experiment.allocator.kind == "entropy"
        for axis in ("objective", "sampler"):
            assert getattr(experiment, axis) == getattr(before[arm], axis), (arm, axis)


def test_no_arm_gets_a_warning_without_saying_why(registries):
    for path in FILES:
        assert load_experiment_file(path, registries).warnings == (), path.name


def test_controls_cost_the_same_rollouts_and_change_one_decision_each(registries):
    arms = load_experiment_file(CONTROLS, registries).arms
    assert len({str(cost(experiment).leaves) for experiment in arms.values()}) == 1
    for arm, experiment in arms.items():
        if arm.startswith("allocation"):
            assert experiment.selector == arms["grpo"].selector
            assert experiment.tree == arms["grpo"].tree
        if arm.startswith("selection"):
            assert experiment.allocator == arms["grpo"].allocator
            assert experiment.tree == arms["selection"].tree


def test_no_arm_is_missing_from_the_paper_index(registries):
    index = (FOLDER / "README.md").read_text()
    for arm in load_experiment_file(BASELINES, registries).arms:
        assert re.search(rf"^\| [^|]+\| [^|]+\| `{re.escape(arm)}` \|", index, re.MULTILINE), arm


def cut_down(experiment):
    """The same parts with 2 prompts that come again, 4 or 8 rollouts each (a trunk needs 8), and two updates a step."""
    low = 8 if experiment.tree.kind == "trunk" else 4
    bounds = {"low": low, "high": 2 * low} if "low" in type(experiment.allocator).model_fields else {}
    changes = {
        "allocator": experiment.allocator.model_copy(update=bounds),
        "rollouts": experiment.rollouts.model_copy(update={"prompts_per_step": 2, "rollouts_per_step": 3 * low}),
        "optimizer": experiment.optimizer.model_copy(update={"rollouts_per_update": 3 * low // 2}),
        "prompts": experiment.prompts.model_copy(update={"train_count": 2}),
    }
    return experiment.model_copy(update=changes)


@cache
def arms_of(path):
    return load_experiment_file(path, load_registries(plugin_manager())).arms


def named_arms(path) -> list[str]:
    base = marked(FOLDER / str(marked(path).children["extends"].value))
    return list(dict.fromkeys([*base.children["arms"].children, *marked(path).children["arms"].children]))


COMPOSED = [(path, arm) for path in (VARIANTS, CONTROLS) for arm in named_arms(path)]


@pytest.mark.parametrize(("path", "arm"), COMPOSED, ids=[f"{path.stem}-{arm}" for path, arm in COMPOSED])
def test_every_composed_arm_learns_from_two_steps(path, arm, tiny_spec):
    assert list(arms_of(path)) == named_arms(path)
    experiment = cut_down(arms_of(path)[arm])
    # what an untrained network paints has no objects, for which `scene` gives nothing at all
    smooth = {"rewards": (PaletteReward(),), "evaluation": experiment.evaluation.model_copy(update={"rewards": ()})}
    experiment = experiment.model_copy(update={"model": tiny_spec, **smooth})
    engine = Engine.build(experiment)
    before = {name: value.clone() for name, value in engine.policy.model.policy.state_dict().items()}
    reports = [engine.step(number) for number in (1, 2)]
    assert all(math.isfinite(value) for report in reports for value in report.metrics.values())
    assert all(report.metrics["trained_edges"] > 0 for report in reports)
    assert any(not value.equal(before[name]) for name, value in engine.policy.model.policy.state_dict().items())
    if experiment.allocator.reads == ("entropy-delta",):
        assert sorted(reports[1].counts) == [experiment.allocator.low, experiment.allocator.high]
