"""Sees what every softmax attention of a network is given, without changing its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from aegpo.interfaces import AttentionCall

Layout = Callable[[str, int, int], tuple[slice, slice]]  # (layer, queries, keys) -> image tokens, text tokens
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@contextmanager
def watch_attention(network: nn.Module, tap: Callable[[AttentionCall], None], layout: Layout) -> Iterator[None]:
    """Inside, `tap` sees query and key of each attention, after QK-norm and rotary embedding.

    Works for every network whose attention modules have a `processor` and end in
    `torch.nn.functional.scaled_dot_product_attention`, as diffusers' native backends do; adapters and gradient
    checkpointing do not matter. `layout` says which tokens are image and which are text.
    """
    layers: list[str] = []
    handles = []
    for name, module in network.named_modules():
        if hasattr(module, "processor"):
            handles.append(module.register_forward_pre_hook(_entering(layers, name)))
            handles.append(module.register_forward_hook(_leaving(layers), always_call=True))
    try:
        with _AttentionMode(layers, tap, layout):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _AttentionMode(TorchFunctionMode):
    """Calls the tap on every scaled dot-product attention."""

    def __init__(self, layers: list[str], tap: Callable[[AttentionCall], None], layout: Layout) -> None:
        super().__init__()
        self._layers, self._tap, self._layout = layers, tap, layout

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        output = func(*args, **given)
        if func is F.scaled_dot_product_attention and self._layers:
            with torch.no_grad():
                self._tap(self._call(dict(zip(_SDPA_ARGUMENTS, args, strict=False)) | given))
        return output

    def _call(self, given: dict[str, Any]) -> AttentionCall:
        layer, query, key, mask = self._layers[-1], given["query"], given["key"], given.get("attn_mask")
        queries, keys = query.shape[-2], key.shape[-2]
        if given.get("is_causal"):
            mask = torch.ones((queries, keys), dtype=torch.bool, device=query.device).tril()
        image, text = self._layout(layer, queries, keys)
        kind: Literal["joint", "self", "cross"] = "cross" if queries != keys else "self"
        if kind == "self" and text.stop > text.start:
            kind = "joint"
        scale = given.get("scale") or 1 / math.sqrt(query.shape[-1])
        return AttentionCall(layer, kind, query.detach(), key.detach(), scale, image, text, mask)


def _entering(layers: list[str], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, arguments: Any) -> None:
        layers.append(name)

    return hook


def _leaving(layers: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        layers.pop()

    return hook
