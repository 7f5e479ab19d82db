"""The door for Python: what `aegpo run` and `aegpo evaluate` do, for scripts and notebooks.

    import aegpo

    class Redness(aegpo.RewardSpec):
        "How red images are."

        kind: Literal["redness"] = "redness"

        def score(self, images, prompts):
            return images[:, 0].mean(dim=(1, 2))

    file = aegpo.load({"extends": "experiments/smoke.yaml", "name": "red", "rewards": [Redness()]})
    study = aegpo.run(file)
    study.runs["grpo", 0].evaluations[-1].scores["redness"].mean()

Everything happens in this process, one run after another; what it records is what the command line records, so either
goes on with the other's runs. Several runs at a time, and several GPUs, are the command line's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aegpo.core.experiment import Experiment
from aegpo.core.registry import Spec

if TYPE_CHECKING:
    import pluggy
    from rich.console import Console

    from aegpo.config.loading import ExperimentFile
    from aegpo.core.parts import RewardSpec
    from aegpo.core.registries import Registries
    from aegpo.report.evaluated import Evaluated
    from aegpo.report.recorded import Study

Source = str | Path | Mapping[str, Any] | Experiment


def load(
    source: Source,
    *,
    overrides: Mapping[str, Any] = {},
    parts: Sequence[type[Spec]] = (),
    plugins: Sequence[str] = (),
) -> ExperimentFile:
    """An experiment, checked: its arms by name, each an `Experiment`.

    Args:
        source: path of an experiment file; or what one holds, as a mapping, whose values may be specs; or one
            `Experiment`. Places in a mapping or an `Experiment` are relative to the working directory.
        overrides: ``{"rollouts.micro_batch": 32}``: as `--set` on the command line.
        parts: classes of rewards or other parts that the source names; those whose specs are in it need not be given.
        plugins: modules or `.py` files, as `--plugin` on the command line.

    Raises:
        SpecError: with every mistake and its place.
        PluginError: for a plugin or a class that cannot be registered.
    """
    return _load(source, overrides, _registries(_manager(source, parts, plugins)))


def run(
    source: Source | ExperimentFile,
    *,
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    overrides: Mapping[str, Any] = {},
    out: str | Path = "runs",
    fresh: bool = False,
    report: bool = True,
    progress: bool = True,
    parts: Sequence[type[Spec]] = (),
    plugins: Sequence[str] = (),
) -> Study:
    """Trains every chosen arm under every chosen seed in this process, going on where an earlier call stopped.

    Args:
        source: as for `load`, or what it returned.
        arms: which ones; none: all.
        seeds: which ones of the source; none: all.
        overrides: as for `load`; not of what it returned.
        out: folder of all runs: those of this experiment are at OUT/NAME/ARM/seed-S.
        fresh: start over in place of going on.
        report: write OUT/NAME/report.html at the end, and print its tables.
        progress: show it, as the tracker `console` does, also where the experiment does not name that.
        parts: as for `load`.
        plugins: as for `load`.

    Returns:
        What all runs of the experiment recorded.

    Raises:
        AegpoError: for a mistake, or if a run fails; what was done is kept, and the same call goes on.
        KeyboardInterrupt: if it is interrupted; the state is saved, and the same call goes on.
    """
    from rich.console import Console

    from aegpo.commands.launch_request import LaunchRequest
    from aegpo.commands.run import begin_anew, one_after_another, open_file
    from aegpo.core.processes import refuse_several_processes
    from aegpo.parallel.team import Team
    from aegpo.report import write_report
    from aegpo.report.recorded import read_study
    from aegpo.runs.child_processes import INTERRUPTED

    refuse_several_processes()
    manager = _manager(source, parts, plugins)
    file = _load(source, overrides, _registries(manager))
    request = LaunchRequest(file.path, arms=tuple(arms), seeds=tuple(seeds), out=Path(out), fresh=fresh)
    team, console = Team.alone(), Console()
    folder, runs = open_file(file, request, team, Console(stderr=True))
    if fresh:
        begin_anew(runs)
    for each in runs:
        with _shown(manager, console, progress and not each.finished and not _has_console(each.experiment)):
            code = 0 if each.finished else one_after_another([each], 1, manager, console, team)
        if code == INTERRUPTED:
            raise KeyboardInterrupt(f"{each.label} is saved; the same call goes on with it")
    if report:
        write_report(folder, console)
    return read_study(folder)


def evaluate(
    subject: str | Path,
    *,
    rewards: Sequence[str | Mapping[str, Any] | RewardSpec] = (),
    prompts: str | Path | None = None,
    images_per_prompt: int | None = None,
    by: str | None = None,
    checkpoint: int | None = None,
    seed: int | None = None,
    steps: int | None = None,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] = {},
    parts: Sequence[type[Spec]] = (),
    plugins: Sequence[str] = (),
) -> Evaluated:
    """Scores a run's policy beside its base, or a model alone, by rewards and prompts of one's choice.

    Args:
        subject: folder of a run, OUT/NAME/ARM/seed-S; of an arm with all its seeds; or an experiment file: its model.
        rewards: kinds, mappings with a `kind`, or specs; none: those of the experiment.
        prompts: file of prompts, or ``"hpsv2"``; None: the experiment's held-out ones.
        images_per_prompt: None: as evaluation has it.
        by: key of the prompts' metadata whose values are rows of their own.
        checkpoint: training step; None: the newest.
        seed: of the noise; None: the experiment's.
        steps: denoising steps; None: as evaluation has them.
        out: folder that is made, with images, `scores.jsonl`, `summary.json` and `index.html`; None: below
            `evaluations/`.
        overrides: of an experiment file, as for `load`.
        parts: classes of rewards or other parts that the subject or `rewards` name.
        plugins: as for `load`.

    Raises:
        AegpoError: for a mistake, before a model is loaded; or if a model or reward fails.
    """
    import json

    from aegpo.commands.evaluate import evaluate as evaluated
    from aegpo.commands.evaluate_request import EvaluateRequest
    from aegpo.config.objects import plain

    texts = tuple(each if isinstance(each, str) else json.dumps(plain(each)) for each in rewards)
    request = EvaluateRequest(
        Path(subject),
        rewards=texts,
        prompts=None if prompts is None else str(prompts),
        images_per_prompt=images_per_prompt,
        by=by,
        checkpoint=checkpoint,
        seed=seed,
        steps=steps,
        out=None if out is None else Path(out),
        plugins=tuple(plugins),
        overrides=_options(overrides),
        parts=tuple(_new(rewards, parts, plugins)),
    )
    return evaluated(request)[1]


def _load(source: Source | ExperimentFile, overrides: Mapping[str, Any], registries: Registries) -> ExperimentFile:
    from aegpo.config.loading import ExperimentFile, load_experiment_file
    from aegpo.config.objects import NAME, as_text
    from aegpo.errors import SpecError

    if isinstance(source, ExperimentFile):
        if overrides:
            raise SpecError("overrides are for a path or a mapping; give them to aegpo.load, which returned this")
        return source
    options = _options(overrides)
    if isinstance(source, str | Path):
        return load_experiment_file(Path(source), registries, options)
    given = dict(source)
    if isinstance(source, Experiment):
        given = {name: value for name, value in source if name in source.model_fields_set and name != "seed"}
        given["seeds"] = [source.seed]
    return load_experiment_file(Path(NAME), registries, options, as_text(given))


def _options(overrides: Mapping[str, Any]) -> tuple[str, ...]:
    """`key.path=value` each, the value as JSON, which is YAML."""
    import json

    from aegpo.config.objects import plain

    return tuple(f"{key}={json.dumps(plain(value))}" for key, value in overrides.items())


def _manager(
    source: Source | ExperimentFile, parts: Sequence[type[Spec]], plugins: Sequence[str]
) -> pluggy.PluginManager:
    from aegpo.plugin.manager import plugin_manager

    holds = source if isinstance(source, Mapping | Experiment | str | Path) else tuple(source.arms.values())
    return plugin_manager(plugins, _new(holds, parts, plugins))


def _new(given: object, parts: Sequence[type[Spec]], plugins: Sequence[str]) -> Sequence[type[Spec]]:
    """The classes that are given, in specs or by themselves, and that no plugin registers."""
    from aegpo.config.objects import spec_classes
    from aegpo.plugin.manager import load_registries, plugin_manager

    known = {entry.spec for registry in load_registries(plugin_manager(plugins)) for entry in registry}
    return [each for each in dict.fromkeys((*spec_classes(given), *parts)) if each not in known]


def _registries(manager: pluggy.PluginManager) -> Registries:
    from aegpo.plugin.manager import load_registries

    return load_registries(manager)


def _has_console(experiment: Experiment) -> bool:
    return any(tracker.kind == "console" for tracker in experiment.trackers)


@contextmanager
def _shown(manager: pluggy.PluginManager, console: Console, wanted: bool) -> Iterator[None]:
    """Inside, runs are shown."""
    if not wanted:
        yield
        return
    from aegpo.runs.trackers import ConsoleObserver

    observer = ConsoleObserver(console)
    manager.register(observer, "progress")
    try:
        yield
    finally:
        manager.unregister(observer)
