"""Plugins that cannot be imported or registered, and hooks that fail or write into what they are shown."""

from __future__ import annotations

import pytest
from faulty_parts import HEAD, Ending, Faulty, part, watcher
from judging_parts import Judge

TRACKERS = {"trackers": ["console", "jsonl", "bad-part"]}


def tracker(name: str, text: str, ending: Ending = "step") -> Faulty:
    return Faulty(name, text, ending, TRACKERS, ("tracker 'bad-part'", "my_plugin.py"))


def hook(event: str, body: str, at: str = "due()") -> str:
    parameters = {
        "run_start": "run",
        "step_end": "run, report",
        "evaluation": "run, step, evaluation",
        "checkpoint": "run, step, path",
        "run_end": "run, outcome",
    }[event]
    return watcher(f"aegpo_on_{event}", parameters, body, at)


def module(name: str, text: str, ending: Ending = "start") -> Faulty:
    return Faulty(name, text, ending, {}, ("my_plugin",))


def registering(body: str) -> str:
    return f"{HEAD}\n@aegpo.hookimpl\ndef aegpo_register_rewards(registry):\n    {body}\n"


def of_kind(kind: str) -> str:
    return part("rewards", "PaletteReward", "", module="aegpo.rewards.palette").replace("bad-part", kind)


WRITES = "report.counts[:] = 0; report.selected[:] = False; report.metrics.clear(); report.seconds.clear()"
CHANGES = "evaluation.images.zero_(); evaluation.scores['bad'] = 3\nfor each in evaluation.scores.values(): each *= 0"
ENDS = {
    "sys.exit(0)": "sys.exit(0)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "BaseException": "raise Evil('oops')",
}
CASES = [
    tracker("hook on_run_start raises", hook("run_start", "oops()", "FAULT"), "start"),
    tracker("hook on_step_end raises", hook("step_end", "oops()"), "any"),
    tracker("hook on_evaluation raises", hook("evaluation", "oops()"), "any"),
    tracker("hook on_checkpoint raises", hook("checkpoint", "oops()"), "any"),
    tracker("hook on_run_end raises", hook("run_end", "oops()", "FAULT"), "any"),
    tracker("hook wants an unknown argument", watcher("aegpo_on_step_end", "run, nonsense", "pass"), "start"),
    tracker("hook writes into the report", hook("step_end", WRITES), "finish"),
    tracker("hook writes into the evaluation", hook("evaluation", CHANGES, "FAULT"), "finish"),
    *(tracker(f"hook {name}", hook("step_end", body), "any") for name, body in ENDS.items()),
    Faulty(
        "module hook raises",
        HEAD + "    if due(): oops()\n",
        "any",
        {},
        ("my_plugin.py",),
    ),
    tracker(
        "tracker build raises",
        watcher("aegpo_on_step_end", "run, report", "pass", build="oops() if FAULT else Watcher()"),
        "start",
    ),
    tracker(
        "tracker builds nothing",
        watcher("aegpo_on_step_end", "run, report", "pass", build="None if FAULT else Watcher()"),
        "start",
    ),
    module("import error", "import nothing_there_at_all\n"),
    module("syntax error", "def (:\n"),
    module("sys.exit at import", "import sys; sys.exit(0)\n"),
    # Was 130, as if the user had pressed Ctrl-C.
    module("KeyboardInterrupt at import", "raise KeyboardInterrupt\n"),
    module("BaseException at import", "class E(BaseException): pass\nraise E('oops')\n"),
    module("import that changes the default dtype", "import torch; torch.set_default_dtype(torch.float64)\n" + HEAD),
    module("import that changes the folder", "import os; os.chdir('/')\n" + HEAD),
    module("registration hook raises", registering("oops()")),
    module("registration hook sys.exit", registering("sys.exit(0)")),
    module("registration hook KeyboardInterrupt", registering("raise KeyboardInterrupt")),
    module("kind of a built-in", of_kind("palette")),
    module("kind is no kebab", of_kind("Bad Part")),
    module("not a spec", registering("registry.add(3)")),
    module("misspelt hook", HEAD + "\n@aegpo.hookimpl\ndef aegpo_register_reward(registry):\n    pass\n"),
    module("empty module", ""),
    module("binary file", "\0\0\0"),
]
CLEAN: dict[str, dict[str, str]] = {}  # what runs without a fault have


@pytest.mark.parametrize("faulty", CASES, ids=str)
def test_a_faulty_plugin_is_blamed_and_nothing_is_lost(faulty, warm, tmp_path, write_experiment):
    judge = Judge(warm, tmp_path, write_experiment(**faulty.changes), faulty, CLEAN)
    assert not (wrong := judge.complaints()), "\n".join(wrong)
