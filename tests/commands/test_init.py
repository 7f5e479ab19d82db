"""Experiments to begin with: written, copied, found without a copy, and all of them in the wheel."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command_line import aegpo
from repository import ROOT, shipped

from aegpo.config.loading import load_experiment_file
from aegpo.config.shipped import shipped_files, shipped_instead
from aegpo.plugin.manager import load_registries, plugin_manager

NAMES = [path.stem for path in shipped(ROOT / "experiments", "*.yaml")]


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_what_init_writes_runs_at_once_and_has_a_comment_on_every_number():
    done = aegpo("init", "mine")
    assert (done.code, done.stdout) == (0, "mine.yaml\nnext:  aegpo check mine.yaml  and  aegpo run mine.yaml\n")
    text = Path("mine.yaml").read_text()
    assert "name: mine " in text
    assert "NAME" not in text
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if re.match(r"\s*[\d\[]", value) and not key.startswith("#"):
            assert "# " in line, line
    file = load_experiment_file(Path("mine.yaml"), load_registries(plugin_manager()))
    assert (file.name, list(file.arms), file.warnings) == ("mine", ["grpo", "aegpo"], ())
    smaller = ("training_steps=1", "prompts.evaluation_count=2", "rollouts.denoising_steps=3")
    done = aegpo("run", "mine.yaml", "--arm", "aegpo", *(word for each in smaller for word in ("--set", each)))
    assert done.code == 0, done.stderr
    assert Path("runs/mine/report.html").is_file()


def test_without_a_name_the_file_has_one_and_nothing_is_written_over():
    assert aegpo("init").stdout.startswith("first.yaml\n")
    Path("first.yaml").write_text("mine")
    done = aegpo("init")
    assert (done.code, done.stderr) == (2, "error: first.yaml is there already; give another name, or move it\n")
    Path("ablation.yaml").write_text("another")
    done = aegpo("init", "--from", "smoke")
    assert (done.code, done.stderr) == (2, "error: ablation.yaml is there already; give another name, or move it\n")
    assert sorted(path.name for path in Path().iterdir()) == ["ablation.yaml", "first.yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_experiment_under_a_name_of_its_own_and_claims_no_measurement(name):
    assert aegpo("init", "mine", "--from", name).code == 0
    registries = load_registries(plugin_manager())
    copied = load_experiment_file(Path("mine.yaml"), registries)
    original = load_experiment_file(ROOT / "experiments" / f"{name}.yaml", registries)
    assert (copied.name, copied.measured) == ("mine", None)
    assert copied.seeds == original.seeds
    assert copied.verdict == original.verdict
    assert {arm: each.model_copy(update={"name": name}) for arm, each in copied.arms.items()} == {
        arm: each.model_copy(update={"name": name}) for arm, each in original.arms.items()
    }


def test_copies_that_extend_the_same_file_share_it():
    for name in ("smoke", "controls"):
        assert aegpo("init", "--from", name).code == 0
    assert sorted(path.name for path in Path().iterdir()) == ["ablation.yaml", "controls.yaml", "smoke.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mine.yaml",), "'mine.yaml' cannot be the name of an experiment: at most 100 letters, digits, '.', '_' and "),
        (("mine.yaml",), "leave '.yaml' out: mine"),
        (("a/b",), "'a/b' cannot be the name of an experiment"),
        (("--from", "smokee"), "no experiment that comes with aegpo is called 'smokee'; did you mean 'smoke'?"),
        (("ablation", "--from", "smoke"), "'smoke' extends ablation.yaml, which comes along; choose another name"),
    ],
)
def test_a_name_that_cannot_be_and_an_experiment_that_is_none_are_refused(words, message):
    done = aegpo("init", *words)
    assert done.code == 2
    assert message in done.stderr
    assert not list(Path().iterdir())


def test_the_list_has_a_line_for_every_shipped_experiment():
    lines = aegpo("init", "--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert "smoke              the whole machine in about a minute" in lines
    assert all(len(line.split()) > 4 for line in lines)


def test_a_shipped_file_is_found_where_there_is_none_of_that_path_and_that_is_said():
    done = aegpo("check", "experiments/smoke.yaml")
    assert done.code == 0
    place = ROOT / "experiments" / "smoke.yaml"
    assert done.stderr == (
        f"note: there is no experiments/smoke.yaml here; this is the one that comes with aegpo, {place} ('aegpo init "
        "--from smoke' copies it)\n"
    )
    assert shipped_instead(Path("smoke")) == place
    for other in ("smoke.yaml", "others/smoke.yaml", "experiments/smoke.yml", "experiments/none.yaml", "/x/smoke"):
        assert shipped_instead(Path(other)) is None
    assert aegpo("check", "smoke.yaml").code == 2
    Path("experiments").mkdir()
    Path("experiments/smoke.yaml").write_text("name: mine\n")
    assert shipped_instead(Path("experiments/smoke.yaml")) is None


def test_a_shipped_file_is_extended_by_its_name_where_there_is_none_beside_and_that_is_said():
    Path("x.yaml").write_text("extends: smoke.yaml\nname: x\n")
    done = aegpo("check", "x.yaml")
    assert done.code == 0, done.stderr
    place = ROOT / "experiments" / "smoke.yaml"
    assert (
        f"warning: x.yaml:1:10: extends: no file 'smoke.yaml', so this is the one that comes with aegpo, {place}\n"
        "  extends: smoke.yaml\n           ^\n"
    ) in done.stderr
    Path("smoke.yaml").write_text("extends: x.yaml\n")
    assert "x.yaml extends smoke.yaml extends x.yaml" in aegpo("check", "x.yaml").stderr


@pytest.mark.slow
def test_a_wheel_brings_every_experiment_and_runs_the_readmes_commands_in_an_empty_folder(tmp_path):
    wheels, site, here = tmp_path / "wheels", tmp_path / "site", tmp_path / "here"
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(wheels)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    here.mkdir()
    assert [path.stem for path in sorted((site / "aegpo" / "experiments").iterdir())] == NAMES
    assert list(shipped_files()) == NAMES
    smaller = ["--arm", "grpo", "--set", "training_steps=1", "--set", "prompts.evaluation_count=2"]
    for words in (
        ["init", "--list"],
        ["init", "mine"],
        ["check", "mine.yaml"],
        ["check", "experiments/ablation.yaml"],
        ["run", "experiments/smoke.yaml", *smaller],
        ["sample", "runs/smoke/grpo/seed-0", "--prompt", "two red circles on a green background"],
    ):
        command = [sys.executable, "-c", "import aegpo.commands.cli as cli; cli.main()", *words]
        variables = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=here, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        if "experiments/smoke.yaml" in words:
            assert f"comes with aegpo, {site}/aegpo/experiments/smoke.yaml" in done.stderr
    assert (here / "runs/smoke/report.html").is_file()
