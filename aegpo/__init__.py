"""Reward fine-tuning of text-to-image diffusion and flow models, guided by attention entropy.

Public names only; importing this package imports no torch.
"""

from __future__ import annotations

from aegpo.core.experiment import Experiment
from aegpo.core.hookspecs import hookimpl
from aegpo.core.parts import (
    AdvantageSpec,
    AllocatorSpec,
    ModelSpec,
    ObjectiveSpec,
    RewardSpec,
    SamplerSpec,
    SelectorSpec,
    TrackerSpec,
    TreeSpec,
)
from aegpo.core.records import (
    AttentionCall,
    Conditioning,
    Edges,
    Evaluation,
    Gaussian,
    Prompt,
    Renoised,
    RolloutPlan,
    Rollouts,
    RunInfo,
    Signals,
    StepReport,
    StepTable,
    Update,
)
from aegpo.core.registry import Registry, Spec
from aegpo.errors import AegpoError, CheckpointError, ContractError, PlanError, PluginError, SpecError

__version__ = "0.1.0"

__all__ = [
    "AdvantageSpec",
    "AegpoError",
    "AllocatorSpec",
    "AttentionCall",
    "CheckpointError",
    "Conditioning",
    "ContractError",
    "Edges",
    "Evaluation",
    "Experiment",
    "Gaussian",
    "ModelSpec",
    "ObjectiveSpec",
    "PlanError",
    "PluginError",
    "Prompt",
    "Registry",
    "Renoised",
    "RewardSpec",
    "RolloutPlan",
    "Rollouts",
    "RunInfo",
    "SamplerSpec",
    "SelectorSpec",
    "Signals",
    "Spec",
    "SpecError",
    "StepReport",
    "StepTable",
    "TrackerSpec",
    "TreeSpec",
    "Update",
    "hookimpl",
]
