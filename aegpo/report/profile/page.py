"""The profile as one self-contained HTML file, in the style of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aegpo.report.plots import Plot
from aegpo.report.profile.analysis import Analysis
from aegpo.report.profile.evidence import Evidence
from aegpo.report.profile.tables import headline, layers_table, prompts_table, steps_table
from aegpo.report.profile.wording import evidence_tables, findings
from aegpo.report.templating import render

WITH_TABLE = {"entropy": steps_table, "layers": layers_table}


def page(analysis: Analysis, evidence: Evidence | None, plots: Sequence[Plot], rows: str) -> str:
    """The whole page; `rows` says how many query rows were measured."""
    drawn = {plot.name: plot for plot in plots}
    return render(
        "profile.html",
        {
            "name": analysis.target.label,
            "headline": headline(analysis),
            "findings": None if evidence is None else findings(evidence),
            "evidence_plots": [drawn[name] for name in ("steps-evidence", "prompts-evidence") if name in drawn],
            "evidence_tables": () if evidence is None else tuple(evidence_tables(evidence)),
            "measured": [
                (drawn.get(name), WITH_TABLE[name](analysis) if name in WITH_TABLE else None)
                for name in ("entropy", "blocks", "layers", "delta", "maps")
            ],
            "prompts": prompts_table(analysis, every=True),
            "setting": tuple(_setting(analysis, rows)),
        },
    )


def _setting(analysis: Analysis, rows: str) -> Iterator[tuple[str, str]]:
    spec = analysis.target.experiment
    yield (
        "Trajectories",
        (
            f"{len(analysis.texts)} prompts, one fixed start noise each, deterministic sampler with "
            f"{spec.rollouts.denoising_steps} steps; policy and base follow trajectories of their own from one noise. "
            "The policy has its trained weights, not their averages, as the probe of a training run sees it."
        ),
    )
    yield (
        "Entropy",
        (
            f"H = -sum p ln p of each attention row, exact, in nats; {rows} query rows of each call; mean over rows, "
            "heads and layers. A block such as image-text takes the image rows, renormalised over the text keys."
        ),
    )
    yield "Layers", ", ".join(analysis.shown.layers)
    described = "docs/how-to/profile-entropy.md describes their columns"
    yield "Files", f"entropy.csv and prompts.csv beside this page hold every number; {described}."
