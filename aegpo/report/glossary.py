"""The words of the report, for a reader who has not read the paper: only those that a page uses."""

from __future__ import annotations

from collections.abc import Iterator

from aegpo.report.summary import Summary


def glossary(summary: Summary) -> tuple[tuple[str, str], ...]:
    """Pairs of a term and its explanation, in the order a reader meets them."""
    return (*_always(), *_where_compared(summary), *_where_signals(summary))


def _always() -> Iterator[tuple[str, str]]:
    yield "Arm", "one way of training; all arms start from the same base model and differ in what the file says."
    yield "Base", "the model before training."
    yield "Seed", "the number that decides every random draw; an arm is trained once under each."
    yield "Reward", "a score that is computed from an image, and often from its prompt; higher is better."
    yield "Trained reward", "what training makes higher; several count as their weighted sum."
    yield (
        "Guard",
        "a reward that is scored but that nothing optimises. If it falls while the trained reward rises, the model may "
        "have learned to please the reward instead of painting better: reward hacking.",
    )
    yield "Held-out", "prompts that are never trained on; all scores of this page are of images of such prompts."
    yield "Gain", "mean score after training less the base's, on the same prompts from the same start noise."
    yield "Rollout", "one image that is painted in training, to be scored and learned from."
    yield "Denoising step", "one of the steps in which noise becomes an image."
    yield "Forwards", "how often the network was run to paint, or to measure; the bulk of the cost without learning."
    yield (
        "Gradient rows",
        "states that the network was run on to learn from them; each costs as much as three forwards.",
    )
    yield (
        "95 % CI",
        "95 % confidence interval: made so that in 95 of 100 such experiments it holds the true value. One that "
        "excludes 0 shows a difference.",
    )


def _where_compared(summary: Summary) -> Iterator[tuple[str, str]]:
    if summary.contrasts:
        yield "Reference", "the arm that another is compared to: its gain is subtracted."
    if summary.controls:
        yield (
            "Control",
            "an arm that does what another does, less what that one claims to be good for: by chance, say.",
        )
    if summary.equal_cost is not None:
        yield "Equal steps", "after as many training steps, whatever each arm spent on them."
        yield "Equal cost", "when each arm has spent what the cheapest run spends in all; read off each arm's curve."
    if any(each.p is not None for each in summary.contrasts):
        yield "Interval over seeds", "what would be found with other seeds on these very prompts."
        yield (
            "p (Holm)",
            "how often a difference this large would be found if there were none, made larger for the number of "
            "comparisons, of which some look large by chance (Holm's correction). Below 0.05 counts as shown.",
        )
        yield "Margin", "a difference that is too small to matter."
        yield "p equal", "how often arms would be found this alike if they differed by the margin; below 0.05: equal."


def _where_signals(summary: Summary) -> Iterator[tuple[str, str]]:
    if summary.signals:
        yield (
            "Attention entropy",
            "how widely the network's attention is spread, in nats: low where it looks at a few places, high where it "
            "looks everywhere.",
        )
        yield "Delta-entropy", "how far a prompt's attention entropy has moved from the base's."
