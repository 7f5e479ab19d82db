"""The hpsv2 package as a backend of reward `hpsv2`, and what it takes to import it.

hpsv2 1.2.0 cannot be imported as it is installed: it needs tkinter for a name it never uses (`from turtle import
forward`), clint for a progress bar it never shows, torchvision for seven names, and a vocabulary that its wheel lacks.
Its dependencies also hold pytest and protobuf back years. So it is installed without them, the names are stood in for
while it is imported and at no other time, and the vocabulary is that of open_clip_torch, which is the same file.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from aegpo.errors import AegpoError
from aegpo.rewards.hpsv2_checkpoint import TEXT_HEAD, VISION_HEAD, architecture
from aegpo.rewards.weights import load_strictly

if TYPE_CHECKING:
    from torch import Tensor

INSTALL = "pip install --no-deps -r requirements/hpsv2.txt"
PINS = ("hpsv2==1.2.0", "open_clip_torch==3.3.0", "ftfy==6.3.1", "wcwidth==0.9.4")  # the same as in that file
_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


class PackageScorer:
    """hpsv2's own network, tokenizer and transform around a checkpoint's weights."""

    def __init__(self, who: str, tensors: Mapping[str, Tensor]) -> None:
        """Builds the network.

        Raises:
            AegpoError: if hpsv2 is not installed, or the checkpoint does not fit.
        """
        open_clip = import_hpsv2(who)
        config = architecture(who, tensors)
        vision, text = config["vision_config"], config["text_config"]
        self.network = open_clip.CLIP(
            embed_dim=config["projection_dim"],
            vision_cfg=open_clip.CLIPVisionCfg(
                image_size=vision["image_size"],
                layers=vision["num_hidden_layers"],
                width=vision["hidden_size"],
                head_width=VISION_HEAD,
                patch_size=vision["patch_size"],
                mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
            ),
            text_cfg=open_clip.CLIPTextCfg(
                context_length=text["max_position_embeddings"],
                vocab_size=text["vocab_size"],
                width=text["hidden_size"],
                heads=text["hidden_size"] // TEXT_HEAD,
                layers=text["num_hidden_layers"],
            ),
            output_dict=True,
        )
        load_strictly(who, self.network, tensors)
        self._tokenize = open_clip.tokenize
        # Its evaluation transform, with what `create_model_and_transforms(light_augmentation=True)` gives it
        self._transform = open_clip.image_transform(vision["image_size"], is_train=False, resize_longest_max=True)

    def score(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """(b, 3, h, w) in [0, 1] and b texts -> (b,): the diagonal of `hpsv2.img_score.score`'s product."""
        import torch
        from PIL import Image

        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        seen = torch.stack([self._transform(Image.fromarray(image)) for image in pixels])
        words = self._tokenize(list(texts)).to(images.device)
        weight: Tensor = self.network.visual.conv1.weight
        with torch.autocast("cuda", enabled=images.is_cuda):  # half precision on a GPU, as the package scores
            outputs = self.network(seen.to(images.device, weight.dtype), words)
            products: Tensor = outputs["image_features"] * outputs["text_features"]
            return products.sum(dim=1)


def import_hpsv2(who: str) -> Any:
    """`hpsv2.src.open_clip`, with its submodules usable and nothing else left behind.

    Raises:
        AegpoError: if hpsv2 or the vocabulary is not installed; the message says the command.
    """
    missing = [name for name in ("hpsv2", "open_clip", "ftfy") if importlib.util.find_spec(name) is None]
    if missing:
        raise AegpoError(
            f"{who}: backend 'package' needs {', '.join(missing)}, which cannot be found; run  {INSTALL}  "
            f"(the file lists {' '.join(PINS)})"
        )
    # asked now, because transformers remembers the answer: inside, a stand-in would be taken for torchvision
    importlib.import_module("transformers.utils").is_torchvision_available()
    with _stand_ins():
        importlib.import_module("hpsv2.utils")
        importlib.import_module("hpsv2.img_score")
        return importlib.import_module("hpsv2.src.open_clip")


@contextmanager
def _stand_ins() -> Iterator[None]:
    """While hpsv2 is imported: the modules it cannot do without, and the vocabulary where it looks for it."""
    modules = _turtle() | _clint() | ({} if _usable("torchvision") else _torchvision())
    before = {name: sys.modules.get(name) for name in modules}
    opened = gzip.open
    sys.modules.update(modules)
    gzip.open = _opener(opened)
    try:
        yield
    finally:
        gzip.open = opened
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _usable(name: str) -> bool:
    """A torchvision of another build of torch is there, but fails on import."""
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def _opener(opened: Any) -> Any:
    spec = importlib.util.find_spec("open_clip")  # found, not imported: it needs torchvision
    assert spec is not None
    assert spec.origin is not None
    vocabulary = Path(spec.origin).parent / _VOCABULARY

    def opener(filename: str, mode: str = "rb") -> Any:
        wanted = Path(filename)
        lacking = wanted.name == _VOCABULARY and not wanted.exists()
        return opened(vocabulary if lacking else filename, mode)

    return opener


def _module(name: str, names: Mapping[str, object]) -> dict[str, ModuleType]:
    module = ModuleType(name)
    module.__path__ = []
    vars(module).update(names)
    return {name: module}


def _turtle() -> dict[str, ModuleType]:
    return _module("turtle", {"forward": None})


def _clint() -> dict[str, ModuleType]:
    textui = _module("clint.textui", {"progress": None})
    return textui | _module("clint", {"textui": textui["clint.textui"]})


def _torchvision() -> dict[str, ModuleType]:
    """The names hpsv2 takes; those that scoring uses work, on float tensors."""
    functional = _module("torchvision.transforms.functional", {"resize": _resize, "pad": _pad})
    used = {
        "Compose": _Compose,
        "Normalize": _Normalize,
        "InterpolationMode": _InterpolationMode,
        "ToTensor": _ToTensor,
    }
    unused = dict.fromkeys(("RandomResizedCrop", "Resize", "CenterCrop"))
    both = {**used, **unused, "functional": functional["torchvision.transforms.functional"]}
    transforms = _module("torchvision.transforms", both)
    misc = _module("torchvision.ops.misc", {"FrozenBatchNorm2d": type("FrozenBatchNorm2d", (), {})})
    ops = _module("torchvision.ops", {"misc": misc["torchvision.ops.misc"]})
    whole = {"transforms": transforms["torchvision.transforms"], "ops": ops["torchvision.ops"]}
    return functional | transforms | misc | ops | _module("torchvision", whole)


class _InterpolationMode:
    BICUBIC = "bicubic"
    BILINEAR = "bilinear"


class _Compose:
    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


class _ToTensor:
    def __call__(self, image: Any) -> Tensor:  # PIL (h, w) -> (3, h, w) in [0, 1]
        import numpy as np
        import torch

        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


class _Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, image: Tensor) -> Tensor:
        mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


def _resize(image: Tensor, size: Sequence[int], interpolation: str) -> Tensor:
    from torch.nn.functional import interpolate

    return interpolate(image[None], tuple(size), mode=interpolation, antialias=True, align_corners=False)[0]


def _pad(image: Tensor, padding: Sequence[int], fill: float) -> Tensor:
    from torch.nn.functional import pad

    left, top, right, bottom = padding
    return pad(image, [left, right, top, bottom], value=fill)
