"""Reward fine-tuning of text-to-image diffusion and flow models, guided by attention entropy.

Public names only; importing this package imports no torch.
"""

from __future__ import annotations

from aegpo.errors import AegpoError, CheckpointError, ContractError, PlanError, PluginError, SpecError
from aegpo.hookspecs import hookimpl
from aegpo.parts import (
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
from aegpo.records import (
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
from aegpo.registry import Registry, Spec
from aegpo.specs import Experiment

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
