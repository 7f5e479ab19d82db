"""What DanceGRPO and its forks MixGRPO and BranchGRPO have in common: training steps on FLUX in a loop of our own.

Their main() needs NCCL, FSDP and a GPU. Here are what it hands to their step function, which samples and learns: a
FLUX transformer as it loads it, AdamW, embeddings of the prompts, a reward. Changed from outside, in their modules
alone: `torch.autocast` does nothing and `torch.bfloat16` is float32; `ReduceOp.AVG`, which gloo lacks, is SUM, the same
for one process; `clip_grad_norm_`, which FSDP's wrapper brings, is torch's.
"""

from __future__ import annotations

import importlib
import itertools
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from bench_rivals.cases import (
    CLIP,
    ETA,
    GUIDANCE,
    LEARNING_RATE,
    MOST_ADVANTAGE,
    MOST_GRADIENT,
    PROMPTS,
    STEPS,
    WEIGHT_DECAY,
    Case,
)
from bench_rivals.models import PIXELS
from bench_rivals.serving import Server
from bench_rivals.standins import Overlay, importing, no_autocast

MISSING = ("wandb", "cv2", "einops", "torchvision", "flash_attn", "liger_kernel", "decord", "av")
UNUSED = (
    "fastvideo.utils.checkpoint",
    "fastvideo.utils.communications_flux",
    "fastvideo.utils.dataset_utils",
    "fastvideo.utils.fsdp_util",
    "fastvideo.utils.load",
    "fastvideo.utils.validation",
    "fastvideo.dataset",
    "fastvideo.models",
)
TEXT_LENGTH = 128
EPSILON = 1e-8  # beside the std of a group


def method(case: Case) -> dict[str, Any]:
    """What aegpo has to do the same."""
    return {
        "model": {"kind": "flux", "guidance": GUIDANCE, "max_sequence_length": TEXT_LENGTH},
        "rollouts": {"micro_batch": 1, "decode": "predicted-clean"},
        "sampler": {"kind": "dance-sde", "eta": ETA},
        "tree": {"kind": "independent", "noise": "all", "start": "own"},
        "advantage": {"kind": "group", "std": "group", "unbiased": True, "epsilon": EPSILON, "clip": MOST_ADVANTAGE},
        "objective": {"kind": "clipped", "clip": CLIP},
        "optimizer": {"micro_batch": 1},
    }


@dataclass
class Given:
    """What a step function of theirs is handed."""

    device: torch.device
    transformer: Any
    vae: Any
    optimizer: Any
    scheduler: Any
    loader: Iterator[Any]

    def for_step(self, args: Namespace) -> tuple[Any, ...]:
        """What DanceGRPO's and BranchGRPO's step functions take, in their order."""
        own = (self.device, self.transformer, self.vae, reward, tokenized, self.optimizer, self.scheduler, self.loader)
        return (args, *own, None, MOST_GRADIENT, preprocessed)


def load(case: Case, name: str, more: tuple[str, ...] = ()) -> ModuleType:
    """Their module, changed as the docstring above says."""
    import diffusers  # noqa: F401 - before there are stand-ins that it would take for packages
    import peft  # noqa: F401

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    distributed: Any = torch.distributed
    store = distributed.FileStore(str(case.folder / "store"), 1)
    backend = "gloo" if case.device == "cpu" else "nccl"
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    with importing(case.checkout, MISSING, UNUSED):
        script = importlib.import_module(f"fastvideo.{name}")
        others = [importlib.import_module(f"fastvideo.{other}") for other in more]
    for module in (script, *others):
        change(module)
    return script


def change(module: ModuleType) -> None:
    """Changes what a module of theirs takes from torch."""
    names, total = module.__dict__, torch.distributed.ReduceOp.SUM
    names["torch"] = Overlay(torch, {"autocast": no_autocast, "bfloat16": torch.float32})
    if "dist" in names:
        names["dist"] = Overlay(torch.distributed, {"ReduceOp": SimpleNamespace(AVG=total, SUM=total)})


def given(case: Case, clipped: Callable[[], None]) -> Given:
    """What they are handed; `clipped` is called before gradients are clipped."""
    from diffusers import FluxPipeline
    from diffusers.optimization import get_scheduler

    device = torch.device(case.device)
    pipeline = FluxPipeline.from_pretrained(case.model).to(device)
    transformer = pipeline.transformer.train()
    weights = list(transformer.parameters())

    def clip(most: float) -> Tensor:
        clipped()
        return torch.nn.utils.clip_grad_norm_(weights, most)

    transformer.clip_grad_norm_ = clip
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY, eps=1e-8)
    with torch.no_grad():
        text, pooled, ids = pipeline.encode_prompt(list(PROMPTS), None, device, max_sequence_length=TEXT_LENGTH)
    batch = (text, pooled, ids[: len(PROMPTS)], list(PROMPTS))
    scheduler = get_scheduler("constant", optimizer)
    return Given(device, transformer, pipeline.vae, optimizer, scheduler, itertools.repeat(batch))


def arguments(case: Case) -> Namespace:
    """Their options, by their names."""
    return Namespace(
        w=PIXELS,
        h=PIXELS,
        t=1,
        sampling_steps=STEPS,
        shift=1.0,
        eta=ETA,
        init_same_noise=False,
        use_group=True,
        num_generations=case.group,
        timestep_fraction=1.0,
        clip_range=CLIP,
        adv_clip_max=MOST_ADVANTAGE,
        gradient_accumulation_steps=case.per_update,
        use_hpsv2=True,
        use_pickscore=False,
        output_dir=str(case.folder),
        seed=0,
    )


def advantages(rewards: Tensor, case: Case) -> Tensor:  # (N,)
    """What they compute within their step: rewards against the mean of the group, by its unbiased std."""
    groups = rewards.float().view(-1, case.group)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + EPSILON)).flatten()


def reward(image: Tensor, text: Tensor) -> dict[str, Tensor]:
    """In place of HPSv2's model: `image` is the mean pixel, see `preprocessed`."""
    return {"image_features": image, "text_features": torch.ones_like(image)}


def preprocessed(image: Any) -> Tensor:  # (1,)
    """In place of HPSv2's preprocessing of a PIL image."""
    import numpy as np

    return torch.tensor([float(np.asarray(image).mean()) / 255])


def tokenized(texts: Any) -> Tensor:
    """In place of HPSv2's tokenizer."""
    return torch.ones(1, 1)


def forever(server: Server, step: Callable[[], None]) -> None:
    """One step whenever it is wanted."""
    while True:
        server.boundary()
        step()
