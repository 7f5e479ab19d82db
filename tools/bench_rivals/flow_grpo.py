"""Flow-GRPO (yifan123/flow_grpo): its whole scripts/train_sd3.py, on one process.

Its own hook at the beginning of an epoch, `eval`, is where a step ends. Changed from outside: `absl.app`'s flags hold a
configuration made here from its config/base.py, `wandb` does nothing, the reward is the mean pixel, prompts come
without a worker process, and the file of held-out prompts is empty.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from bench_rivals.cases import CLIP, FIRST, LEARNING_RATE, MOST_ADVANTAGE, MOST_GRADIENT, NOISE, STEPS, Case
from bench_rivals.first import First
from bench_rivals.models import PIXELS
from bench_rivals.serving import Server
from bench_rivals.standins import importing

TITLE = "Flow-GRPO"
FAMILY = "sd3"
MISSING = ("wandb",)
UNUSED = ("flow_grpo.rewards", "flow_grpo.prompts")
TREE = False


def method(case: Case) -> dict[str, Any]:
    """The same for aegpo."""
    return {
        "model": {"kind": "sd3", "guidance": 1.0, "max_sequence_length": 128},
        "rollouts": {"micro_batch": case.group},
        "sampler": {"kind": "flow-sde", "noise_level": NOISE},
        "advantage": {"kind": "group", "std": "batch", "unbiased": False, "epsilon": 1e-4, "clip": MOST_ADVANTAGE},
        "objective": {"kind": "clipped", "clip": CLIP},
        "optimizer": {"micro_batch": case.group, "drop_zero_credit": True},
    }


def train(case: Case, server: Server) -> None:
    """Its main(), which never returns."""
    import accelerate
    import diffusers  # noqa: F401 - before there are stand-ins that it would take for packages
    import peft  # noqa: F401

    with importing(case.checkout, MISSING, UNUSED):
        script: Any = importlib.import_module("scripts.train_sd3")
        base = importlib.import_module("config.base")
    script.FLAGS = type("Flags", (), {"config": configuration(base.get_config(), case)})
    script.flow_grpo.rewards.multi_score = lambda device, spec: _reward
    script.DataLoader = _without_workers(script.DataLoader)
    (case.shared / "test.txt").touch()
    first = First()
    if case.updates == 1:
        _watch(script, accelerate, first, server)

    def boundary(*args: Any, **kwargs: Any) -> None:
        if server.steps == 1 and first.gradients:
            first.save(case.shared / FIRST)
        server.boundary()

    script.eval = boundary
    script.main(None)


def configuration(config: Any, case: Case) -> Any:
    """Its configuration, from its defaults; names are its own."""
    batches = len(case.prompt_file.read_text().splitlines())
    config.pretrained.model = str(case.model)
    config.dataset, config.prompt_fn = str(case.shared), "general_ocr"
    config.logdir, config.save_dir, config.use_lora = str(case.folder), str(case.folder), False
    config.mixed_precision, config.allow_tf32 = "no", False
    config.resolution, config.eval_freq, config.save_freq = PIXELS, 1, 10**9
    config.sample.update(
        num_steps=STEPS,
        eval_num_steps=STEPS,
        guidance_scale=1.0,
        train_batch_size=case.group,
        num_image_per_prompt=case.group,
        num_batches_per_epoch=batches,
        test_batch_size=1,
        noise_level=NOISE,
        global_std=True,
    )
    config.train.update(
        batch_size=case.group,
        gradient_accumulation_steps=batches // case.updates,
        num_inner_epochs=1,
        timestep_fraction=0.99,
        beta=0.0,
        cfg=False,
        ema=False,
        clip_range=CLIP,
        adv_clip_max=int(MOST_ADVANTAGE),
        max_grad_norm=MOST_GRADIENT,
        learning_rate=LEARNING_RATE,
    )
    config.reward_fn = {"mean_pixel": 1.0}
    return config


def _reward(images: Tensor, prompts: Any, metadata: Any, only_strict: bool = True) -> Any:
    return {"avg": images.mean(dim=(1, 2, 3))}, {}


def _without_workers(loader: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Any:
        return loader(*args, **{**kwargs, "num_workers": 0})

    return made


def _watch(script: Any, accelerate: Any, first: First, server: Server) -> None:
    """Keeps what it samples and learns first."""
    encode, sample = script.compute_text_embeddings, script.pipeline_with_logprob
    credit, clip = script.PerPromptStatTracker.update, accelerate.Accelerator.clip_grad_norm_
    asked: list[str] = []

    def encoded(prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        asked[:] = prompts
        return encode(prompts, *args, **kwargs)

    def sampled(*args: Any, **kwargs: Any) -> Any:
        images, latents, log_prob = sample(*args, **kwargs)
        if server.steps == 1:
            first.texts += asked
            first.levels = list(range(STEPS - 1))
            states = torch.stack(latents[:STEPS], dim=1)
            first.latents = _joined(first.latents, states[:, :-1])
            first.next_latents = _joined(first.next_latents, states[:, 1:])
            first.log_prob = _joined(first.log_prob, torch.stack(log_prob[: STEPS - 1], dim=1))
        return images, latents, log_prob

    def credited(*args: Any, **kwargs: Any) -> Any:
        advantages = credit(*args, **kwargs)
        if server.steps == 1:
            first.advantage = torch.as_tensor(advantages)[:, 0]
        return advantages

    def clipped(*args: Any, **kwargs: Any) -> Any:
        if server.steps == 1:
            first.learned(server.rows.network)
        return clip(*args, **kwargs)

    script.compute_text_embeddings, script.pipeline_with_logprob = encoded, sampled
    script.PerPromptStatTracker.update, accelerate.Accelerator.clip_grad_norm_ = credited, clipped


def _joined(before: Tensor | None, more: Tensor) -> Tensor:
    return more if before is None else torch.cat([before, more])
