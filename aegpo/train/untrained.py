"""What a policy is before it has learned anything: what runs of an experiment have in common."""

from __future__ import annotations

from typing import Any

from aegpo.parallel.dtensors import local
from aegpo.train.policy import Policy


def of_base(policy: Policy) -> dict[str, Any]:
    """What the base policy's answers depend on, as JSON, whatever adapters stand beside it and how they began."""
    adapters = policy.weights.trained if policy.experiment.policy.train == "lora" else ()
    return {**policy.identity(), "weights": policy.fingerprint(without=adapters)}


def of_start(policy: Policy) -> dict[str, Any]:
    """What the untrained policy's answers depend on beside the base's, as JSON.

    LoRA adapters begin with B at zero and add B A x: that is nothing, whatever A is, which each seed draws anew.
    """
    trained, without = policy.weights.trained, list[str]()
    if all(not local(weight).any() for name, weight in trained.items() if ".lora_B." in name):
        without = [name for name in trained if ".lora_A." in name]
    spec = policy.experiment.policy.model_dump(mode="json")
    return {"trained": spec, "weights": policy.fingerprint(without)}
