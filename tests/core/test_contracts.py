"""What parts may not return, and the words that blame them; the conformance checks of `aegpo.testing`."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import accelerate.tracking
import nonconforming as bad
import numpy as np
import pytest
import torch

from aegpo import testing
from aegpo.core import contracts
from aegpo.core.parts import SelectorSpec
from aegpo.core.records import Conditioning, Gaussian
from aegpo.core.signals import Signals
from aegpo.errors import ContractError
from aegpo.method.selectors import UniformSelector
from aegpo.method.trees import BranchingTree, IndependentTree
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.prompts.lists import numbered

SIGNALS = Signals(1, 4, np.linspace(1, 0, 4))
COUNTS = np.array([2, 4, 3, 3])
STEPS = np.array([[1, 1, 0]] * 4, dtype=bool)
NAN = torch.tensor([0.0, float("nan")])


def plan(tree=None, counts=COUNTS):
    return (tree or BranchingTree()).plan(counts, STEPS, np.random.default_rng(0))


def changed(field: str, level: int, index: int | slice, value):
    arrays = [array.copy() for array in vars(plan())[field]]
    arrays[level][index] = value
    return replace(plan(), **{field: tuple(arrays)})


ints = np.array
latents = torch.zeros(2, 3, 4, 4)

CASES = [
    (
        lambda: contracts.check_counts("entropy", ints([16, 16, 16, 15]), SIGNALS, 64),
        "allocator 'entropy' returned 63 rollouts for a budget of 64",
    ),
    (
        lambda: contracts.check_counts("entropy", ints([61, 1, 1, 1]), SIGNALS, 64),
        "allocator 'entropy' returned 1 rollouts for prompt 1 of the step; a group needs at least 2 to be compared, or "
        "none: then the prompt is not asked this time",
    ),
    (
        lambda: contracts.check_counts("entropy", ints([32, 32]), SIGNALS, 64),
        "allocator 'entropy' returned counts of shape (2,), int64; (4,), int64 was asked",
    ),
    (
        lambda: contracts.check_counts("entropy", ints([16.0] * 4), SIGNALS, 64),
        "allocator 'entropy' returned counts of shape (4,), float64; (4,), int64 was asked",
    ),
    (
        lambda: contracts.check_counts("entropy", [16] * 4, SIGNALS, 64),
        "allocator 'entropy' returned counts as list; a numpy array of int64 was asked",
    ),
    (
        lambda: contracts.check_selection("peak", np.ones((4, 4), bool), SIGNALS),
        "selector 'peak' returned a selection of shape (4, 4), bool; (4, 3), bool was asked",
    ),
    (
        lambda: contracts.check_selection("peak", np.eye(4, 3, dtype=bool), SIGNALS),
        "selector 'peak' chose no denoising step for prompt 3 of the step; choose at least one",
    ),
    (
        lambda: contracts.check_plan("t", plan(), COUNTS[::-1], STEPS),
        "tree 't' planned 2 rollouts for prompt 0, which was given 3",
    ),
    (
        lambda: contracts.check_plan("t", plan(), COUNTS, STEPS[:, :2]),
        "tree 't' planned 3 denoising steps in 'prompt'; 2 were asked",
    ),
    (
        lambda: contracts.check_plan("t", changed("parent", 0, 0, 99), COUNTS, STEPS),
        "tree 't' planned a child without a parent at denoising step 0: level 0 has 4 nodes",
    ),
    (
        lambda: contracts.check_plan("t", changed("parent", 2, 0, 5), COUNTS, STEPS),
        "tree 't' planned a child at denoising step 2 whose parent belongs to another prompt",
    ),
    (
        lambda: contracts.check_plan("t", changed("parent", 2, slice(0, 2), [1, 0]), COUNTS, STEPS),
        "tree 't' planned children at denoising step 2 in another order than their parents'; sort them by parent",
    ),
    (
        lambda: contracts.check_plan("t", changed("parent", 2, 0, 1), COUNTS, STEPS),
        "tree 't' planned a node at denoising step 2 that leads to no rollout; every node needs a child",
    ),
    (
        lambda: contracts.check_plan("t", changed("prompt", 3, 0, 7), COUNTS, STEPS),
        "tree 't' planned a node of a prompt that does not exist at denoising step 2; prompts are 0 to P-1",
    ),
    (
        lambda: contracts.check_plan("t", changed("noisy", 0, slice(0, 2), False), COUNTS, STEPS),
        "tree 't' planned siblings at denoising step 0 without noise; they would be the same image",
    ),
    (
        lambda: contracts.check_plan("t", replace(plan(), start=np.array([0, 0, 9, 1])), COUNTS, STEPS),
        "tree 't' planned start noise [0, 0, 9, 1]; 4 roots have 0 to 3",
    ),
    (
        lambda: contracts.check_trainable("o", "reverse", changed("trained", 2, 0, True)),
        "objective 'o' needs log-probabilities, but denoising step 2 is trained and has no noise; choose a tree that "
        "adds noise at the chosen steps, or an objective of the forward process",
    ),
    (
        lambda: contracts.check_trainable("o", "forward", plan()),
        "objective 'o' learns from whole rollouts, but several share a trained step at level 0, which then has no "
        "single clean image; use tree 'independent' with 'start: own'",
    ),
    (
        lambda: contracts.check_noise("s", np.array([0.1, 0.0, 0.0]), plan()),
        "sampler 's' adds no noise at denoising step 1, where the plan asks for some and learning needs a density; "
        "choose other steps, or another sampler",
    ),
    (
        lambda: contracts.check_plan("t", replace(plan(), noisy=(*plan().noisy[:2], np.ones(3, bool))), COUNTS, STEPS),
        "tree 't' returned 'noisy' of step 2 of shape (3,), bool; (12,), bool was asked",
    ),
    (
        lambda: contracts.check_sigmas("m", torch.tensor([1.0, 0.5, 0.5, 0.0]), 3),
        "model 'm' returned sigmas that do not fall at denoising step 1: 0.5 to 0.5; they must fall strictly",
    ),
    (
        lambda: contracts.check_sigmas("m", torch.tensor([1.0, 0.5, 0.1]), 2),
        "model 'm' returned sigmas from 1 to 0.1; they run from 1 to 0",
    ),
    (
        lambda: contracts.check_sigmas("m", torch.linspace(1, 0, 3), 3),
        "model 'm' returned sigmas of shape (3,), float32; (4,), float32 was asked",
    ),
    (
        lambda: contracts.check_conditioning("m", Conditioning(torch.zeros(2, 3, 4), torch.zeros(1, 4)), ["a", "b"]),
        "model 'm' encoded 2 prompts, but 'pooled' has 1 rows; one a prompt",
    ),
    (
        lambda: contracts.check_conditioning("m", Conditioning(latents, extra={"time_ids": NAN[:1]}), ["a", "b"]),
        "model 'm' encoded 2 prompts, but 'extra.time_ids' has 1 rows; one a prompt",
    ),
    (
        lambda: contracts.check_velocity("m", torch.zeros(2, 3, 4), latents),
        "model 'm' returned a velocity of shape (2, 3, 4), float32; (2, 3, 4, 4), floating was asked",
    ),
    (
        lambda: contracts.check_images("m", torch.zeros(2, 1, 4, 4), 2),
        "model 'm' decoded images of shape (2, 1, 4, 4) from 2 latents; (2, 3, h, w) was asked",
    ),
    (
        lambda: contracts.check_images("m", latents + 1.5, 2),
        "model 'm' decoded pixels from 1.5 to 1.5; images lie in [0, 1]",
    ),
    (
        lambda: contracts.check_images("m", latents * float("nan"), 2),
        "model 'm' decoded 96 non-finite values of 96",
    ),
    (
        lambda: contracts.check_transition("s", Gaussian(latents, -torch.ones(2)), latents),
        "sampler 's' returned a std of -1; it must be at least 0",
    ),
    (
        lambda: contracts.check_transition("s", Gaussian(latents, NAN), latents),
        "sampler 's' returned a std with 1 non-finite values of 2",
    ),
    (
        lambda: contracts.check_log_prob("s", NAN, latents),
        "sampler 's' returned 1 non-finite values of 2",
    ),
    (
        lambda: contracts.check_scores("hpsv2", NAN, numbered(["a blue cat", "a red circle"])),
        "reward 'hpsv2' returned a non-finite score for prompt 'a red circle'",
    ),
    (
        lambda: contracts.check_scores("hpsv2", NAN.double(), numbered("ab")),
        "reward 'hpsv2' returned scores of shape (2,), float64; (2,), float32 was asked",
    ),
    (
        lambda: contracts.check_credit("a", torch.zeros(3), 4),
        "advantage 'a' returned credit of shape (3,), float32; (4,), float32 was asked",
    ),
    (
        lambda: contracts.check_credit("a", NAN, 2),
        "advantage 'a' returned 1 non-finite values of 2",
    ),
    (
        lambda: contracts.check_loss("o", torch.zeros(2), {}, 2),
        "objective 'o' returned a loss without a gradient; it must depend on 'log_prob', 'mean' or 'velocity'",
    ),
    (
        lambda: contracts.check_loss("o", torch.zeros(2, requires_grad=True), {"kl": torch.zeros(())}, 2),
        "objective 'o' returned metric 'kl' of shape (), float32; (2,), floating was asked",
    ),
    (
        lambda: contracts.check_loss("o", NAN.clone().requires_grad_(), {}, 2),
        "objective 'o' returned 1 non-finite values of 2",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=[message for _, message in CASES])
def test_a_part_that_breaks_its_contract_is_blamed_by_kind_and_name(call, message):
    with pytest.raises(ContractError) as caught:
        call()
    assert str(caught.value) == message


def test_what_keeps_its_contract_passes():
    contracts.check_counts("x", COUNTS, SIGNALS, 12)
    contracts.check_selection("x", STEPS, SIGNALS)
    for tree in (BranchingTree(), BranchingTree(noise="all"), IndependentTree(), IndependentTree(start="shared")):
        contracts.check_plan("x", plan(tree), COUNTS, STEPS)
    contracts.check_sigmas("x", torch.linspace(1, 0, 5), 4)
    contracts.check_velocity("x", latents.bfloat16(), latents)
    contracts.check_images("x", latents, 2)
    contracts.check_transition("x", Gaussian(latents, torch.zeros(2)), latents)
    contracts.check_scores("x", torch.zeros(2), numbered("ab"))
    contracts.check_loss("x", torch.ones(2, requires_grad=True), {"ratio": torch.ones(2)}, 2)


# --- conformance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "axis",
    [
        *(pytest.param(axis, marks=pytest.mark.slow) for axis in ("allocators", "selectors", "advantages")),
        *("trees", "samplers", "objectives"),
    ],
)
def test_every_built_in_conforms(axis):
    registries = {registry.axis: registry for registry in load_registries(plugin_manager())}
    check = {
        "allocators": testing.check_allocator,
        "selectors": testing.check_selector,
        "trees": testing.check_tree,
        "samplers": testing.check_sampler,
        "advantages": testing.check_advantage,
        "objectives": testing.check_objective,
    }[axis]
    for entry in registries[axis]:
        if entry.source == "aegpo":
            asked = {"median-split": {"signal": "reward-std"}, "peaks": {"signal": "step-noise"}}
            check(entry.spec(**asked.get(entry.name, {})))


def test_built_in_trackers_conform(tmp_path, monkeypatch):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "quiet", Quiet)
    for entry in load_registries(plugin_manager()).trackers:
        asked = {"accelerate": {"log_with": "quiet"}}
        testing.check_tracker(entry.spec(**asked.get(entry.name, {})), tmp_path / entry.name)


class Quiet(accelerate.tracking.GeneralTracker):
    """A tracker of accelerate that keeps what it is told in memory, and takes no images."""

    name, requires_logging_directory, tracker = "quiet", False, None

    def __init__(self, project):
        super().__init__()
        self.told = [project]

    def log(self, values, step=None):
        self.told.append((step, values))


@pytest.mark.parametrize("kind", ["palette", "scene"])
def test_built_in_rewards_that_need_no_weights_conform(kind):
    testing.check_reward(load_registries(plugin_manager()).rewards.get(kind)())


def test_the_embedded_model_conforms(tiny_spec):
    testing.check_model(tiny_spec)


class Heavy(SelectorSpec):
    """Lives in a module that imports torch."""

    kind: Literal["heavy"] = "heavy"


@pytest.mark.parametrize(
    ("check", "spec", "message"),
    [
        (testing.check_allocator, bad.Lopsided(), "allocator 'lopsided' returned 23 rollouts for a budget of 24"),
        (testing.check_selector, bad.Dicey(), "selector 'dicey' decides differently in two equal calls"),
        (testing.check_selector, bad.Choosy(), "selector 'choosy' has problems with each of 12 usual sizes"),
        (testing.check_selector, bad.Amnesiac(), "selector 'amnesiac' goes on differently after load_state_dict"),
        (testing.check_tree, bad.Stump(), "tree 'stump' planned 7 rollouts for prompt 0, which was given 8"),
        (testing.check_reward, bad.Scribbler(), "reward 'scribbler' changes the images it is given; work on a copy"),
        (
            testing.check_reward,
            bad.Neighbourly(),
            "reward 'neighbourly' scores ",
        ),
        (
            testing.check_advantage,
            bad.Dated(),
            "advantage 'dated' failed with TypeError: unsupported operand type(s) for *: 'Scores' and 'Tensor'; it was "
            "written for aegpo 0.1, whose advantages took a tensor of scores: use scores.leaves",
        ),
        (testing.check_advantage, bad.Curious(), "advantage 'curious' failed with KeyError: 0"),
        (testing.check_advantage, bad.Fickle(), "advantage 'fickle' asks for other levels of the same plan in two"),
        (testing.check_objective, bad.Detached(), "objective 'detached' returned a loss without a gradient"),
        (
            testing.check_objective,
            bad.Comparing(),
            "objective 'comparing' has other losses for the same rows in a larger",
        ),
        (testing.check_objective, bad.Mixing(), "objective 'mixing' has other losses for the same groups in a larger"),
        (testing.check_reward, bad.Undescribed(), "spec 'Undescribed' has a field 'power' without a description"),
        (testing.check_reward, bad.Tolerant(), "spec 'Tolerant' accepts unknown keys; keep extra='forbid'"),
        (testing.check_reward, bad.Forgetful(secret=1), "spec 'Forgetful' does not read back equal from its JSON"),
    ],
)
def test_a_part_that_does_not_conform_is_found(check, spec, message):
    with pytest.raises(ContractError) as caught:
        check(spec)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (bad.Silent(), "tracker 'silent' implements no observer hook"),
        (bad.Mumbler(), "tracker 'mumbler' implements 'aegpo_on_step_done', which is no hook"),
    ],
)
def test_a_tracker_that_hears_nothing_is_found(tmp_path, spec, message):
    with pytest.raises(ContractError) as caught:
        testing.check_tracker(spec, tmp_path)
    assert str(caught.value).startswith(message)


def test_a_module_that_imports_torch_is_found():
    with pytest.raises(ContractError, match=r"^spec 'Heavy' imports torch with its module '.*'; import it inside"):
        testing.check_spec(Heavy())


def test_a_spec_with_torch_inside_functions_passes():
    testing.check_spec(UniformSelector())
