"""The profile as one self-contained HTML file, in the style of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from aegpo.report.page import document, figure_html, table_html, verdict_html
from aegpo.report.plots import Plot
from aegpo.report.profile.analysis import Analysis
from aegpo.report.profile.evidence import Evidence
from aegpo.report.profile.tables import headline, layers_table, prompts_table, steps_table
from aegpo.report.profile.wording import evidence_tables, findings

WITH_TABLE = {"entropy": steps_table, "layers": layers_table}


def page(analysis: Analysis, evidence: Evidence | None, plots: Sequence[Plot], rows: str) -> str:
    """The whole page; `rows` says how many query rows were measured."""
    return document(f"{analysis.target.label}: entropy", _parts(analysis, evidence, plots, rows))


def _parts(analysis: Analysis, evidence: Evidence | None, plots: Sequence[Plot], rows: str) -> Iterator[str]:
    yield f"<header><p>aegpo attention entropy</p><h1>{escape(analysis.target.label)}</h1></header>"
    yield verdict_html(headline(analysis))
    drawn = {plot.name: plot for plot in plots}
    if evidence is not None:
        yield "<h2>Does the signal mean anything here?</h2>"
        yield verdict_html(findings(evidence))
        yield from (figure_html(drawn[name]) for name in ("steps-evidence", "prompts-evidence") if name in drawn)
        yield from (table_html(table) for table in evidence_tables(evidence))
    for name in ("entropy", "blocks", "layers", "delta", "maps"):
        if name in drawn:
            yield figure_html(drawn[name])
        if name in WITH_TABLE:
            yield table_html(WITH_TABLE[name](analysis))
    prompts = prompts_table(analysis, every=True)
    if prompts is not None:
        yield f"<details><summary>Every prompt</summary>{table_html(prompts)}</details>"
    yield "<h2>How it was measured</h2>"
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(words)}</dd>" for term, words in _setting(analysis, rows))
    yield f"<dl>{terms}</dl>"


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
    yield "Files", "entropy.csv and prompts.csv beside this page hold every number; the README describes their columns."
