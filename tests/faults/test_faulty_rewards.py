"""Rewards that fail, lie, exit or change what others rely on."""

from __future__ import annotations

import pytest
from faulty_parts import Ending, Faulty, attribute, part, reward
from judging_parts import Judge

NAMED = ("reward 'bad-part'", "my_plugin.py")


def case(name: str, source: str, ending: Ending = "step", **changes) -> Faulty:
    return Faulty(name, source, ending, {"rewards": ["bad-part"]} | changes, NAMED)


def scoring(name: str, body: str, ending: Ending = "step") -> Faulty:
    return case(f"reward {name}", reward(body), ending)


VALIDATOR = """
@pydantic.model_validator(mode="after")
def valid(self):
    return oops() if FAULT else self
"""
REFUSES = """
particular: ClassVar[bool] = True
def refuses(self, prompt):
    return oops() if FAULT else None
"""
# It scores apart from the run's own device, so that `early` is read and calls are in threads.
APART = """
@property
def lane(self):
    return "elsewhere"
"""
PALETTE = {"module": "aegpo.rewards.palette", "before": "import pydantic"}
CASES = [
    scoring("raises in score", "oops()"),
    case("reward raises in build", reward("", build="if FAULT: oops()"), "start"),
    case("reward raises in validation", part("rewards", "PaletteReward", VALIDATOR, **PALETTE), "start"),
    scoring("wrong shape", "return good[:-1]"),
    scoring("float64", "return good.double()"),
    scoring("meta device", "return good.to('meta')"),
    scoring("nan", "good[0] = float('nan')"),
    scoring("inf", "good[0] = float('inf')"),
    scoring("list", "return good.tolist()"),
    scoring("None", "return None"),
    scoring("writes into images", "images.mul_(0.5)"),
    scoring("sys.exit(0)", "sys.exit(0)"),
    scoring("sys.exit(3)", "sys.exit(3)"),
    scoring("sys.exit('text')", "sys.exit('bye')"),
    # Was 130, as if the user had pressed Ctrl-C. Nobody did.
    scoring("KeyboardInterrupt", "raise KeyboardInterrupt"),
    scoring("BaseException", "raise Evil('oops')"),
    scoring("GeneratorExit", "raise GeneratorExit"),
    scoring("StopIteration", "raise StopIteration"),
    scoring("MemoryError", "raise MemoryError"),
    scoring("RecursionError", "def again(): again()\nagain()"),
    scoring("changes global seeds", "torch.manual_seed(1); random.seed(1); np.random.seed(1)", "ok"),
    scoring("draws from the global generators", "torch.rand(999); random.random(); np.random.random(1248)", "ok"),
    scoring("sets default dtype", "torch.set_default_dtype(torch.float64)", "finish"),
    scoring("disables grad", "torch.set_grad_enabled(False)", "finish"),
    scoring("chdir", "os.chdir('/')", "finish"),
    scoring("prints 50 MB", "for _ in range(50_000): sys.stdout.write('y' * 1023 + '\\n')", "ok"),
    scoring(
        "starts daemon threads",
        "for _ in range(50): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()",
        "ok",
    ),
    scoring("leaves a thread", "threading.Thread(target=time.sleep, args=(10,)).start()", "ok"),
    scoring("closes stdout", "sys.stdout.close()", "finish"),
    scoring("writes into metadata", "for prompt in prompts: prompt.metadata['x'] = 1", "finish"),
    Faulty(
        "reward name with markup",
        reward("oops()"),
        "step",
        {"rewards": [{"kind": "bad-part", "name": "[/bold]bad-part"}]},
        ("reward '[/bold]bad-part'",),
    ),
    case("reward apart raises", reward("oops()", methods=APART)),
    case("reward apart sys.exit(0)", reward("sys.exit(0)", methods=APART)),
    case("reward apart KeyboardInterrupt", reward("raise KeyboardInterrupt", methods=APART)),
    case("lane raises", reward("", methods=attribute("lane", "''")), "start"),
    case("early raises", reward("", methods=APART + attribute("early", "1")), "start"),
    Faulty(  # who cannot say what it is called is named by its plugin
        "label raises",
        reward("", methods=attribute("label", "'bad-part'")),
        "start",
        {"rewards": ["bad-part"]},
        ("my_plugin.py", "KeyError: 'oops'"),
    ),
    case("refuses raises", reward("", methods=REFUSES), "start", prompts={"train_count": 12, "evaluation": "held.txt"}),
]
CLEAN: dict[str, dict[str, str]] = {}  # what runs without a fault have


@pytest.mark.parametrize("faulty", CASES, ids=str)
def test_a_faulty_reward_is_blamed_and_nothing_is_lost(faulty, warm, tmp_path, write_experiment):
    (tmp_path / "held.txt").write_text("one\ntwo\nthree\nfour\n")
    judge = Judge(warm, tmp_path, write_experiment(**faulty.changes), faulty, CLEAN)
    assert not (wrong := judge.complaints()), "\n".join(wrong)
