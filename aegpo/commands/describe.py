"""Tables of the command line: what arms differ in, what they cost, and which parts there are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from aegpo.commands.footprints import Holding
from aegpo.config.loading import ExperimentFile
from aegpo.config.marks import dotted
from aegpo.core.footprint import Footprint
from aegpo.core.phases import USABLE
from aegpo.core.registries import Registries
from aegpo.core.registry import Entry, Spec, suggestion
from aegpo.core.sections import GIB
from aegpo.core.sheets import NONE, Sheet
from aegpo.errors import AegpoError
from aegpo.method.balance import Balance, of_prompts
from aegpo.method.costs import Cost

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}


def about(file: ExperimentFile) -> list[str]:
    """What each arm does, a line an arm that the file says it of."""
    return [f"{arm}: {experiment.about}" for arm, experiment in file.arms.items() if experiment.about is not None]


def differences(file: ExperimentFile) -> Sheet:
    """The keys whose value is not the same in every arm; `-` where an arm's part has no such key."""
    arms = {arm: _flat(experiment.model_dump(mode="json"), ()) for arm, experiment in file.arms.items()}
    keys = list(dict.fromkeys(key for values in arms.values() for key in values if key != "about"))
    rows = []
    for key in keys:
        cells = [json.dumps(values[key]).strip('"') if key in values else NONE for values in arms.values()]
        told = set(cells) - ({NONE, "{}"} if key.split(".")[0] == "signals" else set())  # an arm has those it reads
        if len(told) > 1:
            rows.append((key, *cells))
    title = "What differs between arms"
    return Sheet(title, ("key", *arms), tuple(rows), numbers=False, narrow=_by_value(title, tuple(arms), rows))


def _by_value(title: str, arms: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Sheet:
    """A row for each value of a key, with the arms that have it: as wide with many arms as with few."""
    found: list[tuple[str, ...]] = []
    for key, *cells in rows:
        having = {value: [arm for arm, cell in zip(arms, cells, strict=True) if cell == value] for value in cells}
        without = having.pop(NONE, [])
        values = sorted(having, key=lambda value: len(having[value]))  # the most common last
        for index, value in enumerate(values):
            others = not without and 1 < len(values) == index + 1 and len(having[value]) > 2
            told = f"the other {len(having[value])} arms" if others else _listed(having[value], arms)
            found.append(("" if index else key, value, told))
    return Sheet(title, ("key", "value", "arms"), tuple(found), numbers=False)


def _listed(having: Sequence[str], arms: Sequence[str]) -> str:
    """Those arms, or all but a few."""
    without = [arm for arm in arms if arm not in having]
    return ", ".join(having) if 2 * len(without) >= len(having) else f"all but {', '.join(without)}"


def _flat(value: Any, location: tuple[str | int, ...]) -> dict[str, Any]:
    """Nested data as dotted key -> scalar or list of scalars."""
    items: Any = ()
    if isinstance(value, Mapping) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = enumerate(value)
    else:
        return {dotted(location): value}
    return {key: leaf for name, child in items for key, leaf in _flat(child, (*location, name)).items()}


def costs(file: ExperimentFile, figures: Mapping[str, Cost]) -> Sheet:
    """What a training step of each arm costs, and all its seeds together."""
    headings = (
        "arm",
        "rollouts",
        "forwards",
        "per rollout",
        "gradient rows",
        "work",
        "signals",
        "steps x seeds",
        "work of all",
    )
    predicts = any(cost.predicted.high for cost in figures.values())
    rows = []
    for arm, cost in figures.items():
        steps, seeds = file.arms[arm].training_steps, len(file.seeds)
        total = cost.total_work(steps).times(seeds)
        mean = "~" if cost.expected else ""
        found = (cost.leaves, cost.forwards, f"{cost.per_rollout:.2f}", f"{mean}{cost.gradient_rows}")
        base = f"{cost.signals_again:,.0f} of the base" if cost.signals_again else f"{cost.signals_base:,} once"
        signals = f"{cost.signals:,.0f} + {base}" if cost.signals else NONE
        predicted = (str(cost.predicted),) if predicts else ()
        spent = (f"{mean}{cost.work}", signals, f"{steps} x {seeds}", str(total))
        rows.append((arm, *map(str, found), *spent, *predicted))
    note = (
        "gradient rows = states that are learned from, each once in every optimizer step (~: in the mean over how "
        "rollouts may be dealt to these).\n"
        "work = forwards + 3 x gradient rows (a forward and a backward pass), and 1 more for each frozen policy at a "
        "state that is learned from.\n"
        "signals = forwards that measure what parts read: of the policy in a mean step; of the base once a prompt, or "
        "in that step too.\n" + _asked(figures)
    )
    predictions = "\npredicted images = decoded and scored beside the rollouts'; work leaves both out."
    columns = (*headings, "predicted images") if predicts else headings
    return Sheet("What a training step costs", columns, tuple(rows), note + (predictions if predicts else ""))


def _asked(figures: Mapping[str, Cost]) -> str:
    """How many prompts are encoded ahead, and what that takes, for arms that differ in it."""
    arms: dict[str, list[str]] = {}
    for arm, cost in figures.items():
        kept = "" if cost.encodings is None else f", {cost.encodings / 2**30:.2f} GiB on disk at most"
        arms.setdefault(f"{cost.candidates:,}{kept}", []).append(arm)
    told = "; ".join(text if len(arms) == 1 else f"{text} ({', '.join(names)})" for text, names in arms.items())
    return f"prompts that a run may ask, encoded ahead: {told}."


def memory(figures: Mapping[str, Footprint], room: int | None) -> Sheet:
    """What each arm needs in memory, in GiB; `room` is what there is, in bytes, if it is known."""
    sized = ("weights", "optimizer", "activations", "recomputed", "graphs kept", "in all")
    rows = []
    for arm, needs in figures.items():
        fits = "?" if room is None else "yes" if needs.total <= room else "no"
        sizes = [_gib(size) for size in (needs.weights, needs.optimizer, needs.activations)]
        cells = [*sizes, _recomputed(needs, room), _kept_graphs(needs, room), _gib(needs.total), fits]
        rows.append((arm, f"{needs.parameters:,}", f"{needs.trainable:,}", *cells))
    there = "no GPU here" if room is None else f"the GPU has {room / 2**30:.1f}"
    note = (
        f"{there}. Activations of one micro-batch of the optimizer: lower 'optimizer.micro_batch' first where it does "
        "not fit.\nrecomputed = activations, in the backward pass: 'model.gradient_checkpointing'; auto: not where so "
        "much is free.\ngraphs kept = of sampling, at most, for the first optimizer step: 'optimizer.retain'; auto: "
        "half of what is free at each step, which is not in all.\nAn estimate from the network's config; sampling, "
        "decoding and rewards come on top."
    )
    columns = ("arm", "parameters", "trainable", *sized, "fits")
    return Sheet("What it needs in memory, in GiB", columns, tuple(rows), note)


def _recomputed(needs: Footprint, room: int | None) -> str:
    """Whether activations are computed again; where that is left to the machine, from what memory on they are not."""
    told = {None: "-", True: "yes", False: "no"}[needs.recomputes]
    if needs.whole_from is None:
        return told
    return f"{'' if room is None else f'{told}; '}auto: no from {_gib(needs.whole_from)}"


def _kept_graphs(needs: Footprint, room: int | None) -> str:
    """What graphs that sampling keeps may take."""
    if needs.retained is None:
        return "half of the rest" if room is None else f"<= {_gib(max(0, room - needs.total) // 2)}"
    return f"<= {_gib(needs.retained)}" if needs.retained else "-"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def on_gpus(file: ExperimentFile, gpus: int, figures: Mapping[str, Balance]) -> Sheet:
    """How evenly each arm's step is shared out among GPUs, one for each process of a run; `figures` is by arm."""
    rows = []
    for arm, balance in figures.items():
        experiment = file.arms[arm]
        shards = "null" if experiment.parallel.shards is None else str(experiment.parallel.shards)
        pieces = "prompts" if of_prompts(experiment) else "rollouts"
        rows.append((arm, shards, pieces, str(balance.dearest), str(balance.repeated)))
    note = (
        "dearest = forwards of the GPU that samples most, in those of an even share; repeated = forwards that one GPU "
        "would not make, in those that it would."
    )
    columns = ("arm", "shards", "cut between", "dearest", "repeated")
    return Sheet(f"One run on {gpus:,} GPUs", columns, tuple(rows), note)


def by_phase(gpus: int, figures: Mapping[str, Holding], room: int | None) -> Sheet:
    """What each GPU of a run holds while it learns and while it samples, by who has the weights; by arm.

    `room` is what there is on a GPU, in bytes, if that is known.
    """
    rows = []
    for arm, each in figures.items():
        chosen = each.sharded if each.weights == "sharded" else each.whole
        told = each.weights or f"whole from {_gib(each.whole_from)}"
        fits = "?" if room is None or each.weights is None else "yes" if chosen.largest <= room else "no"
        sizes = (each.whole.training, each.whole.sampling, each.sharded.training, each.sharded.sampling)
        rows.append((arm, *map(_gib, sizes), told if each.asked == told else f"{each.asked}: {told}", fits))
    there = "no GPU here" if room is None else f"a GPU has {_gib(room)}"
    note = (
        f"{there}. whole = all weights on each GPU; while it learns, with sums of gradients.\nsharded = a part of "
        "weights, gradients, moments, base and average, and what is gathered: while it learns blocks, while it samples "
        "all weights ('parallel.gather: never': blocks).\nweights = 'parallel.weights'; auto: sharded where learning "
        f"with whole weights takes more than {USABLE:.0%} of a GPU.\nGraphs that sampling keeps under "
        "'optimizer.retain: auto' fill what is left and are not counted. Decoding and rewards come on top."
    )
    phases = tuple(f"{weights}, {phase}" for weights in ("whole", "sharded") for phase in ("training", "sampling"))
    return Sheet(f"What each of {gpus:,} GPUs holds, in GiB", ("arm", *phases, "weights", "fits"), tuple(rows), note)


def parts(registries: Registries) -> Sheet:
    """Every registered part: how an experiment file chooses it, who ships it, and what it is."""
    rows: list[tuple[str, ...]] = []
    sections: list[int] = []
    for registry in registries:
        rows += [(f"{registry.axis}/{entry.name}", entry.source, entry.summary) for entry in registry]
        sections.append(len(rows))
    return Sheet("", ("part", "shipped by", "what it is"), tuple(rows), numbers=False, sections=tuple(sections))


def part(registries: Registries, path: str) -> tuple[Entry[Spec], Sheet]:
    """One part, `AXIS/NAME`, and the table of its fields.

    Raises:
        AegpoError: if there is no such axis or part.
    """
    axis, _, name = path.partition("/")
    known = {registry.axis: registry for registry in registries}
    if axis not in known:
        raise AegpoError(f"no kind of part is called {axis!r}; {suggestion(axis, known)} (as in allocators/entropy)")
    spec: type[Spec] = known[axis].get(name)
    entry = next(entry for entry in known[axis] if entry.spec is spec)
    rows = tuple(
        (field, type_words(info), default_words(info), info.description or "")
        for field, info in spec.model_fields.items()
        if field != "kind"
    )
    return entry, Sheet("", ("field", "type", "default", "what it is"), rows, numbers=False)


def default_words(info: FieldInfo) -> str:
    """A field's default as a reader of YAML knows it."""
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Spec):
        return value.model_dump_json()
    return json.dumps(str(value) if isinstance(value, Path) else value).strip('"')


def type_words(info: FieldInfo) -> str:
    """A field's type and bounds as a reader of YAML knows them: ``whole number, >= 1``."""
    return ", ".join([_words(info.annotation), *_bounds(info.metadata)])


def _bounds(metadata: Iterable[Any]) -> list[str]:
    found = ((sign, getattr(item, bound, None)) for item in metadata for bound, sign in _BOUNDS.items())
    return [f"{sign} {value:g}" for sign, value in found if isinstance(value, int | float)]


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return ", ".join([_words(arguments[0]), *(bound for item in arguments[1:] for bound in _bounds([item]))])
    if origin in (Union, UnionType):
        return " | ".join(_words(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (tuple, list):
        return f"list of {_words(arguments[0])}"
    names = {int: "whole number", float: "number", bool: "true | false", str: "text", Path: "path", NoneType: "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
