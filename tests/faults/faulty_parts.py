"""Plugins with a fault: their sources, what they change in an experiment, and how a run of them should end.

A fault shows only while FAULT=1, and in training step 3 of 4 where it can, so that the same command without it shows
whether anything was lost.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# step: ends with exit code 2 in training step 3, named, its state saved;  any: as step, in whatever step
# start: exit code 2 before any step;  load: as it goes on;  finish: finishes, or is refused by name;  ok: finishes
# and the record is that of a run without a fault
Ending = Literal["step", "any", "start", "load", "finish", "ok"]

HEAD = """
import dataclasses, os, random, sys, threading, time
from typing import Any, ClassVar, Literal

import numpy as np

import aegpo

FAULT = os.environ.get("FAULT") == "1"
STEP = 0  # done


def due():
    return FAULT and STEP >= 2


def oops(*_, **__):
    raise KeyError("oops")


class Evil(BaseException):
    pass


@aegpo.hookimpl
def aegpo_on_step_end(run, report):
    global STEP
    STEP = report.step
"""


@dataclass(frozen=True)
class Faulty:
    """One case."""

    name: str
    source: str  # of the plugin
    ending: Ending
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the experiment
    named: tuple[str, ...] = ("'bad-part'",)  # what the error must have
    like: str = ""  # tells cases apart whose experiments are the same, and whose runs without a fault are not

    def __str__(self) -> str:
        return self.name


def part(
    axis: str,
    base: str,
    methods: str,
    *,
    module: str = "aegpo",
    before: str = "",
) -> str:
    """A plugin that registers a subclass of a spec class, with `methods` in its body."""
    return f'''{HEAD}
from {module} import {base}
{before}

class Bad({base}):
    """A part that has a fault."""

    kind: Literal["bad-part"] = "bad-part"
{textwrap.indent(textwrap.dedent(methods), "    ")}


@aegpo.hookimpl
def aegpo_register_{axis}(registry):
    registry.add(Bad)
'''


def indented(body: str, columns: int) -> str:
    """A body of a function; nothing is `pass`."""
    return textwrap.indent(textwrap.dedent(body) or "pass", " " * columns)


def verb(method: str, parameters: str, body: str) -> str:
    """A method that does as its base does, until its fault is due: then `body`, which knows what is `good`."""
    given = ", ".join(each.partition("=")[0].strip() for each in parameters.split(","))
    return f"""
def {method}(self, {parameters}):
    good = super().{method}({given})
    if due():
{indented(body, 8)}
    return good
"""


def attribute(name: str, good: str) -> str:
    """A property that cannot be read while there is a fault."""
    return f"""
@property
def {name}(self):
    return oops() if FAULT else {good}
"""


def failing(method: str, parameters: str, result: str = "oops()") -> str:
    """A method that fails from the start, or has another result."""
    given = ", ".join(each.partition("=")[0].strip() for each in parameters.split(",")) if parameters else ""
    takes = f"self, {parameters}" if parameters else "self"
    return f"""
def {method}({takes}):
    return {result} if FAULT else super().{method}({given})
"""


SCORER = """
class Scorer:
    def __init__(self, inner):
        self.inner = inner

    def score(self, images, prompts):
        import torch

        good = self.inner.score(images, prompts)
        if due():
{body}
        return good
"""


def reward(body: str, build: str = "", methods: str = "") -> str:
    """A reward whose `score` does `body`."""
    building = f"""
def build(self, device):
{indented(build, 4)}
    return Scorer(PaletteReward().build(device))
"""
    scorer = SCORER.format(body=indented(body, 12))
    return part("rewards", "PaletteReward", building + methods, module="aegpo.rewards.palette", before=scorer)


def allocator(body: str, methods: str = "") -> str:
    """An allocator."""
    methods += verb("allocate", "signals, budget, rng", body)
    return part("allocators", "UniformAllocator", methods, module="aegpo.method.allocators")


def selector(body: str, methods: str = "") -> str:
    """A selector."""
    methods += verb("select", "signals, rng", body)
    return part("selectors", "UniformSelector", methods, module="aegpo.method.selectors")


def tree(body: str) -> str:
    """A tree."""
    return part("trees", "IndependentTree", verb("plan", "counts, steps, rng", body), module="aegpo.method.trees")


TRANSITION = ("transition", "latents, velocity, sigma, sigma_next, scale=None")


def sampler(body: str, method: tuple[str, str] = TRANSITION, methods: str = "") -> str:
    """A sampler."""
    return part("samplers", "FlowSde", methods + verb(*method, body), module="aegpo.method.samplers")


def advantage(body: str, methods: str = "") -> str:
    """An advantage."""
    methods += verb("estimate", "scores, weights, rollouts", body)
    return part("advantages", "GroupAdvantage", methods, module="aegpo.method.advantages")


def objective(body: str, methods: str = "", base: str = "ClippedObjective") -> str:
    """An objective."""
    return part("objectives", base, methods + verb("loss", "update", body), module="aegpo.method.objectives")


def curriculum(choose: str = "return good", methods: str = "", build: str = "") -> str:
    """A curriculum that wraps the one of built-in `shuffle`."""
    wrapper = f"""
class Chooser:
    def __init__(self, inner):
        self.inner = inner

    def candidates(self, steps):
        return self.inner.candidates(steps)

    def choose(self, known, count, rng):
        good = self.inner.choose(known, count, rng)
        if due():
{indented(choose, 12)}
        return good
"""
    building = f"""
def build(self, prompts, per_step, seed):
{indented(build, 4)}
    return Chooser(super().build(prompts, per_step, seed))
"""
    base, module = "ShuffleCurriculum", "aegpo.prompts.curricula"
    return part("curricula", base, methods + building, module=module, before=wrapper)


SOURCE = '''
from aegpo import Measurement, SignalSpec
from aegpo.method.allocators import UniformAllocator


class Reader(UniformAllocator):
    """An allocator that reads the signal."""

    kind: Literal["reader"] = "reader"

    @property
    def reads(self):
        return ("mood",)

{reader}

@aegpo.hookimpl
def aegpo_register_allocators(registry):
    registry.add(Reader)


class Bad(SignalSpec):
    """A source of signals that has a fault."""

    kind: Literal["bad-part"] = "bad-part"
    provides: ClassVar[dict[str, str]] = {{"mood": "prompt"}}

{methods}

    def measure(self, step, prompts, policy):
        good = Measurement({{"mood": np.arange(len(prompts), dtype=np.float64)}})
        if due():
{body}
        return good


@aegpo.hookimpl
def aegpo_register_signals(registry):
    registry.add(Bad)
'''


def source(body: str = "pass", methods: str = "", reader: str = "") -> str:
    """A source of signals, and an allocator that reads what it measures."""
    return HEAD + SOURCE.format(
        body=indented(body, 12),
        methods=textwrap.indent(textwrap.dedent(methods), "    "),
        reader=textwrap.indent(textwrap.dedent(reader), "    "),
    )


def model(body: str, method: str, parameters: str = "latents, sigma, cond") -> str:
    """A model, one method of which has a fault."""
    build = f"""
def build(self, device):
    import torch

    model = super().build(device)
    inner = model.{method}

    def faulty({parameters}):
        good = inner({parameters})
        if due():
{indented(body, 12)}
        return good

    model.{method} = faulty
    return model
"""
    return part("models", "ShapesSpec", build, module="aegpo.models.shapes")


def watcher(hook: str, parameters: str, body: str, at: str = "due()", build: str = "Watcher()") -> str:
    """A tracker with one hook."""
    before = f"""
class Watcher:
    @aegpo.hookimpl
    def {hook}(self, {parameters}):
        if {at}:
{indented(body, 12)}
"""
    methods = f"""
def build(self, folder):
    return {build}
"""
    return part("trackers", "TrackerSpec", methods, before=before)


REMEMBERING = """
class Part:
    def __init__(self, spec):
        self.spec = spec

    def allocate(self, signals, budget, rng):
        return self.spec.allocate(signals, budget, rng)

    def state_dict(self):
{saving}
        return {{}}

    def load_state_dict(self, state):
{loading}
"""


def remembering(saving: str = "pass", loading: str = "pass") -> str:
    """An allocator with a state."""
    before = REMEMBERING.format(saving=indented(saving, 8), loading=indented(loading, 8))
    build = "def build(self):\n    return Part(self)"
    return part("allocators", "UniformAllocator", build, module="aegpo.method.allocators", before=before)
