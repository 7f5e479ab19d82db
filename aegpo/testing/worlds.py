"""Conformance of what surrounds the algorithm: models, rewards and trackers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aegpo.core import contracts
from aegpo.core.examples import Examples, Exemplary
from aegpo.core.interfaces import Model, Reward
from aegpo.core.parts import ModelSpec, RewardSpec, TrackerSpec
from aegpo.core.records import Prompt
from aegpo.core.reports import Evaluation, RunInfo
from aegpo.core.signatures import built
from aegpo.errors import AegpoError, ContractError
from aegpo.models.shapes import ShapesSpec
from aegpo.prompts.lists import lacking, numbered, quoted
from aegpo.testing.common import ROUNDING, check_spec

if TYPE_CHECKING:
    from torch import Tensor

    from aegpo.core.reports import StepReport

_NOBODY = "no-such-network"


def check_reward(
    spec: RewardSpec, prompts: Sequence[str | Prompt] = (), size: tuple[int, int] = (24, 24), frames: int = 3
) -> None:
    """Finite float32 scores, one an image, the same in every call and whatever else is in the batch.

    A group-wise reward gets every prompt twice, and is not asked about an image alone. A reward of videos gets videos,
    one of both first images.

    Args:
        spec: the reward.
        prompts: texts it can score, or prompts with the metadata and images it needs, at least 3; default: captions of
            the embedded world.
        size: height and width of the images.
        frames: of the videos; 0: a reward of both gets images alone.
    """
    import torch

    check_spec(spec)
    asked = list(numbered(prompts or ShapesSpec().captions("evaluation", 6, 0)))
    for message in lacking([spec], quoted(asked)):
        raise ContractError(f"{message}; give check_reward prompts that have it")
    asked = asked * 2 if spec.group_wise else asked
    reward = built("reward", spec.kind, partial(spec.build, torch.device("cpu")), Reward)
    leading = {"image": ((),), "video": ((frames,),), "both": ((), (frames,)) if frames else ((),)}
    for each in leading[spec.media]:
        images = torch.rand((len(asked), *each, 3, *size), generator=torch.Generator().manual_seed(0))
        images[0], images[1] = 0.0, 1.0
        _check_scores(spec, reward, images, asked)
    if isinstance(spec, Exemplary):
        _check_examples(spec, spec.examples(), reward)


def _check_examples(spec: RewardSpec, known: Examples, reward: Reward) -> None:
    """The images that a spec offers are images, and are scored in the order it says."""
    import torch

    who = f"reward {spec.kind!r} offers examples"
    for message in lacking([spec], quoted([known.prompt])):
        raise ContractError(f"{who} with a prompt it cannot score: {message}")
    high, low = (torch.from_numpy(each).float() for each in (known.high, known.low))
    for images in (high, low):
        if images.ndim not in (4, 5) or images.shape[-3] != 3 or images.min() < 0 or images.max() > 1:
            raise ContractError(f"{who} of shape {tuple(images.shape)}; images are (n, [F,] 3, h, w) in [0, 1]")
    together = spec.group_wise and spec.compared_with == "base"
    groups = [torch.cat([high, low])] if together else [high, low]
    found = torch.cat([reward.score(images, [known.prompt] * len(images)) for images in groups])
    of_high, of_low = float(found[: len(high)].mean()), float(found[len(high) :].mean())
    if not of_high > of_low:
        raise ContractError(f"{who}, but scores the one that should be high {of_high:.4g}, the other {of_low:.4g}")


def _check_scores(spec: RewardSpec, reward: Reward, images: Tensor, asked: Sequence[Prompt]) -> None:
    import torch

    before = images.clone()
    scores = reward.score(images, asked)
    contracts.check_scores(spec.kind, scores, asked)
    if not torch.equal(images, before):
        raise ContractError(f"reward {spec.kind!r} changes the images it is given; work on a copy")
    if not torch.equal(scores, reward.score(images, asked)):
        raise ContractError(f"reward {spec.kind!r} scores the same images differently in two calls")
    for index, prompt in enumerate([] if spec.group_wise else asked):
        alone = reward.score(images[index : index + 1], [prompt])
        contracts.check_scores(spec.kind, alone, [prompt])
        if not torch.allclose(alone[0], scores[index], rtol=ROUNDING, atol=ROUNDING):
            raise ContractError(f"reward {spec.kind!r} scores {prompt.text!r} differently alone and among other images")


def check_model(spec: ModelSpec, prompts: Sequence[str | Prompt] = ("a red circle", "two blue squares")) -> None:
    """Shapes and ranges of everything a model returns, an untouched base policy, and taps that change nothing."""
    import torch

    check_spec(spec)
    who = f"model {spec.kind!r}"
    model = built("model", spec.kind, partial(spec.build, torch.device("cpu")), Model)
    for steps in (2, 5, 10):
        contracts.check_sigmas(spec.kind, model.sigmas(steps), steps, spec.partial_schedule)
        if not torch.allclose(model.sigmas(steps), torch.from_numpy(spec.sigmas(steps)).float()):
            raise ContractError(f"{who} has other sigmas than its spec for {steps} steps")
    asked = numbered(prompts)
    with contracts.blaming("model", spec.kind):
        cond = model.encode(asked)
    contracts.check_conditioning(spec.kind, cond, asked)
    shape = (len(prompts), *model.latent_shape)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((len(prompts),), 0.7)
    with torch.no_grad():
        velocity = model.velocity(latents, sigma, cond)
        contracts.check_velocity(spec.kind, velocity, latents)
        contracts.check_images(spec.kind, model.decode(latents), len(prompts), spec.media)
        alone = model.velocity(latents[:1], sigma[:1], cond.select(torch.tensor([0])))
        if not torch.allclose(alone, velocity[:1], rtol=1e-3, atol=1e-3):
            raise ContractError(f"{who} has another velocity for a latent alone than in a batch")
        with model.frozen("base"):
            base = model.velocity(latents, sigma, cond)
        with model.tap_attention(lambda call: None):
            tapped = model.velocity(latents, sigma, cond)
    _check_unknown_name(who, model)
    for what, other in (("the untrained base policy", base), ("a tapped network", tapped)):
        if not torch.allclose(other, velocity, rtol=ROUNDING, atol=ROUNDING):
            raise ContractError(f"{who} has another velocity inside {what}")
    if not any(weight.numel() for weight in model.policy.parameters()):
        raise ContractError(f"{who} has a policy without weights, so there is nothing to train")
    if spec.has_captions:
        _check_captions(who, spec)


def _check_unknown_name(who: str, model: Model) -> None:
    """A frozen network that does not exist is refused, not taken for another."""
    try:
        with model.frozen(_NOBODY):
            pass
    except AegpoError:
        return
    raise ContractError(f"{who} has a frozen network {_NOBODY!r}; refuse names it does not know with an AegpoError")


def _check_captions(who: str, spec: ModelSpec) -> None:
    from aegpo.prompts.lists import numbered

    train, evaluation = (numbered(spec.captions(split, 8, 0)) for split in ("train", "evaluation"))
    if train != numbered(spec.captions("train", 8, 0)):
        raise ContractError(f"{who} draws other captions for the same seed")
    for prompt in (*train, *evaluation):
        missing = [key for key in spec.caption_metadata if prompt.metadata.get(key) is None]
        if missing:
            raise ContractError(f"{who} says that captions have {missing[0]!r}, but {prompt.text!r} has none")
    both = {prompt.text for prompt in train} & {prompt.text for prompt in evaluation}
    if both:
        raise ContractError(f"{who} has captions in both splits: {min(both)!r}")


def check_tracker(spec: TrackerSpec, folder: Path) -> None:
    """An observer with hooks that exist, which survives a run with an evaluation, a checkpoint and a resumption."""
    import pluggy

    from aegpo.core import hookspecs

    check_spec(spec)
    for first in (0, 1):  # a run, and the same run resumed from the checkpoint of step 1
        manager = pluggy.PluginManager(hookspecs.PROJECT)
        manager.add_hookspecs(hookspecs)
        observer = spec.build(folder)
        hookspecs.check_tracker(spec.kind, observer)
        manager.register(observer, spec.kind)
        run = RunInfo(arm="main", seed=0, folder=folder, first_step=first, training_steps=2)
        manager.hook.aegpo_on_run_start(run=run)
        if first == 0:
            manager.hook.aegpo_on_evaluation(run=run, step=0, evaluation=_evaluation(0))
        for step in range(first + 1, 3):
            manager.hook.aegpo_on_step_end(run=run, report=_report(step))
        manager.hook.aegpo_on_evaluation(run=run, step=2, evaluation=_evaluation(2))
        manager.hook.aegpo_on_checkpoint(run=run, step=2, path=folder / "checkpoint")
        manager.hook.aegpo_on_run_end(run=run, outcome="finished")


def _evaluation(step: int) -> Evaluation:
    import torch

    scores = {"palette": np.array([0.25, 0.5])}
    images = torch.rand((2, 3, 24, 24), generator=torch.Generator().manual_seed(step))
    return Evaluation(("one red circle", "two blue squares"), scores, scores, images, seconds=0.3)


def _report(step: int) -> StepReport:
    from aegpo.core.records import Signal
    from aegpo.core.reports import StepReport

    metrics = {"reward": 0.5, "reward/palette": 0.5, "forwards": 40.0, "trained_edges": 20.0}
    selected = np.array([[True, False, True, False], [False, True, True, False]])
    prompts = (Prompt(0, "one red circle"), Prompt(3, "a green square"))
    entropy, delta = np.linspace(3.0, 4.0, 8).reshape(2, 4), np.array([0.1, 0.0])
    seconds = {"rollout": 0.2, "update": 0.1}
    signals = {"entropy": Signal("prompt-step", entropy), "entropy-delta": Signal("prompt", delta)}
    return StepReport(step, metrics, prompts, np.array([2, 4]), selected, signals, seconds)
