"""Curricula, sources of signals, allocators, selectors, trees and advantages that fail or decide what cannot be."""

from __future__ import annotations

import pytest
from faulty_parts import (
    Ending,
    Faulty,
    advantage,
    allocator,
    attribute,
    curriculum,
    failing,
    remembering,
    selector,
    source,
    tree,
)
from judging_parts import Judge


def case(axis: str, name: str, text: str, ending: Ending = "step", **changes) -> Faulty:
    changes = changes or {axis: "bad-part"}
    return Faulty(name, text, ending, changes, (f"{axis} 'bad-part'", "my_plugin.py"))


PROBLEMS = "def problems(self, experiment):\n    return {0} if FAULT else []\n"
ALLOCATORS = {
    "allocator raises": "oops()",
    "allocator wrong sum": "return good + 1",
    "allocator negative": "return good * 0 - np.array([-10, 2])",
    "allocator floats": "return good.astype(float)",
    "allocator None": "return None",
    "allocator sys.exit(0)": "sys.exit(0)",
    "allocator draws nothing but seeds": "random.seed(1); return good[::-1] * 0",
}
SELECTORS = {
    "selector raises": "oops()",
    "selector none": "return good & False",
    "selector shape": "return good[:, :-1]",
}
TREES = {
    "tree raises": "oops()",
    "tree None": "return None",
    "tree drops a leaf": "return dataclasses.replace(good, prompt=(*good.prompt[:-1], good.prompt[-1][:-1]))",
    "tree field of lists": "return dataclasses.replace(good, noisy=[list(each) for each in good.noisy])",
    "tree writes into the counts": "counts[:] = counts[::-1] + 1",
    "tree writes into the chosen steps": "steps[:] = True",
}
ADVANTAGES = {
    "advantage raises": "oops()",
    "advantage nan": "return good * float('nan')",
    "advantage shape": "return good[:-1]",
    "advantage float64": "return good.double()",
    "advantage None": "return None",
    "advantage writes into the scores": "scores.leaves.zero_()",
    "advantage writes into the rollouts": "rollouts.edges.log_prob.zero_()",
    "advantage writes into the plan": "rollouts.plan.prompt[-1][:] = 0",
    "advantage KeyboardInterrupt": "raise KeyboardInterrupt",
}
CURRICULA = {
    "curriculum raises": "oops()",
    "curriculum None": "return None",
    "curriculum beyond the list": "return good + 100",
    "curriculum too few": "return good[:-1]",
    "curriculum floats": "return good.astype(float)",
    "curriculum sys.exit(0)": "sys.exit(0)",
}
SOURCES = {
    "source raises": "oops()",
    "source None": "return None",
    "source of other names": "return Measurement({'other': good.values['mood']})",
    "source of another shape": "return Measurement({'mood': good.values['mood'][:-1]})",
    "source infinite": "return Measurement({'mood': good.values['mood'] + np.inf})",
    "source of lists": "return Measurement({'mood': good.values['mood'].tolist()})",
    "source BaseException": "raise Evil('oops')",
}
WRITES = "def allocate(self, signals, budget, rng):\n    signals.by_prompt('mood')[:] = {0}\n    "
WRITES += "return super().allocate(signals, budget, rng)\n"
CASES = [
    case("allocator", "problems raises", allocator("", PROBLEMS.format("oops()")), "start"),
    case("allocator", "problems returns None", allocator("", PROBLEMS.format("None")), "start"),
    case("allocator", "problems of numbers", allocator("", PROBLEMS.format("[3]")), "start"),
    case("allocator", "problems sys.exit(0)", allocator("", PROBLEMS.format("sys.exit(0)")), "start"),
    case("allocator", "cautions raises", allocator("", failing("cautions", "experiment")), "start"),
    case("allocator", "reads raises", allocator("", attribute("reads", "()")), "start"),
    case("allocator", "allocator build raises", allocator("", failing("build", "")), "start"),
    case("allocator", "allocator builds another thing", allocator("", failing("build", "", "3")), "start"),
    *(case("allocator", name, allocator(body)) for name, body in ALLOCATORS.items()),
    *(case("selector", name, selector(body)) for name, body in SELECTORS.items()),
    *(case("tree", name, tree(body)) for name, body in TREES.items()),
    *(case("advantage", name, advantage(body)) for name, body in ADVANTAGES.items()),
    case("advantage", "levels raises", advantage("", failing("levels", "plan")), "start"),
    *(case("curriculum", name, curriculum(body)) for name, body in CURRICULA.items()),
    case("curriculum", "curriculum build raises", curriculum(build="if FAULT: oops()"), "start"),
    case("curriculum", "curriculum builds another thing", curriculum(build="if FAULT: return 3"), "start"),
    *(case("signals", name, source(body), allocator="reader") for name, body in SOURCES.items()),
    case("signals", "source build raises", source(methods=failing("build", "experiment")), "start", allocator="reader"),
    case("signals", "source cost raises", source(methods=failing("cost", "steps")), "start", allocator="reader"),
    case(
        "signals",
        "source problems raises",
        source(methods=failing("problems", "experiment")),
        "start",
        allocator="reader",
    ),
    case(
        "signals",
        "source foreseen raises",
        source(methods=failing("foreseen", "experiment")),
        "start",
        allocator="reader",
    ),
    Faulty(
        "an allocator writes into a signal",
        source(
            reader=WRITES.format("0 if due() else signals.by_prompt('mood')").replace(
                "signals.by", "if due(): signals.by", 1
            )
        ),
        "step",
        {"allocator": "reader"},
        ("allocator 'reader'",),
    ),
    case("allocator", "state_dict raises", remembering("if due(): oops()")),
    case("allocator", "state_dict no JSON", remembering("if due(): return {'x': {1, 2}}")),
    case("allocator", "state_dict keys", remembering("if due(): return {3: 'x'}")),
    case("allocator", "state_dict nan", remembering("if due(): return {'x': float('nan')}"), "ok"),
    case("allocator", "state_dict None", remembering("if due(): return None")),
    case("allocator", "load_state_dict raises", remembering(loading="oops()"), "load"),
]
CLEAN: dict[str, dict[str, str]] = {}  # what runs without a fault have


@pytest.mark.parametrize("faulty", CASES, ids=str)
def test_a_faulty_decision_is_blamed_and_nothing_is_lost(faulty, warm, tmp_path, write_experiment):
    judge = Judge(warm, tmp_path, write_experiment(**faulty.changes), faulty, CLEAN)
    assert not (wrong := judge.complaints()), "\n".join(wrong)
