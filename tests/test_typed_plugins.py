"""The wheel as a plugin's author has it: whole, typed, and strict mypy finds nothing in a plugin that is right."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLUGIN = '''
"""A reward, an allocator that looks at the experiment, a tracker, an observer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

import aegpo

if TYPE_CHECKING:
    from torch import Tensor


class Redness(aegpo.RewardSpec):
    """How red an image is."""

    kind: Literal["redness"] = "redness"
    threshold: float = Field(default=0.0, ge=0, le=1, description="excess of red that counts as none")

    def score(self, images: Tensor, prompts: Sequence[aegpo.Prompt]) -> Tensor:
        red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return red - (green + blue) / 2 - self.threshold


class Equal(aegpo.AllocatorSpec):
    """As many rollouts for each prompt; the remainder goes to the first."""

    kind: Literal["equal"] = "equal"

    def allocate(self, signals: aegpo.Signals, budget: int, rng: np.random.Generator) -> aegpo.IntArray:
        counts = np.full(signals.num_prompts, budget // signals.num_prompts, dtype=np.int64)
        counts[0] += budget - int(counts.sum())
        return counts

    def problems(self, experiment: aegpo.Experiment) -> Iterator[str]:
        if experiment.rollouts.rollouts_per_step < 2 * experiment.rollouts.prompts_per_step:
            yield "a group needs 2 rollouts; raise 'rollouts_per_step'"


class Counting:
    """Writes how many steps there were."""

    def __init__(self, folder: Path) -> None:
        self._file, self._steps = folder / "steps.txt", 0

    @aegpo.hookimpl
    def aegpo_on_step_end(self, run: aegpo.RunInfo, report: aegpo.StepReport) -> None:
        self._steps += report.step > run.first_step

    @aegpo.hookimpl
    def aegpo_on_run_end(self, outcome: aegpo.Outcome) -> None:
        self._file.write_text(f"{outcome}: {self._steps}")


class CountingTracker(aegpo.TrackerSpec):
    """Counts steps."""

    kind: Literal["counting"] = "counting"

    def build(self, folder: Path) -> Counting:
        return Counting(folder)


@aegpo.hookimpl
def aegpo_register_rewards(registry: aegpo.Registry[aegpo.RewardSpec]) -> None:
    registry.add(Redness)


@aegpo.hookimpl
def aegpo_register_allocators(registry: aegpo.Registry[aegpo.AllocatorSpec]) -> None:
    registry.add(Equal)


class WordsSignal(aegpo.SignalSpec):
    """How many words each prompt has."""

    kind: Literal["words"] = "words"
    provides: ClassVar[Mapping[str, aegpo.Per]] = {"words": "prompt"}

    def measure(self, step: int, prompts: Sequence[aegpo.Prompt], policy: aegpo.Policy) -> aegpo.Measurement:
        return aegpo.Measurement({"words": np.array([float(len(prompt.text.split())) for prompt in prompts])})


class Wordy(aegpo.AllocatorSpec):
    """Declares what it reads."""

    kind: Literal["wordy"] = "wordy"
    reads: ClassVar[tuple[str, ...]] = ("words",)

    def allocate(self, signals: aegpo.Signals, budget: int, rng: np.random.Generator) -> aegpo.IntArray:
        counts = np.full(signals.num_prompts, budget // signals.num_prompts, dtype=np.int64)
        counts[int(signals.by_prompt("words").argmax())] += budget - int(counts.sum())
        return counts


@aegpo.hookimpl
def aegpo_register_signals(registry: aegpo.Registry[aegpo.SignalSpec]) -> None:
    registry.add(WordsSignal)


@aegpo.hookimpl
def aegpo_register_trackers(registry: aegpo.Registry[aegpo.TrackerSpec]) -> None:
    registry.add(CountingTracker)


@aegpo.hookimpl
def aegpo_on_checkpoint(run: aegpo.RunInfo, step: int, path: Path) -> None:
    print(run.arm, step, path)
'''
TESTS = """
from pathlib import Path

import aegpo
from aegpo.testing import check_allocator, check_reward, check_tracker
from counting_plugin import CountingTracker, Equal, Redness

# every section has defaults that a type checker sees
SECTIONS = [
    aegpo.CheckpointSpec(),
    aegpo.EvaluationSpec(rewards=(Redness(),)),
    aegpo.OptimizerSpec(micro_batch=2),
    aegpo.PolicySpec(train="lora"),
    aegpo.PromptsSpec(),
    aegpo.RolloutsSpec(prompts_per_step=2),
]


def test_the_parts_conform(tmp_path: Path) -> None:
    check_reward(Redness(threshold=0.1))
    check_allocator(Equal())
    check_tracker(CountingTracker(), tmp_path)
"""
# What a typed package must catch: wrong names, wrong arguments, wrong types, of each door.
MISTAKES = """
from collections.abc import Iterator

import aegpo
import aegpo.pipelines
import aegpo.testing


class Wrong(aegpo.AllocatorSpec):
    kind: str = "wrong"

    def problems(self, experiment: aegpo.Experiment) -> Iterator[str]:
        yield experiment.rollout.num_prompts  # line 13
        yield experiment.training_steps  # line 14


aegpo.testing.check_reward(Wrong())  # line 17
aegpo.pipelines.FlowSchedule(shfit=3.0)  # line 18
aegpo.RewardsSpec  # line 19
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("aegpo-*.whl")
    return path


@pytest.fixture
def project(wheel, tmp_path) -> Path:
    """A folder with a plugin in it, and an environment in which aegpo is what the wheel holds."""
    environment, project = tmp_path / "environment", tmp_path / "project"
    venv.create(environment, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # those of the tests, behind the wheel
    project.mkdir()
    (project / "counting_plugin.py").write_text(PLUGIN)
    (project / "test_counting_plugin.py").write_text(TESTS)
    return project


def call(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A module of the test's own Python, or of the environment's, without a path to this repository."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    installed = {entry.dist.name for entry in entry_points(group="aegpo") if entry.dist is not None}
    if installed:  # into the test's own environment, perhaps from a checkout, which the other one cannot see
        environment["AEGPO_BLOCK_PLUGINS"] = ",".join(sorted(installed))
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)


def python_of(project: Path) -> str:
    return str(project.parent / "environment" / "bin" / "python")


def test_the_wheel_holds_every_module_and_says_that_it_is_typed(wheel):
    with zipfile.ZipFile(wheel) as packed:
        held = set(packed.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "aegpo").rglob("*.py")}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "aegpo" / "report" / "templates").iterdir()}
    assert len(templates) == 11
    assert modules | templates | {"aegpo/py.typed"} <= held


@pytest.mark.slow
def test_the_parts_of_a_plugin_conform_with_what_the_wheel_holds(project):
    told = "import aegpo; print(aegpo.__file__)"
    assert str(project.parent / "environment") in call(project, python_of(project), "-c", told).stdout
    done = call(project, python_of(project), "-m", "pytest", "-p", "no:cacheprovider", "test_counting_plugin.py")
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_strict_mypy_passes_on_plugins_and_finds_the_mistakes_of_another(project):
    """Without the settings of this repository; the guide's blocks and the shipped plugins are as a stranger's."""
    guide = (ROOT / "plugins" / "README.md").read_text()
    files = ["counting_plugin.py", "test_counting_plugin.py", "aegpo_jpeg.py", "aegpo_qwen_image", "mistakes.py"]
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)):
        files.append("my_reward.py" if number == 0 else f"block_{number}.py")
        typed = block.replace("def test_it_conforms():", "def test_it_conforms() -> None:")
        (project / files[-1]).write_text(typed)
    shutil.copy(ROOT / "plugins" / "aegpo-jpeg" / "aegpo_jpeg.py", project)
    shutil.copytree(ROOT / "plugins" / "aegpo-qwen-image" / "aegpo_qwen_image", project / "aegpo_qwen_image")
    (project / "mistakes.py").write_text(MISTAKES)
    strict = ("--strict", "--config-file=", f"--python-executable={python_of(project)}")
    done = call(project, sys.executable, "-m", "mypy", *strict, *files)
    *said, summary = done.stdout.splitlines()
    wrong = [re.match(r"mistakes\.py:(\d+): error: ", line) for line in said]
    assert all(wrong), said
    assert [int(match[1]) for match in wrong] == [13, 14, 17, 18, 19], said
    modules = [*files[:3], *(project / "aegpo_qwen_image").glob("*.py"), *files[4:]]
    assert summary == f"Found 5 errors in 1 file (checked {len(modules)} source files)"
    assert not done.stderr
