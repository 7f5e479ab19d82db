"""Conformance checks for plugin authors: call the one for your kind of part in a test.

Each builds the part on the CPU, feeds it many valid inputs and raises `ContractError`, with the part's name, at the
first thing that would break a run: a wrong shape or type, a value that is not finite, a result that changes between
equal calls. torch is imported inside the checks that need it, because a spec must be importable and valid without.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from aegpo import contracts
from aegpo.advantages import GroupAdvantage
from aegpo.allocators import UniformAllocator
from aegpo.errors import ContractError
from aegpo.interfaces import BoolArray, IntArray, RolloutPlan, RunInfo, Signals, Stateful, Tree
from aegpo.models.shapes import ShapesSpec
from aegpo.objectives import ClippedObjective
from aegpo.registry import KEBAB_CASE, Spec, kind_of
from aegpo.rewards.palette import PaletteReward
from aegpo.samplers import FlowSde
from aegpo.selectors import UniformSelector
from aegpo.specs import (
    AdvantageSpec,
    AllocatorSpec,
    Experiment,
    ModelSpec,
    ObjectiveSpec,
    RewardSpec,
    RolloutsSpec,
    SamplerSpec,
    SelectorSpec,
    TrackerSpec,
    TreeSpec,
)
from aegpo.trees import BranchingTree, IndependentTree

if TYPE_CHECKING:
    from torch import Tensor

    from aegpo.interfaces import StepReport

_SIZES = tuple(product((1, 2, 3, 8), (2, 5, 10)))  # prompts and denoising steps
_BUDGETS = (2, 3, 8, 12, 16)  # rollouts of a prompt on average
_ROUNDING = 1e-4  # relative: what another batch size may change
_IMPORT = """
import importlib, json, operator, sys
sys.path[:] = json.loads(sys.argv[1])
operator.attrgetter(sys.argv[3])(importlib.import_module(sys.argv[2])).model_validate_json(sys.argv[4])
sys.exit(3 if "torch" in sys.modules else 0)
"""


# --- specs -----------------------------------------------------------------------------------------------------------


def check_spec(spec: Spec) -> None:
    """What every part's spec must have; the checks below begin with it.

    A kebab-case kind, a docstring, a description of every field, no tolerance for unknown keys, a JSON form that reads
    back equal, and a module that can be imported without torch.
    """
    cls, kind = type(spec), kind_of(type(spec))
    who = f"spec {cls.__name__!r}"
    if kind is None or not KEBAB_CASE.fullmatch(kind):
        raise ContractError(f"{who} has no kind; give it  kind: Literal['my-name'] = 'my-name'  (kebab-case)")
    if not (cls.__dict__.get("__doc__") or "").strip():
        raise ContractError(f"{who} has no docstring; its first line is what 'aegpo plugins' shows")
    for name, field in cls.model_fields.items():
        if name != "kind" and not field.description:
            raise ContractError(f"{who} has a field {name!r} without a description; use Field(description=...)")
    data = spec.model_dump(mode="json")
    if cls.model_validate(json.loads(json.dumps(data))) != spec:
        raise ContractError(f"{who} does not read back equal from its JSON {data}")
    try:
        cls.model_validate({**data, "no_such_key": 1})
    except ValidationError:
        pass
    else:
        raise ContractError(f"{who} accepts unknown keys; keep extra='forbid'")
    if "<locals>" not in cls.__qualname__:
        _check_import(who, cls, json.dumps(data))


def _check_import(who: str, cls: type[Spec], data: str) -> None:
    arguments = [json.dumps(sys.path), cls.__module__, cls.__qualname__, data]
    done = subprocess.run([sys.executable, "-c", _IMPORT, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        raise ContractError(f"{who} imports torch with its module {cls.__module__!r}; import it inside functions")
    if done.returncode:
        raise ContractError(f"{who} cannot be imported and validated on its own: {done.stderr.strip()}")


# --- decisions: numpy only -------------------------------------------------------------------------------------------


def check_allocator(spec: AllocatorSpec) -> None:
    """Counts of at least 2 that add up to the budget, for every size that `problems` lets pass, and deterministic."""
    check_spec(spec)
    first, second, tried = spec.build(), spec.build(), 0
    for (prompts, steps), each, extra in product(_SIZES, _BUDGETS, (0, 1)):
        budget = prompts * each + extra
        rollouts = RolloutsSpec(prompts_per_step=prompts, rollouts_per_step=budget, denoising_steps=steps)
        if any(spec.problems(_experiment(rollouts, allocator=spec))):
            continue
        tried += 1
        for signals in _signals(prompts, steps, spec.needs_entropy):
            counts = first.allocate(signals, budget, _rng())
            contracts.check_counts(spec.kind, counts, signals, budget)
            _check_equal(f"allocator {spec.kind!r}", counts, second.allocate(signals, budget, _rng()))
    if not tried:
        raise ContractError(f"allocator {spec.kind!r} has problems with each of {len(_SIZES) * 10} usual sizes")
    _check_memory(f"allocator {spec.kind!r}", first, spec.build(), lambda part: part.allocate(signals, budget, _rng()))


def check_selector(spec: SelectorSpec) -> None:
    """At least one denoising step a prompt, for every size that `problems` lets pass, and deterministic."""
    check_spec(spec)
    first, second, tried = spec.build(), spec.build(), 0
    for prompts, steps in _SIZES:
        rollouts = RolloutsSpec(prompts_per_step=prompts, rollouts_per_step=8 * prompts, denoising_steps=steps)
        if any(spec.problems(_experiment(rollouts, selector=spec))):
            continue
        tried += 1
        for signals in _signals(prompts, steps, spec.needs_entropy):
            selected = first.select(signals, _rng())
            contracts.check_selection(spec.kind, selected, signals)
            _check_equal(f"selector {spec.kind!r}", selected, second.select(signals, _rng()))
    if not tried:
        raise ContractError(f"selector {spec.kind!r} has problems with each of {len(_SIZES)} usual sizes")
    _check_memory(f"selector {spec.kind!r}", first, spec.build(), lambda part: part.select(signals, _rng()))


def check_tree(spec: TreeSpec) -> None:
    """Proper forests with exactly the asked leaves, for equal and unequal counts and any steps, and deterministic."""
    check_spec(spec)
    first, second = spec.build(), spec.build()
    for counts, steps in _tree_inputs():
        plan = first.plan(counts, steps, _rng())
        contracts.check_plan(spec.kind, plan, counts, steps)
        again = second.plan(counts, steps, _rng())
        for field in ("prompt", "parent", "noisy", "trained"):
            for one, other in zip(vars(plan)[field], vars(again)[field], strict=True):
                _check_equal(f"tree {spec.kind!r}", one, other)


def _tree_inputs() -> Iterator[tuple[IntArray, BoolArray]]:
    rng = _rng()
    for prompts, num_steps in _SIZES:
        chosen = [np.ones((prompts, num_steps), dtype=np.bool_), rng.random((prompts, num_steps)) < 0.4]
        chosen += [np.tile(np.eye(num_steps, dtype=np.bool_)[step], (prompts, 1)) for step in (0, num_steps - 1)]
        for steps, counts in product(chosen, (np.full(prompts, 8), rng.integers(2, 17, prompts))):
            steps[~steps.any(axis=1), 0] = True
            yield counts.astype(np.int64), steps


def _signals(prompts: int, steps: int, entropy: bool) -> Iterator[Signals]:
    """First, early and late training steps under flat, tied, rising, falling and random entropies."""
    rng, sigmas = _rng(), np.linspace(1.0, 0.0, steps + 1)
    ramp = np.linspace(0.0, 1.0, steps)
    curves = [np.zeros((prompts, steps)), np.tile(ramp, (prompts, 1)), np.tile(-ramp, (prompts, 1))]
    curves += [rng.random((prompts, steps)), rng.integers(0, 2, (prompts, steps)).astype(np.float64)]
    for step, curve, shift in product((1, 2, 10**6), curves, (np.zeros(prompts), rng.random(prompts))):
        known = (3 + curve, 3 + curve + shift[:, None]) if entropy else (None, None)
        yield Signals(step, prompts, sigmas, *known)


def _experiment(
    rollouts: RolloutsSpec, allocator: AllocatorSpec | None = None, selector: SelectorSpec | None = None
) -> Experiment:
    return Experiment(
        rollouts=rollouts,
        model=ShapesSpec(),
        rewards=(PaletteReward(),),
        allocator=allocator or UniformAllocator(),
        selector=selector or UniformSelector(),
        tree=IndependentTree(),
        sampler=FlowSde(),
        advantage=GroupAdvantage(),
        objective=ClippedObjective(),
    )


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


def _check_equal(who: str, one: Any, other: Any) -> None:
    if not bool((one == other).all()):
        raise ContractError(f"{who} decides differently in two equal calls; draw only from what it is given")


def _check_memory(who: str, used: Any, fresh: Any, call: Callable[[Any], Any]) -> None:
    """A part with state must go on from `state_dict` as if it had never stopped."""
    if isinstance(used, Stateful):
        fresh.load_state_dict(copy.deepcopy(used.state_dict()))
        if not bool((call(used) == call(fresh)).all()):
            raise ContractError(
                f"{who} goes on differently after load_state_dict(state_dict()); store all it remembers"
            )


# --- what touches tensors --------------------------------------------------------------------------------------------


def check_reward(spec: RewardSpec, prompts: Sequence[str] = (), size: tuple[int, int] = (24, 24)) -> None:
    """Finite float32 scores, one an image, the same in every call and whatever else is in the batch.

    Args:
        spec: the reward.
        prompts: texts it can score, at least 3; default: captions of the embedded world.
        size: height and width of the images.
    """
    import torch

    check_spec(spec)
    texts = list(prompts) or list(ShapesSpec().captions("evaluation", 6, 0))
    reward = spec.build(torch.device("cpu"))
    images = torch.rand((len(texts), 3, *size), generator=torch.Generator().manual_seed(0))
    images[0], images[1] = 0.0, 1.0
    before = images.clone()
    scores = reward.score(images, texts)
    contracts.check_scores(spec.kind, scores, texts)
    if not torch.equal(images, before):
        raise ContractError(f"reward {spec.kind!r} changes the images it is given; work on a copy")
    if not torch.equal(scores, reward.score(images, texts)):
        raise ContractError(f"reward {spec.kind!r} scores the same images differently in two calls")
    for index, text in enumerate(texts):
        alone = reward.score(images[index : index + 1], [text])
        contracts.check_scores(spec.kind, alone, [text])
        if not torch.allclose(alone[0], scores[index], rtol=_ROUNDING, atol=_ROUNDING):
            raise ContractError(f"reward {spec.kind!r} scores {text!r} differently alone and among other images")


def check_sampler(spec: SamplerSpec, steps: int = 10) -> None:
    """Transitions with finite means and stds for every step of a schedule, and densities highest at the mean."""
    import torch

    check_spec(spec)
    sampler, generator = spec.build(), torch.Generator().manual_seed(0)
    sigmas = torch.linspace(1.0, 0.0, steps + 1)
    latents, velocity, noise = (torch.randn((4, 2, 3, 3), generator=generator) for _ in range(3))
    for step in range(steps):
        sigma, sigma_next = sigmas[step].expand(4), sigmas[step + 1].expand(4)
        gaussian = sampler.transition(latents, velocity, sigma, sigma_next)
        contracts.check_transition(spec.kind, gaussian, latents)
        alone = sampler.transition(latents[:1], velocity[:1], sigma[:1], sigma_next[:1])
        if not torch.allclose(alone.mean[0], gaussian.mean[0], rtol=_ROUNDING, atol=_ROUNDING):
            raise ContractError(f"sampler {spec.kind!r} moves a latent differently alone and in a batch")
        if bool((gaussian.std == 0).any()):
            continue
        drawn = gaussian.mean + gaussian.std.view(-1, 1, 1, 1) * noise
        log_prob, highest = sampler.log_prob(gaussian, drawn), sampler.log_prob(gaussian, gaussian.mean)
        contracts.check_log_prob(spec.kind, log_prob, latents)
        if bool((log_prob > highest).any()):
            raise ContractError(f"sampler {spec.kind!r} finds a drawn latent likelier than the mean at step {step}")


def check_advantage(spec: AdvantageSpec) -> None:
    """Finite float32 credit for each trained edge, also where all rewards are equal, and deterministic."""
    import torch

    check_spec(spec)
    first, second = spec.build(), spec.build()
    generator = torch.Generator().manual_seed(0)
    trees: tuple[Tree, ...] = (IndependentTree(), BranchingTree())
    inputs = list(_tree_inputs())[::5]
    for tree, (counts, steps), rewards in product(trees, inputs, (1, 2)):
        rollouts = _rollouts(tree.plan(counts, steps, _rng()), generator)
        shape = (rollouts.plan.num_rollouts, rewards)
        for scores in (torch.rand(shape, generator=generator), torch.zeros(shape), torch.full(shape, -1e3)):
            credit = first.estimate(scores, torch.ones(rewards), rollouts)
            contracts.check_credit(spec.kind, credit, rollouts.plan.trained_edges)
            _check_equal(f"advantage {spec.kind!r}", credit, second.estimate(scores, torch.ones(rewards), rollouts))
    again = (scores, torch.ones(rewards), rollouts)
    _check_memory(f"advantage {spec.kind!r}", first, spec.build(), lambda part: part.estimate(*again))


def _rollouts(plan: RolloutPlan, generator: Any) -> Any:
    """Made-up rollouts of a plan: what an execution would return, with random numbers for latents."""
    import torch

    from aegpo.interfaces import Edges, Rollouts

    def joined(arrays: Iterator[IntArray]) -> Tensor:
        return torch.from_numpy(np.concatenate(list(arrays)))

    trained = list(enumerate(plan.trained))
    size = plan.trained_edges
    noise = torch.randn((2, size, 1, 2, 2), generator=generator)
    log_prob = tuple(torch.randn(len(nodes), generator=generator) for nodes in plan.prompt[1:])
    edges = Edges(
        level=joined(np.full(int(mask.sum()), level) for level, mask in trained),
        prompt=joined(plan.prompt[level + 1][mask] for level, mask in trained),
        rollout=joined(plan.first_leaf[level + 1][mask] for level, mask in trained),
        leaves=joined(plan.leaves[level + 1][mask] for level, mask in trained),
        latents=noise[0],
        next_latents=noise[1],
        log_prob=torch.cat([log_prob[level][torch.from_numpy(mask)] for level, mask in trained]),
    )
    images = torch.rand((plan.num_rollouts, 3, 4, 4), generator=generator)
    return Rollouts(plan, images[:, :1, :2, :2], images, log_prob, edges)


def check_objective(spec: ObjectiveSpec) -> None:
    """A finite loss with a finite gradient for each transition, before and after the policy has moved."""
    import torch

    from aegpo.interfaces import Update

    check_spec(spec)
    objective, generator = spec.build(), torch.Generator().manual_seed(0)
    for size, moved in product((1, 6), (0.0, 1e-3, 0.5)):
        old, advantage, drift = (torch.randn(size, generator=generator) for _ in range(3))
        mean = torch.randn((size, 2, 3, 3), generator=generator).requires_grad_()
        log_prob = (old + moved * drift).requires_grad_()
        base = mean.detach() + moved if objective.needs_base else None
        std, level = torch.rand(size, generator=generator) + 0.1, torch.arange(size)
        update = Update(log_prob, old, advantage, mean, base, std, level, float(std.mean()))
        loss, metrics = objective.loss(update)
        contracts.check_loss(spec.kind, loss, metrics, size)
        gradients = torch.autograd.grad(loss.sum(), (log_prob, mean), allow_unused=True)
        if not all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None):
            raise ContractError(f"objective {spec.kind!r} has a gradient that is not finite")


def check_model(spec: ModelSpec, prompts: Sequence[str] = ("a red circle", "two blue squares")) -> None:
    """Shapes and ranges of everything a model returns, an untouched base policy, and taps that change nothing."""
    import torch

    check_spec(spec)
    who, model = f"model {spec.kind!r}", spec.build(torch.device("cpu"))
    for steps in (2, 5, 10):
        contracts.check_sigmas(spec.kind, model.sigmas(steps), steps)
        if not torch.allclose(model.sigmas(steps), torch.from_numpy(spec.sigmas(steps)).float()):
            raise ContractError(f"{who} has other sigmas than its spec for {steps} steps")
    cond = model.encode(prompts)
    contracts.check_conditioning(spec.kind, cond, prompts)
    shape = (len(prompts), *model.latent_shape)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((len(prompts),), 0.7)
    with torch.no_grad():
        velocity = model.velocity(latents, sigma, cond)
        contracts.check_velocity(spec.kind, velocity, latents)
        contracts.check_images(spec.kind, model.decode(latents), len(prompts))
        alone = model.velocity(latents[:1], sigma[:1], cond.select(torch.tensor([0])))
        if not torch.allclose(alone, velocity[:1], rtol=1e-3, atol=1e-3):
            raise ContractError(f"{who} has another velocity for a latent alone than in a batch")
        with model.base():
            base = model.velocity(latents, sigma, cond)
        with model.tap_attention(lambda call: None):
            tapped = model.velocity(latents, sigma, cond)
    for what, other in (("the untrained base policy", base), ("a tapped network", tapped)):
        if not torch.allclose(other, velocity, rtol=_ROUNDING, atol=_ROUNDING):
            raise ContractError(f"{who} has another velocity inside {what}")
    if not any(weight.numel() for weight in model.policy.parameters()):
        raise ContractError(f"{who} has a policy without weights, so there is nothing to train")
    _check_captions(who, spec)


def _check_captions(who: str, spec: ModelSpec) -> None:
    train, evaluation = (spec.captions(split, 8, 0) for split in ("train", "evaluation"))
    if train != spec.captions("train", 8, 0):
        raise ContractError(f"{who} draws other captions for the same seed")
    if train is not None and evaluation is not None and set(train) & set(evaluation):
        raise ContractError(f"{who} has captions in both splits: {sorted(set(train) & set(evaluation))[0]!r}")


def check_tracker(spec: TrackerSpec, folder: Path) -> None:
    """An observer with hooks that exist, which survives a run with an evaluation, a checkpoint and a resumption."""
    import pluggy

    from aegpo import hookspecs

    check_spec(spec)
    for first in (0, 1):  # a run, and the same run resumed from the checkpoint of step 1
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        observer = spec.build(folder)
        manager.register(observer, spec.kind)
        callers = manager.get_hookcallers(observer) or []
        wrong = [caller.name for caller in callers if not caller.has_spec()]
        if wrong or not callers:
            problem = f"implements {wrong[0]!r}, which is no hook" if wrong else "implements no observer hook"
            raise ContractError(f"tracker {spec.kind!r} {problem}; mark methods aegpo_on_... with @aegpo.hookimpl")
        run = RunInfo(arm="main", seed=0, folder=folder, first_step=first, training_steps=2)
        manager.hook.aegpo_on_run_start(run=run)
        for step in range(first and first + 1, 3):
            manager.hook.aegpo_on_step_end(run=run, report=_report(step))
        manager.hook.aegpo_on_checkpoint(run=run, step=2, path=folder / "checkpoint")
        manager.hook.aegpo_on_run_end(run=run, outcome="finished")


def _report(step: int) -> StepReport:
    import torch

    from aegpo.interfaces import Evaluation, Prompt, StepReport

    scores = {"palette": np.array([0.25, 0.5])}
    images = torch.rand((2, 3, 24, 24), generator=torch.Generator().manual_seed(step))
    evaluation = Evaluation(("one red circle", "two blue squares"), scores, scores, images) if step != 1 else None
    if step == 0:
        nothing = np.zeros(0, dtype=np.int64)
        return StepReport(0, {}, (), nothing, np.zeros((0, 4), dtype=np.bool_), None, None, evaluation, {})
    metrics = {"reward": 0.5, "reward/palette": 0.5, "forwards": 40.0, "trained_edges": 20.0}
    selected = np.array([[True, False, True, False], [False, True, True, False]])
    prompts = (Prompt(0, "one red circle"), Prompt(3, "a green square"))
    entropy, delta = np.linspace(3.0, 4.0, 8).reshape(2, 4), np.array([0.1, 0.0])
    return StepReport(
        step, metrics, prompts, np.array([2, 4]), selected, entropy, delta, evaluation, {"rollout": 0.2, "update": 0.1}
    )
