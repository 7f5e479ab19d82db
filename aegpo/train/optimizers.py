"""AdamW, Adam or SGD, moments in float32 or in 8 bits, and their state by the names of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aegpo.core.moments import LEAST_8BIT, missing_package
from aegpo.errors import SettingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from aegpo.core.sections import OptimizerSpec

_NESTED = "__bnb_optimizer_quant_state__"  # where bitsandbytes >= 0.49 puts what must not be cast


def make_optimizer(weights: Sequence[nn.Parameter], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """The optimizer of the weights, as its `kind` says.

    Raises:
        SettingError: for 8-bit moments without a bitsandbytes that can be imported.
    """
    import torch

    options: dict[str, Any] = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay}
    if spec.kind == "sgd":  # not fused: that form fails where a weight has its first gradient later than others
        return torch.optim.SGD(weights, momentum=spec.momentum, **options)
    options |= {"betas": spec.betas, "eps": spec.epsilon}
    if spec.moments == "8bit":
        return _in_8_bits(weights, spec.kind, options)
    chosen = torch.optim.AdamW if spec.kind == "adamw" else torch.optim.Adam
    return chosen(weights, fused=True, **options)  # a third of the time on a CPU, where the others round differently


def _in_8_bits(weights: Sequence[nn.Parameter], kind: str, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW or Adam. Its Adam decays as its AdamW does, so for Adam the gradients get the decay here."""
    bitsandbytes = _bitsandbytes()
    if kind == "adamw":
        optimizer: torch.optim.Optimizer = bitsandbytes.AdamW8bit(weights, min_8bit_size=LEAST_8BIT, **options)
        return optimizer
    import torch

    optimizer = bitsandbytes.Adam8bit(weights, min_8bit_size=LEAST_8BIT, **{**options, "weight_decay": 0.0})

    @torch.no_grad()
    def decay(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        for weight in weights:
            if weight.grad is not None:
                weight.grad.add_(weight, alpha=options["weight_decay"])

    optimizer.register_step_pre_hook(decay)
    return optimizer


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import optim
    except (ImportError, OSError, RuntimeError) as error:  # it loads a library of its own
        reason = missing_package("8bit") or (
            f"'8bit' needs the package bitsandbytes, which cannot be imported ({type(error).__name__}: {error}); mend "
            "the installation, or choose float32"
        )
        raise SettingError(reason, "optimizer", "moments") from error
    return optim


def state_by_name(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """`NAME/KEY`: the optimizer's tensors, and its numbers as tensors, of weights in the optimizer's order.

    Tensors that several weights share, as bitsandbytes' maps from 8 bits to numbers are, are copied.
    """
    import torch

    found: dict[str, Tensor] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in ({**state} | state.get(_NESTED, {})).items():
            if key != _NESTED:
                shared = key.startswith("qmap")
                found[f"{names[index]}/{key}"] = value.clone() if shared else torch.as_tensor(value)
    return found


def load_state_by_name(optimizer: torch.optim.Optimizer, names: Sequence[str], state: Mapping[str, Tensor]) -> None:
    """Takes back what `state_by_name` returned."""
    import torch

    entries: dict[int, dict[str, Any]] = {}
    for index, name in enumerate(names):
        prefix = f"{name}/"
        found = {key.removeprefix(prefix): value.clone() for key, value in state.items() if key.startswith(prefix)}
        if found:
            entries[index] = found
    if not isinstance(optimizer, torch.optim.AdamW | torch.optim.Adam | torch.optim.SGD):
        for entry in entries.values():  # torch counts steps in a tensor, bitsandbytes in an int
            entry["step"] = int(entry["step"])
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
