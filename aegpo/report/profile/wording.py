"""What the evidence says, in words and numbers, and its tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from aegpo.report.profile.evidence import CHILDREN, NOISE_STD, STEP_NUMBER, Correlation, Evidence, PromptEvidence
from aegpo.report.profile.groups import SQUARED_NORM
from aegpo.report.tables import NONE, Table
from aegpo.report.wording import interval, listing, plural, signed

PLACES = 2  # of a rank correlation
ALPHA = 0.05
SIMPLE = (STEP_NUMBER, NOISE_STD)


def findings(evidence: Evidence) -> tuple[str, ...]:
    """The verdict, sentence by sentence."""
    return (*_about_steps(evidence), *_about_prompts(evidence))


def _about_steps(evidence: Evidence) -> Iterator[str]:
    found, block = evidence.by_step, evidence.block
    read = next(each for each in found.along if each.predictor == block)
    kind = _sign(read)
    what = f"block {block}: mean rank correlation over steps {_numbers(read)}, {plural(evidence.prompts, 'prompt')}"
    if kind == 0:
        yield f"Steps: no evidence that rewards spread more where Entropy(t) is high ({what})."
    elif kind < 0:
        yield f"Steps: rewards spread less where Entropy(t) is high ({what})."
    else:
        yield f"Steps: rewards spread more where Entropy(t) is high ({what})."
    simple = max((each for each in found.along if each.predictor in SIMPLE), key=lambda each: _size(each.rho))
    no_better = _size(simple.rho) >= read.rho
    yield f"The {simple.predictor} alone, which costs nothing, has {_numbers(simple)}" + (
        ": entropy tells no more than that." if no_better else ": entropy tells more."
    )
    own = next(each for each in found.own if each.predictor == block)
    tells = "it tells" if _sign(own) > 0 else "there is no evidence that it tells"
    yield (
        f"Where a prompt's own curve differs from the mean curve, {tells} where its rewards spread more than usual "
        f"({_numbers(own)})."
    )
    for name in (each for each in found.along if each.predictor.startswith("signal ")):
        deviation = next(each for each in found.own if each.predictor == name.predictor)
        yield f"{name.predictor.capitalize()}: {_numbers(name)} over steps, {_numbers(deviation)} of a prompt's own."
    yield (
        f"The chosen steps hold {100 * found.overlap:.0f} % of the steps with the largest spread; random steps would "
        f"hold {100 * found.chance:.0f} %, the best fixed ones {100 * found.fixed:.0f} %."
    )


def _about_prompts(evidence: Evidence) -> Iterator[str]:
    found = evidence.by_prompt
    if found is None:
        yield "Prompts: not asked. Delta-entropy is zero before training; give the folder of a run."
        return
    read = [each for each in found.correlations if each.predictor == f"delta {evidence.block}"]
    sure = [each for each in read if _holds(each)]
    which = f"delta-entropy of block {evidence.block} at {_checkpoint(found.delta_at)}"
    if not sure:
        yield f"Prompts: no evidence that {which} tells a prompt's learning value{_bounds(read)}."
    else:
        words = [f"{'more' if each.rho > 0 else 'less'} {each.outcome}" for each in sure]
        yield f"Prompts: a higher {which} goes with {listing(words)}."
    yield "; ".join(f"{each.outcome}: {_numbers(each)}, p {_p(each)}" for each in read) + "."
    others = [each for each in found.correlations if each not in read and _holds(each)]
    if others:
        names = [f"{each.predictor} with {each.outcome} ({signed(each.rho, PLACES)})" for each in others]
        yield f"Other pairs that hold once corrected for {len(found.correlations)} comparisons: {listing(names)}."
    yield _reliability(found)
    yield (
        f"Gradients of two halves of a group have a cosine of {_mean_cosine(found)} on average; without noise it would "
        "be 1."
    )


def _bounds(read: Sequence[Correlation]) -> str:
    """Between what the intervals of a null have the truth."""
    known = [each.interval for each in read if each.interval is not None]
    if not known:
        return ""
    low, high = min(each.low for each in known), max(each.high for each in known)
    return f"; rank correlations from {signed(low, PLACES)} to {signed(high, PLACES)} are not excluded"


def _mean_cosine(found: PromptEvidence) -> str:
    return (
        "undefined"
        if math.isnan(found.cosine)
        else f"{signed(found.cosine, PLACES)} {interval(found.cosine_interval, PLACES)}"
    )


def _reliability(found: PromptEvidence) -> str:
    parts = [f"{name} {signed(value, PLACES)}" for name, value in found.reliability.items()]
    return f"Rank correlation of two halves of each measurement, which bounds what could be seen: {listing(parts)}."


def _checkpoint(step: int) -> str:
    return "the base" if step == 0 else f"step {step}"


def _size(rho: float) -> float:
    return 0.0 if math.isnan(rho) else rho


def _sign(found: Correlation) -> int:
    """1 or -1 where the interval excludes zero, else 0."""
    if found.interval is None or not found.interval.excludes_zero:
        return 0
    return 1 if found.rho > 0 else -1


def _holds(found: Correlation) -> bool:
    return found.p is not None and found.p < ALPHA


def _numbers(found: Correlation) -> str:
    rho = "undefined" if math.isnan(found.rho) else signed(found.rho, PLACES)
    return f"{rho} {interval(found.interval, PLACES)}"


def _p(found: Correlation) -> str:
    return NONE if found.p is None or math.isnan(found.p) else f"{found.p:.2g}"


def evidence_tables(evidence: Evidence) -> Iterator[Table]:
    """Every correlation."""
    by_step = evidence.by_step
    own = {each.predictor: each for each in by_step.own}
    rows = tuple(
        (*_cells(each), *(_cells(own[each.predictor])[1:] if each.predictor in own else (NONE, NONE)))
        for each in by_step.along
    )
    columns = ("predictor", "rho over steps", "95 % CI", "rho, own deviation", "95 % CI")
    note = (
        f"Std of rewards over {CHILDREN} noisy children of each trunk state, against the predictor at that step: rank "
        "correlation over a prompt's steps, mean over prompts. Own deviation: both less their mean over prompts at "
        "each step, which leaves what is particular to a prompt. Intervals: bootstrap over prompts."
    )
    yield Table("Entropy(t) and the spread of rewards", columns, rows, note)
    if evidence.by_prompt is not None:
        yield _prompt_table(evidence.by_prompt)


def _prompt_table(found: PromptEvidence) -> Table:
    rows = tuple((*_cells(each, both=True), _p(each)) for each in found.correlations)
    note = (
        f"Reward gain: from {_checkpoint(found.earlier)} to {_checkpoint(found.later)}, deterministic sampler, mean "
        f"over start noises. Delta and entropy at {_checkpoint(found.delta_at)}; std in group and {SQUARED_NORM} at "
        f"{_checkpoint(found.earlier or found.later)}; the latter is the product of the gradients of two halves of the "
        "group, which share no noise. p: permutations, Holm-corrected for all rows."
    )
    return Table(
        "Delta-entropy and learning value", ("predictor and outcome", "rho", "95 % CI", "p (Holm)"), rows, note
    )


def _cells(found: Correlation, both: bool = False) -> Sequence[str]:
    name = f"{found.predictor} and {found.outcome}" if both else found.predictor
    rho = NONE if math.isnan(found.rho) else signed(found.rho, PLACES)
    return (name, rho, interval(found.interval, PLACES))
