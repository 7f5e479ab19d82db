"""The page of `aegpo watch` and the two parts of it that are shown anew: progress every few seconds, results seldom."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aegpo.report.plots import Plot
from aegpo.report.style import BASELINE, STYLE, Look, looks, new_figure, whole_ticks
from aegpo.report.templating import TEMPLATES, render
from aegpo.report.watch.folder import Found, Watched, common_scores, mean_scores
from aegpo.report.watch.standing import UNDER_WAY, Standing
from aegpo.report.wording import count, decimals, signed

_BAND = 0.15  # opacity of a band


@dataclass(frozen=True)
class Cell:
    """An arm's newest score under a label, over its seeds that have begun."""

    score: str
    gain: str  # over the base
    fell: bool  # it is a guard, and below the base's interval


@dataclass(frozen=True)
class Newest:
    """The newest scores of all arms, a column a label; the first row is the base's."""

    labels: tuple[tuple[str, bool], ...]  # each with whether it is a guard
    base: tuple[str, ...]
    rows: tuple[tuple[str, str, int, tuple[Cell | None, ...]], ...]  # arm, step, seeds, cells


@dataclass(frozen=True)
class Samples:
    """The images of a run."""

    arm: str
    seed: int
    steps: tuple[int, ...]


def whole_page(watched: Watched, version: str, found: str) -> str:
    """The page, with all that is known now; its script shows what follows. `found` is what `results` says of it."""
    parts = {"progress": progress(watched), "results": found}
    return render("watch.html", {"name": watched.name, "version": version, **_safe(parts)})


def progress(watched: Watched) -> str:
    """How runs stand, as HTML."""
    standings = watched.standings()
    return render(
        "watch_progress.html",
        {
            "runs": [_row(each) for each in standings],
            "counts": _counts(standings),
            "left": "" if (left := _left(standings)) is None else clock(left),
            "cost": count(sum(each.cost for each in standings)),
            "forwards": f"{sum(each.forwards for each in standings):,}",
            "seconds": clock(sum(each.seconds for each in standings)),
            "looks": looks(watched.runs()[0]),
            "begun": any(each.total is not None and each.state != "waiting" for each in standings),
        },
    )


def results(watched: Watched) -> str:
    """Curves, newest scores and samples, as HTML."""
    found = watched.found()
    images = [_samples(watched, run.arm, run.seed) for run in found.runs]
    return render(
        "watch_results.html",
        {
            "notes": found.notes,
            "looks": looks(found.arms),
            "arms": [arm for arm in found.arms if found.of(arm)],
            "plots": curves(found),
            "newest": newest(found),
            "samples": [each for each in images if each.steps],
            "seeds": sorted({each.seed for each in images if each.steps}),
        },
    )


def _safe(parts: dict[str, str]) -> dict[str, Any]:
    """HTML of our own templates, which have escaped what is in it."""
    from markupsafe import Markup

    return {name: Markup(html) for name, html in parts.items()}


# --- progress --------------------------------------------------------------------------------------------------------


def _row(each: Standing) -> dict[str, Any]:
    steps = f"{each.step}" if each.total is None else f"{each.step} / {each.total}"
    return {
        "arm": each.arm,
        "seed": each.seed,
        "state": each.state,
        "why": each.why,
        "steps": steps,
        "share": f"{100 * each.share:.1f}",
        "left": clock(each.left) if each.state == "running" else "",
        "cost": count(each.cost) if each.step else "",
        "reward": "" if each.reward is None else f"{each.reward:.3f}",
    }


def _counts(standings: Sequence[Standing]) -> list[tuple[str, int]]:
    states = [each.state for each in standings]
    return [(state, states.count(state)) for state in dict.fromkeys(sorted(states))]


def _left(standings: Sequence[Standing]) -> float | None:
    """Seconds until all that run or wait are done, if as many go on at a time as do now."""
    running = [each for each in standings if each.state == "running"]
    paces = [each.pace for each in standings if each.pace is not None]
    open_ = [each for each in standings if each.state in UNDER_WAY]
    if not running or not paces or any(each.total is None for each in open_):
        return None
    pace = float(np.mean(paces))
    work = sum(((each.total or 0) - each.step) * (each.pace or pace) for each in open_)
    longest = max((each.left or 0.0 for each in running), default=0.0)
    return max(longest, work / len(running))


def clock(seconds: float | None) -> str:
    """``1:02:03``, or a dash where it is not known."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


# --- results ---------------------------------------------------------------------------------------------------------


def newest(found: Found) -> Newest:
    """Every arm at the last step at which all its begun seeds were evaluated."""
    places = {label: _places(found, label) for label in found.labels}
    rows = []
    for arm in found.arms:
        runs = found.of(arm)
        steps = sorted({common_scores(runs, label)[0][-1] for label in found.labels if common_scores(runs, label)[0]})
        cells = tuple(_cell(found, arm, label, places[label]) for label in found.labels)
        if steps:
            rows.append((arm, ", ".join(map(str, steps)), len(runs), cells))
    base = tuple(f"{known[0]:.{places[label]}f}" for label in found.labels if (known := found.base(label)) is not None)
    return Newest(tuple((label, found.is_guard(label)) for label in found.labels), base, tuple(rows))


def _places(found: Found, label: str) -> int:
    base = found.base(label)
    return max(3, decimals([base[1].half_width] if base is not None and base[1] is not None else []))


def _cell(found: Found, arm: str, label: str, places: int) -> Cell | None:
    base, (steps, scores) = found.base(label), common_scores(found.of(arm), label)
    if base is None or not steps:
        return None
    mean, interval = base
    score = float(scores[:, -1].mean())
    fell = found.is_guard(label) and interval is not None and score < interval.low
    return Cell(f"{score:.{places}f}", signed(score - mean, places), fell)


def _samples(watched: Watched, arm: str, seed: int) -> Samples:
    return Samples(arm, seed, tuple(step for step, _ in watched.images(arm, seed)))


def curves(found: Found) -> list[Plot]:
    """A plot for each label: a line and a band over seeds for each arm, and the base's interval."""
    import matplotlib

    plots = []
    with matplotlib.rc_context(STYLE):
        for index, label in enumerate(found.labels):
            role = "guard: scored, never optimised" if found.is_guard(label) else "trained"
            told, name = f"{label} of every arm against training steps", f"watch-{index}"
            fell = [arm for arm in found.arms if (cell := _cell(found, arm, label, 3)) is not None and cell.fell]
            caption = f"below the base's interval: {', '.join(fell)}" if fell else ""
            plots.append(Plot(name, f"{label} ({role})", caption, told, _svg(_drawn(found, label), name)))
    return plots


def _drawn(found: Found, label: str) -> Any:
    figure = new_figure(5.2, 3.0)
    axes = figure.subplots()
    if (base := found.base(label)) is not None:
        mean, interval = base
        axes.axhline(mean, color=BASELINE, linestyle=(0, (5, 4)), linewidth=1, zorder=1)
        if interval is not None and found.is_guard(label):
            axes.axhspan(interval.low, interval.high, color=BASELINE, alpha=0.12, linewidth=0, zorder=0)
    for arm, look in looks(found.arms).items():
        _draw_arm(axes, found, arm, label, look)
    axes.xaxis.set_major_locator(whole_ticks(6))
    axes.set_xlabel("training step")
    return figure


def _draw_arm(axes: Any, found: Found, arm: str, label: str, look: Look) -> None:
    """Its mean and the band from its lowest to its highest seed; dotted, seeds that are ahead of the others."""
    runs = found.of(arm)
    steps, scores = common_scores(runs, label)
    if steps:
        if len(scores) > 1:
            axes.fill_between(steps, scores.min(0), scores.max(0), color=look.color, alpha=_BAND, linewidth=0)
        every = max(1, len(steps) // 10)
        axes.plot(steps, scores.mean(0), color=look.color, linestyle=look.line, marker=look.marker, markevery=every)
    for run in runs:
        ahead = {step: score for step, score in mean_scores(run, label).items() if not steps or step >= steps[-1]}
        if len(ahead) > 1:
            axes.plot(list(ahead), list(ahead.values()), ":", color=look.color, linewidth=1.4)


def _svg(figure: Any, name: str) -> str:
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.id": name}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def script() -> str:
    """What refreshes the page."""
    return (TEMPLATES / "watch.js").read_text(encoding="utf-8")
