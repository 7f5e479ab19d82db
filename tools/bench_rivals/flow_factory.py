"""Flow-Factory (X-GenGroup/Flow-Factory): its GRPO trainer, epoch by epoch.

`max_epochs` is raised by one for every step, so that its own loop returns. Changed from outside: its autocast to
bfloat16, which it has whatever `mixed_precision` says, is off; packages that it imports and does not need here have
stand-ins; the reward is the mean pixel. Weights and stored latents are float32 by its own settings.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

import torch
import yaml

from bench_rivals.cases import (
    CLIP,
    FIRST,
    LEARNING_RATE,
    MOST_ADVANTAGE,
    MOST_GRADIENT,
    NOISE,
    PROMPTS,
    STEPS,
    WEIGHT_DECAY,
    Case,
)
from bench_rivals.first import First
from bench_rivals.models import PIXELS
from bench_rivals.serving import Server
from bench_rivals.standins import importing

TITLE = "Flow-Factory"
FAMILY = "sd3"
MISSING = ("wandb", "swanlab", "torchvision", "torchaudio", "imageio", "einops", "deepspeed")
TREE = False

MeanPixel: type  # made of its base class; found here by its name


def method(case: Case) -> dict[str, Any]:
    """The same for aegpo."""
    return {
        "model": {"kind": "sd3-in-even-times", "guidance": 1.0, "max_sequence_length": 256},
        "rollouts": {"micro_batch": case.group},
        "sampler": {"kind": "flow-sde", "noise_level": NOISE},
        "advantage": {"kind": "group", "std": "batch", "unbiased": False, "epsilon": 1e-6, "clip": MOST_ADVANTAGE},
        "objective": {"kind": "clipped", "clip": CLIP},
        "optimizer": {"micro_batch": case.group},
    }


def train(case: Case, server: Server) -> None:
    """Its trainer's start(), once for every step."""
    import accelerate
    import diffusers  # noqa: F401 - before there are stand-ins that it would take for packages
    import peft  # noqa: F401

    with importing(case.checkout / "src", MISSING):
        parameters = importlib.import_module("flow_factory.hparams")
        loading = importlib.import_module("flow_factory.trainers.loader")
        rewards = importlib.import_module("flow_factory.rewards.abc")
        _make_reward(rewards)
        file = case.folder / "flow_factory.yaml"
        file.write_text(yaml.safe_dump(configuration(case)))
        trainer = loading.load_trainer(parameters.Arguments.load_from_yaml(str(file)))
    trainer.autocast = contextlib.nullcontext
    first = First()
    if case.updates == 1:
        _watch(trainer, accelerate, first, server)
    while True:
        server.boundary()
        trainer.training_args.max_epochs = trainer.epoch + 1
        trainer.start()
        if server.steps == 1 and first.gradients:
            first.save(case.shared / FIRST)


def configuration(case: Case) -> dict[str, Any]:
    """Its YAML; names are its own."""
    here = "cpu" if case.device == "cpu" else "cuda"
    return {
        "mixed_precision": "no",
        "data": {
            "dataset_dir": str(case.shared),
            "cache_dir": str(case.folder / "datasets"),
            "dataloader_num_workers": 0,
            "preprocessing_batch_size": 1,
        },
        "model": {
            "finetune_type": "full",
            "target_modules": "all",
            "master_weight_dtype": "float32",
            "model_name_or_path": str(case.model),
            "model_type": "sd3-5",
        },
        "log": {
            "run_name": "run",
            "logging_backend": "none",
            "save_dir": str(case.folder),
            "save_freq": 0,
            "verbose": False,
        },
        "train": {
            "trainer_type": "grpo",
            "advantage_aggregation": "sum",
            "clip_range": CLIP,
            "adv_clip_range": MOST_ADVANTAGE,
            "kl_beta": 0,
            "resolution": PIXELS,
            "num_inference_steps": STEPS,
            "guidance_scale": 1.0,
            "per_device_batch_size": case.group,
            "group_size": case.group,
            "global_std": True,
            "unique_sample_num_per_epoch": len(PROMPTS),
            "gradient_step_per_epoch": case.updates,
            "learning_rate": LEARNING_RATE,
            "adam_weight_decay": WEIGHT_DECAY,
            "max_grad_norm": MOST_GRADIENT,
            "ema_decay": 0,
            "ema_device": here,
            "enable_gradient_checkpointing": False,
            "latent_storage_dtype": "fp32",
        },
        "scheduler": {
            "dynamics_type": "Flow-SDE",
            "noise_level": NOISE,
            "num_sde_steps": STEPS - 1,
            "sde_steps": list(range(STEPS - 1)),
        },
        "eval": {"eval_freq": 0},
        "rewards": [
            {
                "name": "mean_pixel",
                "reward_model": f"{__name__}.MeanPixel",
                "batch_size": case.group,
                "device": here,
                "dtype": "float32",
            }
        ],
    }


def _make_reward(rewards: Any) -> None:
    """Its kind of reward, on tensors."""

    class Made(rewards.PointwiseRewardModel):  # type: ignore[misc]
        use_tensor_inputs = True

        def __call__(self, prompt: list[str], image: Any = None, **unused: Any) -> Any:
            return rewards.RewardModelOutput(rewards=torch.stack([each.float().mean() for each in image]))

    sys.modules[__name__].__dict__["MeanPixel"] = Made


def _watch(trainer: Any, accelerate: Any, first: First, server: Server) -> None:
    """Keeps what it samples and learns first."""
    prepare, clip = trainer.prepare_feedback, accelerate.Accelerator.clip_grad_norm_

    def prepared(samples: Any) -> None:
        prepare(samples)
        if server.steps == 1:
            first.texts = [sample.prompt for sample in samples]
            first.levels = list(range(STEPS - 1))
            states = torch.stack([sample.all_latents for sample in samples])
            index = samples[0].latent_index_map
            first.latents = states[:, index[: STEPS - 1]]
            first.next_latents = states[:, index[1:STEPS]]
            logged = torch.stack([sample.log_probs for sample in samples])
            first.log_prob = logged[:, samples[0].log_prob_index_map[: STEPS - 1]]
            first.advantage = torch.stack([torch.as_tensor(each.extra_kwargs["advantage"]) for each in samples])

    def clipped(*args: Any, **kwargs: Any) -> Any:
        if server.steps == 1:
            first.learned(server.rows.network)
        return clip(*args, **kwargs)

    trainer.prepare_feedback = prepared
    accelerate.Accelerator.clip_grad_norm_ = clipped
