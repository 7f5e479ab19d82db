"""Pictures of an evaluation for services: of each prompt the base's image beside the policy's, from the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aegpo.core.reports import Evaluation
from aegpo.runs.filmstrips import side_by_side

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_GAP = 4  # grey pixels between base and policy
_TILE = 96  # images of fewer pixels are enlarged by whole factors up to this size


@dataclass(frozen=True)
class Panel:
    """What a service shows of one prompt."""

    picture: Image  # base left, policy right; the policy alone where the base's image is not known
    caption: str  # the prompt, and its scores from the base's to the policy's


def pictures(images: Tensor) -> list[Image]:
    """Images (k, [F,] 3, h, w) in [0, 1]; small ones enlarged with nearest neighbour, videos as strips of frames."""
    from PIL import Image

    shown = side_by_side(images)
    pixels = (shown.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # (k, h, w, 3)
    factor = max(1, _TILE // max(images.shape[-2:]))
    found = [Image.fromarray(each) for each in pixels]
    return [each.resize((each.width * factor, each.height * factor), Image.Resampling.NEAREST) for each in found]


def panels(evaluation: Evaluation, base: Sequence[Image]) -> list[Panel]:
    """A panel of each prompt that images are kept of.

    Args:
        evaluation: whose scores are means over the images of a prompt, of which the first is shown.
        base: the same images of the untrained policy; empty if they are not known.
    """
    found = []
    for row, picture in enumerate(pictures(evaluation.images)):
        known = row < len(base) and base[row].size == picture.size
        scores = [_scores(evaluation, label, row) for label in evaluation.scores]
        shown = "base | policy" if known else "policy alone"
        caption = f"{evaluation.prompts[row]} ({shown}; {', '.join(scores)})"
        found.append(Panel(_beside(base[row], picture) if known else picture, caption))
    return found


def _scores(evaluation: Evaluation, label: str, row: int) -> str:
    """The scores of one prompt, from the base's to the policy's."""
    return f"{label} {evaluation.base_scores[label][row]:.3f} -> {evaluation.scores[label][row]:.3f}"


def _beside(left: Image, right: Image) -> Image:
    from PIL import Image

    sheet = Image.new("RGB", (left.width + _GAP + right.width, right.height), "grey")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + _GAP, 0))
    return sheet


def keep(images: Sequence[Image], folder: Path) -> None:
    """Writes pictures as `base-0.png` and so on, for when the run goes on."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(images):
        each.save(folder / f"base-{number}.png")


def kept(folder: Path) -> list[Image]:
    """What `keep` wrote, as far as it is there."""
    from PIL import Image, UnidentifiedImageError

    found: list[Image.Image] = []
    while (path := folder / f"base-{len(found)}.png").exists():
        try:
            with Image.open(path) as image:
                found.append(image.convert("RGB"))
        except (OSError, UnidentifiedImageError):
            break  # half written: panels show the policy alone
    return found
