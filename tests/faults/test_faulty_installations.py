"""Installed plugins that cannot be loaded, plugins that get in each other's way, and parts that end children.

These need processes of their own: what is installed is found once a process, and children are none of a fork.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import start
from faulty_parts import reward
from warm import CALM, ROOT

RUN = Path("tiny/main/seed-0")
EXITS = "import sys; sys.exit(0)\n"


def run(*words: object, folder: Path, site: Path | None = None, **environment: str) -> tuple[int, str]:
    """Exit code and output of a command."""
    path = os.pathsep.join(map(str, (ROOT, *(() if site is None else (site,)))))
    environment = os.environ | CALM | {"PYTHONPATH": path} | environment
    command = [sys.executable, "-m", "aegpo", *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, cwd=folder, env=environment, text=True, check=False, timeout=1500, **pipes)
    return done.returncode, done.stdout


def installed(folder: Path, name: str, entry: str, module: str = "") -> Path:
    """A place with an installed distribution."""
    site = folder / "site"
    info = site / f"{name}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[aegpo]\n{entry}\n")
    if module:
        (site / "my_module.py").write_text(module)
    return site


def error_of(output: str) -> str:
    """The line that starts with `error:`."""
    return next((line for line in output.splitlines() if line.startswith("error:")), "")


INSTALLED = {
    "entry point of a missing module": ("thing = no_such_module_xyz", ""),
    "entry point of a missing attribute": ("thing = json:nothing", ""),
    "installed plugin that exits at import": ("thing = my_module", EXITS),
    "installed plugin that interrupts at import": ("thing = my_module", "raise KeyboardInterrupt\n"),
    "malformed entry points": ("= =", ""),
}


@pytest.mark.parametrize(("entry", "module"), INSTALLED.values(), ids=INSTALLED)
@pytest.mark.parametrize("command", ["plugins", "check"])
def test_an_installed_plugin_that_cannot_be_loaded_is_named_with_the_way_out(
    command, entry, module, tmp_path, write_experiment
):
    site, words = (
        installed(tmp_path, "acme-rewards", entry, module),
        ([write_experiment()] if command == "check" else []),
    )
    code, output = run(command, *words, folder=tmp_path, site=site)
    error = error_of(output)
    assert code == 2, output
    assert "acme-rewards" in error
    assert "AEGPO_BLOCK_PLUGINS" in error
    assert "Traceback" not in output


def test_a_part_of_an_installed_plugin_is_blamed_with_its_distribution(tmp_path, write_experiment):
    """Distribution, kind and label are in one line, after the part's own traceback."""
    site = installed(tmp_path, "acme-rewards", "thing = my_module", reward("", build="oops()"))
    experiment = write_experiment(rewards=[{"kind": "bad-part", "name": "mine"}])
    code, output = run("run", experiment, "--no-report", folder=tmp_path, site=site)
    assert code == 2, output
    assert error_of(output) == "error: reward 'mine' failed with KeyError: 'oops' (shipped by acme-rewards)"
    assert "my_module.py" in output.partition("Traceback")[2]
    assert output.index("Traceback") < output.index("\nerror:")


def test_two_plugins_of_one_kind_are_both_named(tmp_path, write_experiment):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    for path in (one, other):
        path.write_text(reward(""))
    code, output = run("check", write_experiment(), "--plugin", one, "--plugin", other, folder=tmp_path)
    assert code == 2, output
    assert all(name in error_of(output) for name in ("'bad-part'", "one.py", "other.py")), output
    assert "Traceback" not in output


def test_two_plugin_files_of_one_name_live_side_by_side(tmp_path, write_experiment):
    one, other = tmp_path / "one.py", tmp_path / "below" / "one.py"
    other.parent.mkdir()
    one.write_text(reward(""))
    other.write_text(reward("").replace("bad-part", "bad-parts"))
    experiment = write_experiment(rewards=["bad-part", "bad-parts"])
    code, output = run("check", experiment, "--plugin", one, "--plugin", other, folder=tmp_path)
    assert code == 0, output


ENDS = {
    "sys.exit(0)": "sys.exit(0)",
    "sys.exit(130)": "sys.exit(130)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "BaseException": "raise Evil('oops')",
    "os._exit(0)": "os._exit(0)",
    "os._exit(130)": "os._exit(130)",
}


@pytest.mark.parametrize("body", ENDS.values(), ids=[f"child: {name}" for name in ENDS])
def test_a_part_that_ends_a_child_has_not_finished_the_run(body, tmp_path, write_experiment):
    """Of two runs, one with the fault fails, exit code 1, and the other is started all the same.

    The original asks for the reward's name in any case; nobody but the system knows whose `os._exit` it was, so that
    here the run is named, and what happened.
    """
    plugin = tmp_path / "my_plugin.py"
    plugin.write_text(reward(body))
    words = ["run", write_experiment(seeds=[0, 1], rewards=["bad-part"]), "--plugin", plugin, "--jobs", "1"]
    code, output = run(*words, "--no-report", folder=tmp_path, FAULT="1")
    assert code == 1, output
    assert ": finished" not in output
    assert "os._exit" in output if body.startswith("os.") else "reward 'bad-part' failed with" in output
    saved = 1 if body.startswith("os.") else 2  # it ends in the evaluation after step 2, which is saved after that
    for seed in (0, 1):
        assert f"main seed {seed} failed" in output
        assert not (tmp_path / f"runs/tiny/main/seed-{seed}/finished.json").exists()
        assert (tmp_path / f"runs/tiny/main/seed-{seed}/checkpoints/step-{saved:06d}").exists()


def test_ctrl_c_twice_ends_a_run_whose_reward_sleeps(tmp_path, write_experiment):
    """reward that sleeps: Ctrl-C twice."""
    plugin = tmp_path / "my_plugin.py"
    plugin.write_text(reward("time.sleep(1000)"))
    saved = tmp_path / "runs" / RUN / "checkpoints" / "step-000001"  # it sleeps in the evaluation after step 2
    words = ["run", str(write_experiment(rewards=["bad-part"])), "--plugin", str(plugin), "--no-report"]
    process = start(*words, folder=tmp_path, FAULT="1", PYTHONPATH=str(ROOT), **{"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None, "a step is finished before a run stops"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "to go on:" in output
    assert "Traceback" not in output
    assert saved.exists()
