"""The model card of an exported policy: what was trained, how, what came of it, and what nobody has tested.

Everything is read off the run's own records as far as the exported step; what they do not say is not said, or is said
to be unknown. Places on this machine are not named, since a card is made to be published.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aegpo.core.files import write_atomically
from aegpo.core.verdicts import VerdictSpec
from aegpo.report.card_text import PICTURES, Exported, body, hub_base
from aegpo.report.figures import draw_curves
from aegpo.report.plots import Drawing, save_drawings
from aegpo.report.recorded import Study
from aegpo.report.recorded_run import RecordedRun, read_run
from aegpo.runs.resuming import IMAGES, image_name

CARD = "README.md"
LICENSE = ("license", "license_name", "license_link")  # keys of a card that what is derived from a model inherits


def write_card(exported: Exported, folder: Path) -> None:
    """Writes `README.md` into the folder, with `curves.png` and `pictures.png` where the run recorded what is in them.

    Raises:
        CheckpointError: if the run's records are damaged.
    """
    from huggingface_hub import ModelCard

    run = _until(read_run(exported.arm, exported.seed, exported.run), exported.step)
    if len(run.evaluations) > 1:
        _draw(run, folder)
    picture = exported.run / IMAGES / image_name(run.evaluations[-1].step) if run.evaluations else None
    if picture is not None and picture in run.images:
        shutil.copyfile(picture, folder / PICTURES)
    license = _license(exported.base_folder)
    text = "\n".join(body(exported, run, license, folder))
    card = ModelCard(f"---\n{_data(exported, run, license).to_yaml()}\n---\n\n{text}\n")
    write_atomically(folder / CARD, str(card).encode())


def _until(run: RecordedRun, step: int) -> RecordedRun:
    """The run as far as a step."""
    steps = tuple(row for row in run.steps if row.step <= step)
    return replace(run, steps=steps, evaluations=tuple(row for row in run.evaluations if row.step <= step))


def _draw(run: RecordedRun, folder: Path) -> None:
    study = Study(run.folder, (run.arm,), (run.seed,), {(run.arm, run.seed): run}, (), VerdictSpec(), {})
    save_drawings([Drawing("curves", "", "", "", lambda: draw_curves(study))], folder)


# --- metadata --------------------------------------------------------------------------------------------------------


def _data(exported: Exported, run: RecordedRun, license: Mapping[str, str]) -> Any:
    from huggingface_hub import ModelCardData

    adapts = [] if exported.whole else ["lora"]
    kind = "text-to-video" if exported.video else "text-to-image"
    base = hub_base(run)
    told: dict[str, Any] = dict(license)
    if base is not None:
        told["base_model_relation"] = "finetune" if exported.whole else "adapter"
    return ModelCardData(
        base_model=base,
        library_name=exported.library,
        pipeline_tag=kind,
        tags=["aegpo", "reinforcement-learning", kind, *adapts],
        **told,
    )


def _license(base: Path | None) -> dict[str, str]:
    """What the base's own card says of its license; nothing where it has no card beside its weights, or one without."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if base is None or not (base / CARD).is_file():
        return {}
    try:
        data = ModelCard.load(base / CARD).data.to_dict()
    except (ValueError, OSError, YAMLError):
        return {}
    return {name: str(data[name]) for name in LICENSE if data.get(name)}
