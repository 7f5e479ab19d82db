"""What tests of a model look at, as a run would: images, attention, a policy that has moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from aegpo.core.interfaces import Model
from aegpo.core.records import AttentionCall, Conditioning, Prompt
from aegpo.core.sections import PolicySpec
from aegpo.prompts.lists import numbered

if TYPE_CHECKING:
    from torch import Tensor

_STRENGTH = 0.2  # std of the weights of disturbed adapters


def paint(model: Model, prompts: Sequence[str | Prompt], noise: Tensor, steps: int) -> Tensor:
    """The images (P, [F,] 3, h, w) of P prompts by the deterministic sampler, from start noise (P, *x).

    Compare them with what the published program paints from the same noise.
    """
    import torch

    from aegpo.method.samplers import FlowSde
    from aegpo.train.execution import Execution
    from aegpo.train.rollouts import sample_deterministic

    def velocity(latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        with torch.no_grad():
            return model.velocity(latents, sigma, cond)

    how = Execution(model, velocity, FlowSde(), model.sigmas(steps), micro_batch=len(noise), storage=torch.float32)
    return sample_deterministic(how, noise, model.encode(numbered(prompts)))


def adapt(model: Model, targets: Sequence[str], rank: int = 2, alpha: int = 6, disturbed: bool = True) -> None:
    """Puts LoRA adapters into the policy, in place, as a run does before it begins.

    Args:
        model: the model.
        targets: its spec's `adapter_targets`.
        rank: of the adapters.
        alpha: of the adapters; they count by alpha / rank.
        disturbed: give their weights random values, the same in every call; else they do nothing yet.
    """
    import torch

    from aegpo.models.adapters import add_adapters

    add_adapters(model.policy, PolicySpec(train="lora", rank=rank, alpha=alpha), targets)
    if not disturbed:
        return
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.policy.named_parameters():
            if "lora_" in name:
                weight.copy_(_STRENGTH * torch.randn(weight.shape, generator=generator))


def attention_entropies(
    model: Model, prompts: Sequence[str | Prompt], latents: Tensor, sigma: Tensor, rows: int | None = None
) -> dict[str, Tensor]:
    """What the probe would measure: block -> (P,) nats, mean over heads and layers, of one velocity evaluation.

    Args:
        model: the model.
        prompts: P of them.
        latents: (P, *x).
        sigma: (P,) noise levels.
        rows: queries that are sampled of each attention; None: all of them.
    """
    import torch

    from aegpo.attention.entropy import Block, measure_call

    calls: list[AttentionCall] = []
    with torch.no_grad(), model.tap_attention(calls.append):
        model.velocity(latents, sigma, model.encode(numbered(prompts)))
    found = [measure_call(call, get_args(Block), rows="all" if rows is None else rows) for call in calls]
    entropies = [{block: one.entropy.mean(dim=1) for block, one in blocks.items()} for blocks in found]
    return {block: torch.stack([one[block] for one in entropies]).mean(dim=0) for block in entropies[0]}
