"""Plugins: found, blocked, blamed."""

from __future__ import annotations

import os
import signal
import sys
import tomllib
from pathlib import Path

import pytest
from command_line import aegpo
from repository import ROOT

from aegpo.core.registries import PART_AXES
from aegpo.errors import PluginError
from aegpo.plugin.manager import distributions, load_registries, plugin_manager

GOOD = '''
from typing import Literal
import aegpo

class Constant(aegpo.RewardSpec):
    """The same score for everything."""
    kind: Literal["{kind}"] = "{kind}"

    def score(self, images, prompts):
        return images.new_zeros(len(images))

@aegpo.hookimpl
def aegpo_register_rewards(registry):
    registry.add(Constant)
'''


def install(site: Path, distribution: str, entry: str, source: str, group: str = "aegpo") -> str:
    """What pip would leave of a distribution with one module, and the module's name."""
    module = distribution.replace("-", "_")
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry} = {module}\n")
    return module


def block(monkeypatch, *names: str) -> None:
    before = os.environ.get("AEGPO_BLOCK_PLUGINS", "")
    monkeypatch.setenv("AEGPO_BLOCK_PLUGINS", ",".join([*filter(None, [before]), *names]))


def refusal(*modules: str) -> str:
    with pytest.raises(PluginError) as caught:
        load_registries(plugin_manager(modules))
    return str(caught.value)


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_built_ins_register_through_the_same_hooks(site):
    registries = load_registries(plugin_manager())
    assert [registry.axis for registry in registries] == list(PART_AXES)
    assert all(registry.names for registry in registries)
    assert {entry.source for registry in registries for entry in registry} == {"aegpo"}


def test_every_manager_is_a_fresh_one(site):
    first, second = plugin_manager(), plugin_manager()
    first.register(object(), "only here")
    assert second.get_plugin("only here") is None


def test_an_installed_distribution_is_found_and_named(site):
    install(site, "aegpo-alpha", "alpha", GOOD.format(kind="one"))
    manager = plugin_manager()
    entries = {entry.name: entry for entry in load_registries(manager).rewards}
    assert entries["one"].source == "aegpo-alpha"
    assert entries["scene"].source == "aegpo"
    assert distributions(manager) == (("aegpo-alpha", "1.2"),)


def test_entry_points_of_other_groups_are_left_alone(site):
    install(site, "aegpo-beta", "beta", "raise RuntimeError('imported')", group="aegpo_other")
    assert distributions(plugin_manager()) == ()


def test_a_module_on_the_command_line_is_loaded_but_is_no_distribution(site):
    (site / "gamma_plugin.py").write_text(GOOD.format(kind="two"))
    manager = plugin_manager(["gamma_plugin"])
    entries = {entry.name: entry for entry in load_registries(manager).rewards}
    assert entries["two"].source == "gamma_plugin"
    assert distributions(manager) == ()


def test_a_file_on_the_command_line_is_loaded(site, monkeypatch):
    (site / "sub").mkdir()
    (site / "sub" / "delta.py").write_text(GOOD.format(kind="three"))
    assert "three" in load_registries(plugin_manager(["sub/delta.py"])).rewards.names


def test_a_module_that_a_distribution_brings_already_counts_once(site):
    module = install(site, "aegpo-epsilon", "epsilon", GOOD.format(kind="four"))
    assert load_registries(plugin_manager([module])).rewards.names.count("four") == 1


@pytest.mark.parametrize("name", ["zeta", "aegpo-zeta", "aegpo_zeta", "AEGPO-Zeta"])
def test_a_plugin_is_blocked_by_entry_point_distribution_or_module(site, monkeypatch, name):
    install(site, "aegpo-zeta", "zeta", "raise RuntimeError('imported')")
    block(monkeypatch, f" {name} ")
    manager = plugin_manager()
    assert distributions(manager) == ()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_block_name_that_matches_nothing_is_refused(site, monkeypatch):
    install(site, "aegpo-eta", "eta", GOOD.format(kind="five"))
    block(monkeypatch, "aegpo-etta")
    assert refusal() == (
        "AEGPO_BLOCK_PLUGINS names 'aegpo-etta', but no plugin is called that; did you mean 'aegpo-eta'?"
    )


def test_an_import_that_fails_names_the_distribution_and_the_way_out(site):
    install(site, "aegpo-theta", "theta", "import no_such_library")
    assert refusal() == (
        "plugin 'theta' of distribution 'aegpo-theta' cannot be imported: ModuleNotFoundError: "
        "No module named 'no_such_library'; mend it, or leave it out with AEGPO_BLOCK_PLUGINS=aegpo-theta"
    )


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("class Evil(BaseException): pass\nraise Evil('oops')", "Evil: oops"),
    ],
    ids=["exit", "interrupt", "other"],
)
def test_a_plugin_that_ends_the_program_at_import_or_in_a_hook_has_failed(site, monkeypatch, source, told):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)  # as on the command line: Ctrl-C is watched for
    (site / "lambda_.py").write_text(source)
    way_out = "mend it, or leave it out with AEGPO_BLOCK_PLUGINS=lambda_"
    assert refusal("lambda_") == f"plugin module 'lambda_' cannot be imported: {told}; {way_out}"
    monkeypatch.delitem(sys.modules, "mu", raising=False)
    body = source.replace("\n", "\n    ")
    (site / "mu.py").write_text(hook("aegpo_register_trees", body=body))
    assert f"plugin module 'mu' fails to register its trees: {told}; " in refusal("mu")


def test_a_plugin_that_changes_what_others_rely_on_is_refused(site):
    (site / "nu.py").write_text("import torch; torch.set_default_dtype(torch.float64)\n" + GOOD.format(kind="eleven"))
    assert "plugin module 'nu' left torch's default dtype at torch.float64" in refusal("nu")
    (site / "xi.py").write_text("import os; os.chdir('/')\n" + GOOD.format(kind="eleven"))
    assert "plugin module 'xi' left the working directory at /" in refusal("xi")


FAILING = GOOD.format(kind="twelve").replace("return images.new_zeros(len(images))", "return images.mean()")
INVALID = """
    @pydantic.model_validator(mode="after")
    def valid(self):
        raise SystemExit(0)
"""


def test_whose_part_failed_is_told_with_kind_label_and_distribution(site):
    install(
        site,
        "aegpo-omicron",
        "omicron",
        "import pydantic\n" + FAILING.replace("\n    def score", INVALID + "\n    def score"),
    )
    (site / "one.yaml").write_text("model: shapes\nrewards: [{kind: twelve, name: mine}]\n")
    done = aegpo("check", "one.yaml")
    assert done.code == 2
    assert done.stderr.splitlines()[-1] == "error: reward 'mine' failed with SystemExit: 0 (shipped by aegpo-omicron)"
    assert "raise SystemExit(0)" in done.stderr


def test_a_file_named_as_a_module_is_recognised(site):
    sys.path.remove(str(site))
    (site / "iota.py").write_text(GOOD.format(kind="six"))
    assert refusal("iota") == (
        "plugin module 'iota' cannot be imported: ModuleNotFoundError: No module named 'iota'; "
        "give its path, --plugin iota.py, or leave it out with AEGPO_BLOCK_PLUGINS=iota"
    )


def test_a_file_that_does_not_exist_is_named(site):
    assert "FileNotFoundError: no file 'kappa.py'" in refusal("kappa.py")


def hook(name: str, arguments: str = "registry", mark: str = "@aegpo.hookimpl", body: str = "pass") -> str:
    return f"import aegpo\n\n{mark}\ndef {name}({arguments}):\n    {body}\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            hook("aegpo_register_reward"),
            "plugin 'x' of distribution 'aegpo-x' defines 'aegpo_register_reward', which is no hook; "
            "did you mean 'aegpo_register_rewards'?",
        ),
        (
            hook("aegpo_on_step_ends", "report", mark=""),
            "plugin 'x' of distribution 'aegpo-x' defines 'aegpo_on_step_ends', which is no hook; "
            "did you mean 'aegpo_on_step_end'?",
        ),
        (
            hook("aegpo_on_step_end", "report", mark=""),
            "plugin 'x' of distribution 'aegpo-x' defines 'aegpo_on_step_end' without the mark @aegpo.hookimpl, so it "
            "would never run",
        ),
        ("x = 1", "plugin 'x' of distribution 'aegpo-x' implements no hook; known: aegpo_on_checkpoint, "),
        (
            hook("aegpo_on_step_end", "run, reprot"),
            "plugin 'x' of distribution 'aegpo-x' has a hook that does not fit: ",
        ),
        (
            hook("aegpo_register_trees", mark="@aegpo.hookimpl(wrapper=True)", body="return (yield)"),
            "plugin 'x' of distribution 'aegpo-x' wraps a registration hook, which only adds; drop 'wrapper', or leave "
            "it out with AEGPO_BLOCK_PLUGINS=aegpo-x",
        ),
        (
            hook("aegpo_register_trees", body="1 / 0"),
            "plugin 'x' of distribution 'aegpo-x' fails to register its trees: ZeroDivisionError: division by zero; "
            "mend it, or leave it out with AEGPO_BLOCK_PLUGINS=aegpo-x",
        ),
        (
            GOOD.format(kind="scene"),
            "aegpo-x registers rewards 'scene', a name aegpo has taken; rename it, or leave the plugin out with "
            "AEGPO_BLOCK_PLUGINS=aegpo-x",
        ),
    ],
)
def test_a_wrong_hook_names_the_distribution(site, monkeypatch, source, message):
    install(site, "aegpo-x", "x", source)
    monkeypatch.delitem(sys.modules, "aegpo_x", raising=False)
    assert refusal().startswith(message)


WORDLESS = GOOD.replace("def score", "def rate").format(kind="nine")


@pytest.mark.parametrize("words", [["plugins"], ["check", "one.yaml"], ["run", "one.yaml"]], ids=lambda words: words[0])
def test_a_reward_without_its_verb_stops_every_command_before_it_begins(site, words):
    install(site, "aegpo-nu", "nu", WORDLESS)
    (site / "one.yaml").write_text("rewards: [nine]\n")
    done = aegpo(*words)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr == (
        "error: aegpo-nu registers 'Constant' in 'rewards' as 'nine', which has no 'score'; asked is  score(images: "
        "Tensor, prompts: Sequence[Prompt]) -> Tensor, or define  build(device: torch.device) -> Reward  to return "
        "another object; mend it, or leave the plugin out with AEGPO_BLOCK_PLUGINS=aegpo-nu\n"
    )
    assert not (site / "runs").exists()


SILENT = """
from typing import Literal
import aegpo

class Silent(aegpo.TrackerSpec):
    \"\"\"Watches nothing.\"\"\"
    kind: Literal["silent"] = "silent"

    def build(self, folder):
        return Observer()

class Observer:
    {hook}

@aegpo.hookimpl
def aegpo_register_trackers(registry):
    registry.add(Silent)
"""


@pytest.mark.parametrize(
    ("hook", "problem"),
    [
        ("pass", " implements no observer hook; mark methods aegpo_on_... with @aegpo.hookimpl"),
        ("def aegpo_on_step_end(self, run): pass", " implements no observer hook; mark methods aegpo_on_... with @aeg"),
        (
            "@aegpo.hookimpl\n    def aegpo_on_step(self): pass",
            " implements 'aegpo_on_step', which is no hook; mark meth",
        ),
        ("@aegpo.hookimpl\n    def aegpo_on_step_end(self, step): pass", " has a hook that does not fit: Plugin '"),
    ],
    ids=["none", "unmarked", "unknown", "other arguments"],
)
def test_a_tracker_that_would_never_be_told_stops_a_run_before_it_begins(site, hook, problem):
    (site / "silent.py").write_text(SILENT.format(hook=hook))
    smoke = str(ROOT / "experiments" / "smoke.yaml")
    done = aegpo("run", smoke, "--arm", "grpo", "--plugin", "silent.py", "--set", "trackers=[silent]")
    assert done.code == 2
    assert f"error: tracker 'silent'{problem}" in done.stderr


def test_two_plugins_of_one_name_are_refused(site):
    install(site, "aegpo-lambda", "same", GOOD.format(kind="seven"))
    install(site, "aegpo-mu", "same", GOOD.format(kind="eight"))
    assert refusal() == (
        "plugin 'same' of distribution 'aegpo-mu' has the name of a plugin that is loaded already; rename its entry "
        "point, or leave it out with AEGPO_BLOCK_PLUGINS=aegpo-mu"
    )


@pytest.mark.parametrize(("name", "module"), [("jpeg", "aegpo_jpeg"), ("qwen-image", "aegpo_qwen_image")])
def test_a_shipped_plugin_declares_its_entry_point(name, module):
    project = tomllib.loads((ROOT / "plugins" / f"aegpo-{name}" / "pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"aegpo": {name: module}}


ODD = '''
from typing import Literal
import aegpo

class Odd(aegpo.RewardSpec):
    """What it needs cannot be read."""
    kind: Literal["thirteen"] = "thirteen"

    @property
    def needs_images(self):
        raise {error}

    def score(self, images, prompts):
        return images.new_zeros(len(images))

@aegpo.hookimpl
def aegpo_register_rewards(registry):
    registry.add(Odd)
'''


@pytest.mark.parametrize("error", ["KeyError('oops')", "SystemExit(0)", "KeyboardInterrupt", "EOFError"])
def test_what_a_plugin_raises_where_nobody_calls_it_by_name_is_its_failure_too(site, error):
    (site / "odd.py").write_text(ODD.format(error=error))
    (site / "one.yaml").write_text("model: shapes\nrewards: [thirteen]\n")
    done = aegpo("check", "one.yaml", "--plugin", "odd.py")
    assert done.code == 2, done.stderr
    assert "in needs_images" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "odd.py" in done.stderr.splitlines()[-1]
