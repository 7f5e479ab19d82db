"""DanceGRPO (XueZeyue/DanceGRPO): `train_one_step` of fastvideo/train_grpo_flux.py; see fastvideo.py for the rest.

Weights and levels make the cut of times to thousandths exact, and all of its T - 1 steps are trained.
"""

from __future__ import annotations

from typing import Any

from bench_rivals import fastvideo
from bench_rivals.cases import FIRST, STEPS, Case
from bench_rivals.fastvideo import method as method
from bench_rivals.first import First
from bench_rivals.serving import Server

TITLE = "DanceGRPO"
FAMILY = "flux"
TREE = False


def train(case: Case, server: Server) -> None:
    """Its training step, in a loop."""
    script = fastvideo.load(case, "train_grpo_flux")
    (case.folder / "images").mkdir()  # where it saves every image
    first = First()

    def clipped() -> None:
        if server.steps == 1 and case.updates == 1:
            first.learned(server.rows.network)

    hands = fastvideo.given(case, clipped)
    watch(script, first, server, case)
    args = fastvideo.arguments(case)

    def step() -> None:
        script.train_one_step(*hands.for_step(args), None)
        if server.steps == 1 and first.gradients:
            first.save(case.shared / FIRST)

    fastvideo.forever(server, step)


def watch(
    script: Any, first: First, server: Server, case: Case, levels: tuple[int, ...] = tuple(range(STEPS - 1))
) -> None:
    """Keeps what it samples first."""
    sample = script.sample_reference_model

    def sampled(*args: Any, **kwargs: Any) -> Any:
        rewards, latents, log_prob, *rest = sample(*args, **kwargs)
        if server.steps == 1:
            first.texts = next(arg for arg in args if isinstance(arg, list) and arg and isinstance(arg[0], str))
            first.levels = list(levels)
            first.latents, first.next_latents = latents[:, first.levels], latents[:, [1 + each for each in levels]]
            first.log_prob = log_prob[:, first.levels]
            of_all = next(iter(rewards.values())) if isinstance(rewards, dict) else rewards
            first.advantage = fastvideo.advantages(of_all, case)
        return rewards, latents, log_prob, *rest

    script.sample_reference_model = sampled
