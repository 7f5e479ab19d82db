"""Table of contents: the parts in the box, registered through the same hooks as anyone's."""

from __future__ import annotations

from aegpo.core.hookspecs import hookimpl
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
from aegpo.method.advantages import (
    DepthAdvantage,
    GainAdvantage,
    GroupAdvantage,
    ProcessAdvantage,
    RunningAdvantage,
)
from aegpo.method.allocators import (
    EntropyAllocator,
    InvertedAllocator,
    KnapsackAllocator,
    MedianSplitAllocator,
    RandomAllocator,
    RewardStdAllocator,
    UniformAllocator,
    VarianceAllocator,
)
from aegpo.method.objectives import (
    ClippedObjective,
    DivergenceMaskedObjective,
    GuardedObjective,
    MatchingObjective,
    NftObjective,
    PreferenceObjective,
)
from aegpo.method.samplers import CpsSampler, DanceSde, DdimSampler, FlowSde
from aegpo.method.selectors import (
    DepthPrunedSelector,
    EntropyPeakSelector,
    FirstSelector,
    FixedSelector,
    FractionSelector,
    LowestEntropySelector,
    MergedSelector,
    PeaksSelector,
    RandomSelector,
    SlidingWindowSelector,
    TopStdSelector,
    UniformSelector,
    WindowSelector,
)
from aegpo.method.signals import EntropySignal, RewardSignal, StepNoiseSignal
from aegpo.method.trees import BranchingTree, IndependentTree, TrunkTree
from aegpo.models.flux import FluxSpec
from aegpo.models.sd import SdSpec
from aegpo.models.sd3 import Sd3Spec
from aegpo.models.sdxl import SdxlSpec
from aegpo.models.shapes import ShapesSpec
from aegpo.prompts.curricula import BoundaryCurriculum, ShuffleCurriculum
from aegpo.rewards.aesthetic import AestheticReward
from aegpo.rewards.clip import ClipReward
from aegpo.rewards.diversity import DiversityReward
from aegpo.rewards.hpsv2 import Hpsv2Reward
from aegpo.rewards.image_reward import ImageRewardReward
from aegpo.rewards.palette import PaletteReward
from aegpo.rewards.pickscore import PickScoreReward
from aegpo.rewards.remote import RemoteReward
from aegpo.rewards.scene import SceneReward
from aegpo.rewards.vlm import VlmJudgeReward, VlmPreferenceReward
from aegpo.runs.trackers import ConsoleTracker, JsonlTracker, TensorboardTracker
from aegpo.runs.tracking import AccelerateTracker


@hookimpl
def aegpo_register_models(registry: Registry[ModelSpec]) -> None:
    """The embedded world, and the published families."""
    registry.add(ShapesSpec)
    registry.add(SdSpec)
    registry.add(SdxlSpec)
    registry.add(Sd3Spec)
    registry.add(FluxSpec)


@hookimpl
def aegpo_register_rewards(registry: Registry[RewardSpec]) -> None:
    """Rewards of the embedded world, learned ones for real images, diversity, and those on servers."""
    registry.add(PaletteReward)
    registry.add(SceneReward)
    registry.add(Hpsv2Reward)
    registry.add(PickScoreReward)
    registry.add(ClipReward)
    registry.add(AestheticReward)
    registry.add(ImageRewardReward)
    registry.add(DiversityReward)
    registry.add(RemoteReward)
    registry.add(VlmJudgeReward)
    registry.add(VlmPreferenceReward)


@hookimpl
def aegpo_register_curricula(registry: Registry[CurriculumSpec]) -> None:
    """The usual order, and prompts at the boundary of what is learned."""
    registry.add(ShuffleCurriculum)
    registry.add(BoundaryCurriculum)


@hookimpl
def aegpo_register_signals(registry: Registry[SignalSpec]) -> None:
    """Attention entropy, what prompts brought, and the sampler's noise."""
    registry.add(EntropySignal)
    registry.add(RewardSignal)
    registry.add(StepNoiseSignal)


@hookimpl
def aegpo_register_allocators(registry: Registry[AllocatorSpec]) -> None:
    """AEGPO's allocation, its controls and GRPO's."""
    registry.add(UniformAllocator)
    registry.add(RandomAllocator)
    registry.add(EntropyAllocator)
    registry.add(InvertedAllocator)
    registry.add(MedianSplitAllocator)
    registry.add(RewardStdAllocator)
    registry.add(VarianceAllocator)
    registry.add(KnapsackAllocator)


@hookimpl
def aegpo_register_selectors(registry: Registry[SelectorSpec]) -> None:
    """AEGPO's choice of steps, its controls and those of the baselines."""
    registry.add(UniformSelector)
    registry.add(FractionSelector)
    registry.add(WindowSelector)
    registry.add(SlidingWindowSelector)
    registry.add(DepthPrunedSelector)
    registry.add(EntropyPeakSelector)
    registry.add(LowestEntropySelector)
    registry.add(PeaksSelector)
    registry.add(RandomSelector)
    registry.add(FirstSelector)
    registry.add(FixedSelector)
    registry.add(TopStdSelector)
    registry.add(MergedSelector)


@hookimpl
def aegpo_register_trees(registry: Registry[TreeSpec]) -> None:
    """Side by side, splitting at the chosen steps, or children of trunks."""
    registry.add(IndependentTree)
    registry.add(BranchingTree)
    registry.add(TrunkTree)


@hookimpl
def aegpo_register_samplers(registry: Registry[SamplerSpec]) -> None:
    """The stochastic steps of Flow-GRPO, DanceGRPO, Flow-CPS and DDPO."""
    registry.add(FlowSde)
    registry.add(DanceSde)
    registry.add(CpsSampler)
    registry.add(DdimSampler)


@hookimpl
def aegpo_register_advantages(registry: Registry[AdvantageSpec]) -> None:
    """Credit within the group, the depth of a tree, the children of a step, for a step's gain, or against the past."""
    registry.add(GroupAdvantage)
    registry.add(DepthAdvantage)
    registry.add(ProcessAdvantage)
    registry.add(GainAdvantage)
    registry.add(RunningAdvantage)


@hookimpl
def aegpo_register_objectives(registry: Registry[ObjectiveSpec]) -> None:
    """PPO's clipped loss and its relatives; DiffusionNFT, AWM and DGPO in the forward process."""
    registry.add(ClippedObjective)
    registry.add(GuardedObjective)
    registry.add(DivergenceMaskedObjective)
    registry.add(NftObjective)
    registry.add(MatchingObjective)
    registry.add(PreferenceObjective)


@hookimpl
def aegpo_register_trackers(registry: Registry[TrackerSpec]) -> None:
    """Terminal, files, TensorBoard, and services through accelerate."""
    registry.add(ConsoleTracker)
    registry.add(JsonlTracker)
    registry.add(TensorboardTracker)
    registry.add(AccelerateTracker)
