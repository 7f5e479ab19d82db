"""The hooks: eleven to register parts, five to observe a run.

A registry answers "which one?"; a hook answers "who else wants to know?". Registration hooks receive a registry and
call ``registry.add(SpecClass)``. Observer hooks are told what happened; what they return is ignored and they cannot
change the run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import pluggy

from aegpo.core.parts import (
    AdvantageSpec,
    AllocatorSpec,
    CurriculumSpec,
    ModelSpec,
    ObjectiveSpec,
    RewardSpec,
    SamplerSpec,
    SelectorSpec,
    SignalSpec,
    TrackerSpec,
    TreeSpec,
)
from aegpo.core.registry import Registry
from aegpo.core.reports import Evaluation, RunInfo, StepReport
from aegpo.errors import ContractError

PROJECT = "aegpo"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

Outcome = Literal["finished", "interrupted", "failed"]


@hookspec
def aegpo_register_models(registry: Registry[ModelSpec]) -> None:
    """Adds text-to-image networks, chosen by `model`."""


@hookspec
def aegpo_register_rewards(registry: Registry[RewardSpec]) -> None:
    """Adds scorers of images, chosen by the list `rewards`."""


@hookspec
def aegpo_register_curricula(registry: Registry[CurriculumSpec]) -> None:
    """Adds rules that choose each step's prompts from the list, chosen by `curriculum`."""


@hookspec
def aegpo_register_signals(registry: Registry[SignalSpec]) -> None:
    """Adds sources of signals that other parts decide by, with their options under `signals`."""


@hookspec
def aegpo_register_allocators(registry: Registry[AllocatorSpec]) -> None:
    """Adds rules that split rollouts over prompts, chosen by `allocator`."""


@hookspec
def aegpo_register_selectors(registry: Registry[SelectorSpec]) -> None:
    """Adds rules that choose denoising steps, chosen by `selector`."""


@hookspec
def aegpo_register_trees(registry: Registry[TreeSpec]) -> None:
    """Adds shapes of a step's forest of trajectories, chosen by `tree`."""


@hookspec
def aegpo_register_samplers(registry: Registry[SamplerSpec]) -> None:
    """Adds stochastic denoising steps, chosen by `sampler`."""


@hookspec
def aegpo_register_advantages(registry: Registry[AdvantageSpec]) -> None:
    """Adds rules that turn rewards into credit, chosen by `advantage`."""


@hookspec
def aegpo_register_objectives(registry: Registry[ObjectiveSpec]) -> None:
    """Adds losses, chosen by `objective`."""


@hookspec
def aegpo_register_trackers(registry: Registry[TrackerSpec]) -> None:
    """Adds observers that record or show a run, chosen by the list `trackers`."""


@hookspec
def aegpo_on_run_start(run: RunInfo) -> None:
    """One arm under one seed begins, or goes on after `run.first_step`: forget anything recorded beyond it."""


@hookspec
def aegpo_on_step_end(run: RunInfo, report: StepReport) -> None:
    """A training step is over."""


@hookspec
def aegpo_on_evaluation(run: RunInfo, step: int, evaluation: Evaluation) -> None:
    """The held-out prompts were scored, after training step `step`; 0 is before training."""


@hookspec
def aegpo_on_checkpoint(run: RunInfo, step: int, path: Path) -> None:
    """A checkpoint of the state after `step` is safely on disk."""


@hookspec
def aegpo_on_run_end(run: RunInfo, outcome: Outcome) -> None:
    """The run is over: finished, interrupted by the user, or failed."""


def check_tracker(name: str, observer: object) -> None:
    """What a tracker built: an object with observer hooks, all of which exist and take what they are told.

    Raises:
        ContractError: if it has none, or one that would never be called.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(sys.modules[__name__])
    try:
        manager.register(observer)
    except pluggy.PluginValidationError as error:
        raise ContractError(f"tracker {name!r} has a hook that does not fit: {' '.join(str(error).split())}") from None
    callers = manager.get_hookcallers(observer) or []
    wrong = [caller.name for caller in callers if not caller.has_spec()]
    if wrong or not callers:
        problem = f"implements {wrong[0]!r}, which is no hook" if wrong else "implements no observer hook"
        raise ContractError(f"tracker {name!r} {problem}; mark methods aegpo_on_... with @aegpo.hookimpl")
