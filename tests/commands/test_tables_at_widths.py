"""Every table of the command line in terminals of 80 and 120 columns, and plainly."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from command_line import aegpo
from repository import ROOT, sized
from rich.cells import cell_len
from rich.console import Console

from aegpo.commands import describe
from aegpo.commands.cli import COMMANDS
from aegpo.commands.footprints import footprints, holdings
from aegpo.config.loading import load_experiment_file
from aegpo.core.sections import GIB
from aegpo.core.sheets import Sheet, print_sheet
from aegpo.method.balance import balances
from aegpo.method.costs import costs
from aegpo.plugin.manager import load_registries, plugin_manager

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
DRAWN = re.compile("[\u2500-\u259f\u2026\x1b]")  # lines, blocks, an ellipsis, colour


def table_of(monkeypatch, width: int, *words: str) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    done = aegpo(*words)
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(cell_len, lines)) <= width, max(lines, key=cell_len)
    assert "…" not in done.stdout
    return done.stdout


def sheets_of(path) -> list[Sheet]:
    """The tables of `check`, as for a GPU of 24 GiB and runs on two of them."""
    file = load_experiment_file(path, load_registries(plugin_manager()))
    needs = footprints(file)
    shared = {arm: balances(experiment, [(2, 2)])[0] for arm, experiment in file.arms.items()}
    held = {room: holdings(file, 2, needs, room) for room in (24 * GIB, None)}
    sheets = [describe.costs(file, costs(file.arms)), describe.on_gpus(file, 2, shared)]
    sheets += [describe.by_phase(2, each, room) for room, each in held.items() if each]
    sheets += [describe.differences(file)] if len(file.arms) > 1 else []
    return [*sheets, *([describe.memory(needs, 24 * GIB)] if needs else [])]


@sized(EXPERIMENTS)
def test_tables_of_a_shipped_experiment_fit_and_keep_every_word(path):
    for sheet in sheets_of(path):
        for width in (80, 120):
            stream = io.StringIO()
            print_sheet(sheet, Console(file=stream, width=width))
            text = stream.getvalue()
            assert max(map(cell_len, text.splitlines())) <= width
            assert "…" not in text
            for word in " ".join((*sheet.columns, *(row[0] for row in sheet.rows))).split():
                assert word in text
            for cells in sheet.rows if sheet.numbers else ():
                assert all(word in text for cell in cells for word in cell.split())


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["ablation", "baselines", "controls", "smoke"])
def test_all_that_check_prints_fits(monkeypatch, tmp_path, name, width):
    monkeypatch.chdir(tmp_path)
    text = table_of(monkeypatch, width, "check", str(ROOT / "experiments" / f"{name}.yaml"), "--gpus", "2")
    assert "measured: " in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_of_parts_and_the_fields_of_each_fit(monkeypatch, width):
    listed = table_of(monkeypatch, width, "plugins")
    for registry in load_registries(plugin_manager()):
        for entry in registry:
            assert f"{registry.axis}/{entry.name}" in listed
            fields = table_of(monkeypatch, width, "plugins", f"{registry.axis}/{entry.name}")
            assert all(field in fields for field in entry.spec.model_fields if field != "kind")


@pytest.mark.parametrize("words", [("check", str(EXPERIMENTS[0])), ("plugins",), ("plugins", "trees/trunk")])
def test_plainly_there_are_no_lines_and_no_colours_but_every_fact(monkeypatch, words):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = aegpo(*words, "--plain").stdout
    assert not DRAWN.search(text)
    assert "AEGPO_PLAIN" not in os.environ
    assert "NO_COLOR" not in os.environ
    assert DRAWN.search(aegpo(*words).stdout)


def test_plainly_check_says_what_it_says_otherwise():
    lines = aegpo("check", str(ROOT / "experiments" / "ablation.yaml"), "--plain").stdout.splitlines()
    assert "What a training step costs" in lines
    assert "allocator.kind, control: random" in lines
    assert "aegpo, signals: 80 + 2,400 once" in lines
    assert "control, work of all: 78,840-91,440" in lines


def test_every_command_that_prints_tables_can_print_them_plainly():
    able = {each.__name__ for each in COMMANDS if "plain" in each.__annotations__}
    assert able >= {"run", "check", "evaluate", "profile_entropy", "plugins"}


def in_a_terminal(folder, *words: str, **environment: str) -> str:
    """What a command writes to a terminal of 80 columns and 24 lines."""
    ours, its = pty.openpty()
    os.set_blocking(ours, True)
    size = ["stty", "-F", os.ttyname(its), "cols", "80", "rows", "24"]
    subprocess.run(size, check=True)
    variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    command = [sys.executable, "-m", "aegpo", *words]
    child = subprocess.Popen(
        command, cwd=folder, stdout=its, stderr=its, stdin=its, env=variables | {"TERM": "xterm-256color"} | environment
    )
    os.close(its)
    written = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not read:
            break
        written += read
    os.close(ours)
    assert child.wait() == 0, written.decode()
    return written.decode()


def test_a_terminal_says_how_wide_it_is(tmp_path):
    path = str(ROOT / "experiments" / "baselines.yaml")
    text = re.sub(r"\x1b\[[0-9;]*m", "", in_a_terminal(tmp_path, "check", path))
    assert max(map(cell_len, text.splitlines())) == 80
    assert "…" not in text
    assert not DRAWN.search(in_a_terminal(tmp_path, "check", path, TERM="dumb"))


SPEC = """
name: small
training_steps: 2
seeds: [0]
model: {{kind: shapes, weights: {weights}}}
prompts: {{train_count: 2, evaluation_count: 2}}
rollouts: {{prompts_per_step: 1, rollouts_per_step: 2, denoising_steps: 2}}
rewards: [palette]
allocator: uniform
selector: uniform
tree: independent
sampler: flow-sde
advantage: group
objective: clipped
evaluation: {{every: 1, images: 1}}
trackers: [console]
"""


@pytest.mark.slow
def test_a_run_in_a_terminal_of_80_columns_has_bars_and_plainly_lines(experiment, tmp_path):
    drawn = in_a_terminal(tmp_path, "run", str(experiment), "--out", "drawn", "--no-report")
    assert re.search("━+.* 2/2.* eta", drawn)
    plain = in_a_terminal(tmp_path, "run", str(experiment), "--out", "plain", "--plain")
    assert not DRAWN.search(plain)
    assert "main seed 0: step 2/2  eta 0:00:00  reward" in plain
    assert "main, final: " in plain
