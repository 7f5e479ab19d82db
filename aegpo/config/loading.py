"""Experiment files: YAML with `extends`, `arms` and `seeds` -> one frozen Experiment for each arm and seed.

Every mistake of a file is reported at once, at the line and column it was made, wherever it came from: the file, the
one it extends, an arm or `--set`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from aegpo.config import places
from aegpo.config.extending import lay_over, read_extended
from aegpo.config.marks import OPTION, Mark, Marked, Mistake, dotted, merge, refuse
from aegpo.config.measured import MeasuredSpec, read_measured
from aegpo.config.older import modern, moved
from aegpo.config.parsing import parse
from aegpo.config.validation import Finding, mistake, validate
from aegpo.core.experiment import Experiment
from aegpo.core.experiment_type import experiment_type
from aegpo.core.registries import Registries
from aegpo.core.registry import LONGEST_NAME, suggestion
from aegpo.core.sections import MOST_SEED
from aegpo.core.verdicts import VerdictSpec
from aegpo.errors import SpecError
from aegpo.method import planning
from aegpo.prompts.problems import PromptProblems

FILE_KEYS = ("extends", "arms", "seeds", "measured", *VerdictSpec.model_fields)  # of a file, beside those of Experiment
OF_THE_FILE = (*FILE_KEYS, "name", "seed")  # what no arm may change
ONLY_ARM = "main"  # of a file without arms
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = ("order.json", "report", "report.html")  # of a folder of runs
DEFAULT_SEEDS = (0,)


@dataclass(frozen=True)
class ExperimentFile:
    """A valid experiment file, resolved."""

    path: Path
    name: str
    seeds: tuple[int, ...]
    arms: Mapping[str, Experiment]  # in the order of the file, each under the first seed
    verdict: VerdictSpec  # what the report compares
    warnings: tuple[str, ...] = ()  # what is possible but probably not meant, with its place in the file
    measured: MeasuredSpec | Literal["never"] | None = None  # None: the file does not say

    def experiment(self, arm: str, seed: int) -> Experiment:
        """One arm under one seed."""
        return self.arms[arm].model_copy(update={"seed": seed})


def load_experiment_file(
    path: Path, registries: Registries, overrides: Sequence[str] = (), text: str | None = None
) -> ExperimentFile:
    """Reads, merges and validates a file.

    Args:
        path: of the YAML file.
        registries: the parts it may choose.
        overrides: `key.path=value` each, the value in YAML; they apply to the base and win over the arms.
        text: what is read in place of the file, which need not be there: places are seen from its folder.

    Raises:
        SpecError: with every mistake, its place, the line and a caret.
    """
    mistakes: list[Mistake] = []
    extended = read_extended(path, mistakes, text)
    refuse(mistakes)
    document, dropped = extended.document, extended.dropped
    patches = [patch for text in overrides if (patch := _option(text, document, mistakes)) is not None]
    refuse(mistakes)
    for patch in patches:
        document = lay_over(document, patch, dropped, indexed=True)
    seeds = _seeds(document, mistakes)
    measured = read_measured(document, mistakes)
    arms = _arms(document, patches, dropped, mistakes)
    verdict = _verdict(document, dropped, mistakes)
    spec = experiment_type(registries)
    experiments: dict[str, Experiment] = {}
    complaints: dict[Mistake, list[str]] = {}
    cautions: dict[Mistake, list[str]] = {}
    of_prompts = PromptProblems()
    for arm, tree in arms.items():
        tree = places.written_out(spec, tree, mistakes)
        experiment, findings = _experiment(spec, tree, seeds[0], of_prompts)
        for finding in findings:
            (cautions if finding.warning else complaints).setdefault(mistake(tree, finding), []).append(arm)
        if experiment is not None:
            experiments[arm] = experiment
    refuse([*mistakes, *(_naming_arms(mistake, names, len(arms)) for mistake, names in complaints.items())])
    warnings = [str(each) for each in extended.cautions]
    warnings += [str(_naming_arms(mistake, names, len(arms))) for mistake, names in cautions.items()]
    name = next(iter(experiments.values())).name
    return ExperimentFile(path, name, seeds, experiments, verdict, tuple(warnings), measured)


def parse_experiment(data: Mapping[str, Any], registries: Registries) -> Experiment:
    """An experiment from the plain data of a manifest: the inverse of `model_dump(mode="json")`.

    Raises:
        SpecError: if these registries do not accept it, for example because a plugin is gone.
    """
    experiment, findings = validate(experiment_type(registries), modern(data))
    if experiment is None:
        raise SpecError("\n".join(f"{dotted(finding.location)}: {finding.message}" for finding in findings))
    return experiment


# --- from texts to one tree an arm -----------------------------------------------------------------------------------


def _option(text: str, document: Marked, mistakes: list[Mistake]) -> Marked | None:
    """`key.path=value` as the patch {key: {path: value}}."""
    text = _as_utf8(text)
    path, equals, value_text = text.partition("=")
    keys = path.split(".")
    mark = Mark(OPTION, None, 1, text)
    if not equals or not all(keys):
        mistakes.append(Mistake(mark, "", f"{text!r} is not of the form key.path=value"))
        return None
    if keys[0] == "extends":
        mistakes.append(Mistake(mark, "extends", "cannot be set by an option; write it into the file"))
        return None
    if (wrong := _leads_nowhere(document, keys)) is not None:
        mistakes.append(Mistake(mark, path, wrong))
        return None
    value, found = parse(value_text, OPTION, lines=False, indent=f"{path}=")
    mistakes += [replace(mistake, path=path) for mistake in found]
    if found:
        return None
    patch = Marked(None, mark, mark) if value is None else replace(value, key=mark)
    for key in reversed(keys):
        patch = Marked({key: patch}, mark, mark)
    return patch


def _as_utf8(text: str) -> str:
    """An option as a file is read, in whatever locale: its bytes are UTF-8."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError:
        return text


def _leads_nowhere(document: Marked, keys: list[str]) -> str | None:
    """What is wrong if the keys of an option name an arm or an item of a list that does not exist."""
    arms = document.children.get("arms")
    if keys[0] == "arms" and arms is not None and len(keys) > 1 and keys[1] not in arms.children:
        return f"no arm is called {keys[1]!r}; {suggestion(keys[1], arms.children)}"
    node = document
    for key in keys:
        if isinstance(node.value, tuple):
            if not (key.isdecimal() and int(key) < len(node.value)):
                return f"no item {key!r}; the list has {len(node.value)}, counted from 0"
            node = node.value[int(key)]
        elif key in node.children:
            node = node.children[key]
        else:
            return None
    return None


def _seeds(document: Marked, mistakes: list[Mistake]) -> tuple[int, ...]:
    given = document.children.get("seeds")
    if given is None:
        return DEFAULT_SEEDS
    seeds = given.plain
    if not isinstance(seeds, list) or not seeds:
        mistakes.append(Mistake(given.mark, "seeds", "must be a list of at least 1 whole number, such as [0, 1, 2]"))
        return DEFAULT_SEEDS
    for index, seed in enumerate(seeds):
        mark = given.find((index,))[0].mark
        if type(seed) is not int or not 0 <= seed <= MOST_SEED:
            what = f"must be a whole number from 0 to {MOST_SEED}, not {seed!r}"
            mistakes.append(Mistake(mark, f"seeds.{index}", what))
        elif seed in seeds[:index]:
            mistakes.append(Mistake(mark, f"seeds.{index}", f"{seed} is given twice; every seed is run once"))
    right = all(type(seed) is int and 0 <= seed <= MOST_SEED for seed in seeds)
    return tuple(seeds) if right else DEFAULT_SEEDS


def _verdict(document: Marked, dropped: Mapping[str, Mark], mistakes: list[Mistake]) -> VerdictSpec:
    """What the report is asked for; arms are those of the file, also where a mistake leaves one out."""
    given = {key: child for key, child in document.children.items() if key in VerdictSpec.model_fields}
    tree = replace(document, value=given)
    verdict, findings = validate(VerdictSpec, tree.plain)
    arms = document.children["arms"].children if "arms" in document.children else {}
    problems = verdict.problems(tuple(arms) or (ONLY_ARM,)) if verdict is not None else ()
    findings += [Finding(problem.location, problem.message) for problem in problems]
    mistakes += [_of_dropped(mistake(tree, finding), tree.find(finding.location)[0], dropped) for finding in findings]
    return verdict if verdict is not None else VerdictSpec()


def _of_dropped(found: Mistake, named: Marked, dropped: Mapping[str, Mark]) -> Mistake:
    """Says where the arm was dropped that a comparison names."""
    if not isinstance(named.value, str) or named.value not in dropped:
        return found
    where = f"arm {named.value!r} is dropped at {dropped[named.value]}"
    return replace(found, message=f"{where}; name other pairs, or write 'comparisons: null' there")


def _arms(
    document: Marked, patches: list[Marked], dropped: Mapping[str, Mark], mistakes: list[Mistake]
) -> dict[str, Marked]:
    """The document of each arm, less what belongs to the file."""
    base = document.without(*FILE_KEYS)
    if "arms" not in document.children:
        return {ONLY_ARM: base}
    given = document.children["arms"]
    if not given.children:
        what = "must map the name of each arm to what it changes; or leave it out"
        if dropped:
            what = "every arm is dropped; keep one, or write 'main: {}' for an arm that changes nothing"
        mistakes.append(Mistake(given.mark, "arms", what))
        return {ONLY_ARM: base}
    arms: dict[str, Marked] = {}
    for name, arm in given.children.items():
        path = f"arms.{name}"
        mistakes += [Mistake(arm.key, path, why) for why in _no_folders_name(name)]
        if arm.value is None:
            others = [other for other, each in given.children.items() if each.value is not None]
            none = f"none is called {name!r}; {suggestion(name, others)}" if others else "there is none"
            what = f"null drops an inherited arm (one that changes nothing is {{}}), but {none}"
            mistakes.append(Mistake(arm.mark, path, what))
            continue
        if not isinstance(arm.value, Mapping):
            mistakes.append(Mistake(arm.mark, path, "must be a mapping of what the arm changes; {} if nothing"))
            continue
        foreign = [child for key, child in arm.children.items() if key in OF_THE_FILE]
        mistakes += [Mistake(child.key, path, "this key belongs to the file, not to an arm") for child in foreign]
        # words about the base are not about an arm that changes it
        tree = merge(base if not arm.children else base.without("about"), arm.without(*OF_THE_FILE))
        for patch in patches:
            tree = merge(tree, patch.without(*FILE_KEYS), indexed=True)
        arms[name] = tree
    return arms or {ONLY_ARM: base}


def _no_folders_name(arm: str) -> Iterator[str]:
    """Why an arm cannot be called so."""
    folder = "an arm's name becomes a folder"
    if not ARM_NAME.fullmatch(arm):
        yield f"{folder}: letters, digits, '.', '_' and '-', the first a letter or digit"
    if len(arm) > LONGEST_NAME:
        yield f"{folder}: at most {LONGEST_NAME} letters, not {len(arm)}"
    if arm in RESERVED:
        yield f"the report keeps {arm!r} beside the arms; choose another name"


# --- from trees to experiments ---------------------------------------------------------------------------------------


def _experiment(
    spec: type[Experiment], tree: Marked, seed: int, of_prompts: PromptProblems
) -> tuple[Experiment | None, list[Finding]]:
    known = [*FILE_KEYS, *(name for name in spec.model_fields if name != "seed")]
    unknown = [key for key in tree.children if key not in known]
    plain = tree.plain
    wrong = [
        Finding((key,), moved(key, plain[key]) or f"unknown key; {suggestion(key, known)}", at_key=True)
        for key in unknown
    ]
    experiment, findings = validate(spec, {**tree.without(*unknown).plain, "seed": seed})
    if experiment is not None:
        found = list(experiment.problems())
        if not any(not problem.warning for problem in found):
            found += [*planning.problems(experiment), *of_prompts.of(experiment)]
        findings = [Finding(problem.location, problem.message, warning=problem.warning) for problem in found]
    findings = [*wrong, *findings]
    return (experiment if all(finding.warning for finding in findings) else None), findings


def _naming_arms(mistake: Mistake, arms: list[str], total: int) -> Mistake:
    """Says which arms are meant, unless all are."""
    if len(arms) == total:
        return mistake
    names = ", ".join(repr(arm) for arm in arms)
    return replace(mistake, message=f"{mistake.message} (in arm{'s' if len(arms) > 1 else ''} {names})")
