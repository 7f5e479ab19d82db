"""BranchGRPO (Fredreic1849/BranchGRPO): `train_one_step_tree` of fastvideo/train_branchgrpo_flux.py; see fastvideo.py.

A tree for each prompt, nothing pruned; siblings' noise has the scale 1, where its script has 4.
"""

from __future__ import annotations

from typing import Any

from bench_rivals import fastvideo
from bench_rivals.cases import PROMPTS, STEPS, Case
from bench_rivals.serving import Server

TITLE = "BranchGRPO"
FAMILY = "flux"
TREE = True
SPLITS = (0, 2, 4, 6)


def splits(case: Case) -> tuple[int, ...]:
    """The steps at which every node gets two children: as many as make the group."""
    rounds = case.group.bit_length() - 1
    assert 2**rounds == case.group <= 2 ** len(SPLITS), "a group is a power of two, 16 at most"
    return SPLITS[:rounds]


def edges(case: Case) -> int:
    """Transitions of a tree."""
    return sum(2 ** sum(split <= step for split in splits(case)) for step in range(STEPS))


def method(case: Case) -> dict[str, Any]:
    """The same for aegpo."""
    return {
        **fastvideo.method(case),
        "tree": {"kind": "branching", "splits": list(splits(case)), "noise": "all"},
        "selector": {"kind": "uniform", "last": True},
        "advantage": {"kind": "depth", "weighting": "mean", "epsilon": fastvideo.EPSILON},
        "optimizer": {"micro_batch": 1, "reduction": "edge"},
    }


def train(case: Case, server: Server) -> None:
    """Its training step, in a loop."""
    script: Any = fastvideo.load(case, "train_branchgrpo_flux")
    hands = fastvideo.given(case, lambda: None)
    args = fastvideo.arguments(case)
    own = {
        "use_group": False,
        "train_batch_size": len(PROMPTS),
        "tree_split_rounds": len(splits(case)),
        "tree_split_points": ",".join(map(str, splits(case))),
        "tree_split_noise_scale": 1.0,
        "gradient_accumulation_steps": len(PROMPTS) * edges(case) // case.updates,
    }
    for name, value in own.items():
        setattr(args, name, value)

    fastvideo.forever(server, lambda: script.train_one_step_tree(*hands.for_step(args)))
