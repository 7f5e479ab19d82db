"""The text of a model card, read off a run's records; `card` writes it with its metadata and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aegpo.core.records import FloatArray
from aegpo.report.recorded_run import WEIGHTED_SUM, RecordedEvaluation, RecordedRun
from aegpo.report.scores import forwards
from aegpo.report.statistics import Interval, mean_interval
from aegpo.report.wording import count, decimals, interval, listing, plural, signed

CURVES, PICTURES = "curves.png", "pictures.png"
METHOD = ("curriculum", "allocator", "selector", "tree", "sampler", "advantage", "objective")  # parts of an arm


@dataclass(frozen=True)
class Exported:
    """What a folder holds."""

    run: Path
    arm: str
    seed: int
    step: int
    whole: bool  # the whole model; False: a LoRA
    library: str  # that loads it, by the hub's name
    use: str  # how it is loaded, in Markdown
    base_folder: Path | None = None  # where a card of the base may be
    video: bool = False


@dataclass(frozen=True)
class _Gain:
    """What a label had gained at an evaluation, policy minus base prompt by prompt."""

    label: str
    base: float
    policy: float
    gain: float
    interval: Interval | None  # for new prompts

    @property
    def shown(self) -> str:
        """The gain and its interval."""
        return f"{signed(self.gain, self.places)} {interval(self.interval, self.places)}"

    @property
    def places(self) -> int:
        """Decimal places that show it."""
        return max(3, decimals([self.interval.half_width] if self.interval else []))


def hub_base(run: RecordedRun) -> str | None:
    """The base's id on the hub, if that is where the run had it from."""
    base = run.manifest.get("base") or {}
    return None if "hub" not in base else str(base["hub"])


def body(exported: Exported, run: RecordedRun, license: Mapping[str, str], folder: Path) -> Iterator[str]:
    """The lines of the card below its metadata; `folder` has the plots and pictures that it shows."""
    spec = run.experiment
    what = "A whole model, fine-tuned from" if exported.whole else "A LoRA for"
    yield f"# {spec['name']}: {exported.arm}, seed {exported.seed}, step {exported.step}\n"
    yield (
        f"{what} {_base(run)}: trained with rewards by `aegpo` "
        f"{run.manifest['versions'].get('aegpo') or ''}. Written from the records of the run.\n"
    )
    yield f"## Use\n\n{exported.use}\n"
    yield "## Rewards\n"
    yield from _rewards(run)
    yield "## Protocol\n"
    yield from _table(("what", "how"), _protocol(exported, run))
    yield from _course(run, folder)
    yield "## Limits\n"
    yield from (f"* {line}" for line in _limits(exported, run, license))


def _base(run: RecordedRun) -> str:
    """How the text calls the base; a local folder by its own name alone."""
    base, hub = run.manifest.get("base") or {}, hub_base(run)
    if hub is not None:
        return f"[{hub}](https://huggingface.co/{hub}) at commit `{str(base.get('commit'))[:12]}`"
    kind = str(run.experiment["model"]["kind"])
    if "sha256" in base:
        return f"a local base of kind `{kind}`, its files with SHA-256 `{str(base['sha256'])[:12]}`"
    return f"a base of kind `{kind}` that the run does not identify"


def _rewards(run: RecordedRun) -> Iterator[str]:
    """What was trained on and what was only scored, at the last evaluation."""
    spec = run.experiment
    weights = {_label(each): each.get("weight", 1.0) for each in spec["rewards"]}
    kinds = {_label(each): each["kind"] for each in (*spec["rewards"], *spec["evaluation"].get("rewards", ()))}
    if not run.evaluations:
        rows = [(label, kinds[label], f"{weight:g}") for label, weight in weights.items()]
        yield from _table(("reward", "kind", "weight"), rows)
        return
    last = run.evaluations[-1]
    yield (
        f"On {plural(len(last.prompts), 'held-out prompt')} at step {last.step}, from the same noise as the base; 95 % "
        "CI of the gain for new prompts of the same kind.\n"
    )
    yield from _table(
        ("reward", "kind", "role", "base", "this model", "gain", "95 % CI"),
        [
            (
                each.label,
                kinds.get(each.label, ""),
                _role(each.label, weights),
                f"{each.base:.{each.places}f}",
                f"{each.policy:.{each.places}f}",
                signed(each.gain, each.places),
                interval(each.interval, each.places),
            )
            for each in _gains(last)
        ],
    )


def _role(label: str, weights: Mapping[str, float]) -> str:
    if label == WEIGHTED_SUM:
        return "what was optimised"
    return f"trained on, weight {weights[label]:g}" if label in weights else "guard: scored, never trained on"


def _label(reward: Mapping[str, Any]) -> str:
    return str(reward.get("name") or reward["kind"])


def _gains(row: RecordedEvaluation) -> list[_Gain]:
    return [_gain(label, row.base_scores[label], scores) for label, scores in row.scores.items()]


def _gain(label: str, base: FloatArray, policy: FloatArray) -> _Gain:  # (K,) each
    paired = policy - base
    return _Gain(label, float(base.mean()), float(policy.mean()), float(paired.mean()), mean_interval(paired))


def _protocol(exported: Exported, run: RecordedRun) -> Iterator[tuple[str, str]]:
    spec = run.experiment
    rollouts, policy, optimizer = spec["rollouts"], spec["policy"], spec["optimizer"]
    yield "arm", f"`{exported.arm}`, seed {exported.seed}"
    yield from ((name, _part(spec[name])) for name in METHOD if name in spec)
    lora = f"LoRA, rank {policy.get('rank')}, alpha {policy.get('alpha')}"
    yield "trained", "every weight" if policy["train"] == "full" else lora
    yield "averaged weights", f"exported, decay {policy['ema']:g}" if policy.get("ema") else "none kept"
    yield "optimizer", f"{optimizer.get('kind', 'adamw')}, learning rate {optimizer['learning_rate']:g}"
    yield (
        "steps",
        f"{exported.step} of {run.training_steps}, each of {plural(rollouts['prompts_per_step'], 'prompt')}, "
        f"{rollouts['rollouts_per_step']} rollouts and {rollouts['denoising_steps']} denoising steps",
    )
    yield "training prompts", _prompts(spec, "train")
    yield "held-out prompts", _prompts(spec, "evaluation")
    yield "evaluation", _evaluation(spec)
    yield "cost", _cost(exported.step, run)
    versions = run.manifest["versions"]
    named = [f"{name} {versions[name]}" for name in ("aegpo", "torch", "diffusers") if versions.get(name)]
    yield "made with", ", ".join(named)


def _part(part: Mapping[str, Any]) -> str:
    """A part of the method with its settings."""
    given = {name: value for name, value in part.items() if name != "kind" and isinstance(value, (str, int, float))}
    told = ", ".join(f"{name} {json.dumps(value).strip(chr(34))}" for name, value in given.items())
    return f"`{part['kind']}`" + (f" ({told})" if told else "")


def _prompts(spec: Mapping[str, Any], split: str) -> str:
    """Where prompts come from; of a file its name alone."""
    source, most = spec["prompts"].get(split), spec["prompts"].get(f"{split}_count")
    if source is None:
        return f"{most} of the model's own captions"
    if isinstance(source, Mapping):
        return f"dataset `{Path(source['dataset']).name if _is_local(source['dataset']) else source['dataset']}`"
    return f"file `{Path(source).name}`, at most {most}"


def _is_local(place: str) -> bool:
    return Path(place).is_absolute() or place.startswith((".", "~"))


def _evaluation(spec: Mapping[str, Any]) -> str:
    evaluation = spec["evaluation"]
    steps = evaluation.get("denoising_steps") or spec["rollouts"]["denoising_steps"]
    images, seed = evaluation.get("images_per_prompt", 1), evaluation.get("seed", 0)
    noise = "one start noise" if images == 1 else f"{images} start noises, scores averaged"
    height, width = (evaluation.get(side) or spec["model"].get(side) for side in ("height", "width"))
    size = "" if height is None else f", {height} x {width} pixels"
    return f"deterministic sampler, {steps} denoising steps{size}, {noise} for each prompt, of seed {seed}"


def _cost(step: int, run: RecordedRun) -> str:
    seconds = run.training_seconds(step)
    spent = f"{count(forwards(run, step))} forwards, {count(run.gradient_rows(step))} gradient rows"
    return f"{spent}, {count(seconds)} s of training" if seconds else spent


def _course(run: RecordedRun, folder: Path) -> Iterator[str]:
    """Curves, the gain at every evaluation, and pictures."""
    if len(run.evaluations) > 1:
        labels = list(run.evaluations[-1].scores)
        yield "## Course\n"
        yield f"![Scores of held-out prompts against training steps, cost and seconds]({CURVES})\n"
        yield "Gain over the base, mean over held-out prompts with its 95 % CI:\n"
        rows = [
            (str(row.step), *({each.label: each.shown for each in _gains(row)}.get(label, "") for label in labels))
            for row in run.evaluations
        ]
        yield from _table(("step", *labels), rows)
    if (folder / PICTURES).is_file():
        last = run.evaluations[-1]
        yield f"![What this model paints]({PICTURES})\n"
        shown = last.prompts[: int(run.experiment["evaluation"].get("images", 16))]
        yield f"Painted at step {last.step}, the first held-out prompts, in the order of reading:\n"
        yield "\n".join(f"1. {_plain(text)}" for text in shown) + "\n"


def _limits(exported: Exported, run: RecordedRun, license: Mapping[str, str]) -> Iterator[str]:
    """What was not tested, and what got worse."""
    yield from _worse(run)
    yield "One training seed: the intervals are for new prompts, and say nothing about other seeds."
    if exported.step < run.training_steps:
        yield f"Taken at step {exported.step} of the {run.training_steps} that the run was to have."
    if not run.evaluations:
        yield "No evaluation of it was recorded: nothing is known of what it learned."
        return
    last = run.evaluations[-1]
    if last.step < exported.step:
        yield f"Step {exported.step} itself was not evaluated: the scores are those of step {last.step}."
    yield (
        f"Measured were {plural(len(last.scores), 'score')} of {plural(len(last.prompts), 'prompt')}, at one size, "
        "with one sampler and one number of steps. Other prompts, sizes and samplers were not tried; nobody rated the "
        "images, and safety and bias were not looked at."
    )
    yield from (f"Of the records: {line}." for line in run.damage)
    if not license:
        yield "The license of the base model is not recorded here; it may bind what is derived from it: see its page."


def _worse(run: RecordedRun) -> Iterator[str]:
    gains = _gains(run.evaluations[-1]) if run.evaluations else []
    for each in gains:
        if each.label in run.trained and not (each.interval and each.interval.low > 0):
            yield f"The trained {_plain(each.label)} did not rise beyond doubt: {each.shown}."
    guards = [each for each in gains if each.label not in run.trained]
    fell = [each for each in guards if each.interval and each.interval.high < 0]
    yield from (f"The guard {_plain(each.label)} fell: {each.shown}, a sign of reward hacking." for each in fell)
    lower = [f"{_plain(each.label)} {each.shown}" for each in guards if each.gain < 0 and each not in fell]
    if lower:
        yield f"Lower than the base, within the interval: {listing(lower)}."
    if gains and not guards:
        yield "Every score was trained on, so that reward hacking would not show in any of them."


# --- Markdown --------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> Iterator[str]:
    for row in (tuple(columns), ("---",) * len(columns), *rows):
        yield f"| {' | '.join(_plain(cell) for cell in row)} |"
    yield ""


def _plain(text: str) -> str:
    """Text that neither leaves its cell or line nor is taken for HTML."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
