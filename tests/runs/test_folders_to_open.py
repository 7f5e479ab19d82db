"""Which folders commands open: a run's, an arm's, an experiment's; the same ones, and the same errors, everywhere."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aegpo.commands.cli import app, main
from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run import launch
from aegpo.errors import AegpoError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.runs.opening import Options, begun_runs, find_arm, find_run, run_folders

MADE = Path(__file__).parents[1] / "data" / "run-0.1.0"
ONE = ("out/one/grpo/seed-0", "out/one/grpo", "out/one")  # a run, and what has it alone
WORDS = {
    "sample": ["--prompt", "two red circles", "--out", "made"],
    "export": ["--to", "made", "--full"],
    "evaluate": ["--out", "made"],
    "profile-entropy": ["--out", "made", "--layers", "transformer_blocks.0.*"],
}


@pytest.fixture
def registries():
    return load_registries(plugin_manager())


@pytest.fixture(autouse=True)
def _there(tmp_path, monkeypatch):
    """`out/small` with two arms of two seeds, and `out/one` with one run."""
    shutil.copytree(MADE / "small", tmp_path / "out" / "small")
    shutil.copytree(MADE / "weights", tmp_path / "weights")
    shutil.copytree(MADE / "small" / "grpo" / "seed-0", tmp_path / "out" / "one" / "grpo" / "seed-0")
    monkeypatch.chdir(tmp_path)


def error_of(capsys, monkeypatch, *words: str) -> str:
    """What a command that fails prints."""
    monkeypatch.setattr(sys, "argv", ["aegpo", *words])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    return capsys.readouterr().err.partition("error: ")[2].rstrip("\n")


# --- what is opened --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize("folder", ONE)
def test_every_command_takes_a_run_and_what_has_one_run_below_it(command, folder):
    done = CliRunner().invoke(app, [command, folder, *WORDS[command]], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert any(Path("made").iterdir())


@pytest.mark.parametrize("folder", ONE)
def test_a_run_is_the_same_by_whichever_folder_it_is_named(registries, folder):
    found = find_run(Path(folder), registries)
    assert (found.folder, found.arm, found.seed, found.step) == (Path("out/one/grpo/seed-0"), "grpo", 0, 3)
    assert found.steps == (3,)
    assert [each.label for each in find_arm(Path(folder), registries)] == [found.label]


def test_options_name_one_of_several_runs(registries):
    found = find_run(Path("out/small"), registries, options=Options(("aegpo",), (1,)))
    assert found.folder == Path("out/small/aegpo/seed-1")
    again = find_run(Path("out/small/aegpo"), registries, options=Options(seeds=(1,)))
    assert again.folder == found.folder


def test_a_folder_that_is_called_like_a_seed_but_is_none_is_no_run():
    Path("out/small/grpo/seed-0").rename("out/small/grpo/seed-old")
    assert run_folders(Path("out/small/grpo")) == [Path("out/small/grpo/seed-1")]


# --- what is refused -------------------------------------------------------------------------------------------------

SEVERAL = "\n  out/small/grpo/seed-0\n  out/small/grpo/seed-1"
OF_EVERY_ARM = f"\n  out/small/aegpo/seed-0\n  out/small/aegpo/seed-1{SEVERAL}"


@pytest.mark.parametrize("command", ["sample", "export"])
def test_several_runs_are_listed(command, capsys, monkeypatch):
    error = error_of(capsys, monkeypatch, command, "out/small/grpo", *WORDS[command])
    assert error == f"out/small/grpo holds 2 runs; name one of them:{SEVERAL}"


def test_a_command_with_options_that_choose_names_them(capsys, monkeypatch):
    words = WORDS["profile-entropy"]
    error = error_of(capsys, monkeypatch, "profile-entropy", "out/small/grpo", *words)
    assert error == f"out/small/grpo holds 2 runs; name one of them, or choose it with --seed:{SEVERAL}"
    error = error_of(capsys, monkeypatch, "profile-entropy", "out/small", *words)
    assert error == f"out/small holds 4 runs; name one of them, or choose it with --arm and --seed:{OF_EVERY_ARM}"


def test_evaluate_takes_the_seeds_of_one_arm_and_lists_several_arms(capsys, monkeypatch):
    error = error_of(capsys, monkeypatch, "evaluate", "out/small", *WORDS["evaluate"])
    assert error == "out/small holds 2 arms; name one of them:\n  out/small/aegpo\n  out/small/grpo"


@pytest.mark.parametrize("command", [*WORDS, "run"])
def test_a_folder_without_a_run_is_told_in_the_same_words_everywhere(command, capsys, monkeypatch):
    Path("empty").mkdir()
    error = error_of(capsys, monkeypatch, command, "empty", *WORDS.get(command, []))
    assert error == "empty is not the folder of a run: a run has a manifest.json; give OUT/NAME/ARM/seed-S"


def test_an_option_that_names_no_run_says_which_there_are(registries):
    with pytest.raises(AegpoError, match="--seed 7: out/small has no run of that seed; those there are: 0, 1"):
        find_run(Path("out/small"), registries, options=Options(seeds=(7,)))
    with pytest.raises(
        AegpoError, match="--arm aegpoo: out/small has no run of that arm; those there are: aegpo, grpo"
    ):
        find_run(Path("out/small"), registries, options=Options(arms=("aegpoo",)))


# --- going on by a folder --------------------------------------------------------------------------------------------

TINY = """
name: tiny
training_steps: 2
seeds: [0, 1]
device: cpu
model: {kind: shapes, weights: weights}
prompts: {train_count: 4, evaluation_count: 2}
rewards: [palette]
rollouts: {prompts_per_step: 2, rollouts_per_step: 4, denoising_steps: 4}
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: {kind: clipped, clip: 1.0e-3}
checkpoint: {every: 1}
"""


def trained(*words: str) -> str:
    done = CliRunner().invoke(app, ["run", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def to_the_first_step(run: Path) -> None:
    """As if the run had been stopped after its first step."""
    (run / "finished.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000002")


def rows(run: Path) -> dict[str, bytes]:
    return {name: (run / f"{name}.jsonl").read_bytes() for name in ("metrics", "evaluations")}


@pytest.mark.slow
def test_a_stopped_run_goes_on_by_its_folder_to_the_same_bytes_without_its_file():
    Path("tiny.yaml").write_text(TINY)
    trained("tiny.yaml", "--out", "out", "--seed", "0", "--no-report")
    run = Path("out/tiny/main/seed-0")
    straight = rows(run)
    Path("tiny.yaml").unlink()
    for folder in ("out/tiny/main/seed-0", "out/tiny/main", "out/tiny"):
        to_the_first_step(run)
        output = trained(folder)
        assert rows(run) == straight
        assert (run / "finished.json").exists()
        assert str(Path("out/tiny/report.html")) in output.replace("\n", "")


def test_every_run_below_a_folder_goes_on_seed_by_seed(registries):
    runs = begun_runs(Path("out/small"), registries, Options())
    assert [(run.arm, run.seed) for run in runs] == [("aegpo", 0), ("grpo", 0), ("aegpo", 1), ("grpo", 1)]
    assert [run.seed for run in begun_runs(Path("out/small"), registries, Options(("grpo",), (1,)))] == [1]


@pytest.mark.slow
def test_several_stopped_runs_go_on_in_processes_of_their_own():
    Path("tiny.yaml").write_text(TINY)
    trained("tiny.yaml", "--out", "out", "--no-report")
    for seed in (0, 1):
        to_the_first_step(Path(f"out/tiny/main/seed-{seed}"))
    assert launch(LaunchRequest(Path("out/tiny/main"), report=False, jobs=1)) == 0
    for seed in (0, 1):
        assert json.loads(Path(f"out/tiny/main/seed-{seed}/finished.json").read_text()) == {"step": 2}


@pytest.mark.parametrize("words", [["--set", "seed=1"], ["--fresh"], ["--out", "elsewhere"]])
def test_what_a_manifest_settles_cannot_be_given_again(words, capsys, monkeypatch):
    error = error_of(capsys, monkeypatch, "run", "out/one", *words)
    assert error == (
        f"{words[0]}: the runs in out/one go on as their manifests say and where they are; leave the option out, or "
        "give the experiment file"
    )


def test_a_run_that_was_moved_goes_on_and_no_report_is_written_elsewhere(capsys):
    Path("out/one/grpo/seed-0").rename("alone")
    before = sorted(Path().iterdir())
    assert launch(LaunchRequest(Path("alone"))) == 0
    printed = capsys.readouterr()
    assert "grpo seed 0: finished before, skipped" in printed.out
    assert "alone: no report is written, for its runs are not at OUT/NAME/ARM/seed-S" in printed.err
    assert sorted(Path().iterdir()) == before
