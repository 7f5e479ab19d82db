"""Verbs of parts and their parameters: asked for when a class is registered and when a part is built."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Literal, Protocol

import pytest
from worlds import GaussianSpec, small_experiment

from aegpo.core import parts, signatures
from aegpo.core.interfaces import Objective, Reward
from aegpo.core.parts import (
    AdvantageSpec,
    AllocatorSpec,
    ModelSpec,
    ObjectiveSpec,
    RewardSpec,
    SamplerSpec,
    SelectorSpec,
    SignalSpec,
    TrackerSpec,
    TreeSpec,
)
from aegpo.core.registries import PART_AXES
from aegpo.core.registry import Registry
from aegpo.errors import ContractError, PluginError
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.train.engine import Engine

SCORE = "score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor"
BUILD = "define  build(device: torch.device) -> Reward  to return another object"


class Bare(RewardSpec):
    """No verb."""

    kind: Literal["bare"] = "bare"


class Short(Bare):
    """Scores images alone."""

    def score(self, images):
        return images


class Long(Bare):
    """Wants more than there is."""

    def score(self, images, prompts, weights):
        return images


class KeywordsOnly(Bare):
    """Cannot be called by position."""

    def score(self, *, images, prompts):
        return images


class OtherNames(Bare):
    """Calls them otherwise, and takes one more if it is given."""

    def score(self, pictures, words, weights=None):
        return pictures


class Static(Bare):
    """Needs nothing of itself."""

    @staticmethod
    def score(images, prompts):
        return images


class Whatever(Bare):
    """Takes anything."""

    def score(*arguments):
        return arguments[1]


class WrongBuild(Bare):
    """Builds on no device."""

    def build(self):
        return self


class Built(Bare):
    """What it builds is seen when it is built."""

    def build(self, where):
        return object()


class WrongRefusal(Static):
    """Refuses without being asked about a prompt."""

    def refuses(self):
        return "never"


class Schedule(ModelSpec):
    """Can be built, but does not say its noise levels."""

    kind: Literal["schedule"] = "schedule"

    def build(self, device):
        return object()


class Provides(SignalSpec):
    """Measures, but does not say what."""

    kind: Literal["provides"] = "provides"

    def measure(self, step, prompts, policy):
        return None


class Mute(TrackerSpec):
    """Builds nothing."""

    kind: Literal["mute"] = "mute"


def registered(base: type, spec: type) -> str | None:
    """What a registry says of a class, after its name; None: it takes it."""
    axis = next(axis for axis, each in PART_AXES.items() if each is base)
    registry = Registry(axis, base)
    registry.source = "aegpo-other"
    start = f"aegpo-other registers {spec.__name__!r} in {axis!r} as {spec.model_fields['kind'].default!r}, which "
    end = "; mend it, or leave the plugin out with AEGPO_BLOCK_PLUGINS=aegpo-other"
    try:
        registry.add(spec)
    except PluginError as error:
        said = str(error)
    else:
        return None
    assert not registry.names
    assert said.startswith(start)
    assert said.endswith(end)
    return said.removeprefix(start).removesuffix(end)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Bare, f"has no 'score'; asked is  {SCORE}, or {BUILD}"),
        (Short, f"has score(images), which cannot be called as  {SCORE}, or {BUILD}"),
        (Long, f"has score(images, prompts, weights), which cannot be called as  {SCORE}, or {BUILD}"),
        (KeywordsOnly, f"has score(*, images, prompts), which cannot be called as  {SCORE}, or {BUILD}"),
        (WrongBuild, "has build(), which cannot be called as  build(device: torch.device) -> Reward"),
        (WrongRefusal, "has refuses(), which cannot be called as  refuses(prompt: Prompt) -> str | None"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_reward_that_cannot_be_asked_is_refused_when_it_is_registered(spec, message):
    assert registered(RewardSpec, spec) == message


@pytest.mark.parametrize("spec", [OtherNames, Static, Whatever, Built])
def test_names_of_parameters_and_further_optional_ones_are_free(spec):
    assert registered(RewardSpec, spec) is None


def test_what_a_spec_base_leaves_open_must_be_defined():
    assert registered(ModelSpec, Schedule) == "has no 'sigmas'; asked is  sigmas(steps: int) -> FloatArray"
    assert registered(SignalSpec, Provides) == ("has no 'provides'; asked is  provides: ClassVar[Mapping[str, Per]]")
    assert registered(TrackerSpec, Mute) == "has no 'build'; asked is  build(folder: Path) -> object"


@pytest.mark.parametrize("base", [base for base in PART_AXES.values() if base is not TrackerSpec])
def test_the_verbs_of_every_kind_are_those_of_the_protocol_that_its_build_returns(base):
    """So that who changes a protocol changes what is asked of foreign parts."""
    protocols = signatures.protocols_of(base)
    promised = [vars(parts)[name] for name in inspect.get_annotations(base.build)["return"].split(" | ")]
    assert protocols
    assert list(protocols) == promised


@pytest.mark.parametrize(
    "base", [SignalSpec, AllocatorSpec, SelectorSpec, TreeSpec, SamplerSpec, AdvantageSpec, ObjectiveSpec, RewardSpec]
)
def test_a_part_without_a_verb_that_builds_nothing_else_is_refused_when_it_is_registered(base):
    class Empty(base):
        """Has no verb."""

        kind: Literal["empty"] = "empty"
        provides: ClassVar[dict[str, str]] = {}  # of signals

    (protocol, *_) = signatures.protocols_of(base)
    verbs = [name for name, member in vars(protocol).items() if inspect.isfunction(member) and name[0] != "_"]
    verb = next(name for name in verbs if not hasattr(base, name))  # the others have a default
    assert registered(base, Empty).startswith(f"has no {verb!r}; asked is  {verb}(")


def test_every_part_in_the_box_has_what_is_asked():
    for registry in load_registries(plugin_manager()):
        for entry in registry:
            assert signatures.refusal(entry.spec, registry.base) is None


class Wide(Protocol):
    """A protocol that grew."""

    def score(self, images: Any, prompts: Any, *, scale: float, strict: bool = True) -> Any:
        """More than before."""


def test_a_protocol_that_grows_asks_for_more_by_itself():
    class Old:
        def score(self, images, prompts):
            return images

    class New:
        def score(self, images, prompts, *, scale, strict=True):
            return images

    class Half:
        """Lacks what has a default, which is an ability that a part may lack."""

        def score(self, images, prompts, *, scale):
            return images

    for able in (New, Half):
        assert signatures.built("reward", "new", able, Wide)
    with pytest.raises(ContractError, match=r"which cannot be called as  score\(images: Any, prompts: Any, \*, scale"):
        signatures.built("reward", "old", Old, Wide)


def test_what_build_returns_is_asked_by_the_same_rule():
    class Scorer:
        def score(self, images):
            return images

    with pytest.raises(ContractError) as caught:
        signatures.built("reward", "bare", object, Reward)
    assert str(caught.value) == f"reward 'bare' was built as 'object', which has no 'score'; asked is  {SCORE}"
    assert caught.value.location == ("reward",)
    with pytest.raises(ContractError) as caught:
        signatures.built("reward", "short", Scorer, Reward)
    assert str(caught.value) == (
        f"reward 'short' was built as 'Scorer', which has score(images), which cannot be called as  {SCORE}"
    )


def test_a_part_that_is_built_has_the_attributes_that_are_read():
    class Loss:
        process, needs_old, keeps_old = "reverse", False, False

        def old_decay(self, step):
            return 0.0

        def loss(self, update):
            return update.log_prob, {}

    with pytest.raises(ContractError, match=r"was built as 'Loss', which has no attribute 'scope'; Objective ask"):
        signatures.built("objective", "loss", Loss, Objective)


class NoModel(GaussianSpec):
    """Builds no model."""

    def build(self, device):
        return object()


def builder(base: type) -> Any:
    """A spec of a kind that is registered, and builds an object without a verb."""

    class Empty(base):
        """Builds nothing of use."""

        kind: Literal["empty"] = "empty"

        def build(self, *device):
            return object()

    assert registered(base, Empty) is None
    return Empty()


@pytest.mark.parametrize(
    ("changes", "blamed"),
    [
        ({"allocator": builder(AllocatorSpec)}, "allocator 'empty' was built as 'object', which has no 'allocate'"),
        ({"selector": builder(SelectorSpec)}, "selector 'empty' was built as 'object', which has no 'select'"),
        ({"tree": builder(TreeSpec)}, "tree 'empty' was built as 'object', which has no 'plan'"),
        ({"sampler": builder(SamplerSpec)}, "sampler 'empty' was built as 'object', which has no 'transition'"),
        ({"advantage": builder(AdvantageSpec)}, "advantage 'empty' was built as 'object', which has no "),
        ({"objective": builder(ObjectiveSpec)}, "objective 'empty' was built as 'object', which has no "),
        ({"rewards": (builder(RewardSpec),)}, "reward 'empty' was built as 'object', which has no 'score'"),
        ({"model": NoModel()}, "model 'gaussian' was built as 'object', which has no 'encode'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_engine_refuses_a_part_without_its_verb_before_it_begins(changes, blamed):
    with pytest.raises(ContractError) as caught:
        Engine.build(small_experiment(**{"model": GaussianSpec(), **changes}))
    assert str(caught.value).startswith(blamed)
