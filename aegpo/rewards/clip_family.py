"""What rewards on CLIP share: how images and words become its inputs, and how it is loaded and asked.

Images come as float tensors and are never rounded to bytes, so scores differ from those of saved images by what half a
grey level is worth.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from aegpo.errors import AegpoError
from aegpo.rewards.weights import TOKENIZER_FILES, find_folder, load_pretrained

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPModel

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images (Radford et al. 2021, the released code)
STD = (0.26862954, 0.26130258, 0.27577711)
OPENAI_LARGE = "openai/clip-vit-large-patch14"
LAION_HUGE = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

Preprocess = Callable[["Tensor", int], "Tensor"]  # (b, 3, h, w) in [0, 1] and a size -> (b, 3, size, size), normalised


# --- images ----------------------------------------------------------------------------------------------------------


def padded(images: Tensor, size: int) -> Tensor:
    """The whole image, its longest side at `size`, centred on black: what HPSv2 and open_clip's `longest` do.

    (b, 3, h, w) in [0, 1] -> (b, 3, size, size), normalised. Bicubic with antialiasing on floats, not clamped
    (`ResizeMaxSize` of hpsv2 1.2.0, src/open_clip/transform.py).
    """
    from torch.nn import functional

    height, width = images.shape[-2:]
    scale = size / max(height, width)
    new = (round(height * scale), round(width * scale))
    resized = images if new == (height, width) else _bicubic(images, new)
    below, beside = size - new[0], size - new[1]
    margins = [beside // 2, beside - beside // 2, below // 2, below - below // 2]
    return _normalise(functional.pad(resized, margins))


def cropped(images: Tensor, size: int) -> Tensor:
    """The middle square of the image, its shortest side at `size`: what CLIP's own image processor does.

    (b, 3, h, w) in [0, 1] -> (b, 3, size, size), normalised. Bicubic with antialiasing, clamped, since processors
    round to bytes after it. Of an odd margin the smaller half is above or to the left.
    """
    resized = _shortest_at(images, size)
    return _normalise(_window(resized, size, [(side - size) // 2 for side in resized.shape[-2:]]))


def cropped_by_torchvision(images: Tensor, size: int) -> Tensor:
    """As `cropped`, but for odd margins: half of one is rounded to the even number, 3 / 2 to 2 and 5 / 2 to 2.

    `CenterCrop` of torchvision: int(round((h - size) / 2)). OpenAI's CLIP and ImageReward.py prepare images with it.
    """
    resized = _shortest_at(images, size)
    return _normalise(_window(resized, size, [round((side - size) / 2) for side in resized.shape[-2:]]))


def _shortest_at(images: Tensor, size: int) -> Tensor:
    """The whole image, its shortest side at `size`; the other is rounded down."""
    height, width = images.shape[-2:]
    shortest = min(height, width)
    new = (int(size * height / shortest), int(size * width / shortest))
    return images if new == (height, width) else _bicubic(images, new).clamp(0, 1)


def _window(images: Tensor, size: int, corner: Sequence[int]) -> Tensor:
    top, left = corner
    return images[..., top : top + size, left : left + size]


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    from torch.nn import functional

    return functional.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def _normalise(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


# --- words -----------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    """A prompt as it is."""
    return text


def cleaned(text: str) -> str:
    """A prompt as open_clip cleans it (`basic_clean`, `whitespace_clean`): mended, unescaped, single spaces.

    Its tokens are open_clip's too, but for a prompt that spells out `<start_of_text>` or `<end_of_text>`: open_clip
    takes that for the marks themselves.

    Raises:
        AegpoError: if ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise AegpoError(
            'reward hpsv2 cleans prompts with ftfy, which is not installed; run  pip install "aegpo[hpsv2]"'
        ) from error
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


class Words:
    """CLIP's tokenizer: a row of `length` ids a prompt, cut at the end, zeros after it."""

    def __init__(self, tokenizer: Any, length: int, clean: Callable[[str], str] = plain) -> None:
        self._tokenizer, self._length, self._clean = tokenizer, length, clean
        self.end = int(tokenizer.eos_token_id)
        self.size = len(tokenizer)

    def __call__(self, prompts: Sequence[str]) -> Tensor:  # (b, length) int64
        """Start, at most `length` - 2 pieces of the prompt, end; what follows the end is never attended to."""
        import torch

        ids = torch.zeros((len(prompts), self._length), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            pieces = self._tokenizer(self._clean(prompt), add_special_tokens=False)["input_ids"]
            marked = [self._tokenizer.bos_token_id, *pieces[: self._length - 2], self.end]
            row[: len(marked)] = torch.tensor(marked)
        return ids


# --- the network -----------------------------------------------------------------------------------------------------


class Clip:
    """A CLIP network with its preprocessing: normalised features of images and of prompts."""

    def __init__(self, network: CLIPModel, words: Words | None, preprocess: Preprocess) -> None:
        self.network, self._words, self._preprocess = network, words, preprocess
        self._size = int(network.config.vision_config.image_size)

    def see(self, images: Tensor) -> Tensor:  # (b, 3, h, w) in [0, 1] -> (b, D) float32 of length 1
        """Features of images."""
        pixels = self._preprocess(images, self._size).to(self.network.dtype)
        pooled = self.network.vision_model(pixel_values=pixels).pooler_output
        return _unit(self.network.visual_projection(pooled))

    def read(self, prompts: Sequence[str]) -> Tensor:  # (b, D) float32 of length 1
        """Features of prompts; equal ones are read once."""
        import torch

        assert self._words is not None, "a reward that reads prompts has a tokenizer"
        known = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        ids = self._words(list(known)).to(self.network.device)
        pooled = self.network.text_model(input_ids=ids).pooler_output
        rows = torch.tensor([known[prompt] for prompt in prompts], device=ids.device)
        return _unit(self.network.text_projection(pooled))[rows]

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:  # (b,) float32 in [-1, 1]
        """How near each image is to its prompt."""
        return (self.see(images) * self.read(prompts)).sum(dim=1)


def _unit(features: Tensor) -> Tensor:
    from torch.nn.functional import normalize

    return normalize(features.float(), dim=-1)


def load_clip(who: str, source: str) -> CLIPModel:
    """A CLIP network in transformers' layout, from a folder or the hub.

    Raises:
        AegpoError: if it cannot be had, is no CLIP, or does not have all of its weights.
    """
    from transformers import CLIPModel

    def load(name: str) -> Any:
        return CLIPModel.from_pretrained(name, output_loading_info=True, dtype="auto")

    network, loading = load_pretrained(who, load, source)
    if loading["missing_keys"] or loading["mismatched_keys"]:
        lacking = sorted([*loading["missing_keys"], *(str(key) for key in loading["mismatched_keys"])])
        raise AegpoError(
            f"{who}: {source!r} is no whole CLIP network: {len(lacking)} of its weights are missing or of another "
            f"shape, such as {lacking[0]!r}"
        )
    return network


def load_words(
    who: str, source: str, length: int, field: str = "tokenizer", clean: Callable[[str], str] = plain
) -> Words:
    """CLIP's tokenizer, from a folder or the hub.

    Raises:
        AegpoError: if it cannot be had.
    """
    from transformers import CLIPTokenizer

    # The files first: from_pretrained makes an empty tokenizer where there are none.
    folder = find_folder(who, source, TOKENIZER_FILES, field)
    return Words(load_pretrained(who, CLIPTokenizer.from_pretrained, str(folder), field), length, clean)


def load_with_words(who: str, source: str, tokenizer: str, field: str = "tokenizer") -> Clip:
    """A CLIP network in transformers' layout with a tokenizer that fits it; sees images as CLIP's processor does.

    Raises:
        AegpoError: if they cannot be had or do not fit.
    """
    network = load_clip(who, source)
    words = load_words(who, tokenizer, network.config.text_config.max_position_embeddings, field)
    check_vocabulary(who, words, network)
    return Clip(network, words, cropped)


def check_vocabulary(who: str, words: Words, network: CLIPModel) -> None:
    """A tokenizer must be of the network's vocabulary.

    Raises:
        AegpoError: if it has another size.
    """
    config = network.config.text_config
    if words.size != config.vocab_size:
        raise AegpoError(
            f"{who}: the tokenizer has {words.size} pieces, but the network {config.vocab_size}; they must be a pair"
        )
    # 2 stands for the highest id there is in networks that were saved by old versions of transformers
    if config.eos_token_id not in (words.end, 2):
        raise AegpoError(
            f"{who}: the tokenizer ends prompts with {words.end}, but the network reads at {config.eos_token_id}; "
            "they must be a pair"
        )
