"""Every block of the documentation does what its page says: commands run or are accepted, files load, parts conform."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nox.registry
import page_blocks
import pytest
import typer
from page_blocks import CHEAP, Reader, commands, read
from repository import ROOT, shipped

from aegpo.commands.cli import app
from aegpo.commands.launch_request import LaunchRequest
from aegpo.commands.run import launch
from aegpo.report.profile import csvs

ELSEWHERE = ("plugins", "aegpo/models")  # tests/plugin/test_guide.py; and a page without commands of ours
PAGES = [path for path in shipped(ROOT, "*.md") if not path.relative_to(ROOT).as_posix().startswith(ELSEWHERE)]
LASTING = [path for path in PAGES if "<!--- block: slow -->" in path.read_text(encoding="utf-8")]
EVERYTHING = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
STEP = re.compile(r"\d{6}")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_weights):
    """What the main job leaves of two arms, in the smallest runs there are."""
    out = tmp_path_factory.mktemp("runs")
    cheap = [f"{key}={value}" for key, value in CHEAP.items()]
    overrides = (*cheap, f"model.weights={tiny_weights}", "device=cpu")
    file = ROOT / "experiments" / "ablation.yaml"
    request = LaunchRequest(file, overrides, arms=("grpo", "aegpo"), seeds=(0,), out=out)
    assert launch(request) == 0
    return out


@pytest.fixture
def reader(tmp_path, monkeypatch, runs, tiny_weights):
    """In a folder with the experiments and a finished run, as the reader of a page would be."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    shutil.copytree(runs, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(nox.registry, "_REGISTRY", {})
    return Reader(tmp_path, tiny_weights)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_every_block_of_a_page_does_what_the_page_says(path, reader):
    read(path, reader)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", LASTING, ids=name)
def test_what_takes_long_does_too(path, reader):
    reader.slow = True
    read(path, reader)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("```bash\naegpo run experiments/ablation.yaml --arms grpo\n```\n", "--arms"),
        ("```bash\naegpo run experiments/ablation.yaml --arm gropo\n```\n", "gropo"),
        ("```bash\naegpo plugins rewards/nothing\n```\n", "nothing"),
        ("```bash\nnox -s nothing\n```\n", "nothing"),
        ("```bash\nwget x\n```\n", "wget"),
        ("```yaml\n# experiments/x.yaml\nextends: smoke.yaml\nname: x\ntrain: 1\n```\n", "train"),
        ("```python\nassert 1 == 2\n```\n", "1 == 2"),
        ("```text\nsomething\n```\n", "something"),
        ("```bash\naegpo plugins\n```\n\n<!--- block: printed -->\n```text\nrewards/nothing\n```\n", "rewards/nothing"),
        ("<!--- block: printed -->\n", "printed"),
    ],
)
def test_a_block_that_does_not_is_found(text, wrong, reader, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises((Exception, SystemExit)) as failure:
        read(path, reader)
    assert wrong in str(getattr(failure.value, "message", failure.value)) + str(failure.getrepr())


def test_every_block_is_of_a_language_that_is_evaluated():
    found = re.findall(r"^```(\w*)$", EVERYTHING, re.MULTILINE)
    assert set(found) - {""} == set(page_blocks.LANGUAGES)
    assert found[1::2] == [""] * (len(found) // 2), "every block says its language"


def test_every_command_is_in_a_block():
    assert {words[0] for path in PAGES for words in commands(path, "aegpo")} >= set(
        typer.main.get_command(app).commands
    )


@pytest.mark.parametrize("command", ["run", "check", "profile-entropy", "evaluate", "sample", "export"])
def test_the_options_of_a_command_are_told_somewhere(command):
    (found,) = [each for key, each in typer.main.get_command(app).commands.items() if key == command]
    options = {option for param in found.params for option in param.opts if option.startswith("--")}
    assert options - {"--help", "--no-report"} <= set(re.findall(r"--[a-z]+(?:-[a-z]+)*", EVERYTHING))


def test_the_columns_of_the_profile_are_told():
    assert all(f"`{column}`" in EVERYTHING for column in (*csvs.ENTROPY, *csvs.PROMPTS))


def test_a_run_leaves_the_folder_that_is_shown(runs):
    (tree,) = re.findall(r"<!--- block: tree -->\n```text\n(.*?)```", EVERYTHING, re.DOTALL)
    assert found_below(runs / "ablation") == described(tree)


def found_below(folder):
    """Paths in a run folder without locks, the other arm and what is inside of checkpoints, report and store."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != ".lock"}
    inside = re.compile(r"aegpo(/|$)|report/.|.base/.|.*/checkpoints/[^/]+/.")
    return {STEP.sub("N", path) for path in paths if not inside.match(path)}


def described(tree):
    """The paths of an indented tree, below its first line."""
    paths, parents = set(), []
    for line in tree.splitlines()[1:]:
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        parents[depth:] = [line.split()[0].rstrip("/")]
        whole = "/".join(parents)
        paths |= {STEP.sub("N", whole)} | {"/".join(parents[: i + 1]) for i in range(depth)}
    return paths
