"""The JSON schema of experiment files, for editors and other programs."""

from __future__ import annotations

from typing import Any, get_args

from aegpo.config.loading import ARM_NAME, OF_THE_FILE
from aegpo.config.measured import DESCRIPTION as OF_MEASURED
from aegpo.config.measured import MeasuredSpec
from aegpo.core.experiment_type import experiment_type
from aegpo.core.rates import ScheduleSpec
from aegpo.core.registries import Registries
from aegpo.core.verdicts import VerdictSpec


def file_schema(registries: Registries) -> dict[str, Any]:
    """What a file may contain: the fields of an experiment, `extends`, `arms`, `seeds`, `measured`, and its report's.

    Nothing is required, because keys may come from the extended file; patches of arms are described by name only,
    because what they must contain depends on what they patch.
    """
    schema = experiment_type(registries).model_json_schema(mode="validation")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "aegpo experiment file"
    schema.pop("required", None)
    schema["properties"].pop("seed")
    _allow_names(schema, registries)
    fields: dict[str, Any] = schema["properties"]
    patch = {key: True for key in fields if key not in OF_THE_FILE}
    schema["properties"] = {
        "extends": {"type": "string", "description": "a file whose keys this one patches; relative to this one"},
        **fields,
        "measured": {
            "anyOf": [{"const": "never"}, MeasuredSpec.model_json_schema()],
            "description": OF_MEASURED,
        },
        "seeds": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0},
            "minItems": 1,
            "uniqueItems": True,
            "default": [0],
            "description": "every arm is run under each",
        },
        **VerdictSpec.model_json_schema()["properties"],
        "arms": {
            "type": "object",
            "propertyNames": {"pattern": f"^{ARM_NAME.pattern}$"},
            "additionalProperties": {"type": ["object", "null"], "properties": patch, "additionalProperties": False},
            "minProperties": 1,
            "description": "name -> what it changes, null drops an inherited one; without arms there is one, 'main'",
        },
    }
    return schema


def _allow_names(schema: dict[str, Any], registries: Registries) -> None:
    """Lets the bare name of a part stand for it, wherever one is chosen."""
    names, fields = {registry.axis: registry.names for registry in registries}, schema["properties"]
    for key in ("model", "curriculum", "allocator", "selector", "tree", "sampler", "advantage", "objective"):
        fields[key] = _or_name(fields[key], registries.of(key).names)
    sources = fields["signals"].pop("additionalProperties")["discriminator"]["mapping"]
    fields["signals"]["properties"] = {kind: {"$ref": place} for kind, place in sources.items()}
    fields["signals"]["additionalProperties"] = False
    evaluation = schema["$defs"]["EvaluationSpec"]["properties"]
    for lists, key in ((fields, "rewards"), (evaluation, "rewards"), (fields, "trackers")):
        lists[key]["items"] = _or_name(lists[key]["items"], names[key])
    optimizer = schema["$defs"]["OptimizerSpec"]["properties"]
    optimizer["schedule"] = _or_name(optimizer["schedule"], get_args(ScheduleSpec.model_fields["kind"].annotation))


def _or_name(part: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The schema of a part, or its bare name; a description stays where editors look for it."""
    inner = {key: value for key, value in part.items() if key not in ("description", "title")}
    outer = {key: value for key, value in part.items() if key in ("description", "title")}
    return {**outer, "anyOf": [{"enum": list(names), "description": "short for {kind: name}"}, inner]}
