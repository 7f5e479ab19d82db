"""A training step of this checkout beside that of another commit, on the same plans and the same weights.

    python tools/bench_before.py [--against REV] [--turns 5] [--steps 3]

Processor time of one thread, in turns: each turn runs every case in a process of the other commit's worktree and in one
of this checkout, one after the other. Prints the median ratio of each case with its range, and what both spent.
Cases with `known` ask the same prompts in every step, so that base entropies are known after the first; they are
held against the other commit's step in which they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = "b752621"  # the first edition
LATER = "aegpo-qwen-image"  # a plugin that it cannot load
BASE = """
name: before
training_steps: 20
seeds: [0]
model: {{kind: shapes, weights: {weights}}}
rewards: [palette]
prompts: {{train_count: {prompts}, evaluation_count: 4}}
rollouts: {{prompts_per_step: {per_step}, rollouts_per_step: {rollouts}, denoising_steps: 10, micro_batch: 96}}
sampler: {sampler}
allocator: {allocator}
selector: {selector}
tree: {tree}
advantage: {advantage}
objective: {{kind: clipped, clip: 1.0e-3, step_weight: std}}
policy: {{ema: 0.9}}
optimizer: {{learning_rate: 5.0e-5, rollouts_per_update: {update}}}
"""
GRPO = {"sampler": "flow-sde", "allocator": "uniform", "selector": "uniform", "tree": "independent"}
GRPO |= {"advantage": "group", "update": "null", "rollouts": "96", "per_step": "8", "prompts": "512"}
AEGPO = {**GRPO, "allocator": "{kind: entropy, low: 8, high: 16}", "tree": "branching"}
AEGPO |= {"selector": "{kind: entropy-peak, top_k: 4}"}
FAST = {**GRPO, "sampler": "{kind: cps, noise_level: 0.8}", "selector": "{kind: window, width: 3, low: 0, high: 5}"}
FAST |= {"rollouts": "92", "per_step": "4"}
TEMPFLOW = {**GRPO, "tree": "trunk", "advantage": "process", "rollouts": "216", "per_step": "4"}
CASES = {
    "grpo, one update": (GRPO, GRPO),
    "aegpo, one update": (AEGPO, AEGPO),
    "aegpo, one update, base entropies known": (AEGPO, {**AEGPO, "prompts": "8"}),
    "flow-grpo-fast, one update": (FAST, FAST),
    "tempflow-grpo, one update": (TEMPFLOW, TEMPFLOW),
    "grpo, two updates": ({**GRPO, "update": "48"}, {**GRPO, "update": "48"}),
    "aegpo, two updates": ({**AEGPO, "update": "48"}, {**AEGPO, "update": "48"}),
}
MEASURE = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
try:
    from aegpo.config.loading import load_experiment_file
    from aegpo.plugin.manager import load_registries, plugin_manager
    from aegpo.train.engine import Engine
    build = Engine.build
except ImportError:  # the first edition
    from aegpo.loading import load_experiment_file
    from aegpo.plugins import load_registries, plugin_manager
    from aegpo.engine import Engine
    build = lambda experiment: Engine.build(experiment, plugin_manager())
file = load_experiment_file(Path(sys.argv[1]), load_registries(plugin_manager()))
engine, seconds, spent = build(next(iter(file.arms.values()))), [], []
for number in range(1, 2 + int(sys.argv[2])):
    begun = time.process_time()
    report = engine.step(number)
    seconds.append(time.process_time() - begun)
    spent.append(report.metrics)
mean = lambda name: sum(row.get(name, 0) for row in spent[1:]) / len(spent[1:])
names = ("forwards", "signal_forwards", "probe_forwards", "trained_edges", "gradient_rows")
print(json.dumps({"seconds": sum(seconds[1:]) / len(seconds[1:]), **{name: mean(name) for name in names}}))
"""


@dataclass(frozen=True)
class Side:
    """One checkout."""

    tree: Path
    scratch: Path

    def step(self, case: dict[str, str], steps: int) -> dict[str, Any]:
        """Seconds of a step after the first, and what it spent."""
        file = self.scratch / "case.yaml"
        weights = ROOT / "aegpo" / "models" / "shapes" / "weights"
        file.write_text(BASE.format(**case, weights=weights), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": "1"}
        if LATER in {found.name for found in distributions()}:
            environment["AEGPO_BLOCK_PLUGINS"] = LATER
        command = [sys.executable, "-c", MEASURE, str(file), str(steps)]
        done = subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def row(name: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """One case as a line of a table."""
    ratios = [new["seconds"] / old["seconds"] for old, new in zip(before, after, strict=True)]
    old, new = before[0], after[0]
    forwards = [each["forwards"] + each["signal_forwards"] + each["probe_forwards"] for each in (old, new)]
    spent = f"{forwards[0]:,.0f} + {old['trained_edges']:,.0f} | {forwards[1]:,.0f} + {new['gradient_rows']:,.0f}"
    middle = [statistics.median(each["seconds"] for each in side) for side in (before, after)]
    seconds = f"{middle[0]:.2f} | {middle[1]:.2f}"
    return f"| {name} | {spent} | {seconds} | {statistics.median(ratios):.2f} | {min(ratios):.2f}-{max(ratios):.2f} |"


def main() -> None:
    """Measures all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="REV", default=REFERENCE)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one to warm up")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    options = parser.parse_args()
    cases = {name: CASES[name] for name in options.case or CASES}
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch, "tree")
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", tree, options.against], check=True)
        before, after = (Side(each, Path(scratch)) for each in (tree, ROOT))
        found: dict[str, tuple[list[Any], list[Any]]] = {name: ([], []) for name in cases}
        try:
            for _ in range(options.turns):
                for name, (old, new) in cases.items():
                    found[name][0].append(before.step(old, options.steps))
                    found[name][1].append(after.step(new, options.steps))
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)
    print("| case | forwards + edges before | forwards + rows now | s before | s now | ratio | range |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, sides in found.items():
        print(row(name, *sides))


if __name__ == "__main__":
    main()
