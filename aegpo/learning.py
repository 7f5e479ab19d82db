"""Learns from executed plans: replays trained transitions, weighs their losses, steps the optimizer."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from aegpo import contracts
from aegpo.errors import AegpoError
from aegpo.interfaces import Conditioning, Edges, Objective, Rollouts, Update
from aegpo.rollouts import Execution
from aegpo.specs import OptimizerSpec, PolicySpec

DIVERGED = (
    "training diverged: the policy's outputs or gradients are not finite; lower 'optimizer.learning_rate', or raise "
    "'sampler.noise_level', and start over with --fresh"
)


def add_adapters(policy: nn.Module, spec: PolicySpec) -> None:
    """Puts LoRA adapters into the policy, in place; nothing happens for full fine-tuning.

    Raises:
        AegpoError: if no module matches the targets.
    """
    if spec.train == "full":
        policy.requires_grad_(True)
        return
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets), init_lora_weights="gaussian"
    )
    try:
        inject_adapter_in_model(config, policy)
    except ValueError as error:
        names = sorted(
            {name.rsplit(".", 1)[-1] for name, part in policy.named_modules() if isinstance(part, nn.Linear)}
        )
        raise AegpoError(
            f"policy: no module of {type(policy).__name__} matches 'targets' {', '.join(spec.targets)}; "
            f"its linear layers end in {', '.join(names)}"
        ) from error
    for name, weight in policy.named_parameters():
        weight.requires_grad_("lora_" in name)


def edge_weights(edges: Edges, reduction: str) -> Tensor:
    """The share of each trained edge in a training step's loss; (E,) float64, sums to 1.

    An edge counts as often as rollouts pass through it, so that the steps of a tree weigh what they would weigh if its
    rollouts were independent: near the root there are few edges, but every rollout passes them. `rollout`: that, over
    the sum of all edges. `prompt`: over the sum of the edges of the same prompt, and 1 / P for the P prompts that have
    trained edges, so that a prompt with 16 rollouts weighs what one with 8 does.
    """
    passes = edges.leaves.double()
    if reduction == "rollout":
        return passes / passes.sum()
    total = torch.bincount(edges.prompt, weights=passes)
    return passes / (total[edges.prompt] * (total > 0).sum())


class Learner:
    """Optimizer, averaged weights and the loop over a training step's transitions."""

    def __init__(
        self, how: Execution, objective: Objective, spec: OptimizerSpec, policy: PolicySpec, accelerator: Accelerator
    ) -> None:
        self._how, self._objective, self._spec, self._accelerator = how, objective, spec, accelerator
        self.weights = {name: w for name, w in how.model.policy.named_parameters() if w.requires_grad}
        optimizer = torch.optim.AdamW(
            self.weights.values(),
            lr=spec.learning_rate,
            betas=spec.betas,
            eps=spec.epsilon,
            weight_decay=spec.weight_decay,
            fused=True,  # the same arithmetic, a quarter of the time on a CPU
        )
        self._optimizer = accelerator.prepare_optimizer(optimizer)
        self._ema_decay = policy.ema
        self.averaged = {name: w.detach().clone() for name, w in self.weights.items()} if self._ema_decay else {}
        self.updates = 0
        self._mean_std = self._schedule_std()

    def _schedule_std(self) -> float:
        """Mean transition std over all denoising steps but the last: what `step_weight: std` is relative to."""
        sigmas = self._how.sigmas[:-1]
        nothing = sigmas.new_zeros(len(sigmas) - 1, 1, 1, 1)
        return float(self._how.sampler.transition(nothing, nothing, sigmas[:-1], sigmas[1:]).std.mean())

    def update(
        self, rollouts: Rollouts, credit: Tensor, cond: Conditioning, rng: np.random.Generator
    ) -> dict[str, float]:
        """Every inner epoch over a step's transitions; returns metrics averaged as the loss is."""
        edges = rollouts.edges
        share = edge_weights(edges, self._spec.reduction).float()
        sums: dict[str, float] = defaultdict(float)
        norms: list[float] = []
        for epoch in range(self._spec.inner_epochs):
            parts = self._partition(rollouts.plan.num_rollouts, rng)
            for number, members in enumerate(parts):
                rows = torch.isin(edges.rollout, members.to(edges.rollout.device)).nonzero().flatten()
                if len(rows) == 0:
                    continue  # none of these rollouts owns a trained transition
                deviation = self._accumulate(edges, credit, share * len(parts), cond, rows, sums)
                if epoch == number == 0:
                    sums["ratio_error"] = deviation
                norms.append(self._advance())
        passes = self._spec.inner_epochs * len(parts)
        averages = {name: total / passes for name, total in sums.items() if name != "ratio_error"}
        return averages | {"ratio_error": sums["ratio_error"], "grad_norm": float(np.mean(norms))}

    def _partition(self, rollouts: int, rng: np.random.Generator) -> list[Tensor]:
        """Deals the rollouts out to optimizer steps."""
        size = self._spec.rollouts_per_update or rollouts
        return list(torch.split(torch.from_numpy(rng.permutation(rollouts)), size))

    def _accumulate(
        self, edges: Edges, credit: Tensor, share: Tensor, cond: Conditioning, rows: Tensor, sums: dict[str, float]
    ) -> float:
        """Gradients of sum(share * loss) over the given edges; returns the largest |ratio - 1|."""
        deviation = 0.0
        for part in torch.split(rows, self._spec.micro_batch):
            update = self._replay(edges, credit, cond, part)
            if not bool(update.log_prob.isfinite().all()):
                raise AegpoError(DIVERGED)
            losses, metrics = self._objective.loss(update)
            contracts.check_loss(type(self._objective).__name__, losses, metrics, len(part))
            self._accelerator.backward((share[part] * losses).sum())
            for name, values in {"loss": losses.detach(), **metrics}.items():
                sums[name] += float((share[part] * values).sum())
            deviation = max(deviation, float((update.log_prob - update.old_log_prob).detach().expm1().abs().max()))
        return deviation

    def _replay(self, edges: Edges, credit: Tensor, cond: Conditioning, part: Tensor) -> Update:
        """Evaluates stored transitions under the current policy, with gradient."""
        how, level = self._how, edges.level[part]
        latents, chosen = edges.latents[part].float(), cond.select(edges.prompt[part])
        sigma, sigma_next = how.sigmas[level], how.sigmas[level + 1]
        gaussian = how.sampler.transition(latents, how.velocity(latents, sigma, chosen), sigma, sigma_next)
        base_mean = None
        if self._objective.needs_base:
            with torch.no_grad(), how.model.base():
                velocity = how.velocity(latents, sigma, chosen)
            base_mean = how.sampler.transition(latents, velocity, sigma, sigma_next).mean
        return Update(
            log_prob=how.sampler.log_prob(gaussian, edges.next_latents[part].float()),
            old_log_prob=edges.log_prob[part],
            advantage=credit[part],
            mean=gaussian.mean,
            base_mean=base_mean,
            std=gaussian.std,
            level=level,
            mean_std=self._mean_std,
        )

    def _advance(self) -> float:
        """One optimizer step; returns the gradient norm before clipping."""
        limit = self._spec.max_grad_norm or math.inf
        norm = self._accelerator.clip_grad_norm_(list(self.weights.values()), limit)
        if self._accelerator.scaler is None and not math.isfinite(float(norm)):
            raise AegpoError(DIVERGED)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self._ema_decay is not None:
            decay = min(self._ema_decay, (1 + self.updates) / (10 + self.updates))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.values()), list(self.weights.values()), 1 - decay)
        return float(norm)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, the policy has its averaged weights, if the run keeps any."""
        if not self.averaged:
            yield
            return
        current = {name: w.detach().clone() for name, w in self.weights.items()}
        self._assign(self.averaged)
        try:
            yield
        finally:
            self._assign(current)

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Trained weights, their averages and AdamW's moments, by name with a prefix."""
        state = {f"policy/{name}": w.detach() for name, w in self.weights.items()}
        state |= {f"ema/{name}": value for name, value in self.averaged.items()}
        moments = self._optimizer.optimizer.state_dict()["state"]
        for index, name in enumerate(self.weights):
            state |= {
                f"optimizer/{name}/{key}": torch.as_tensor(value) for key, value in moments.get(index, {}).items()
            }
        return state

    def load_state_dict(self, state: dict[str, Tensor], updates: int) -> None:
        """Takes back what `state_dict` returned."""
        self._assign({name: state[f"policy/{name}"] for name in self.weights})
        for name in self.averaged:
            self.averaged[name].copy_(state[f"ema/{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(self.weights):
            prefix = f"optimizer/{name}/"
            found = {key.removeprefix(prefix): value.clone() for key, value in state.items() if key.startswith(prefix)}
            if found:
                moments[index] = found
        whole = copy.copy(self._optimizer.optimizer.state_dict())
        self._optimizer.optimizer.load_state_dict({"state": moments, "param_groups": whole["param_groups"]})
        self.updates = updates
