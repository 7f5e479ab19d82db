"""The defaults of parts are vetted settings: each stands in a table with where it is from, compared both ways.

Lines are those of Flow-GRPO at 9745241 (scripts/train_sd3.py: at ac4c86e), DanceGRPO at 15cc71d, MixGRPO at e5cdd6a,
BranchGRPO at 19fbb9f, DiffusionNFT at 24af555, DDPO (ddpo-pytorch) at 1958463, Flow-Factory at a0b2bc5 and verl-omni at
a1139ba. A source that begins with "ours" is our choice.
"""

from __future__ import annotations

import csv
import inspect
import json
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from aegpo.plugin.manager import load_registries, plugin_manager

TABLE = Path(__file__).parent.parent / "data" / "vetted_defaults.csv"
ALGORITHM = ("curricula", "signals", "allocators", "selectors", "trees", "samplers", "advantages", "objectives")
# Of models and rewards: where things come from, where and how they are computed, and whom a server knows.
SETTINGS = {
    "models": {
        "path",
        "revision",
        "variant",
        "weights",
        "dtype",
        "vae_dtype",
        "vae_slice",
        "vae_tiling",
        "gradient_checkpointing",
        "compile",
        "offload_base",
        "cache",
        "negative_prompt",
    },
    "rewards": {
        "name",
        "weight",
        "path",
        "filename",
        "tokenizer",
        "clip",
        "backend",
        "device",
        "dtype",
        "micro_batch",
        "offload",
        "url",
        "timeout",
        "retries",
        "backoff",
        "concurrency",
        "token_env",
        "body",
        "health",
        "model",
        "max_tokens",
        "attempts",
        "question",
        "frames",
    },
}

Defaults = dict[tuple[str, str], str]  # (axis/kind, field) -> JSON


@pytest.fixture(scope="module")
def sources() -> dict[tuple[str, str], str]:
    with TABLE.open(encoding="utf-8", newline="") as rows:
        return {(row["part"], row["field"]): row["source"] for row in csv.DictReader(rows)}


@pytest.fixture(scope="module")
def vetted() -> Defaults:
    with TABLE.open(encoding="utf-8", newline="") as rows:
        return {(row["part"], row["field"]): row["default"] for row in csv.DictReader(rows)}


@pytest.fixture(scope="module")
def defaults() -> Defaults:
    """What the classes in the box say."""
    found: Defaults = {}
    for registry in load_registries(plugin_manager()):
        for entry in registry if registry.axis in (*ALGORITHM, *SETTINGS) else ():
            for name, field in entry.spec.model_fields.items():
                if name != "kind" and name not in SETTINGS.get(registry.axis, set()) and entry.source == "aegpo":
                    found[f"{registry.axis}/{entry.name}", name] = written(field)
    return found


def written(field: FieldInfo) -> str:
    return "required" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))


def differences(vetted: Defaults, defaults: Defaults) -> list[str]:
    """What a table and the classes say differently."""
    both = sorted(vetted.keys() | defaults.keys())
    return [
        f"{part} {field}: the table has {vetted.get((part, field))}, the class {defaults.get((part, field))}"
        for part, field in both
        if vetted.get((part, field)) != defaults.get((part, field))
    ]


def test_every_default_is_the_one_that_was_vetted(vetted, defaults):
    assert not differences(vetted, defaults)


def test_a_default_that_moved_a_new_field_and_a_field_that_left_would_be_found(vetted, defaults):
    moved = defaults | {("samplers/flow-sde", "noise_level"): "0.8"}
    assert differences(vetted, moved) == ["samplers/flow-sde noise_level: the table has 0.7, the class 0.8"]
    new = defaults | {("samplers/flow-sde", "floor"): "0.0"}
    assert differences(vetted, new) == ["samplers/flow-sde floor: the table has None, the class 0.0"]
    left = {key: value for key, value in defaults.items() if key != ("samplers/ddim", "eta")}
    assert differences(vetted, left) == ["samplers/ddim eta: the table has 1.0, the class None"]


def test_every_row_is_there_once_and_says_where_its_default_is_from(sources):
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(sources) + 1
    assert all(len(source) > 3 for source in sources.values())


def test_what_is_no_setting_of_a_method_is_a_field_of_some_part():
    registries = {registry.axis: registry for registry in load_registries(plugin_manager())}
    for axis, names in SETTINGS.items():
        assert names <= {name for entry in registries[axis] for name in entry.spec.model_fields}


@pytest.mark.parametrize(
    ("pipeline", "argument", "row"),
    [
        ("StableDiffusionPipeline", "guidance_scale", ("models/sd", "guidance")),
        ("StableDiffusionXLPipeline", "guidance_scale", ("models/sdxl", "guidance")),
        ("StableDiffusion3Pipeline", "max_sequence_length", ("models/sd3", "max_sequence_length")),
        ("FluxPipeline", "guidance_scale", ("models/flux", "guidance")),
        ("FluxPipeline", "true_cfg_scale", ("models/flux", "true_guidance")),
        ("FluxPipeline", "max_sequence_length", ("models/flux", "max_sequence_length")),
    ],
)
def test_what_is_said_to_be_a_default_of_diffusers_is_one(vetted, pipeline, argument, row):
    import diffusers

    call = inspect.signature(getattr(diffusers, pipeline).__call__)
    assert float(vetted[row]) == call.parameters[argument].default
