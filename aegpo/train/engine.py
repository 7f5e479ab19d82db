"""The engine: one class for every method; `step` names each stage in the paper's order."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import pluggy
import torch
from torch import Tensor, nn

from aegpo.core import contracts
from aegpo.core.experiment import Experiment
from aegpo.core.interfaces import Model, Preparable, Stateful
from aegpo.core.memory_shortage import enough_memory, lower
from aegpo.core.records import Conditioning, Evaluation, Prompt, Rollouts, RunInfo, Signals, StepReport
from aegpo.errors import AegpoError, MemoryShortageError, RewardError
from aegpo.method.costs import update_work
from aegpo.method.planning import Planner
from aegpo.method.residual_noise import residual_noise
from aegpo.method.reward_history import RewardHistory
from aegpo.models.adapters import add_adapters
from aegpo.prompts.lists import PromptStream, read_prompts, refuse_shared
from aegpo.runs import checkpoints, unreported
from aegpo.train.base_entropies import BaseCurves, fingerprint
from aegpo.train.devices import STORAGE, choose_device, make_accelerator
from aegpo.train.entropy_probe import EntropyProbe
from aegpo.train.learning import DIVERGED, Learner
from aegpo.train.painting import resized
from aegpo.train.rollouts import Execution, Show, Trunk, Velocity, roll_out, sample_deterministic, unseen
from aegpo.train.scoring import HeldOut, Scoring, build_scorers


class Engine:
    """One arm under one seed: its parts, and the loop over training steps."""

    def __init__(self, experiment: Experiment, hooks: pluggy.PluginManager) -> None:
        self.experiment, self.hooks = experiment, hooks
        self.device = choose_device(experiment.device)
        self.accelerator = make_accelerator(experiment, self.device)
        torch.manual_seed(experiment.seed)  # adapters, and foreign parts that start at random
        with contracts.blaming("model", experiment.model.kind):
            self.model = experiment.model.build(self.device)
        add_adapters(self.model.policy, experiment.policy, experiment.model.adapter_targets)
        with self.model.base():
            pass  # the base policy is what the model is now
        self.rewards = build_scorers(experiment.rewards, self.device)
        self.guards = build_scorers(experiment.evaluation.rewards, self.device)
        self.planner = Planner.build(experiment)
        self.history = RewardHistory()
        self.advantage = experiment.advantage.build()
        self.objective = experiment.objective.build()
        self.how = self._execution(experiment.rollouts.denoising_steps)
        self.learner = Learner(self.how, self.objective, experiment.optimizer, experiment.policy, self.accelerator)
        texts = read_prompts(experiment, "train")
        self.probe = (
            EntropyProbe(self.how, experiment.probe, BaseCurves(self._base_depends_on(texts)))
            if experiment.needs_entropy
            else None
        )
        self.prompts = PromptStream(texts, experiment.rollouts.prompts_per_step, experiment.seed)
        self.held_out = read_prompts(experiment, "evaluation")
        refuse_shared(texts, self.held_out)
        if isinstance(self.model, Preparable):
            self.model.prepare([*self.prompts.until(experiment.training_steps), *self.held_out])
        resized(self.model, experiment)  # finds a size it cannot paint before any work is done
        self._check_parts(self.prompts.at(1)[0].text)
        self._evaluated: HeldOut | None = None  # with the base policy's scores
        self._unreported: StepReport | None = None  # of a restored state: learned, but not evaluated
        for name, part in self._parts().items():
            if any(attribute.startswith("aegpo_on_") for attribute in dir(type(part))):
                hooks.register(part, name=f"part/{name}")

    @classmethod
    def build(cls, experiment: Experiment, hooks: pluggy.PluginManager) -> Engine:
        """Builds every part of an experiment on its device.

        Raises:
            AegpoError: if a part cannot be built, or breaks its contract on a first latent.
        """
        remedy = "load the model in a smaller 'dtype', train LoRA adapters, or use a device with more memory"
        with enough_memory("the parts were built", remedy):
            return cls(experiment, hooks)

    @torch.no_grad()
    def _check_parts(self, text: str) -> None:
        """Tries model and sampler on one latent, so that a foreign part is blamed before any work is done."""
        spec, cond = self.experiment, self._encode([text])
        contracts.check_conditioning(spec.model.kind, cond, [text])
        sigma, sigma_next = self.how.sigmas[:1], self.how.sigmas[1:2]
        latents = torch.zeros((1, *self.model.latent_shape), device=self.device)
        velocity = self.how.velocity(latents, sigma, cond)
        contracts.check_velocity(spec.model.kind, velocity, latents)
        with contracts.blaming("model", spec.model.kind):
            image = self.model.decode(latents)
        contracts.check_images(spec.model.kind, image, 1)
        with contracts.blaming("sampler", spec.sampler.kind):
            gaussian = self.how.sampler.transition(latents, velocity.float(), sigma, sigma_next)
            contracts.check_transition(spec.sampler.kind, gaussian, latents)
            log_prob = self.how.sampler.log_prob(gaussian, gaussian.mean)
        contracts.check_log_prob(spec.sampler.kind, log_prob, latents)

    # --- one training step ---------------------------------------------------------------------------------------

    def step(self, number: int) -> StepReport:
        """Training step `number`, counted from 1; a pure function of the weights, the parts' state and (seed, step)."""
        spec, watch = self.experiment, Stopwatch()
        rng, generator = self._randomness(number)
        prompts = self.prompts.at(number)
        with watch("probe"), self._sampling("the probe measured"):
            cond = self._encode([prompt.text for prompt in prompts])
            signals, probe_forwards, trunk = self._signals(number, prompts, cond)
        with watch("plan"), self._few_rollouts("rollouts were planned"):
            planned = self.planner.plan(signals, rng)  # allocator: counts; selector: steps; tree: the forest
            plan = planned.plan
        with Scoring(self.rewards, [prompts[row].text for row in plan.group]) as scoring:
            with watch("rollout"), self._sampling("rollouts were sampled"), self.learner.sampling_weights():
                rollouts = roll_out(self.how, plan, cond, generator, prompts, trunk, self._inspected(scoring.show))
                contracts.check_images(spec.model.kind, rollouts.images, plan.num_rollouts)
            with watch("reward"):  # of which rewards in lanes of their own have done a part already
                scores = scoring.finish(rollouts.images)
                rewards = torch.stack(list(scores.values()), dim=1)
                with self._few_rollouts("credit was given"), contracts.blaming("advantage", spec.advantage.kind):
                    credit = self.advantage.estimate(rewards, self._reward_weights(), rollouts).to(self.device)
                contracts.check_credit(spec.advantage.kind, credit, plan.trained_edges)
                self.history.add(prompts, rewards @ self._reward_weights(), plan.group)
        fewer = lower("optimizer.micro_batch", spec.optimizer.micro_batch)
        with watch("update"), enough_memory("the policy was updated", fewer):
            learned = self.learner.update(rollouts, credit, cond, rng)
            self.learner.end_step(number)
        metrics = _describe(scores, self._reward_weights(), rollouts) | learned
        forwards = plan.forwards - (0 if trunk is None else trunk.saved(plan))
        left = residual_noise(plan, self.experiment.step_table, self.experiment.sigmas, self.how.predicted_clean)
        metrics["residual_noise"] = left
        metrics |= {"forwards": forwards, "probe_forwards": probe_forwards, "trained_edges": plan.trained_edges}
        metrics["work"] = forwards + probe_forwards + update_work(spec) * plan.trained_edges
        delta = signals.delta if signals.entropy is not None else None
        return StepReport(
            number, metrics, prompts, planned.counts, planned.selected, signals.entropy, delta, None, watch.seconds
        )

    def _signals(self, number: int, prompts: Sequence[Prompt], cond: Conditioning) -> tuple[Signals, int, Trunk | None]:
        signals = Signals(number, len(prompts), self.experiment.sigmas, stds=self.experiment.step_table.std)
        signals = self.history.told(signals, prompts)
        if self.probe is None:
            return signals, 0, None
        probed = self.probe.measure(number, prompts, cond)
        signals = replace(signals, entropy=probed.entropy, base_entropy=probed.base_entropy)
        return signals, probed.forwards, probed.trunk

    def _inspected(self, show: Show) -> Show:
        """Shows what is known to be images."""

        def inspect(images: Tensor) -> None:
            if self.learner.updates and not bool(images.isfinite().all()):
                raise AegpoError(DIVERGED)  # the adapter was fine when the run began
            contracts.check_images(self.experiment.model.kind, images, len(images))
            show(images)

        return inspect

    def _randomness(self, number: int) -> tuple[np.random.Generator, torch.Generator]:
        """Decisions and noise of a step, and the global generators that foreign parts may use."""
        rng = np.random.default_rng((self.experiment.seed, number))
        noise, common = (int(seed) for seed in rng.integers(2**31, size=2))
        torch.manual_seed(common)
        np.random.seed(common)
        random.seed(common)
        return rng, torch.Generator().manual_seed(noise)

    # --- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self) -> Evaluation:
        """Scores the held-out prompts for the policy (its averaged weights, if any) and, once, for the base."""
        paint = partial(self.images, self.held_out)
        if self._evaluated is None:
            with self.model.base():
                self._evaluated = HeldOut(self.rewards + self.guards, self.held_out, paint)
        with self.learner.averaged_weights():
            scores, base_scores, images = self._evaluated.evaluate(paint)
        return Evaluation(self.held_out, scores, base_scores, images[: self.experiment.evaluation.images].cpu())

    def images(self, texts: Sequence[str], show: Show = unseen) -> Tensor:
        """(B, 3, h, w) in [0, 1]: each prompt from fixed noise with the deterministic sampler."""
        spec = self.experiment
        steps = spec.evaluation.denoising_steps or spec.rollouts.denoising_steps
        how = self._execution(steps, resized(self.model, spec))
        generator = torch.Generator().manual_seed(spec.evaluation.seed)
        noise = torch.randn((len(texts), *how.model.latent_shape), generator=generator).to(self.device)
        with self._sampling("held-out prompts were painted"):
            return sample_deterministic(how, noise, self._encode(texts), show)

    # --- a whole run ---------------------------------------------------------------------------------------------

    def run(self, info: RunInfo, should_stop: Callable[[], bool]) -> Literal["finished", "interrupted"]:
        """Trains from `info.first_step` to the end, or until asked to stop; the state is on disk when it returns.

        Raises:
            RewardError: if a reward fails; all that was learned before is on disk then, and the message says so.
            MemoryShortageError: if memory runs out; the message says what to lower, and what is on disk.
        """
        self.hooks.hook.aegpo_on_run_start(run=info)
        if self.probe is not None:
            self.probe.base.open(info.folder / "probe", info.first_step)
        saved = info.first_step
        if info.first_step == 0:
            self.hooks.hook.aegpo_on_step_end(run=info, report=self._before_training())
        for number in range(info.first_step + 1, info.training_steps + 1):
            if should_stop():
                if saved < number - 1:
                    self._save(info, number - 1)
                self.hooks.hook.aegpo_on_run_end(run=info, outcome="interrupted")
                return "interrupted"
            report = self._reported(info, number, saved)
            self.hooks.hook.aegpo_on_step_end(run=info, report=report)
            if self._due(number, self.experiment.checkpoint.every):
                self._save(info, number)
                saved = number
        self.hooks.hook.aegpo_on_run_end(run=info, outcome="finished")
        return "finished"

    def _reported(self, info: RunInfo, number: int, saved: int) -> StepReport:
        """A step with its evaluation, if one is due; if a reward or the memory fails, what was learned is not lost."""
        before, report, self._unreported = self._memory(), self._unreported, None
        updates = self.learner.updates
        try:
            report = report or self.step(number)
            return self._with_evaluation(report) if self._due(number, self.experiment.evaluation.every) else report
        except (RewardError, MemoryShortageError) as error:
            last = number - 1
            if report is None and self.learner.updates != updates:
                last = saved  # the weights are those of half a step, which no checkpoint may have
            elif report is None and saved < last:
                self._save(info, last, before)
            elif report is not None and last > 0:
                self._save(info, last, unreported_step=report)
            kept = f"step {last} and all before it are saved" if last > 0 else "nothing was learned yet"
            raise type(error)(f"{error}\n{kept}; the same command goes on from there") from error.__cause__

    def _due(self, number: int, every: int) -> bool:
        return number % every == 0 or number == self.experiment.training_steps

    def _before_training(self) -> StepReport:
        none = np.zeros(0, dtype=np.int64)
        selected = np.zeros((0, self.experiment.rollouts.denoising_steps), dtype=np.bool_)
        return self._with_evaluation(StepReport(0, {}, (), none, selected, None, None, None, {}))

    def _with_evaluation(self, report: StepReport) -> StepReport:
        watch = Stopwatch()
        with watch("evaluation"):
            evaluation = self.evaluate()
        fields = {name: value for name, value in vars(report).items() if name not in ("evaluation", "seconds")}
        return StepReport(**fields, evaluation=evaluation, seconds={**report.seconds, **watch.seconds})

    # --- state ---------------------------------------------------------------------------------------------------

    def _save(
        self, info: RunInfo, number: int, memory: Memory | None = None, unreported_step: StepReport | None = None
    ) -> None:
        if self.probe is not None:
            self.probe.base.write(number, until=number if unreported_step is None else unreported_step.step)
        tensors, state = self._state(memory or self._memory())
        state["unreported"] = None if unreported_step is None else unreported.to_json(unreported_step)
        checkpoint = checkpoints.Checkpoint(number, tensors, state)
        path = checkpoints.save(info.folder / "checkpoints", checkpoint, self.experiment.checkpoint.keep)
        self.hooks.hook.aegpo_on_checkpoint(run=info, step=number, path=path)

    def _memory(self) -> Memory:
        """All that a step may change before it has learned anything: what parts remember, and the generator."""
        parts = {name: copy.deepcopy(part.state_dict()) for name, part in self._stateful().items()}
        return Memory(parts, torch.get_rng_state())

    def _state(self, memory: Memory) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = self.learner.state_dict() | {"rng/torch": memory.generator}
        scaler = self.accelerator.scaler  # of float16 gradients
        state: dict[str, Any] = {"updates": self.learner.updates, "parts": {}}
        state["scaler"] = None if scaler is None else scaler.state_dict()
        for name, remembered in memory.parts.items():
            for key, value in remembered.items():
                if isinstance(value, Tensor):
                    tensors[f"part/{name}/{key}"] = value
                else:
                    state["parts"].setdefault(name, {})[key] = value
        return tensors, state

    def restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Takes back the state of a checkpoint; the next step is `checkpoint.step + 1`."""
        self.learner.load_state_dict(checkpoint.tensors, checkpoint.state["updates"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
        torch.set_rng_state(checkpoint.tensors["rng/torch"].cpu())
        for name, part in self._stateful().items():
            prefix = f"part/{name}/"
            tensors = {key.removeprefix(prefix): v for key, v in checkpoint.tensors.items() if key.startswith(prefix)}
            part.load_state_dict(tensors | checkpoint.state["parts"].get(name, {}))
        report = checkpoint.state.get("unreported")  # not in checkpoints of version 0.1.0
        self._unreported = None if report is None else unreported.from_json(report)

    def _base_depends_on(self, texts: Sequence[str]) -> dict[str, Any]:
        """What the base policy's entropies depend on."""
        spec = self.experiment
        probe = spec.probe.model_dump(mode="json", exclude={"refresh", "source"})
        how = {"sigmas": self.how.sigmas.tolist(), "storage": spec.rollouts.storage, "precision": spec.precision}
        network = {"model": spec.model.model_dump(mode="json"), "weights": fingerprint(self.model.policy)}
        return {"probe": probe, "prompts": list(texts), **how, **network}

    def _parts(self) -> dict[str, object]:
        named: dict[str, object] = {f"reward-{each.label}": each.reward for each in self.rewards + self.guards}
        plans = self.planner
        named |= {"allocator": plans.allocator, "selector": plans.selector, "tree": plans.tree}
        named |= {"sampler": self.how.sampler, "advantage": self.advantage, "objective": self.objective}
        return named

    def _stateful(self) -> dict[str, Stateful]:
        parts = {"probe": self.probe, "history": self.history, **self._parts()}
        stateful = {name: part for name, part in parts.items() if isinstance(part, Stateful)}
        # A scorer that is a module has weights, but they are not what the run has learned.
        return {name: part for name, part in stateful.items() if not isinstance(part, nn.Module)}

    def _execution(self, steps: int, model: Model | None = None) -> Execution:
        spec, model = self.experiment, model or self.model
        with contracts.blaming("model", spec.model.kind):
            sigmas = model.sigmas(steps).to(self.device)
        contracts.check_sigmas(spec.model.kind, sigmas, steps, spec.model.partial_schedule)
        storage = STORAGE[spec.rollouts.storage]
        return Execution(
            model,
            self._velocity_of(model),
            spec.sampler.build(),
            sigmas,
            spec.rollouts.micro_batch,
            storage,
            keep_velocity=spec.objective.needs_old and spec.objective.process == "reverse",
            predicted_clean=spec.rollouts.decode == "predicted-clean",
        )

    def _velocity_of(self, model: Model) -> Velocity:
        """What a model says, in the run's precision; evaluation may take it at another size than training."""

        def velocity(latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
            with contracts.blaming("model", self.experiment.model.kind), self.accelerator.autocast():
                return model.velocity(latents, sigma, cond).float()

        return velocity

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        with contracts.blaming("model", self.experiment.model.kind):
            return self.model.encode(texts)

    def _sampling(self, doing: str) -> AbstractContextManager[None]:
        """Inside, `rollouts.micro_batch` latents at a time go through the network."""
        return enough_memory(doing, lower("rollouts.micro_batch", self.experiment.rollouts.micro_batch))

    def _few_rollouts(self, doing: str) -> AbstractContextManager[None]:
        """Inside, all rollouts of a step are looked at together."""
        return enough_memory(doing, lower("rollouts.rollouts_per_step", self.experiment.rollouts.rollouts_per_step))

    def _reward_weights(self) -> Tensor:  # (R,)
        return torch.tensor([spec.weight for spec in self.experiment.rewards], device=self.device)


@dataclass(frozen=True)
class Memory:
    """What a step may change before it has learned anything."""

    parts: Mapping[str, Mapping[str, Any]]  # of every part with a state
    generator: Tensor  # torch's global one


class Stopwatch:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Times a block as `stage`."""
        begin = time.perf_counter()
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        self.seconds[stage] = time.perf_counter() - begin


def _describe(scores: dict[str, Tensor], weights: Tensor, rollouts: Rollouts) -> dict[str, float]:
    """Training rewards of a step, every prompt counted once, and the spread inside groups that learning lives on."""
    total = (torch.stack(list(scores.values()), dim=1) * weights).sum(dim=1)
    group = torch.from_numpy(rollouts.plan.group).to(total.device)
    members = [group == prompt for prompt in torch.unique(group)]

    def mean(values: Tensor) -> float:
        return float(torch.stack([values[rows].mean() for rows in members]).mean())

    spread = float(torch.stack([total[rows].std() for rows in members]).mean())
    metrics = {"reward": mean(total), "reward_std": spread}
    return metrics | {f"reward/{label}": mean(values) for label, values in scores.items()}
