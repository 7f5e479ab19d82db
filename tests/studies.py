"""Folders of runs whose true effects are known, for tests of reports: nothing was trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image
from rich.console import Console

from aegpo.report import write_report
from aegpo.report.recorded import read_study
from aegpo.report.summary import summarize
from aegpo.report.verdict import verdict

SEEDS = (0, 1, 2)
VERSIONS = {"python": "3.11.9", "torch": "2.13.0", "tensorboard": None}


@dataclass(frozen=True)
class Arm:
    """An arm whose true effects are known; gains grow over training as 1 - exp(-3 step / steps)."""

    name: str
    gains: dict[str, float]  # evaluation label -> true mean gain
    forwards: int = 640  # of the rollouts of a step
    signal_forwards: int = 0
    trained_edges: int = 600
    frozen: int = 0  # policies evaluated at a trained edge, beside the one that learns
    entropy: bool = False
    allocates: bool = False
    chosen: int = 10  # denoising steps a prompt
    noise: float | None = None  # left in the images; None: not recorded
    probe: dict | None = None  # options of entropy
    rewards: tuple[dict, ...] = ({"kind": "palette", "name": None, "weight": 1.0},)


@dataclass(frozen=True)
class World:
    """How runs vary: the noise of the synthetic folder."""

    training_steps: int = 40
    every: int = 5
    prompts: int = 48
    seed_spread: float = 0.006
    prompt_spread: float = 0.05
    noise: float = 0.05
    texts: tuple[str, ...] = ()
    draw: int = 7  # which prompts, and so how hard they are


GRPO = Arm("grpo", {"palette": 0.05, "scene": 0.01})
ALLOCATION = Arm("allocation", {"palette": 0.056, "scene": 0.01}, signal_forwards=160, entropy=True, allocates=True)
SELECTION = Arm("selection", {"palette": 0.06, "scene": 0.005}, 420, 160, 320, entropy=True, chosen=4)
AEGPO = Arm("aegpo", {"palette": 0.1, "scene": 0.02}, 420, 160, 320, entropy=True, allocates=True, chosen=4)
RANDOM = Arm("random-steps", {"palette": 0.045, "scene": -0.06}, 420, 0, 320, chosen=4)
ARMS = (GRPO, ALLOCATION, SELECTION, AEGPO, RANDOM)


def write_experiment(folder, arms, seeds=SEEDS, world=World(), order=True, **verdict):
    """Every arm under every seed; `verdict` is what the file asks of the report."""
    for arm in arms:
        for seed in seeds:
            write_run(folder, arm, seed, world, world.training_steps)
    if order:
        order_file = {"arms": [arm.name for arm in arms], "seeds": list(seeds), **verdict}
        (folder / "order.json").write_text(json.dumps(order_file))
    return folder


def write_run(folder, arm, seed, world, steps_done):
    run = folder / arm.name / f"seed-{seed}"
    (run / "images").mkdir(parents=True)
    (run / "manifest.json").write_text(json.dumps(manifest(arm, seed, world)))
    # the base and what is hard about a prompt are the same in every run
    shared, own = np.random.default_rng(world.draw), np.random.default_rng((11, seed, *arm.name.encode()))
    prompts = world.texts or tuple(f"{number} red circles on a <blue> background" for number in range(world.prompts))
    base = {label: shared.uniform(0.3, 0.7, len(prompts)) for label in arm.gains}
    hard = {label: shared.normal(0, world.prompt_spread, len(prompts)) for label in arm.gains}
    luck = {label: own.normal(0, world.seed_spread) for label in arm.gains}
    evaluations, metrics, timing = [], [], [{"step": 0, "seconds": {"evaluation": 2.0}}]
    for step in range(steps_done + 1):
        due = step % world.every == 0 or step == world.training_steps
        if due:
            grown = (1 - np.exp(-3 * step / world.training_steps)) / (1 - np.exp(-3))
            scores = {
                label: base[label]
                + grown * (gain + hard[label] + luck[label] + own.normal(0, world.noise, len(prompts)))
                for label, gain in arm.gains.items()
            }
            evaluations.append(evaluation_row(step, scores, base, prompts))
            write_grid(run / "images" / f"step-{step:06}.png", step * arm.gains["palette"])
        if step:
            metrics.append(metrics_row(arm, step, own))
            seconds = {"signals": 0.4 if arm.entropy else 0.0, "plan": 0.001, "rollout": arm.forwards / 400}
            seconds |= {"reward": 0.2, "update": arm.trained_edges / 200} | ({"evaluation": 2.0} if due else {})
            timing.append({"step": step, "seconds": seconds})
    for name, rows in (("evaluations", evaluations), ("metrics", metrics), ("timing", timing)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if steps_done == world.training_steps:
        (run / "finished.json").write_text(json.dumps({"step": steps_done}))
    return run


def manifest(arm, seed, world):
    experiment = {
        "name": "ablation",
        "training_steps": world.training_steps,
        "seed": seed,
        "rollouts": {"prompts_per_step": 8, "rollouts_per_step": 64, "denoising_steps": 10},
        "rewards": list(arm.rewards),
        "allocator": {"kind": "entropy", "least": 4} if arm.allocates else {"kind": "uniform"},
        "selector": {"kind": "entropy-peak", "top_k": 4} if arm.chosen < 10 else {"kind": "uniform"},
        "evaluation": {"every": world.every, "denoising_steps": None, "images": 4},
    } | ({} if arm.probe is None else {"signals": {"entropy": arm.probe}})
    made_with = {"versions": VERSIONS, "plugins": [["aegpo-jpeg", "0.1.0"]], "commit": "3da94a6"}
    return {"format": 1, "arm": arm.name, "seed": seed, "experiment": experiment, "threads": 1, **made_with}


def evaluation_row(step, scores, base, prompts):
    def table(values):
        return {label: each.tolist() for label, each in values.items()}

    return {"step": step, "scores": table(scores), "base_scores": table(base), "prompts": prompts}


def metrics_row(arm, step, rng):
    spent = {"forwards": arm.forwards, "signal_forwards": arm.signal_forwards, "trained_edges": arm.trained_edges}
    spent["work"] = arm.forwards + arm.signal_forwards + (3 + arm.frozen) * arm.trained_edges
    spent |= {} if arm.noise is None else {"residual_noise": arm.noise + 0.01 * (step % 2)}
    entropy = delta = None
    counts, selected = [8] * 8, [sorted(rng.choice(10, arm.chosen, replace=False).tolist()) for _ in range(8)]
    if arm.entropy:
        level = 2.2 + 0.5 * np.exp(-((np.arange(10) - 3) ** 2) / 4) + rng.normal(0, 0.08, (8, 1))
        entropy = level + rng.normal(0, 0.03, (8, 10))
        delta = 0.01 * (step - 1) * rng.uniform(0.4, 1.6, 8)
        if arm.chosen < 10:
            selected = [sorted(np.argsort(-row)[: arm.chosen].tolist()) for row in entropy]
        if arm.allocates and step > 1:
            shares = np.argsort(np.argsort(delta))
            counts = (4 + shares + (shares > 3)).tolist()
    return {
        "step": step,
        "metrics": {"reward": 0.5, "loss": 0.01, **spent},
        "prompts": [f"prompt {index}" for index in range(8)],
        "counts": counts,
        "selected": selected,
        "signals": {} if entropy is None else {"entropy": entropy.tolist(), "entropy-delta": delta.tolist()},
    }


def write_grid(path, strength):
    pixels = np.full((64, 64, 3), 230, dtype=np.uint8)
    pixels[8:56, 8:56] = (200, max(0, 120 - int(30 * strength)), 60)
    Image.fromarray(pixels).save(path)


def report(folder, width=160):
    with (folder / "terminal.txt").open("w") as file:
        path = write_report(folder, Console(file=file, width=width))
    numbers = json.loads((folder / "report" / "summary.json").read_text())
    return path.read_text(), numbers, (folder / "terminal.txt").read_text()


def numbers_of(folder):
    summary = summarize(read_study(folder))
    return {**asdict(summary), "verdict": verdict(summary)}


def score(numbers, arm, label="palette"):
    return next(row for row in numbers["scores"] if (row["arm"], row["label"]) == (arm, label))


def difference(numbers, arm, reference="grpo", label="palette"):
    found = [
        row for row in numbers["contrasts"] if (row["arm"], row["reference"], row["label"]) == (arm, reference, label)
    ]
    return found[0] if found else None
