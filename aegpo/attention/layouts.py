"""Which tokens of an attention are image and which are text, for the networks of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from aegpo.errors import AegpoError

Kind = Literal["joint", "self", "cross"]


@dataclass(frozen=True)
class Site:
    """Where an attention is computed, and what is known there."""

    layer: str  # the module's name
    queries: int
    keys: int
    context: int | None  # tokens of the `encoder_hidden_states` that the attention module was given; None: none
    arguments: Mapping[str, Any]  # of the network's forward, by name


@dataclass(frozen=True)
class Tokens:
    """What the tokens of an attention are; see `AttentionCall`."""

    kind: Kind
    image: slice
    text: slice


Layout = Callable[[Site], Tokens]
Count = Callable[[Mapping[str, Any], nn.Module], int]  # tokens, from the arguments of a network's forward


@dataclass(frozen=True)
class _Joint:
    """A transformer that concatenates text and image tokens; some of its layers may see one of them alone."""

    image_first: bool
    image: Count
    text: Count
    registers: int = 0  # learned tokens before the others

    def tokens(self, site: Site, network: nn.Module) -> Tokens:
        image, text, first = (
            self.image(site.arguments, network),
            self.text(site.arguments, network),
            self.registers,
        )
        nothing = slice(0, 0)
        if site.queries != site.keys:
            raise _unknown(site, network, f"{image} image and {text} text tokens")
        if site.keys == text and (image != text or "context_refiner" in site.layer):
            return Tokens("self", nothing, slice(0, text))
        if site.keys == image:
            return Tokens("self", slice(0, image), slice(image, image))
        if site.keys != first + image + text:
            raise _unknown(site, network, f"{image} image and {text} text tokens")
        if self.image_first:
            return Tokens("joint", slice(first, first + image), slice(first + image, site.keys))
        return Tokens("joint", slice(first + text, site.keys), slice(first, first + text))


def _separate(site: Site, network: nn.Module) -> Tokens:
    """A network in which image tokens look at each other in one layer and at the text in another."""
    if site.context is None and site.queries == site.keys:
        return Tokens("self", slice(0, site.queries), slice(site.queries, site.queries))
    if site.context != site.keys:
        raise _unknown(site, network, f"{site.context or 'no'} text tokens")
    return Tokens("cross", slice(0, site.queries), slice(0, site.keys))


def _by_counts(site: Site, network: nn.Module) -> Tokens:
    """An unknown network: only what the numbers of tokens leave no doubt about."""
    given = site.arguments.get("hidden_states")
    packed = given.shape[1] if isinstance(given, Tensor) and given.dim() == 3 else None
    text = site.arguments.get("encoder_hidden_states")
    alone = packed == site.queries or (packed is None and not isinstance(text, Tensor))
    if site.context == site.keys or (site.context is None and site.queries == site.keys and alone):
        return _separate(site, network)
    raise AegpoError(
        f"layer {site.layer!r} of {type(network).__name__} attends from {site.queries} to {site.keys} tokens, and it "
        "is not known which of them are text; give watch_attention a layout of your own (known networks: "
        f"{', '.join(sorted(_NETWORKS))})"
    )


def _unknown(site: Site, network: nn.Module, expected: str) -> AegpoError:
    return AegpoError(
        f"layer {site.layer!r} of {type(network).__name__} attends from {site.queries} to {site.keys} tokens, which "
        f"does not fit its {expected}; give watch_attention a layout of your own"
    )


# --- how many tokens a network was given -----------------------------------------------------------------------------


def _patches(arguments: Mapping[str, Any], network: nn.Module) -> int:
    height, width = arguments["hidden_states"].shape[-2:]
    size = int(_config(network)["patch_size"])
    return int((height // size) * (width // size))


def _packed(arguments: Mapping[str, Any], network: nn.Module) -> int:
    return int(arguments["hidden_states"].shape[1])


def _words(arguments: Mapping[str, Any], network: nn.Module) -> int:
    return int(arguments["encoder_hidden_states"].shape[1])


def _unpadded_words(arguments: Mapping[str, Any], network: nn.Module) -> int:
    """Lumina 2 drops the padding and starts the image of each prompt right after its own words."""
    lengths = set(arguments["encoder_attention_mask"].sum(dim=1).tolist())
    return int(_equal(lengths, network, "words"))


def _z_image_patches(arguments: Mapping[str, Any], network: nn.Module) -> int:
    """Z-Image fills images up to a multiple of 32 with tokens that are attended to; they count as image."""
    size = arguments.get("patch_size", 2)
    patches = {image.shape[-2] // size * (image.shape[-1] // size) for image in arguments["x"]}
    return _multiple(_equal(patches, network, "image tokens"), 32)


def _z_image_words(arguments: Mapping[str, Any], network: nn.Module) -> int:
    """Z-Image fills captions up to a multiple of 32 with tokens that are attended to; they count as text."""
    return max(_multiple(len(caption), 32) for caption in arguments["cap_feats"])


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of


def _equal(counts: set[int], network: nn.Module, what: str) -> int:
    if len(counts) > 1:
        raise AegpoError(
            f"{type(network).__name__} puts samples with {' and '.join(map(str, sorted(counts)))} {what} into one "
            "batch, so that tokens of the same place are of different kinds; watch one sample at a time"
        )
    return counts.pop()


def _config(network: nn.Module) -> Mapping[str, Any]:
    config: Mapping[str, Any] = network.config  # type: ignore[assignment]  # of diffusers' ConfigMixin
    return config


_SEPARATE = ("UNet2DConditionModel", "PixArtTransformer2DModel", "SanaTransformer2DModel")
_JOINT = {
    "SD3Transformer2DModel": _Joint(True, _patches, _words),
    "ZImageTransformer2DModel": _Joint(True, _z_image_patches, _z_image_words),
    "FluxTransformer2DModel": _Joint(False, _packed, _words),
    "Flux2Transformer2DModel": _Joint(False, _packed, _words),
    "ChromaTransformer2DModel": _Joint(False, _packed, _words),
    "QwenImageTransformer2DModel": _Joint(False, _packed, _words),
    "AuraFlowTransformer2DModel": _Joint(False, _patches, _words, registers=8),
    "Lumina2Transformer2DModel": _Joint(False, _patches, _unpadded_words),
}
_NETWORKS = (*_SEPARATE, *_JOINT)


def known_network(network: nn.Module) -> nn.Module:
    """The diffusers network inside wrappers such as DDP or PEFT's; the given one if there is none that is known."""
    return next((module for module in network.modules() if _name(module) is not None), network)


def layout_of(network: nn.Module) -> Layout:
    """What the tokens of its attentions are, by the network's class, or by token counts where these leave no doubt.

    Known are SD3, FLUX, FLUX.2, Chroma, Qwen-Image, AuraFlow, Lumina 2 and Z-Image, the UNets of SD and SDXL, PixArt
    and Sana. The layout raises `AegpoError` for an attention whose tokens it cannot tell apart.
    """
    found = known_network(network)
    name = _name(found)
    if name in _JOINT:
        joint = _JOINT[name]
        return lambda site: joint.tokens(site, found)
    return lambda site: (_separate if name in _SEPARATE else _by_counts)(site, found)


def _name(module: nn.Module) -> str | None:
    """The known class a module is an instance of; FSDP and others subclass it."""
    return next((base.__name__ for base in type(module).__mro__ if base.__name__ in _NETWORKS), None)
