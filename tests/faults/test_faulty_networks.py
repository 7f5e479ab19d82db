"""Samplers, objectives and models that fail, or whose tensors are not what was asked: other shapes, NaN, in place."""

from __future__ import annotations

import pytest
from faulty_parts import Ending, Faulty, failing, model, objective, part, sampler
from judging_parts import Judge


def case(axis: str, name: str, text: str, ending: Ending = "step", like: str = "", **changes) -> Faulty:
    return Faulty(name, text, ending, {axis: "bad-part"} | changes, (f"{axis} 'bad-part'", "my_plugin.py"), like)


TRANSITIONS = {
    "transition raises": "oops()",
    "transition nan": "good.mean.fill_(float('nan'))",
    "transition None": "return None",
    "transition shape": "return dataclasses.replace(good, std=good.std[:1])",
    "transition mean shape": "return dataclasses.replace(good, mean=good.mean[:, :1])",
    "transition std nan": "good.std.fill_(float('nan'))",
    "transition std negative": "return dataclasses.replace(good, std=-good.std)",
    "transition float64": "return dataclasses.replace(good, mean=good.mean.double())",
    "transition in place": "latents.mul_(0.5)",
    "transition sys.exit(0)": "sys.exit(0)",
}
LOG_PROBS = {
    "log_prob raises": "oops()",
    "log_prob nan": "return good * float('nan')",
    "log_prob shape": "return good[:1]",
    "log_prob scalar": "return good.mean()",
    "log_prob None": "return None",
}
LOSSES = {
    "loss raises": "oops()",
    "loss nan": "return good[0] * float('nan'), good[1]",
    "loss no grad": "return good[0].detach(), good[1]",
    "loss None": "return None",
    "loss scalar": "return good[0].mean(), good[1]",
    "loss metrics wrong": "return good[0], {'x': 3}",
    "loss metrics a list": "return good[0], []",
    "loss alone": "return good[0]",
    "loss KeyboardInterrupt": "raise KeyboardInterrupt",
}
VELOCITIES = {
    "model velocity raises": "oops()",
    "model velocity nan": "return good * float('nan')",
    "model velocity one nan": "good = good.clone(); good[0, 0, 0, 0] = float('nan'); return good",
    "model velocity inf": "return good / 0",
    "model velocity shape": "return good[:, :1]",
    "model velocity one row": "return good[:1]",
    "model velocity None": "return None",
    "model velocity in place": "latents.mul_(0.5)",
    "model velocity sys.exit(0)": "sys.exit(0)",
}
DECODED = {
    "model decode nan": "return good * float('nan')",
    "model decode range": "return good + 1",
    "model decode rows": "return good[:1]",
    "model decode None": "return None",
    "model decode in place": "latents.mul_(0.5)",
    "model decode raises": "oops()",
}
ENCODED = {
    "model encode raises": "oops()",
    "model encode rows": "return good.select(torch.zeros(1, dtype=torch.long))",
    "model encode None": "return None",
    "model encode seeds": "torch.manual_seed(1)",
}
CAPTIONS, SIGMAS = ("captions", "split, count, seed"), ("sigmas", "steps")
GROUPS = 'scope: ClassVar[Literal["groups"]] = "groups"\n'
ALONE = "def build(self):\n    return Alone() if FAULT else self\n"
SHAPES = {"module": "aegpo.models.shapes"}


def of_spec(method: tuple[str, str], result: str = "oops()") -> str:
    return part("models", "ShapesSpec", failing(*method, result), **SHAPES)


CASES = [
    *(case("sampler", name, sampler(body)) for name, body in TRANSITIONS.items()),
    *(case("sampler", name, sampler(body, ("log_prob", "gaussian, sample"))) for name, body in LOG_PROBS.items()),
    case("sampler", "table raises", sampler("", methods=failing("table", "sigmas")), "start"),
    case("sampler", "table None", sampler("", methods=failing("table", "sigmas", "None")), "start"),
    *(case("objective", name, objective(body)) for name, body in LOSSES.items()),
    *(
        case("objective", f"groups: {name}", objective(body, GROUPS), optimizer={"micro_batch": 16})
        for name, body in LOSSES.items()
        if name in ("loss raises", "loss nan", "loss scalar")
    ),
    case("objective", "objective builds another thing", objective("", failing("build", "", "3")), "start"),
    case(
        "objective",
        "objective needs_base raises",
        objective("", "needs_base = property(lambda self: FAULT and oops())"),
        "start",
    ),
    case("objective", "forward loss raises", objective("oops()", base="NftObjective"), like="nft"),
    case(
        "objective",
        "forward loss nan",
        objective("return good[0] * float('nan'), good[1]", base="NftObjective"),
        like="nft",
    ),
]
MODELS = [
    *((name, model(body, "velocity"), "step") for name, body in VELOCITIES.items()),
    *((name, model(body, "decode", "latents"), "step") for name, body in DECODED.items()),
    *(
        (name, model(body, "encode", "prompts"), "finish" if name.endswith("seeds") else "step")
        for name, body in ENCODED.items()
    ),
    ("model captions raises", of_spec(CAPTIONS), "start"),
    ("model captions None", of_spec(CAPTIONS, "None"), "start"),
    ("model captions of numbers", of_spec(CAPTIONS, "(1, 2, 3)"), "start"),
    ("model captions too few", of_spec(CAPTIONS, "('one', )"), "start"),
    ("model sigmas raises", of_spec(SIGMAS), "start"),
    ("model sigmas None", of_spec(SIGMAS, "None"), "start"),
    ("model sigmas rise", of_spec(SIGMAS, "np.linspace(0, 1, steps + 1)"), "start"),
    ("model build raises", of_spec(("build", "device")), "start"),
    ("model footprint raises", of_spec(("problems", "experiment")), "start"),
]
CLEAN: dict[str, dict[str, str]] = {}  # what runs without a fault have


@pytest.mark.parametrize("faulty", CASES, ids=str)
def test_a_faulty_step_or_loss_is_blamed_and_nothing_is_lost(faulty, warm, tmp_path, write_experiment):
    judge = Judge(warm, tmp_path, write_experiment(**faulty.changes), faulty, CLEAN)
    assert not (wrong := judge.complaints()), "\n".join(wrong)


@pytest.mark.parametrize(("name", "source", "ending"), MODELS, ids=[each[0] for each in MODELS])
def test_a_faulty_model_is_blamed_and_nothing_is_lost(name, source, ending, warm, tmp_path, tiny, write_experiment):
    faulty = case("model", name, source, ending, model=tiny["model"] | {"kind": "bad-part"})
    judge = Judge(warm, tmp_path, write_experiment(**faulty.changes), faulty, CLEAN)
    assert not (wrong := judge.complaints()), "\n".join(wrong)
