"""What is trained of a network: every weight, or low-rank adapters that are put into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from aegpo.core.parts import ATTENTION_TARGETS
from aegpo.core.sections import PolicySpec
from aegpo.errors import SettingError


def add_adapters(policy: nn.Module, spec: PolicySpec, defaults: Sequence[str] = ATTENTION_TARGETS) -> None:
    """Puts LoRA adapters into the policy, in place; for full fine-tuning it makes every weight trainable.

    What is trained is float32, whatever the dtype of what is frozen. `defaults` are the model's `adapter_targets`,
    which count where the spec names none.

    Raises:
        SettingError: if no module matches the targets.
    """
    if spec.train == "full":
        policy.float().requires_grad_(True)
        return
    targets = list(spec.targets or defaults)
    begins: Literal[True, "gaussian"] = True if spec.init == "default" else "gaussian"
    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=targets, init_lora_weights=begins)
    try:
        inject_adapter_in_model(config, policy)
    except ValueError as error:
        names = sorted(
            {name.rsplit(".", 1)[-1] for name, part in policy.named_modules() if isinstance(part, nn.Linear)}
        )
        raise SettingError(
            f"no module of {type(policy).__name__} matches 'targets' {', '.join(targets)}; "
            f"its linear layers end in {', '.join(names)}",
            "policy",
        ) from error
    for name, weight in policy.named_parameters():
        weight.requires_grad_("lora_" in name)
        if weight.requires_grad:
            weight.data = weight.data.float()
