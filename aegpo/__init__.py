"""Reward fine-tuning of text-to-image diffusion and flow models, guided by attention entropy.

The door for plugins and for Python: what they need is here, in `aegpo.pipelines` and `aegpo.testing`. Importing it
imports no torch.
"""

from __future__ import annotations

from aegpo.core.examples import Examples, Exemplary
from aegpo.core.experiment import EvaluationSpec, Experiment
from aegpo.core.exporting import Exportable
from aegpo.core.footprint import Footprint, Shares
from aegpo.core.hookspecs import Outcome, hookimpl
from aegpo.core.interfaces import (
    Advantage,
    Allocator,
    Filed,
    ForwardObjective,
    Merging,
    Model,
    Objective,
    Policy,
    Preparable,
    Reporting,
    Resizable,
    Reward,
    Rewarded,
    Sampler,
    SignalSource,
    Stateful,
    TimestepSelector,
    Tree,
)
from aegpo.core.parts import (
    AdvantageSpec,
    AllocatorSpec,
    ModelSpec,
    ObjectiveSpec,
    OnError,
    RewardSpec,
    SamplerSpec,
    SelectorSpec,
    SignalSpec,
    TrackerSpec,
    TreeSpec,
)
from aegpo.core.places import LocalOrHub
from aegpo.core.records import (
    AttentionCall,
    BoolArray,
    Conditioning,
    Edges,
    FloatArray,
    Gaussian,
    IntArray,
    Per,
    Prompt,
    Renoised,
    RolloutPlan,
    Rollouts,
    Scores,
    Signal,
    StepTable,
    Tail,
    Update,
)
from aegpo.core.registry import Registry, Spec, Where
from aegpo.core.reports import Evaluation, RunInfo, StepReport
from aegpo.core.sections import CheckpointSpec, OptimizerSpec, PolicySpec, PromptsSpec, RolloutsSpec
from aegpo.core.shardable import Shardable, Unread
from aegpo.core.signals import Measurement, SignalCost, Signals, Trunk
from aegpo.core.version import __version__
from aegpo.door import evaluate, load, run
from aegpo.errors import AegpoError, CheckpointError, ContractError, PlanError, PluginError, SettingError, SpecError
from aegpo.method.trees import forest

__all__ = [
    "Advantage",
    "AdvantageSpec",
    "AegpoError",
    "Allocator",
    "AllocatorSpec",
    "AttentionCall",
    "BoolArray",
    "CheckpointError",
    "CheckpointSpec",
    "Conditioning",
    "ContractError",
    "Edges",
    "Evaluation",
    "EvaluationSpec",
    "Examples",
    "Exemplary",
    "Experiment",
    "Exportable",
    "Filed",
    "FloatArray",
    "Footprint",
    "ForwardObjective",
    "Gaussian",
    "IntArray",
    "LocalOrHub",
    "Measurement",
    "Merging",
    "Model",
    "ModelSpec",
    "Objective",
    "ObjectiveSpec",
    "OnError",
    "OptimizerSpec",
    "Outcome",
    "Per",
    "PlanError",
    "PluginError",
    "Policy",
    "PolicySpec",
    "Preparable",
    "Prompt",
    "PromptsSpec",
    "Registry",
    "Renoised",
    "Reporting",
    "Resizable",
    "Reward",
    "RewardSpec",
    "Rewarded",
    "RolloutPlan",
    "Rollouts",
    "RolloutsSpec",
    "RunInfo",
    "Sampler",
    "SamplerSpec",
    "Scores",
    "SelectorSpec",
    "SettingError",
    "Shardable",
    "Shares",
    "Signal",
    "SignalCost",
    "SignalSource",
    "SignalSpec",
    "Signals",
    "Spec",
    "SpecError",
    "Stateful",
    "StepReport",
    "StepTable",
    "Tail",
    "TimestepSelector",
    "TrackerSpec",
    "Tree",
    "TreeSpec",
    "Trunk",
    "Unread",
    "Update",
    "Where",
    "__version__",
    "evaluate",
    "forest",
    "hookimpl",
    "load",
    "run",
]
