"""The reference in Markdown, written from the code itself: commands, experiment files, parts, hooks and names.

`tools/site_pages.py` puts it into the site. It is not committed, so it cannot go stale.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import hook_reference
import public_names
import typer

from aegpo.commands.cli import app
from aegpo.commands.describe import default_words, type_words
from aegpo.config.schema import file_schema
from aegpo.core.experiment import Experiment
from aegpo.core.experiment_type import DEFAULTS
from aegpo.core.registries import Registries
from aegpo.core.registry import Entry, Spec, kind_of
from aegpo.plugin.manager import load_registries, plugin_manager

PARTS = {  # kind of part -> its key in an experiment file and the question it answers, in the order of a step
    "models": ("model", "The network that is trained."),
    "rewards": ("rewards", "What is optimised, as a weighted sum; under `evaluation`, what is watched."),
    "curricula": ("curriculum", "Which prompts a step asks."),
    "signals": ("signals", "What is known before rollouts are planned; measured only if a part reads it."),
    "allocators": ("allocator", "How many rollouts each prompt gets."),
    "selectors": ("selector", "At which denoising steps trajectories explore and learn."),
    "trees": ("tree", "Where trajectories share a prefix."),
    "samplers": ("sampler", "What noise a denoising step adds."),
    "advantages": ("advantage", "From rewards to the credit of each step."),
    "objectives": ("objective", "The loss."),
    "trackers": ("trackers", "Who is told what happened."),
}
_KEYS = {key: kind for kind, (key, _) in PARTS.items()}


def reference_pages() -> dict[str, str]:
    """File name -> Markdown, in the order of the navigation."""
    registries = load_registries(plugin_manager())
    return {
        "command-line.md": command_line(),
        "experiment-files.md": experiment_files(registries),
        "parts.md": parts(registries),
        "hooks.md": hooks(),
        "python.md": python(),
    }


def command_line() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    found: Any = typer.main.get_command(app)
    lines = ["# Commands", "", found.help, ""]
    rows = [(f"[`aegpo {name}`](#aegpo-{name})", command.help) for name, command in found.commands.items()]
    lines += [*_table(("command", "what it does"), rows), ""]
    for name, command in found.commands.items():
        lines += [f"## `aegpo {name}`", "", command.help, ""]
        context = command.make_context(name, [], resilient_parsing=True)
        told = [parameter.get_help_record(context) for parameter in command.params if parameter.name != "help"]
        rows = [(f"`{usage}`", what) for usage, what in filter(None, told)]
        lines += [*_table(("argument or option", "what it is"), rows), ""]
    return "\n".join(lines)


def experiment_files(registries: Registries) -> str:
    """The keys of a file, and the fields of sections that choose no part."""
    schema = file_schema(registries)
    lines = ["# Experiment files", "", "Every key may be left out but `model` and `rewards`, and prompts where the"]
    lines += ["model brings none. Parts that are left out are GRPO's. `aegpo schema` prints the same as a JSON schema,"]
    lines += ["for editors.", "", *_table(("key", "default", "what it is"), _keys(schema["properties"])), ""]
    for key, info in Experiment.model_fields.items():
        if inspect.isclass(info.annotation) and issubclass(info.annotation, Spec) and key not in _KEYS:
            lines += [f"## `{key}`", "", _doc(info.annotation), "", *_fields(info.annotation), ""]
            for name, inner in _inner(info.annotation):
                lines += [f"### `{key}.{name}`", "", _doc(inner), "", *_fields(inner), ""]
    return "\n".join(lines)


def _keys(properties: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for key, told in properties.items():
        if key in _KEYS:
            kind = _KEYS[key]
            chosen = f"`{DEFAULTS[key]}`" if key in DEFAULTS else "required" if key in ("model", "rewards") else ""
            yield f"`{key}`", chosen, f"{PARTS[kind][1]} [Parts](parts.md#{kind})"
        elif "description" in told:
            default = told.get("default")
            yield f"`{key}`", "" if default in (None, {}, []) else f"`{default}`", told["description"]
        else:
            yield f"`{key}`", "", f"a section, [below](#{key})"


def _inner(spec: type[Spec]) -> Iterator[tuple[str, type[Spec]]]:
    """The sections and mappings that fields of a section take."""
    for name, info in spec.model_fields.items():
        for each in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if inspect.isclass(each) and issubclass(each, Spec):
                yield name, each


def parts(registries: Registries) -> str:
    """Every part in the box by kind, with its fields; plugins that happen to be installed are left out."""
    lines = ["# Parts", "", "What `aegpo plugins` lists and `aegpo plugins KIND/NAME` shows: every part that ships"]
    lines += ["with `aegpo`. `allocator: uniform` is short for `allocator: {kind: uniform}`.", ""]
    for kind, (key, about) in PARTS.items():
        entries: list[Entry[Any]] = [entry for entry in getattr(registries, kind) if entry.source == "aegpo"]
        rows = [(f"[`{entry.name}`](#{_slug(kind, entry.name)})", entry.summary) for entry in entries]
        lines += [f"## {kind.capitalize()} {{ #{kind} }}", "", f"Key `{key}`. {about}", ""]
        lines += [*_table((key, "what it is"), rows), ""]
        for entry in entries:
            lines += [f"### `{entry.name}` {{ #{_slug(kind, entry.name)} }}", "", _doc(entry.spec), ""]
            lines += [*_fields(entry.spec), ""]
    return "\n".join(lines)


def _slug(kind: str, name: str) -> str:
    return f"{kind}-{name}"


def hooks() -> str:
    """Every hook with its arguments and what it is for."""
    return f"# Hooks\n\nA plugin implements any of these with `@aegpo.hookimpl`.\n\n{hook_reference.hook_reference()}"


def python() -> str:
    """What plugins import: a directive of mkdocstrings for each public name."""
    lines = ["# Python", "", "What plugins import, and all that they may. Names and signatures are held by a test.", ""]
    for door in public_names.DOORS:
        module = importlib.import_module(door)
        lines += [f"## `{door}` {{ #{door.replace('.', '-')}-door }}", "", inspect.getdoc(module) or "", ""]
        lines += [f"::: {door}.{name}\n" for name in module.__all__]
    return "\n".join(lines)


def _doc(spec: type[Spec]) -> str:
    """The docstring; reStructuredText's double backticks become Markdown's."""
    return inspect.cleandoc(spec.__doc__ or "").replace("``", "`")


def _fields(spec: type[Spec]) -> list[str]:
    rows = [
        (f"`{name}`", type_words(info), f"`{default_words(info)}`", info.description or "")
        for name, info in spec.model_fields.items()
        if not (name == "kind" and kind_of(spec))
    ]
    return _table(("field", "type", "default", "what it is"), rows) if rows else ["No fields."]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return lines + [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\|", " ".join(text.split()))
