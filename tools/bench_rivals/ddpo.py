"""DDPO in PyTorch (kvablack/ddpo-pytorch): its whole scripts/train.py, on one process, without guidance.

A step ends where its progress bar of the next sampling begins. Changed from outside: `absl.app`'s flags hold a
configuration made here from its config/base.py; `wandb` does nothing and is no tracker of accelerate's; prompts come in
turns, the reward is the mean pixel; `randn_tensor` is put where diffusers 0.17 had it, and `_encode_prompt` returns
what it did there.
"""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import torch
from torch import Tensor

from bench_rivals.cases import CLIP, FIRST, LEARNING_RATE, MOST_ADVANTAGE, MOST_GRADIENT, PROMPTS, STEPS, Case
from bench_rivals.first import First
from bench_rivals.serving import Server
from bench_rivals.standins import importing

TITLE = "ddpo-pytorch"
FAMILY = "sd"
MISSING = ("wandb", "inflect")
UNUSED = ("ddpo_pytorch.rewards", "ddpo_pytorch.prompts")
TREE = False
BUFFER = 16  # rewards of a prompt that are compared


def method(case: Case) -> dict[str, Any]:
    """The same for aegpo."""
    return {
        "model": {"kind": "sd", "guidance": 1.0},
        "rollouts": {"micro_batch": case.group},
        "sampler": {"kind": "ddim", "eta": 1.0},
        "selector": {"kind": "uniform", "last": True},
        "advantage": {"kind": "running", "buffer": BUFFER, "least": BUFFER, "epsilon": 1e-6, "clip": MOST_ADVANTAGE},
        "objective": {"kind": "clipped", "clip": CLIP},
        "optimizer": {"micro_batch": case.group},
    }


def train(case: Case, server: Server) -> None:
    """Its main(), which never returns."""
    import accelerate
    import diffusers.loaders
    import diffusers.models.attention_processor
    import diffusers.utils.torch_utils
    import peft  # noqa: F401 - before there are stand-ins that it would take for packages

    _as_in_diffusers_0_17(diffusers)
    with importing(case.checkout, MISSING, UNUSED):
        script: Any = importlib.import_module("scripts.train")
        base = importlib.import_module("config.base")
    script.FLAGS = type("Flags", (), {"config": configuration(base.get_config(), case)})
    order = itertools.cycle([text for text in PROMPTS for _ in range(case.group)])
    script.ddpo_pytorch.prompts.in_turns = lambda: (next(order), {})
    script.ddpo_pytorch.rewards.mean_pixel = lambda: _reward
    script.Accelerator = _without_trackers(script.Accelerator)
    first, bar = First(), script.tqdm
    if case.updates == 1:
        _watch(script, accelerate, first, server)

    def shown(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("desc", "")).endswith(": sampling"):
            if server.steps == 1 and first.gradients:
                first.save(case.shared / FIRST)
            server.boundary()
        return bar(*args, **kwargs)

    script.tqdm = shown
    script.main(None)


def configuration(config: Any, case: Case) -> Any:
    """Its configuration, from its defaults; names are its own."""
    config.pretrained.model, config.logdir, config.use_lora = str(case.model), str(case.folder), False
    config.mixed_precision, config.allow_tf32 = "no", False
    config.num_epochs, config.save_freq = 10**6, 10**9
    config.prompt_fn, config.reward_fn = "in_turns", "mean_pixel"
    config.sample.update(
        num_steps=STEPS, eta=1.0, guidance_scale=1.0, batch_size=case.group, num_batches_per_epoch=len(PROMPTS)
    )
    config.train.update(
        batch_size=case.group,
        learning_rate=LEARNING_RATE,
        gradient_accumulation_steps=len(PROMPTS) // case.updates,
        max_grad_norm=MOST_GRADIENT,
        cfg=False,
        adv_clip_max=int(MOST_ADVANTAGE),
        clip_range=CLIP,
    )
    config.per_prompt_stat_tracking.update(buffer_size=BUFFER, min_count=BUFFER)
    return config


def _as_in_diffusers_0_17(diffusers: Any) -> None:
    """Puts things where they were."""
    diffusers.utils.randn_tensor = diffusers.utils.torch_utils.randn_tensor
    for module, name in (
        (diffusers.loaders, "AttnProcsLayers"),
        (diffusers.models.attention_processor, "LoRAAttnProcessor"),
    ):
        if name not in dir(module):
            setattr(module, name, object)  # which it uses for adapters alone

    def encode(pipeline: Any, *args: Any, prompt_embeds: Tensor, **unused: Any) -> Tensor:
        return prompt_embeds  # there is no guidance

    diffusers.StableDiffusionPipeline._encode_prompt = encode


def _reward(images: Tensor, prompts: Any, metadata: Any) -> Any:
    return images.mean(dim=(1, 2, 3)), {}


def _without_trackers(accelerator: Any) -> Any:
    def made(**kwargs: Any) -> Any:
        return accelerator(**{**kwargs, "log_with": None})

    return made


def _watch(script: Any, accelerate: Any, first: First, server: Server) -> None:
    """Keeps what it samples and learns first."""
    sample, credit = script.pipeline_with_logprob, script.PerPromptStatTracker.update
    clip = accelerate.Accelerator.clip_grad_norm_
    states: list[Tensor] = []
    logged: list[Tensor] = []

    def sampled(pipeline: Any, *args: Any, **kwargs: Any) -> Any:
        images, nothing, latents, log_prob = sample(pipeline, *args, **kwargs)
        if server.steps == 1:
            states.append(torch.stack(latents, dim=1))
            logged.append(torch.stack(log_prob, dim=1))
            first.scale = _scales(pipeline.scheduler)
        return images, nothing, latents, log_prob

    def credited(tracker: Any, prompts: Any, rewards: Any) -> Any:
        advantages = credit(tracker, prompts, rewards)
        if server.steps == 1:
            first.texts, first.levels = [str(each) for each in prompts], list(range(STEPS))
            latents = torch.cat(states)
            first.latents, first.next_latents, first.log_prob = latents[:, :-1], latents[:, 1:], torch.cat(logged)
            first.advantage = torch.as_tensor(advantages)
        return advantages

    def clipped(*args: Any, **kwargs: Any) -> Any:
        if server.steps == 1:
            first.learned(server.rows.network)
        return clip(*args, **kwargs)

    script.pipeline_with_logprob, script.PerPromptStatTracker.update = sampled, credited
    accelerate.Accelerator.clip_grad_norm_ = clipped


def _scales(scheduler: Any) -> Tensor:  # (T+1,)
    """sqrt(abar) + sqrt(1 - abar) of each level: aegpo's states are its, divided by that."""
    abar = scheduler.alphas_cumprod[[*scheduler.timesteps.tolist(), 0]].double()
    scales: Tensor = abar.sqrt() + (1 - abar).sqrt()
    return scales
