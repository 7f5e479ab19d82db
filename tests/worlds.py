"""What the tests of the algorithm run on: two small real models, a smooth reward and experiments around them.

`GaussianSpec` is a closed form: its target is N(m, s^2 I), so the conditional expectation noise - x0, and with it every
marginal of the flow, is known exactly. `write_tiny_shapes` writes an untrained network in the embedded model's format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from aegpo.core.experiment import EvaluationSpec, Experiment
from aegpo.core.parts import ModelSpec, RewardSpec
from aegpo.core.records import AttentionCall, Conditioning, Prompt, RolloutPlan, Signal
from aegpo.core.sections import CheckpointSpec, OptimizerSpec, PolicySpec, PromptsSpec, RolloutsSpec
from aegpo.core.signals import Signals
from aegpo.method.advantages import GroupAdvantage
from aegpo.method.allocators import UniformAllocator
from aegpo.method.objectives import ClippedObjective
from aegpo.method.samplers import FlowSde
from aegpo.method.selectors import UniformSelector
from aegpo.method.signals import EntropySignal, RewardSignal, StepNoiseSignal
from aegpo.method.trees import IndependentTree
from aegpo.models.adapters import add_adapters
from aegpo.models.base_policy import BasePolicy, refuse_unknown
from aegpo.parallel.team import Team
from aegpo.plugin.manager import plugin_manager
from aegpo.prompts.curricula import ShuffleCurriculum
from aegpo.runs.checkpoints import Checkpoint, load_latest
from aegpo.runs.folders import Run
from aegpo.runs.loop import Loop, owes_evaluation
from aegpo.runs.observers import Observers
from aegpo.train.engine import Engine
from aegpo.train.execution import Execution
from aegpo.train.learning import Learner
from aegpo.train.noise import prompt_noise
from aegpo.train.precision import Precision
from aegpo.train.weights import Weights

CPU = torch.device("cpu")


class GaussianField(nn.Module):
    """The exact velocity of the flow from N(0, I) to N(prompt + mean, spread^2 I)."""

    def __init__(self, spread: float, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.spread = spread
        self.mean = nn.Parameter(torch.zeros(shape))

    def forward(self, latents: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        mean, sigma = self.mean + prompt.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        variance = (1 - sigma) ** 2 * self.spread**2 + sigma**2
        slope = (sigma - (1 - sigma) * self.spread**2) / variance
        return slope * (latents - (1 - sigma) * mean) - mean


class GaussianModel:
    """A model whose prompts are numbers: the mean of what it paints."""

    latent_shape = (1, 4, 4)

    def __init__(self, spec: GaussianSpec) -> None:
        self.spec = spec
        self._policy = self._network = GaussianField(spec.spread, self.latent_shape)
        self._base = BasePolicy(self._policy)

    @property
    def policy(self) -> nn.Module:
        return self._policy

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        return Conditioning(torch.tensor([float(prompt.text) for prompt in prompts]).view(-1, 1, 1))

    def sigmas(self, steps: int) -> Tensor:
        return torch.from_numpy(self.spec.sigmas(steps)).float()

    def velocity(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self._network(latents, sigma, cond.text)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().sigmoid().expand(-1, 3, -1, -1)

    @contextmanager
    def frozen(self, name: str) -> Iterator[None]:
        refuse_unknown("gaussian", name)
        with self._base.active() as network:
            before, self._network = self._network, network
            try:
                yield
            finally:
                self._network = before

    @contextmanager
    def tap_attention(self, tap: Callable[[AttentionCall], None]) -> Iterator[None]:
        yield  # there is no attention in it


class GaussianSpec(ModelSpec):
    """A flow with a Gaussian target."""

    kind: Literal["gaussian"] = "gaussian"
    has_captions: ClassVar[bool] = True
    spread: float = 0.5

    def sigmas(self, steps: int):
        return np.linspace(1.0, 0.0, steps + 1)

    def captions(self, split, count, seed):
        start = 0.0 if split == "train" else 0.05
        return tuple(f"{start + 0.1 * index:.2f}" for index in range(count))

    def build(self, device):
        return GaussianModel(self)


class BrightnessReward(RewardSpec):
    """The mean of all pixels."""

    kind: Literal["brightness"] = "brightness"

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


def asked(texts: Iterable[str], **metadata: object) -> list[Prompt]:
    """A prompt for each text, the same one for equal texts."""
    texts = list(texts)
    known = {text: Prompt(index, text, metadata) for index, text in enumerate(dict.fromkeys(texts))}
    return [known[text] for text in texts]


def write_tiny_shapes(folder: Path) -> Path:
    """A random network of 2 layers and width 16 that `ShapesSpec(weights=folder)` loads."""
    from diffusers import SD3Transformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

    words = "a above and background below blue circle circles four green left of on purple red right square squares"
    names = ["<pad>", "<bos>", "<unk>", "<eos>", *words.split(), "three", "triangle", "triangles", "two", "yellow"]
    vocabulary = {word: index for index, word in enumerate(names)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
    core.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=marks)
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>", "eos_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=14, **special)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=24,
            patch_size=4,
            in_channels=3,
            out_channels=3,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=16,
            pos_embed_max_size=6,
            qk_norm="rms_norm",
        )
        text_encoder = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                intermediate_size=32,
                projection_dim=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=14,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=3,
            )
        )
    for part, name in ((tokenizer, "tokenizer"), (text_encoder, "text_encoder"), (transformer, "transformer")):
        part.save_pretrained(folder / name)
    return folder


def small_experiment(model: ModelSpec, **changes: Any) -> Experiment:
    """Flow-GRPO on a small scale: 2 prompts x 4 rollouts x 4 denoising steps, brighter is better."""
    fields: dict[str, Any] = {
        "name": "test",
        "training_steps": 4,
        "device": "cpu",
        "model": model,
        "prompts": PromptsSpec(train_count=8, evaluation_count=4),
        "rollouts": RolloutsSpec(prompts_per_step=2, rollouts_per_step=8, denoising_steps=4),
        "rewards": (BrightnessReward(),),
        "curriculum": ShuffleCurriculum(),
        "allocator": UniformAllocator(),
        "selector": UniformSelector(),
        "tree": IndependentTree(),
        "sampler": FlowSde(),
        "advantage": GroupAdvantage(),
        "objective": ClippedObjective(),
        "signals": SOURCES,
        "evaluation": EvaluationSpec(every=2, images=2),
        "checkpoint": CheckpointSpec(every=2),
    }
    return Experiment(**(fields | changes))


def execution(model: Any, steps: int, sampler: Any = None, micro_batch: int = 64, storage=torch.float32) -> Execution:
    """How `model` executes plans in float32, without an engine around it."""

    def velocity(latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return model.velocity(latents, sigma, cond).float()

    return Execution(model, velocity, sampler or FlowSde(), model.sigmas(steps), micro_batch, storage)


def learner(
    how: Execution,
    objective: Any = None,
    policy: PolicySpec | None = None,
    updates: int = 1000,
    team: Team | None = None,
    **optimizer: Any,
) -> Learner:
    """A learner of the model in `how`, whose base policy is what the model is now, in a run of so many updates."""
    policy = policy or PolicySpec()
    with how.model.frozen("base"):
        pass
    add_adapters(how.model.policy, policy)
    objective, spec = objective or ClippedObjective(), OptimizerSpec(**optimizer)
    weights = Weights(how.model.policy)
    return Learner(how, weights, objective, "tried", spec, policy.ema, Precision("float32", CPU), updates, team)


@dataclass(frozen=True)
class Asked:
    """A policy as sources of signals see it, without an engine around it."""

    how: Execution

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.how.model.latent_shape

    @property
    def sigmas(self) -> Tensor:
        return self.how.sigmas

    @property
    def storage(self) -> torch.dtype:
        return self.how.storage

    @property
    def micro_batch(self) -> int:
        return self.how.micro_batch

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        return self.how.model.encode(prompts)

    def velocity(self, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        return self.how.velocity(latents, sigma, cond)

    def decode(self, latents: Tensor) -> Tensor:
        return self.how.model.decode(latents)

    def shared_out(self, count: int, work: Callable[[slice], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        return tuple(work(slice(0, count)))

    def start_noise(self, prompts: Sequence[Prompt], seed: int, sample: int = 0) -> Tensor:
        return prompt_noise(self.latent_shape, seed, prompts, "signal", sample)

    def base(self) -> Any:
        return self.how.model.frozen("base")

    def tap_attention(self, tap: Callable[[AttentionCall], None]) -> Any:
        return self.how.model.tap_attention(tap)


def signals(step: int, prompts: int, steps: int, **values: Any) -> Signals:
    """Signals of P prompts and T steps, by name with _ for -: (P,) of prompts, (T,) of steps, (P, T) of both."""
    per = {"entropy": "prompt-step", "step_noise": "step"}
    known = {
        name.replace("_", "-"): Signal(per.get(name, "prompt"), np.asarray(each, dtype=np.float64))
        for name, each in values.items()
    }
    return Signals(step, prompts, np.linspace(1, 0, steps + 1), known)


SOURCES = {spec.kind: spec for spec in (EntropySignal(), RewardSignal(), StepNoiseSignal())}


def restore(engine: Engine, checkpoint: Checkpoint) -> None:
    """Gives an engine the state of a checkpoint."""
    engine.load_state_dict(checkpoint.tensors, checkpoint.state)


def run_loop(
    engine: Engine,
    folder: Path,
    observers: Mapping[str, object] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = print,
) -> str:
    """Runs an engine in a folder, from its newest checkpoint if there is one; observers by the name messages use."""
    checkpoint = load_latest(folder / "checkpoints")
    if checkpoint is not None:
        restore(engine, checkpoint)
    experiment = engine.experiment
    run = Run("arm", experiment.seed, experiment, folder)
    info = run.info(0 if checkpoint is None else checkpoint.step, owes_evaluation(checkpoint))
    told = Observers(plugin_manager(), info, say)
    for name, observer in {**(observers or {}), **engine.parts()}.items():
        told.add(name, observer)
    return Loop(engine, info, told).run(should_stop)


def plan_of(tree: Any, counts: Sequence[int], steps: Sequence[Sequence[int]]) -> RolloutPlan:
    """The plan of a tree for (P,) counts and (P, T) zeros and ones."""
    return tree.plan(np.array(counts, dtype=np.int64), np.array(steps, dtype=bool), np.random.default_rng(0))


@contextmanager
def recorded_gradients() -> Iterator[list[list[Tensor]]]:
    """Inside, the gradients each optimizer step is taken with, parameter by parameter."""
    seen: list[list[Tensor]] = []

    def record(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        seen.append([w.grad.clone() if w.grad is not None else torch.zeros_like(w) for w in weights])

    handle = register_optimizer_step_pre_hook(record)
    try:
        yield seen
    finally:
        handle.remove()
