"""GRPO on one page: the arm `grpo` of experiments/ablation.yaml, seed 0, without the engine. Read it bottom up.

Only parts come from aegpo: the embedded network, its reward, its captions, and noise by key, so that the numbers are
the engine's (tests/docs/test_one_page.py). `python docs/grpo_on_one_page.py` takes under three minutes on one core.

Shapes: P prompts, G rollouts of each, N = P G, T denoising steps, x = (3, 24, 24): latents are pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from aegpo.core.interfaces import Model
from aegpo.core.records import Conditioning, Prompt
from aegpo.models.shapes import ShapesSpec
from aegpo.prompts.curricula import Shuffle
from aegpo.rewards.scene import SceneReward
from aegpo.train.noise import StepNoise, prompt_noise


@dataclass(frozen=True)
class Settings:
    """As in the file, whose comments say where each number is from."""

    training_steps: int = 30
    prompts: int = 8  # P
    group: int = 12  # G
    denoising_steps: int = 10  # T
    rollouts_per_update: int = 48
    noise_level: float = 0.7  # a
    clip: float = 1e-3  # c
    learning_rate: float = 2e-4
    ema: float = 0.9
    train_captions: int = 512
    held_out_captions: int = 192
    seed: int = 0


@dataclass(frozen=True)
class Transition:
    """One stochastic denoising step of all rollouts, as it was sampled."""

    sigma: Tensor  # () noise level where it begins: 1 is noise, 0 the image
    sigma_next: Tensor  # () where it ends
    latents: Tensor  # (N, *x)
    reached: Tensor  # (N, *x)
    log_prob: Tensor  # (N,) of the policy that sampled


def gaussian(
    latents: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Mean (N, *x) and std () of the stochastic step: Flow-GRPO, arXiv 2505.05470, Eq. 9.

    A Euler step, with noise of rate^2 per unit of sigma added and its expected effect taken out again, so that the
    states of a level are distributed as without it. At sigma 1 the rate has sigma_next, as in the published code.
    """
    below_one = sigma_next if sigma == 1 else sigma
    rate = settings.noise_level**2 * sigma / (1 - below_one)  # squared
    delta, pull = sigma - sigma_next, rate / (2 * sigma)
    mean = (1 - pull * delta) * latents - (delta + pull * (1 - sigma) * delta) * velocity
    return mean, (rate * delta).sqrt()


def log_density(reached: Tensor, mean: Tensor, std: Tensor) -> Tensor:  # (N,)
    """Of a Gaussian, as a mean over the latent's dimensions."""
    squared = (reached - mean).square().flatten(1).mean(dim=1)
    return -squared / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)


@torch.no_grad()
def sample(model: Model, cond: Conditioning, noise: StepNoise, settings: Settings) -> tuple[Tensor, list[Transition]]:
    """N images (N, 3, h, w) in [0, 1] and their T - 1 noisy steps; the last one is deterministic, and not trained."""
    nodes = np.arange(len(cond.text))
    latents = noise.start(nodes, model.latent_shape)
    sigmas, transitions = model.sigmas(settings.denoising_steps), []
    for level, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocity = model.velocity(latents, sigma.expand(len(latents)), cond)
        if level == settings.denoising_steps - 1:
            latents = latents + (sigma_next - sigma) * velocity
            break
        mean, std = gaussian(latents, velocity, sigma, sigma_next, settings)
        reached = mean + std * noise.level(level, nodes, model.latent_shape)
        transitions.append(Transition(sigma, sigma_next, latents, reached, log_density(reached, mean, std)))
        latents = reached
    return model.decode(latents), transitions


def reward(images: Tensor, prompts: list[Prompt]) -> Tensor:  # (N,) in [0, 1]
    """Half of it for an image that shows exactly what its caption asks for, half in parts."""
    strict, partial = SceneReward(strict=True), SceneReward()
    return 0.5 * strict.score(images, prompts) + 0.5 * partial.score(images, prompts)


def advantages(rewards: Tensor) -> Tensor:  # (P, G) -> (P, G)
    """How much better a rollout did than the others of its prompt, in their standard deviations: GRPO's critic."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return (centred / (rewards.std(dim=1, keepdim=True) + 1e-4)).clamp(-5, 5)


def learn(
    model: Model,
    optimizer: torch.optim.Optimizer,
    cond: Conditioning,
    transitions: list[Transition],
    advantage: Tensor,  # (N,)
    rows: Tensor,  # (n,) the rollouts of this optimizer step
    settings: Settings,
) -> None:
    """One optimizer step on PPO's clipped loss, -min(A r, A clip(r, 1 - c, 1 + c)), over every noisy step.

    Each step is weighted by its std over the mean one (TempFlow-GRPO): gradients of log-densities go with 1 / std, so
    without it the late steps would decide everything.
    """
    stds = torch.stack([gaussian(t.latents, t.latents, t.sigma, t.sigma_next, settings)[1] for t in transitions])
    for step, std in zip(transitions, stds, strict=True):
        latents, credit = step.latents[rows], advantage[rows]
        velocity = model.velocity(latents, step.sigma.expand(len(rows)), cond.select(rows))
        mean, _ = gaussian(latents, velocity, step.sigma, step.sigma_next, settings)
        ratio = (log_density(step.reached[rows], mean, std) - step.log_prob[rows]).exp()
        gain = torch.minimum(credit * ratio, credit * ratio.clamp(1 - settings.clip, 1 + settings.clip))
        (-(gain * std / stds.mean()).mean() / len(transitions)).backward()
    torch.nn.utils.clip_grad_norm_(model.policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def held_out(model: Model, prompts: list[Prompt], settings: Settings) -> float:
    """The share of held-out captions whose image is exactly right, with the deterministic sampler and fixed noise."""
    cond = model.encode(prompts)
    latents = prompt_noise(model.latent_shape, 0, prompts, "evaluation", 0)
    sigmas = model.sigmas(settings.denoising_steps)
    for sigma, sigma_next in pairwise(sigmas):
        latents = latents + (sigma_next - sigma) * model.velocity(latents, sigma.expand(len(latents)), cond)
    return float(SceneReward(strict=True).score(model.decode(latents), prompts).mean())


def train(model: Model, settings: Settings) -> list[float]:
    """Trains the network in place, to its averaged weights; returns the mean reward of each training step."""
    captions = ShapesSpec().captions("train", settings.train_captions, seed=0)
    order = Shuffle(len(captions), settings.prompts, settings.seed)
    weights = list(model.policy.parameters())
    optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=1e-4, fused=True)
    average = [weight.detach().clone() for weight in weights]
    history, updates = [], 0
    for number in range(1, settings.training_steps + 1):
        rng, noise = np.random.default_rng((settings.seed, number)), StepNoise(settings.seed, number)
        rng.integers(2**31)  # the engine's seed for parts of others
        prompts = [captions[row] for row in order.at(number) for _ in range(settings.group)]  # N, group by group
        cond = model.encode(prompts)
        images, transitions = sample(model, cond, noise, settings)
        rewards = reward(images, prompts).view(settings.prompts, settings.group)
        credit = advantages(rewards).flatten()
        dealt = torch.from_numpy(rng.permutation(len(prompts)))
        for rows in dealt.split(settings.rollouts_per_update):
            learn(model, optimizer, cond, transitions, credit, rows, settings)
            updates += 1
            kept = min(settings.ema, (1 + updates) / (10 + updates))
            for mean, weight in zip(average, weights, strict=True):
                mean.lerp_(weight.detach(), 1 - kept)
        history.append(float(rewards.mean()))
        print(f"step {number:2}: reward {history[-1]:.3f}")
    for mean, weight in zip(average, weights, strict=True):
        weight.data = mean
    return history


if __name__ == "__main__":
    torch.manual_seed(0)
    settings = Settings()
    embedded = ShapesSpec().build(torch.device("cpu"))
    asked = list(ShapesSpec().captions("evaluation", settings.held_out_captions, seed=0))
    before = held_out(embedded, asked, settings)
    train(embedded, settings)
    print(
        f"held-out images that are exactly right: {before:.3f} before, {held_out(embedded, asked, settings):.3f} after"
    )
