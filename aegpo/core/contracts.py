"""What foreign parts return, checked once at the seam: each function blames the part by its kind and name.

Every check takes the part's name (its `kind`), what it returned and what the engine asked for, returns nothing and
raises `ContractError` with what was returned and what would be right. Decisions are numpy and need no torch; tensors
are only read through their own methods, so this module imports none either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from aegpo.core.foreign import blamed as blamed
from aegpo.core.foreign import blaming as blaming
from aegpo.core.records import BoolArray, Conditioning, FloatArray, Gaussian, IntArray, Media, Per, Prompt, RolloutPlan
from aegpo.core.signals import Measurement, Signals
from aegpo.core.steps import check_steps, kinds, splits_last
from aegpo.errors import ContractError

if TYPE_CHECKING:
    from torch import Tensor

_RANKS: Mapping[Media, int] = {"image": 4, "video": 5}
LEAST_GROUP = 2  # rollouts a group needs to be compared


def check_measurement(name: str, provides: Mapping[str, Per], found: Measurement, signals: Signals) -> None:
    """A source's signals: every one it provides and no other, float64 and nowhere infinite; NaN is unknown."""
    who = f"signals {name!r}"
    given_as: object = found  # foreign code may return anything
    if not isinstance(given_as, Measurement):
        raise ContractError(f"{who} measured a {type(given_as).__name__}; an aegpo.Measurement was asked")
    if found.values.keys() != provides.keys():
        asked, given = (", ".join(map(repr, names)) or "nothing" for names in (provides, found.values))
        raise ContractError(f"{who} measured {given}; it provides {asked}")
    shapes = {"prompt": (signals.num_prompts,), "step": (signals.num_steps,)}
    for signal, values in found.values.items():
        shape = shapes.get(provides[signal], (signals.num_prompts, signals.num_steps))
        _check_array(who, f"signal {signal!r}", values, shape, "float64")
        if np.isinf(values).any():
            raise ContractError(f"{who} returned an infinite value of signal {signal!r}; NaN says that it is unknown")


def check_choice(name: str, chosen: IntArray, prompts: int, count: int) -> None:
    """A curriculum's (count,) int64 indices of a list of `prompts`; one that comes twice makes two groups."""
    who = f"curriculum {name!r}"
    _check_array(who, "a choice", chosen, (count,), "int64")
    if (outside := chosen[(chosen < 0) | (chosen >= prompts)]).size:
        raise ContractError(f"{who} chose prompt {outside[0]}; the list has {prompts}, counted from 0")


def check_counts(name: str, counts: IntArray, signals: Signals, budget: int) -> None:
    """An allocator's (P,) int64: each 0 or at least 2, in all exactly the budget."""
    who = f"allocator {name!r}"
    _check_array(who, "counts", counts, (signals.num_prompts,), "int64")
    if (low := np.flatnonzero((counts < LEAST_GROUP) & (counts != 0))).size:
        raise ContractError(
            f"{who} returned {counts[low[0]]} rollouts for prompt {low[0]} of the step; "
            f"a group needs at least {LEAST_GROUP} to be compared, or none: then the prompt is not asked this time"
        )
    if (total := int(counts.sum())) != budget:
        raise ContractError(f"{who} returned {total} rollouts for a budget of {budget}")


def check_selection(name: str, selected: BoolArray, signals: Signals) -> None:
    """A selector's (P, T) bool: at least one denoising step a prompt."""
    who = f"selector {name!r}"
    _check_array(who, "a selection", selected, (signals.num_prompts, signals.num_steps), "bool")
    if (bare := np.flatnonzero(~selected.any(axis=1))).size:
        raise ContractError(f"{who} chose no denoising step for prompt {bare[0]} of the step; choose at least one")


def check_plan(name: str, plan: RolloutPlan, counts: IntArray, steps: BoolArray) -> None:
    """A tree's plan: a proper forest with exactly `counts` leaves a prompt over the T steps of `steps` (P, T)."""
    check_forest(f"tree {name!r}", plan, counts, steps.shape[1])


def check_forest(who: str, plan: RolloutPlan, counts: IntArray, num_steps: int) -> None:
    """Any plan, whoever made it: a proper forest with `counts` leaves a prompt, children in the order of parents."""
    given: object = plan
    if not isinstance(given, RolloutPlan):
        raise ContractError(f"{who} planned a {type(given).__name__}; an aegpo.RolloutPlan was asked")
    _check_levels(who, plan, num_steps)
    _check_start(who, plan)
    for level in range(num_steps):
        _check_edges(who, plan, level, len(counts))
    check_steps(who, plan)
    leaves = np.bincount(plan.group, minlength=len(counts))
    if (wrong := np.flatnonzero(leaves != counts)).size:
        first = wrong[0]
        raise ContractError(
            f"{who} planned {leaves[first]} rollouts for prompt {first}, which was given {counts[first]}"
        )


def check_trainable(name: str, process: Literal["reverse", "forward"], plan: RolloutPlan) -> None:
    """What an objective can learn from: in the reverse process noisy steps, in the forward process whole rollouts."""
    who = f"objective {name!r}"
    for level in range(plan.num_steps):
        trained = plan.trained[level]
        if process == "reverse" and (trained & ~plan.noisy[level]).any():
            raise ContractError(
                f"{who} needs log-probabilities, but denoising step {level} is trained and has no noise; choose a tree "
                "that adds noise at the chosen steps, or an objective of the forward process"
            )
        if process == "forward" and (plan.leaves[level + 1][trained] > 1).any():
            raise ContractError(
                f"{who} learns from whole rollouts, but several share a trained step at level {level}, which then has "
                "no single clean image; use tree 'independent' with 'start: own'"
            )


def check_noise(name: str, std: FloatArray, plan: RolloutPlan) -> None:
    """A sampler's (K,) stds of a plan's kinds of step, (T,) in an ordinary one: above 0 where the plan adds noise."""
    for level, kind in enumerate(kinds(plan).of):
        if (std[kind[plan.noisy[level]]] == 0).any():
            raise ContractError(
                f"sampler {name!r} adds no noise at denoising step {level}, where the plan asks for some and learning "
                "needs a density; choose other steps, or another sampler"
            )


def check_last_split(name: str, plan: RolloutPlan) -> None:
    """A plan whose images come from a deterministic last step: no two of them from the same state."""
    if splits_last(plan):
        raise ContractError(
            f"tree {name!r} splits at the last denoising step, whose noise 'decode: predicted-clean' leaves out of the "
            "images, so they would be the same; choose earlier steps, or 'decode: final'"
        )


def check_sigmas(name: str, sigmas: Tensor, steps: int, partial: bool = False) -> None:
    """A model's (T+1,) noise levels: strictly falling from 1 to 0, or, if `partial`, within 1 and 0."""
    who = f"model {name!r}"
    _check_tensor(who, "sigmas", sigmas, (steps + 1,), ("float32",))
    first, last = float(sigmas[0]), float(sigmas[-1])
    if partial and not (first <= 1.0 and last >= 0.0):
        raise ContractError(f"{who} returned sigmas from {first:g} to {last:g}; they lie within 1 and 0")
    if not partial and (first != 1.0 or last != 0.0):
        raise ContractError(f"{who} returned sigmas from {sigmas[0]:g} to {sigmas[-1]:g}; they run from 1 to 0")
    rising = (sigmas[1:] >= sigmas[:-1]).nonzero()
    if len(rising):
        step = int(rising[0])
        raise ContractError(
            f"{who} returned sigmas that do not fall at denoising step {step}: "
            f"{float(sigmas[step]):g} to {float(sigmas[step + 1]):g}; they must fall strictly"
        )


def check_conditioning(name: str, conditioning: Conditioning, prompts: Sequence[Prompt]) -> None:
    """A model's conditioning: the leading dimension of every tensor is P."""
    given: object = conditioning
    if not isinstance(given, Conditioning):
        raise ContractError(f"model {name!r} encoded a {type(given).__name__}; an aegpo.Conditioning was asked")
    tensors = {"text": conditioning.text, "pooled": conditioning.pooled, "mask": conditioning.mask}
    tensors |= {f"extra.{name}": tensor for name, tensor in conditioning.extra.items()}
    for field, tensor in tensors.items():
        if tensor is not None and len(tensor) != len(prompts):
            raise ContractError(
                f"model {name!r} encoded {len(prompts)} prompts, but {field!r} has {len(tensor)} rows; one a prompt"
            )


def check_velocity(name: str, velocity: Tensor, latents: Tensor) -> None:
    """A model's velocity: shaped like the latents and floating; its values are looked at later, without a wait here."""
    _check_tensor(f"model {name!r}", "a velocity", velocity, tuple(latents.shape), _FLOATING)


def check_images(name: str, images: Tensor, count: int, media: Media = "image") -> None:
    """A model's images (N, 3, h, w), or videos (N, F, 3, h, w) if that is its `media`: finite and in [0, 1]."""
    who = f"model {name!r}"
    given: object = images
    shape = tuple(getattr(given, "shape", ()))
    if len(shape) != _RANKS[media] or shape[0] != count or shape[-3] != 3 or 0 in shape:
        asked = f"({count}, 3, h, w)" if media == "image" else f"({count}, F, 3, h, w)"
        other = "" if len(shape) == _RANKS[media] else f"; its spec says media = {media!r}"
        raise ContractError(f"{who} decoded images of shape {shape} from {count} latents; {asked} was asked{other}")
    _check_finite(who, "decoded", images)
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise ContractError(f"{who} decoded pixels from {low:g} to {high:g}; images lie in [0, 1]")


def check_transition(name: str, gaussian: Gaussian, latents: Tensor, values: bool = True) -> None:
    """A sampler's transition: float32 mean like the latents, and a finite std of at least 0 for each.

    Without a look at the `values`, for which the device would have to be waited for.
    """
    who = f"sampler {name!r}"
    given: object = gaussian
    if not isinstance(given, Gaussian):
        raise ContractError(f"{who} returned a {type(given).__name__}; an aegpo.Gaussian was asked")
    _check_tensor(who, "a mean", gaussian.mean, tuple(latents.shape), ("float32",))
    _check_tensor(who, "a std", gaussian.std, (len(latents),), ("float32",))
    if not values:
        return
    _check_finite(who, "returned a mean with", gaussian.mean)
    _check_finite(who, "returned a std with", gaussian.std)
    if bool((gaussian.std < 0).any()):
        raise ContractError(f"{who} returned a std of {float(gaussian.std.min()):g}; it must be at least 0")


def check_log_prob(name: str, log_prob: Tensor, latents: Tensor, values: bool = True) -> None:
    """A sampler's (B,) log-density: float32 and finite."""
    who = f"sampler {name!r}"
    _check_tensor(who, "log-probabilities", log_prob, (len(latents),), ("float32",))
    if values:
        _check_finite(who, "returned", log_prob)


def check_scores(name: str, scores: Tensor, prompts: Sequence[Prompt]) -> None:
    """A reward's (N,) scores: float32 and finite; the message names the prompt."""
    who = f"reward {name!r}"
    _check_tensor(who, "scores", scores, (len(prompts),), ("float32",))
    if scores.is_meta:
        raise ContractError(f"{who} returned scores on the device 'meta', which have no values")
    broken = (~scores.isfinite()).nonzero()
    if len(broken):
        raise ContractError(f"{who} returned a non-finite score for prompt {prompts[int(broken[0])].text!r}")


def check_credit(name: str, credit: Tensor, edges: int) -> None:
    """An advantage's (E,) credit: float32 and finite."""
    who = f"advantage {name!r}"
    _check_tensor(who, "credit", credit, (edges,), ("float32",))
    _check_finite(who, "returned", credit)


def check_report(axis: str, name: str, report: Mapping[str, float]) -> None:
    """What a part with memory says of it: finite numbers by name."""
    for what, value in report.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ContractError(f"{axis} {name!r} reported {value!r} as {what!r}; a finite number was asked")


def check_learned(name: str, learned: tuple[Tensor, Mapping[str, Tensor]]) -> None:
    """What an objective returns: a loss, and metrics by name."""
    given: object = learned
    if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[1], Mapping):
        what = type(given).__name__ if not isinstance(given, tuple) else str([type(each).__name__ for each in given])
        raise ContractError(f"objective {name!r} returned {what}; a loss and a mapping of metrics were asked")


def check_loss(name: str, loss: Tensor, metrics: Mapping[str, Tensor], size: int, values: bool = True) -> None:
    """An objective's (B,) loss, finite and with a gradient, and its (B,) metrics.

    Without a look at the `values`, for which the device would have to be waited for.
    """
    who = f"objective {name!r}"
    _check_tensor(who, "a loss", loss, (size,), ("float32",))
    for metric, value in metrics.items():
        if metric in _OWN_METRICS or metric.startswith("reward/"):
            raise ContractError(f"{who} returned a metric {metric!r}, which the engine has one of; call it otherwise")
        _check_tensor(who, f"metric {metric!r}", value, (size,), _FLOATING)
    if not loss.requires_grad:
        raise ContractError(
            f"{who} returned a loss without a gradient; it must depend on 'log_prob', 'mean' or 'velocity'"
        )
    if values:
        _check_finite(who, "returned", loss)


def check_decay(name: str, kept: float) -> None:
    """What an objective's sampling policy keeps of itself: a number of [0, 1]."""
    given: object = kept
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given <= 1:
        raise ContractError(f"objective {name!r} returned {given!r} from old_decay(step); a number of [0, 1] was asked")


_OWN_METRICS = {"loss", "ratio_error", "learning_rate", "grad_norm", "updated_edges", "reward", "reward_std"}
_FLOATING = ("float32", "bfloat16", "float16", "float64")


def _check_array(who: str, what: str, array: object, shape: tuple[int, ...], dtype: str) -> None:
    if not isinstance(array, np.ndarray):
        raise ContractError(f"{who} returned {what} as {type(array).__name__}; a numpy array of {dtype} was asked")
    given: NDArray[Any] = array
    if given.shape != shape or given.dtype != dtype:
        raise ContractError(f"{who} returned {what} of shape {given.shape}, {given.dtype}; {shape}, {dtype} was asked")


def _check_tensor(who: str, what: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    import torch

    given: object = tensor  # foreign code may return anything
    if not isinstance(given, torch.Tensor):
        raise ContractError(f"{who} returned {what} as {type(given).__name__}; a tensor was asked")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) != shape or dtype not in dtypes:
        wanted = dtypes[0] if len(dtypes) == 1 else "floating"
        raise ContractError(
            f"{who} returned {what} of shape {tuple(tensor.shape)}, {dtype}; {shape}, {wanted} was asked"
        )


def _check_finite(who: str, verb: str, tensor: Tensor) -> None:
    broken = int((~tensor.isfinite()).sum())
    if broken:
        raise ContractError(f"{who} {verb} {broken} non-finite values of {tensor.numel()}")


def _check_levels(who: str, plan: RolloutPlan, num_steps: int) -> None:
    lengths = {"prompt": len(plan.prompt) - 1, "parent": len(plan.parent)}
    lengths |= {"noisy": len(plan.noisy), "trained": len(plan.trained)}
    for field, length in lengths.items():
        if length != num_steps:
            raise ContractError(f"{who} planned {length} denoising steps in {field!r}; {num_steps} were asked")
    for level in range(num_steps + 1):
        size = len(plan.prompt[level])
        _check_array(who, f"'prompt' of level {level}", plan.prompt[level], (size,), "int64")
    for step in range(num_steps):
        shape = (len(plan.prompt[step + 1]),)
        _check_array(who, f"'parent' of step {step}", plan.parent[step], shape, "int64")
        _check_array(who, f"'noisy' of step {step}", plan.noisy[step], shape, "bool")
        _check_array(who, f"'trained' of step {step}", plan.trained[step], shape, "bool")


def _check_start(who: str, plan: RolloutPlan) -> None:
    roots = len(plan.prompt[0])
    if plan.start is None:
        return
    _check_array(who, "'start'", plan.start, (roots,), "int64")
    if plan.start.min() < 0 or plan.start.max() >= roots:
        raise ContractError(f"{who} planned start noise {plan.start.tolist()}; {roots} roots have 0 to {roots - 1}")


def _check_edges(who: str, plan: RolloutPlan, level: int, num_prompts: int) -> None:
    """Everything between level and level + 1."""
    above, below, parent = plan.prompt[level], plan.prompt[level + 1], plan.parent[level]
    where = f"at denoising step {level}"
    for prompts in (above, below):
        if prompts.size and (prompts.min() < 0 or prompts.max() >= num_prompts):
            raise ContractError(f"{who} planned a node of a prompt that does not exist {where}; prompts are 0 to P-1")
    if parent.size and (parent.min() < 0 or parent.max() >= len(above)):
        raise ContractError(f"{who} planned a child without a parent {where}: level {level} has {len(above)} nodes")
    if (below != above[parent]).any():
        raise ContractError(f"{who} planned a child {where} whose parent belongs to another prompt")
    if (np.diff(parent) < 0).any():
        raise ContractError(f"{who} planned children {where} in another order than their parents'; sort them by parent")
    children = np.bincount(parent, minlength=len(above))
    if (children == 0).any():
        raise ContractError(f"{who} planned a node {where} that leads to no rollout; every node needs a child")
    if (np.bincount(parent[~plan.noisy[level]]) > 1).any():
        raise ContractError(f"{who} planned siblings {where} without noise; they would be the same image")
