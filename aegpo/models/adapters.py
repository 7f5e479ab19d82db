"""What is trained of a network: every weight, or low-rank adapters that are put into it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from aegpo.core.parts import ATTENTION_TARGETS
from aegpo.core.sections import PolicySpec
from aegpo.errors import SettingError
from aegpo.models.unread import as_if_read


def add_adapters(policy: nn.Module, spec: PolicySpec, defaults: Sequence[str] = ATTENTION_TARGETS) -> None:
    """Puts LoRA adapters into the policy, in place; for full fine-tuning it makes every weight trainable.

    What is trained is float32, whatever the dtype of what is frozen. `defaults` are the model's `adapter_targets`,
    which count where the spec names none.

    Raises:
        SettingError: if a target that the spec names matches no module, or none does, or one cannot be adapted.
    """
    if spec.train == "full":
        policy.float().requires_grad_(True)
        return
    targets = list(defaults if spec.targets is None else spec.targets)
    _refuse_strays(policy, targets, spec.targets is not None)
    begins: Literal[True, "gaussian"] = True if spec.init == "default" else "gaussian"
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=targets, init_lora_weights=begins)
    try:
        with as_if_read(policy):
            inject_adapter_in_model(config, policy)
    except ValueError as error:
        raise SettingError(
            f"'targets' {', '.join(targets)} name a module that LoRA cannot adapt, for it is no single layer; "
            f"{_linear_layers(policy)}",
            "policy",
        ) from error
    for name, weight in policy.named_parameters():
        weight.requires_grad_("lora_" in name)
        if weight.requires_grad:
            weight.data = weight.data.float()


def _refuse_strays(policy: nn.Module, targets: Sequence[str], named: bool) -> None:
    """Each target that was named is of some module: peft would leave one that is misspelt out without a word.

    Of a model's own list, which is of a whole family, some is enough.
    """
    names = [name for name, _ in policy.named_modules() if name]
    strays = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if not strays or (len(strays) < len(targets) and not named):
        return
    known = _layer_names(policy)
    close = difflib.get_close_matches(strays[0], known, n=1, cutoff=0.7) if len(strays) == 1 else []
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise SettingError(
        f"no module of {type(policy).__name__} matches 'targets' {', '.join(strays)}; {hint}{_linear_layers(policy)}",
        "policy",
    )


def _linear_layers(policy: nn.Module) -> str:
    return f"its linear layers end in {', '.join(_layer_names(policy))}"


def _layer_names(policy: nn.Module) -> list[str]:
    """How targets call the linear layers: the end of their names, from the last part that is no number."""
    names = (name.split(".") for name, part in policy.named_modules() if isinstance(part, nn.Linear))
    return sorted({".".join(parts[-2:] if parts[-1].isdecimal() else parts[-1:]) for parts in names})
