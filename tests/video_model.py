"""The network of `video_world`: one layer of attention over the patches of all frames, which moves a known mean.

The target of a prompt is N(m, SPREAD^2 I) around its video m, so the flow's velocity is known exactly, as in `worlds`;
the network adds to m what it was taught, at first nearly nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aegpo

FRAMES, SIZE, PATCH, WIDTH, HEADS = 3, 8, 4, 24, 2
SIDE = SIZE // PATCH
SPREAD, TAUGHT = 0.15, 0.1
COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.8, 0.2), "blue": (0.2, 0.3, 1.0), "white": (1.0, 1.0, 1.0)}
WAYS = {"left": (0, -2), "right": (0, 2), "up": (-2, 0), "down": (2, 0), "nowhere": (0, 0)}
WORDS = ("a", "dot", "moves", *COLOURS, *WAYS)


def video_of(text: str) -> Tensor:  # (C, F, H, W) in [-1, 1]
    """A square of 2 x 2 pixels in the colour that a text names, going the way that it names, on nearly black."""
    words = text.split()
    colour = next((COLOURS[word] for word in words if word in COLOURS), (0.5, 0.5, 0.5))
    down, right = next((WAYS[word] for word in words if word in WAYS), (0, 0))
    video = torch.full((3, FRAMES, SIZE, SIZE), 0.05)
    for frame in range(FRAMES):
        top, left = 3 + down * (frame - 1), 3 + right * (frame - 1)
        video[:, frame, top : top + 2, left : left + 2] = torch.tensor(colour)[:, None, None]
    return 2 * video - 1


class Attention(nn.Module):
    """Every token looks at every token, of its frame and of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.tap: Callable[[aegpo.AttentionCall], None] | None = None
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, tokens, WIDTH)
        projected = (project(tokens) for project in (self.to_q, self.to_k, self.to_v))
        query, key, value = (each.unflatten(2, (HEADS, -1)).transpose(1, 2) for each in projected)
        if self.tap is not None:
            count, scale = tokens.shape[1], 1 / math.sqrt(WIDTH / HEADS)
            everything, nothing = slice(0, count), slice(count, count)
            seen = query.detach(), key.detach()
            self.tap(aegpo.AttentionCall("attention", "self", *seen, scale, everything, nothing))
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Network(nn.Module):
    """(B, C, F, H, W) latents, (B,) noise levels, (B, 1, WIDTH) texts and the (B, C F H W) means -> the velocity."""

    def __init__(self) -> None:
        super().__init__()
        pixels = 3 * PATCH * PATCH
        self.into, self.out = nn.Linear(pixels, WIDTH), nn.Linear(WIDTH, pixels)
        self.place = nn.Parameter(0.5 * torch.randn(FRAMES * SIDE * SIDE, WIDTH))
        self.told, self.attention, self.late = nn.Linear(WIDTH + 1, WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor, mean: Tensor) -> Tensor:
        sigmas = sigma.view(-1, 1, 1, 1, 1)
        moved = mean.view(latents.shape) + TAUGHT * self._moved(latents, sigma, text)
        variance = (1 - sigmas) ** 2 * SPREAD**2 + sigmas**2
        slope = (sigmas - (1 - sigmas) * SPREAD**2) / variance
        return slope * (latents - (1 - sigmas) * moved) - moved

    def _moved(self, latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:  # (B, C, F, H, W)
        patches = latents.unflatten(4, (SIDE, PATCH)).unflatten(3, (SIDE, PATCH))  # (B, C, F, rows, p, columns, p)
        tokens = self.into(patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)) + self.place
        tokens = tokens + self.told(torch.cat([text.mean(dim=1), sigma[:, None]], dim=1))[:, None]
        tokens = tokens + self.attention(F.layer_norm(tokens, (WIDTH,)))
        tokens = tokens + self.late(F.silu(tokens))
        painted = self.out(tokens).view(-1, FRAMES, SIDE, SIDE, 3, PATCH, PATCH).permute(0, 4, 1, 2, 5, 3, 6)
        return painted.reshape(latents.shape)


class VideoModel:
    """Latents are the pixels of all frames, scaled to [-1, 1], colours first: (C, F, H, W)."""

    latent_shape = (3, FRAMES, SIZE, SIZE)

    def __init__(self, seed: int, schedule: Callable[[int], aegpo.FloatArray], device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._policy = self._network = Network().to(device)
            self._words = torch.randn(len(WORDS) + 1, WIDTH).to(device)
        self._schedule, self._device = schedule, device
        self._base: Network | None = None

    @property
    def policy(self) -> nn.Module:
        return self._policy

    def encode(self, prompts: Sequence[aegpo.Prompt]) -> aegpo.Conditioning:
        places = [[WORDS.index(word) if word in WORDS else -1 for word in prompt.text.split()] for prompt in prompts]
        words = torch.stack([self._words[row].mean(dim=0, keepdim=True) for row in places])
        means = torch.stack([video_of(prompt.text).flatten() for prompt in prompts])
        return aegpo.Conditioning(words, means.to(self._device))

    def sigmas(self, steps: int) -> Tensor:
        return torch.from_numpy(self._schedule(steps)).float().to(self._device)

    def velocity(self, latents: Tensor, sigma: Tensor, cond: aegpo.Conditioning) -> Tensor:
        velocity: Tensor = self._network(latents, sigma, cond.text, cond.pooled)
        return velocity

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents.float() + 1) / 2).clamp(0, 1).movedim(2, 1)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        if name != "base":
            raise aegpo.AegpoError(f"model 'tiny-videos' has no frozen network {name!r}; it has 'base'")
        if self._base is None:  # the engine asks before anything is learned
            self._base = copy.deepcopy(self._policy).requires_grad_(False)
        before, self._network = self._network, self._base
        try:
            yield
        finally:
            self._network = before

    @contextmanager
    def tap_attention(self, tap: Callable[[aegpo.AttentionCall], None]) -> Iterator[None]:
        attention = self._network.attention
        attention.tap = tap
        try:
            yield
        finally:
            attention.tap = None
