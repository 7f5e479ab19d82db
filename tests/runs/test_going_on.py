"""What a run that goes on is compared with: its experiment by today's defaults, and the rules; the code it names."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

import aegpo
from aegpo.commands.cli import app
from aegpo.config.loading import load_experiment_file
from aegpo.errors import CheckpointError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs import manifest as manifests
from aegpo.runs.folders import Run, run_folder
from aegpo.runs.rules import RULES, changed_rules
from aegpo.runs.software import source_state

EXPERIMENT = """
name: tiny
training_steps: 2
seeds: [0, 1]
device: cpu
model: shapes
rollouts: {prompts_per_step: 4, rollouts_per_step: 48}
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: {kind: clipped, clip: 1.0e-3}
"""
RATE = "optimizer.learning_rate"


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(EXPERIMENT)
    return Path("tiny.yaml")


def a_run(path: Path, *overrides: str, seed: int = 0) -> Run:
    file = load_experiment_file(path, load_registries(plugin_manager()), overrides)
    return Run("main", seed, file.experiment("main", seed), run_folder(Path("runs"), file.name, "main", seed))


def begun(path: Path, change=lambda manifest: None, seed: int = 0) -> Run:
    """A run with one step, whose manifest was changed since."""
    run = a_run(path, seed=seed)
    run.folder.mkdir(parents=True)
    manifest = manifests.open_manifest(run, (), 1)
    change(manifest)
    (run.folder / "manifest.json").write_text(json.dumps(manifest))
    (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


def without_new_fields(manifest):
    """As a version would have written it that did not know these fields yet."""
    del manifest["experiment"]["rollouts"]["decode"]
    del manifest["experiment"]["signals"]
    del manifest["experiment"]["rewards"][0]["weight"]


def other_default(manifest):
    """As a version would have written it that had another default."""
    manifest["experiment"]["optimizer"]["learning_rate"] = 0.25


# --- fields that are new ---------------------------------------------------------------------------------------------


def test_a_field_that_is_new_and_has_its_default_is_no_difference(path):
    run = begun(path, without_new_fields)
    manifests.check_manifest(run)
    assert manifests.changed_batches(run, manifests.read_manifest(run.folder)) == []


def test_a_field_that_is_new_and_is_set_to_something_else_is_a_difference_to_its_default(path):
    begun(path, without_new_fields)
    changed = a_run(path, "rollouts.decode=predicted-clean", "rewards.0.weight=2")
    with pytest.raises(CheckpointError) as caught:
        manifests.check_manifest(changed)
    lines = str(caught.value).splitlines()[1:-1]
    assert lines == ['  rollouts.decode: "final" -> "predicted-clean"', "  rewards[0].weight: 1.0 -> 2.0"]


def test_a_manifest_with_a_field_that_is_gone_is_compared_as_it_is(path):
    run = begun(path, lambda manifest: manifest["experiment"]["optimizer"].update(nesterov=0.5))
    with pytest.raises(CheckpointError, match=r"optimizer\.nesterov: 0\.5 -> \(absent\)"):
        manifests.check_manifest(run)


# --- defaults that changed -------------------------------------------------------------------------------------------


def test_a_default_that_changed_is_told_with_how_to_keep_the_old_one(path):
    run = begun(path, other_default)
    now = run.experiment.optimizer.learning_rate
    with pytest.raises(CheckpointError) as caught:
        manifests.check_manifest(run)
    assert str(caught.value).splitlines()[1] == (
        f"  {RATE}: 0.25 -> {now} (the file does not set it, and its default is this now; to keep the old one, write "
        f"{RATE}: 0.25)"
    )
    manifests.check_manifest(a_run(path, f"{RATE}=0.25"))
    with pytest.raises(CheckpointError, match=rf"{RATE}: 0\.25 -> 0\.5\n"):
        manifests.check_manifest(a_run(path, f"{RATE}=0.5"))


def test_check_says_what_a_default_has_become_since_the_runs_were_begun(path):
    for seed in (0, 1):
        begun(path, other_default, seed)
    done = CliRunner().invoke(app, ["check", str(path)], catch_exceptions=False)
    assert done.exit_code == 0
    now = a_run(path).experiment.optimizer.learning_rate
    assert (
        f"note: main seed 0 and 1 more in runs/tiny cannot go on: {RATE} was 0.25 when begun, tiny.yaml does not set "
        f"it, and its default is {now} now; to keep the old one, write {RATE}: 0.25\n"
    ) in done.stderr
    kept = CliRunner().invoke(app, ["check", str(path), "--set", f"{RATE}=0.25"], catch_exceptions=False)
    assert "cannot go on" not in kept.stderr
    elsewhere = CliRunner().invoke(app, ["check", str(path), "--out", "others"], catch_exceptions=False)
    assert "cannot go on" not in elsewhere.stderr


def test_check_passes_over_a_manifest_it_cannot_read_and_says_so(path):
    run = begun(path)
    (run.folder / "manifest.json").write_text("{")
    done = CliRunner().invoke(app, ["check", str(path)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "note: cannot read runs/tiny/main/seed-0/manifest.json" in done.stderr


# --- rules -----------------------------------------------------------------------------------------------------------


def test_the_rules_are_in_the_manifest_and_those_of_0_1_0_are_all_the_first(path):
    assert manifests.read_manifest(begun(path).folder)["rules"] == RULES
    assert changed_rules(RULES) == []
    first = changed_rules(dict.fromkeys(RULES, 1))
    assert changed_rules({}) == first
    assert first == [
        "was begun under noise rule 1; this version draws noise by rule 2",
        "was begun under decisions rule 1; this version draws prompts, counts and steps by rule 2",
        "was begun under evaluation rule 1; this version paints held-out prompts by rule 2",
        "was begun under cost rule 1; this version counts what a step costs by rule 2",
    ]


def test_a_run_that_was_begun_under_another_rule_does_not_go_on(path):
    run = begun(path, lambda manifest: manifest["rules"].update(noise=7))
    with pytest.raises(CheckpointError) as caught:
        manifests.check_manifest(run)
    assert str(caught.value) == (
        "main seed 0 in runs/tiny/main/seed-0 cannot go on:\n"
        f"  it was begun under noise rule 7; this version draws noise by rule {RULES['noise']}\n"
        f"go on with aegpo {aegpo.__version__}, start the run over with --fresh, or keep both with another --out"
    )


def test_a_rule_that_this_version_does_not_know_is_refused_too(path):
    run = begun(path, lambda manifest: manifest["rules"].update(weather=2))
    with pytest.raises(CheckpointError, match="it was begun under weather rule 2, which this version does not know"):
        manifests.check_manifest(run)


def test_a_finished_run_of_another_rule_is_left_as_it_is(path):
    run = begun(path, lambda manifest: manifest["rules"].update(noise=7))
    run.mark_finished(2)
    manifests.check_manifest(run)


def test_a_run_of_another_rule_that_learned_nothing_is_begun_anew(path):
    run = begun(path, lambda manifest: manifest["rules"].update(noise=7))
    (run.folder / "metrics.jsonl").unlink()
    manifests.check_manifest(run)
    assert manifests.open_manifest(run, (), 1)["rules"] == RULES


# --- the code --------------------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    author = ["-c", "user.name=n", "-c", "user.email=e"]
    command = ["git", "-C", str(folder), *author, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def package(tmp_path) -> Path:
    """A package in a repository, committed; the repository also has an environment that git ignores."""
    folder = tmp_path / "repository" / "aegpo"
    (folder / "runs").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "runs" / "manifest.py").write_text("")
    (folder.parent / ".gitignore").write_text("environment/\n")
    git(folder.parent, "init", "-q")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-q", "-m", "first")
    return folder


def test_the_commit_is_that_of_the_packages_own_source_wherever_it_is_run(package, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    git(tmp_path / "work", "init", "-q")
    git(tmp_path / "work", "commit", "-q", "--allow-empty", "-m", "of the working directory")
    monkeypatch.chdir(tmp_path / "work")
    assert source_state(package) == {"commit": git(package, "rev-parse", "HEAD"), "dirty": False}


@pytest.mark.parametrize("changed", ["runs/manifest.py", "new.py"])
def test_source_that_was_changed_or_added_to_is_dirty(package, changed):
    (package / changed).write_text("changed = True\n")
    assert source_state(package)["dirty"] is True


def test_what_is_beside_the_source_makes_it_not_dirty(package):
    (package.parent / "notes.txt").write_text("mine")
    assert source_state(package)["dirty"] is False


def test_a_package_installed_into_a_folder_of_some_repository_has_no_commit(package):
    installed = package.parent / "environment" / "site-packages" / "aegpo"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert source_state(installed) == {"commit": None, "dirty": None}


def test_a_package_outside_of_any_repository_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "aegpo").mkdir()
    assert source_state(tmp_path / "aegpo") == {"commit": None, "dirty": None}


def test_a_manifest_says_which_code_wrote_it(path):
    manifest = manifests.read_manifest(begun(path).folder)
    assert {name: manifest[name] for name in ("commit", "dirty")} == source_state()
