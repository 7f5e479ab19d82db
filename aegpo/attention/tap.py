"""Sees what every softmax attention of a network is given, without changing its output."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from aegpo.attention.layouts import Kind, Layout, Site, known_network, layout_of
from aegpo.core.records import AttentionCall
from aegpo.errors import AegpoError

KINDS: tuple[Kind, ...] = ("joint", "self", "cross")
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class AttentionTap:
    """Passes on the calls of chosen layers and kinds, and remembers what there was to choose from."""

    def __init__(self, tap: Callable[[AttentionCall], None], layers: str = "*", kinds: Sequence[Kind] = KINDS) -> None:
        """`layers` is a pattern of module names as in a shell: `*single*`, `transformer_blocks.[0-3].attn`."""
        self._tap, self._layers, self._kinds = tap, layers, kinds
        self._seen: dict[str, Kind] = {}
        self.calls = 0

    def __call__(self, call: AttentionCall) -> None:
        """Passes a call on if it is one of the chosen."""
        self._seen[call.layer] = call.kind
        if call.kind in self._kinds and fnmatchcase(call.layer, self._layers):
            self.calls += 1
            self._tap(call)

    def check(self) -> None:
        """Raises `AegpoError` if attention was seen, but none of the chosen."""
        if self._seen and not self.calls:
            seen = [f"{layer} ({kind})" for layer, kind in self._seen.items()]
            some = ", ".join(seen[:8]) + (f" and {len(seen) - 8} more" if len(seen) > 8 else "")
            raise AegpoError(
                f"no softmax attention has a layer like {self._layers!r} and kind {' or '.join(self._kinds)}; the "
                f"network has {some}"
            )


def parts_of(call: AttentionCall, count: int) -> Iterator[AttentionCall]:
    """The calls of `count` equal parts of a batch, in order."""
    if count == 1:
        yield call
        return
    rows = len(call.query)
    masks = [call.mask] * count
    if call.mask is not None and call.mask.dim() == 4 and len(call.mask) == rows:
        masks = list(call.mask.chunk(count))
    for query, key, mask in zip(call.query.chunk(count), call.key.chunk(count), masks, strict=True):
        yield replace(call, query=query, key=key, mask=mask)


def is_attention(module: nn.Module) -> bool:
    """True for modules that give their attention its name: diffusers' have a processor, others are called so."""
    return hasattr(module, "processor") or type(module).__name__.endswith(("Attention", "Attn"))


@contextmanager
def watch_attention(
    network: nn.Module,
    tap: Callable[[AttentionCall], None],
    layout: Layout | None = None,
    names: Callable[[nn.Module], bool] = is_attention,
) -> Iterator[None]:
    """Inside, `tap` sees query, key and mask of each attention, after QK-norm and rotary embedding.

    Works for every network that ends in `torch.nn.functional.scaled_dot_product_attention`, as diffusers' native
    backends do; adapters, gradient checkpointing and FSDP2 do not matter. Give it the eager module: a compiled one
    would be compiled again. Keys of grouped-query attention are repeated for each query head.

    Args:
        network: the module whose forward is watched.
        tap: called inside the forward, without gradients; an `AttentionTap` to choose layers.
        layout: says which tokens are image and which are text; None: `layout_of(network)`.
        names: which modules give their name to the attention they compute.

    Raises:
        AegpoError: inside, if the layout cannot tell image from text; at the end, if the network ran but no softmax
            attention was seen, because it has none or an attention backend hides it.
    """
    watch = _Watch(network, tap, layout or layout_of(network))
    handles = []
    inner = known_network(network)
    for name, module in inner.named_modules():
        if module is inner:
            handles.append(module.register_forward_pre_hook(watch.enter_network, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.leave_network, always_call=True))
        elif names(module):
            handles.append(module.register_forward_pre_hook(watch.entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(watch.leave, always_call=True))
    try:
        with watch:
            yield
        watch.check()
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Calls the tap on every scaled dot-product attention inside the network's forward."""

    def __init__(self, network: nn.Module, tap: Callable[[AttentionCall], None], layout: Layout) -> None:
        super().__init__()
        self._network, self._tap, self._layout = known_network(network), tap, layout
        self._signature = inspect.signature(self._network.forward)
        self._arguments: dict[str, Any] = {}  # of the network's forward
        self._inside: list[tuple[str, int | None]] = []  # name and context of the modules that are being evaluated
        self._entered: dict[str, nn.Module] = {}
        self._forwards = self._calls = 0
        self._culprit = ""  # who computed attention in the last forward, if nothing was seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        output = func(*args, **given)
        if func is F.scaled_dot_product_attention and self._inside and not _going_back():
            with torch.no_grad():
                self._calls += 1
                self._tap(self._call(dict(zip(_SDPA_ARGUMENTS, args, strict=False)) | given))
        return output

    def _call(self, given: dict[str, Any]) -> AttentionCall:
        layer, context = self._inside[-1]
        query, key, mask, scale = given["query"], given["key"], given.get("attn_mask"), given.get("scale")
        queries, keys = query.shape[-2], key.shape[-2]
        if given.get("is_causal"):
            mask = torch.ones((queries, keys), dtype=torch.bool, device=query.device).tril()
        if given.get("enable_gqa"):
            key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        tokens = self._layout(Site(layer, queries, keys, context, self._arguments))
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        mask = None if mask is None else mask.detach()
        return AttentionCall(layer, tokens.kind, query.detach(), key.detach(), scale, tokens.image, tokens.text, mask)

    def enter_network(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remembers what the network is given; attention outside a named module bears the network's name."""
        self._forwards += 1
        self._arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        self._inside.append((type(module).__name__, None))

    def leave_network(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forgets it; the attention backend may be another one later."""
        if not self._calls:
            self._culprit = _culprit(self._processors())
        self._arguments = {}
        self._inside.clear()

    def entering(self, name: str) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
        """A hook that knows the module's name."""

        def enter(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            context = kwargs.get("encoder_hidden_states")
            self._entered[name] = module
            self._inside.append((name, context.shape[1] if isinstance(context, Tensor) else None))

        return enter

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Back in the module around it."""
        if self._inside:
            self._inside.pop()

    def _processors(self) -> dict[str, Any]:
        modules = [module for module in self._entered.values() if hasattr(module, "processor")]
        return {type(module.processor).__name__: module.processor for module in modules}

    def check(self) -> None:
        """Raises if the network ran and no attention was seen."""
        if not self._forwards or self._calls:
            return
        network, processors = type(self._network).__name__, self._processors()
        if not self._entered:
            raise AegpoError(f"{network} has no attention modules, so there is no attention entropy to measure")
        if processors and all("Linear" in name for name in processors):
            raise AegpoError(
                f"{network} has linear attention only ({', '.join(processors)}): without a softmax there is no "
                "attention entropy to measure"
            )
        raise AegpoError(
            f"the attention of {network} cannot be seen: {self._culprit} does not call torch's "
            'scaled_dot_product_attention; run it inside diffusers\' attention_backend("native")'
        )


def _going_back() -> bool:
    """True inside a backward pass, where gradient checkpointing evaluates layers again that have been seen."""
    return torch._C._current_graph_task_id() != -1


def _culprit(processors: Mapping[str, Any]) -> str:
    """Who computes attention in place of torch, for a message."""
    having = [processor for processor in processors.values() if hasattr(processor, "_attention_backend")]
    if not having:
        return f"its {', '.join(processors) or 'own attention'}"
    backend = having[0]._attention_backend
    if backend is None:  # the one in force for all
        from diffusers.models import attention_dispatch

        backend, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
    return f"the attention backend {str(getattr(backend, 'value', backend))!r}"
