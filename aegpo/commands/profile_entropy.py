"""Attention entropy of a network as an instrument: `aegpo profile-entropy`.

`target` says what is profiled, `measure` measures it, `analysis` computes what it says, `evidence` asks whether that
means anything; `tables` and `wording` say it, `figures` and `evidence_figures` draw it, `csvs` and `page` write it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.text import Text

from aegpo.core.files import whole_folder, write_atomically
from aegpo.core.processes import refuse_several_processes
from aegpo.core.records import FloatArray
from aegpo.core.terminals import plain
from aegpo.method.signals.entropy import entropy_options
from aegpo.plugin.manager import load_registries, plugin_manager
from aegpo.report.csv_files import write_csv
from aegpo.report.plots import save_drawings
from aegpo.report.profile.analysis import Analysis, analyse
from aegpo.report.profile.csvs import write_csvs
from aegpo.report.profile.evidence import Evidence, gather
from aegpo.report.profile.evidence_figures import drawings as evidence_drawings
from aegpo.report.profile.figures import drawings
from aegpo.report.profile.measure import Profile, measure_profile
from aegpo.report.profile.page import page
from aegpo.report.profile.tables import headline, spark_lines, tables
from aegpo.report.profile.target import ProfileRequest, Target, find_target
from aegpo.report.profile.wording import evidence_tables, findings
from aegpo.report.terminal import print_table
from aegpo.train.engine import Engine

__all__ = ["ProfileRequest", "profile"]

STEPS_CSV = ("prompt", "step", "reward_std", "entropy_nats")
WRITTEN = (  # by an earlier profile, which is replaced
    "profile.html",
    *("entropy.csv", "prompts.csv", "steps.csv", "correlations.csv"),
    *("entropy.png", "layers.png", "delta.png", "blocks.png", "maps.png"),
    *("steps-evidence.png", "prompts-evidence.png"),
)
CORRELATIONS_CSV = ("question", "predictor", "outcome", "rho", "low", "high", "p_holm")


def profile(request: ProfileRequest, console: Console, progress: Console) -> Path:
    """Profiles what was asked for, prints the tables and writes the files.

    Args:
        request: what was asked for.
        console: where the tables go.
        progress: where it is said what is being done.

    Returns:
        The folder, which is whole or absent: `profile.html`, plots as PNG, `entropy.csv` and `prompts.csv`; with
        evidence also `steps.csv` and `correlations.csv`.

    Raises:
        AegpoError: for a target that does not exist, or a network whose attention cannot be measured.
    """
    refuse_several_processes()
    target = find_target(request, load_registries(plugin_manager(request.plugins)))
    out = request.out or target.default_out
    with whole_folder(out, replaces=WRITTEN) as folder:
        subject = _Subject(request, target)
        analysis = subject.analysis()
        for line in _lines(analysis, drawn=not plain(console)):
            _say(console, line)
        for table in tables(analysis, every=False):
            print_table(table, console, note=True)
        evidence = _evidence(subject, analysis, console, progress) if request.validate else None
        _write(analysis, evidence, folder, request)
    _say(console, f"profile: {out / 'profile.html'}")
    return out


@dataclass
class _Subject:
    """The engine of a target, which has its network, rewards and learner."""

    request: ProfileRequest
    target: Target

    def __post_init__(self) -> None:
        self.engine = Engine.build(self.target.experiment)

    def measure(self) -> Profile:
        """Profiles the policy that the engine has now."""
        seed = entropy_options(self.target.experiment).seed
        return measure_profile(
            self.engine.policy.how, self.target.prompts, seed, self.request.layers, self.request.rows
        )

    def analysis(self) -> Analysis:
        """Profiles the base, then the policy of the checkpoint."""
        with self.engine.policy.base():
            base = self.measure()
        policy = None
        if self.target.folder is not None:
            self.target.load(self.target.step, self.engine)
            policy = self.measure()
        return analyse(self.target, base, policy, self._told())

    def _told(self) -> Mapping[str, FloatArray] | None:
        """What the experiment's own probe says, where trajectories of every step from the same noise do not say it."""
        options = entropy_options(self.target.experiment)
        on_policy = options.base_on == "policy" and self.target.folder is not None
        if options.stride == 1 and not on_policy:
            return None
        found = options.build(self.target.experiment).measure(self.target.step, self.target.prompts, self.engine.policy)
        return found.values


def _evidence(subject: _Subject, analysis: Analysis, console: Console, progress: Console) -> Evidence:
    """Gathers what says whether the signal means anything, and prints it."""
    evidence = gather(
        analysis, subject.engine, subject.measure, lambda line: _say(progress, line), subject.request.signals
    )
    for table in evidence_tables(evidence):
        print_table(table, console, note=True)
    for sentence in findings(evidence):
        _say(console, sentence)
    return evidence


def _lines(analysis: Analysis, drawn: bool) -> Iterable[str]:
    against = "against its base" if analysis.policy is not None else "the base alone"
    yield f"{analysis.target.label}: {against}; {len(analysis.texts)} prompts"
    yield ""
    yield from spark_lines(analysis, drawn)
    yield ""
    yield from headline(analysis)
    yield ""


def _write(analysis: Analysis, evidence: Evidence | None, folder: Path, request: ProfileRequest) -> None:
    write_csvs(analysis, folder)
    extra = () if evidence is None else evidence_drawings(evidence)
    plots = save_drawings(chain(drawings(analysis), extra), folder)
    if evidence is not None:
        _write_evidence(evidence, folder)
    rows = "all" if request.rows == "all" else f"at most {request.rows}"
    write_atomically(folder / "profile.html", page(analysis, evidence, plots, rows).encode())


def _write_evidence(evidence: Evidence, folder: Path) -> None:
    found = evidence.by_step
    entropy = found.entropy[evidence.block]
    steps = (
        (prompt, int(step), float(found.reward_std[prompt, place]), float(entropy[prompt, place]))
        for prompt in range(len(entropy))
        for place, step in enumerate(found.steps)
    )
    write_csv(folder / "steps.csv", STEPS_CSV, steps)
    asked = [("steps", each) for each in found.along] + [("steps, own deviation", each) for each in found.own]
    asked += [("prompts", each) for each in (evidence.by_prompt.correlations if evidence.by_prompt else ())]
    rows = (
        (
            question,
            each.predictor,
            each.outcome,
            each.rho,
            None if each.interval is None else each.interval.low,
            None if each.interval is None else each.interval.high,
            each.p,
        )
        for question, each in asked
    )
    write_csv(folder / "correlations.csv", CORRELATIONS_CSV, rows)


def _say(console: Console, line: str) -> None:
    console.print(Text(line), soft_wrap=True)
