"""MixGRPO (Tencent-Hunyuan/MixGRPO): `train_one_step` of fastvideo/train_grpo_flux.py; see fastvideo.py too.

Its window of four steps stays at the first ones here, since it moves after 25 steps. Its rewards are replaced.
"""

from __future__ import annotations

from typing import Any

from bench_rivals import fastvideo
from bench_rivals.cases import FIRST, MOST_GRADIENT, NOISE, STEPS, Case
from bench_rivals.dance_grpo import watch
from bench_rivals.first import First
from bench_rivals.serving import Server

TITLE = "MixGRPO"
FAMILY = "flux"
TREE = False
WINDOW, INTERVAL = 4, 25


def method(case: Case) -> dict[str, Any]:
    """The same for aegpo."""
    return {
        **fastvideo.method(case),
        "rollouts": {"micro_batch": 1},
        "sampler": {"kind": "flow-sde", "noise_level": NOISE},
        "tree": {"kind": "independent", "start": "own"},
        "selector": {"kind": "sliding-window", "width": WINDOW, "interval": INTERVAL},
    }


def train(case: Case, server: Server) -> None:
    """Its training step, in a loop."""
    script: Any = fastvideo.load(case, "train_grpo_flux", ("utils.sampling_utils",))
    first = First()

    def clipped() -> None:
        if server.steps == 1 and case.updates == 1:
            first.learned(server.rows.network)

    hands = fastvideo.given(case, clipped)
    watch(script, first, server, case, tuple(range(WINDOW)))
    script.compute_reward = _rewards
    args = fastvideo.arguments(case)
    for name, value in options().items():
        setattr(args, name, value)
    windows = script.GRPOTrainingStates(
        iters_per_group=INTERVAL,
        group_size=WINDOW,
        max_timesteps=STEPS - 2,
        prog_overlap=True,
        prog_overlap_step=1,
        roll_back=True,
    )

    def step() -> None:
        window = windows.get_current_timesteps()
        windows.update_iteration()
        script.train_one_step(
            args,
            hands.device,
            hands.transformer,
            hands.vae,
            [],
            hands.optimizer,
            hands.scheduler,
            hands.loader,
            None,
            MOST_GRADIENT,
            window,
            server.steps,
            {"mean-pixel": 1.0},
        )
        if server.steps == 1 and first.gradients:
            first.save(case.shared / FIRST)

    fastvideo.forever(server, step)


def options() -> dict[str, Any]:
    """Its own options beside DanceGRPO's, as its script has them."""
    return {
        "eta": NOISE,
        "flow_grpo_sampling": True,
        "drop_last_sample": False,
        "dpm_algorithm_type": "null",
        "training_strategy": "part",
        "sample_strategy": "progressive",
        "experiment_name": "run",
        "reward_model": "mean-pixel",
        "multi_reward_mix": "advantage_aggr",
        "advantage_rerange_strategy": "null",
        "trimmed_ratio": 0.0,
        "frozen_init_timesteps": -1,
        "kl_coeff": 0.0,
    }


def _rewards(images: Any, prompts: Any, models: Any, weights: Any) -> Any:
    """In place of its reward models."""
    scores, known = [float(fastvideo.preprocessed(image)) for image in images], [1] * len(images)
    return scores, known, {"mean-pixel": scores}, {"mean-pixel": known}
