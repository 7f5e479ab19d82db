"""Trains the embedded text-to-image model from scratch with flow matching: the only source of the shipped weights.

    python tools/train_shapes.py --out runs/shapes --steps 4000 --cooldown 1 --batch 16 --lesson 1000 \\
        --noise-shift 1 --compile
    python tools/train_shapes.py --out runs/shapes --steps 13000 --cooldown 3500 --noise-shift 1 --compile \\
        --wrong colour=0.02 shape=0.04 count=0.12 relation=0.15 background=0.1
    python tools/train_shapes.py --out runs/shapes --steps 18500 --cooldown 5500 --noise-shift 0.5 --compile \\
        --learning-rate 1e-3 --wrong colour=0.015 shape=0.03 count=0.06 relation=0.1 background=0.06

The first command teaches relations one after another, from captions that are right; the others go on with captions of
every kind that are sometimes wrong, as those of the web are, so that the model half-knows what it could paint.

Resumes from OUT if it holds a checkpoint, also with another --steps: the learning rate is constant after a warm-up and
falls linearly to zero over the last --cooldown steps, so a run can be lengthened before its cooldown begins. Every
process owns one thread and one shard of the data; parameters are averaged every --average-every steps, which on a CPU
is faster than averaging gradients. Writes OUT/curve.jsonl, OUT/samples-STEP.png and OUT/weights/ (averaged weights in
half precision, the folder `aegpo/models/shapes/weights`).
"""

from __future__ import annotations

import json
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from train_shapes_options import Options, parse_arguments
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast
from wrong_captions import shown

from aegpo.models.shapes.captions import COLOURS, COUNTS, KINDS, RELATIONS, SHAPES, captions, scenes
from aegpo.models.shapes.rendering import SIZE, render

SPECIAL = ("<pad>", "<bos>", "<unk>", "<eos>")
LONGEST = 14  # "a green square left of a yellow triangle on a blue background" and two marks
WIDTH = 128
KIND_SHARES = {"count": 0.18, "pair": 0.18, "relation": 0.40, "mixed": 0.24}
LESSON_SHARES = {"count": 0.03, "pair": 0.04, "relation": 0.90, "mixed": 0.03}  # while relations are added
PREVIEW = 12


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the grammar, padded to the longest caption."""
    words = {*COUNTS, *COLOURS, *SHAPES, *(shape + "s" for shape in SHAPES), "and", "on", "background"}
    words |= {word for relation in RELATIONS for word in relation.split()}
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *sorted(words)))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])]
    core.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=marks)
    pad, bos, unk, eos = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, bos_token=bos, unk_token=unk, eos_token=eos, model_max_length=LONGEST
    )


class ShapesNetwork(nn.Module):
    """Transformer and text encoder together, as they are trained."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.transformer = SD3Transformer2DModel(
            sample_size=SIZE,
            patch_size=4,
            in_channels=3,
            out_channels=3,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=SIZE // 4,
            qk_norm="rms_norm",
        )
        self.text_encoder = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=LONGEST,
                pad_token_id=SPECIAL.index("<pad>"),
                bos_token_id=SPECIAL.index("<bos>"),
                eos_token_id=SPECIAL.index("<eos>"),
            )
        )
        self._zero_modulation()

    def _zero_modulation(self) -> None:
        """DiT's zero initialisation, which diffusers leaves out: every block starts as the identity."""
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and (
                name.endswith(("norm1.linear", "norm1_context.linear")) or name in ("norm_out.linear", "proj_out")
            ):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, latents: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        text = self.text_encoder(input_ids=tokens)
        output = self.transformer(latents, text.last_hidden_state, text.text_embeds, sigma * 1000, return_dict=False)
        velocity: Tensor = output[0]
        return velocity


class Batches:
    """Endless training batches, a pure function of (seed, rank, step)."""

    def __init__(self, options: Options, tokenizer: PreTrainedTokenizerFast) -> None:
        self.options = options
        self.pools = scenes("train")
        related = self.pools["relation"]
        self.related = {word: [i for i, s in enumerate(related) if s.relation == word] for word in RELATIONS}
        self.tokens = {kind: encode(tokenizer, [s.caption for s in pool]) for kind, pool in self.pools.items()}
        self.nothing = encode(tokenizer, [""])[0]

    def relation(self, step: int, rng: np.random.Generator) -> str:
        """The relation of one picture. A lesson has one more than the one before it, which half of its pictures have.

        Where an object lies depends on the relation and on which of the two is named first, and on neither alone: with
        all relations from the start there is hardly a gradient to either, and 280,000 pictures taught none.
        """
        if not self.teaches(step):
            return RELATIONS[int(rng.integers(len(RELATIONS)))]
        newest = step // self.options.lesson
        return RELATIONS[newest if rng.random() < 0.5 else int(rng.integers(newest + 1))]

    def teaches(self, step: int) -> bool:
        """True during the lessons at the beginning."""
        return step < self.options.lesson * len(RELATIONS)

    def at(self, step: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clean latents, noise, sigma and caption tokens of one step."""
        rng = np.random.default_rng((self.options.seed, rank, step))
        shares = LESSON_SHARES if self.teaches(step) else KIND_SHARES
        kinds = rng.choice(len(KINDS), size=self.options.batch, p=[shares[kind] for kind in KINDS])
        images, tokens = [], []
        for kind in (KINDS[index] for index in kinds):
            which = int(rng.integers(len(self.pools[kind])))
            if kind == "relation":
                which = int(rng.choice(self.related[self.relation(step, rng)]))
            images.append(render(shown(self.pools[kind][which], self.options.rates, rng), rng))
            tokens.append(self.nothing if rng.random() < self.options.caption_dropout else self.tokens[kind][which])
        clean = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) * 2 - 1
        noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype=np.float32))
        logit = self.options.noise_shift + rng.standard_normal(len(images), dtype=np.float32)
        sigma = torch.sigmoid(torch.from_numpy(logit))
        return clean.contiguous(), noise, sigma, torch.stack(tokens)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:  # (B, LONGEST) int64
    return torch.tensor(tokenizer(texts, padding="max_length", max_length=LONGEST)["input_ids"])


def rate_factor(step: int, options: Options) -> float:
    """Warm-up, plateau, linear cooldown."""
    return min(1.0, (step + 1) / 300, (options.steps - step) / max(1, options.cooldown))


def average(network: nn.Module) -> None:
    """Replaces every process's parameters by their mean."""
    flat = torch.cat([weight.data.flatten() for weight in network.parameters()])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for weight in network.parameters():
        weight.data.copy_(flat[start : start + weight.numel()].view_as(weight))
        start += weight.numel()


@torch.no_grad()
def sample(network: nn.Module, tokens: Tensor, steps: int, seed: int) -> Tensor:  # (B, 3, SIZE, SIZE) in [0, 1]
    """Euler from sigma 1 to 0 in equal steps."""
    latents = torch.randn(len(tokens), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    sigmas = torch.linspace(1, 0, steps + 1)
    for sigma, following in pairwise(sigmas):
        latents = latents + (following - sigma) * network(latents, sigma.expand(len(tokens)), tokens)
    return ((latents + 1) / 2).clamp(0, 1)


def save_grid(images: Tensor, path: Path) -> None:
    """Tiles images into one row, enlarged without smoothing."""
    tiles = [np.pad(tile, ((1, 1), (1, 1), (0, 0))) for tile in images.permute(0, 2, 3, 1).numpy()]
    pixels = Image.fromarray((np.concatenate(tiles, axis=1) * 255).round().astype(np.uint8))
    pixels.resize((pixels.width * 4, pixels.height * 4), Image.Resampling.NEAREST).save(path)


def export(network: ShapesNetwork, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the three `from_pretrained` folders in half precision."""
    half = {name: value.half() for name, value in network.state_dict().items()}
    for part in ("transformer", "text_encoder"):
        module = getattr(network, part)
        state = {name.removeprefix(f"{part}."): value for name, value in half.items() if name.startswith(f"{part}.")}
        if part == "transformer":
            copy = type(module).from_config(module.config)
            copy.load_state_dict(state)
            copy.half().save_pretrained(folder / part)
        else:
            module.save_pretrained(folder / part, state_dict=state)
    tokenizer.save_pretrained(folder / "tokenizer")


class Trainer:
    """The state of one process: network, averaged copy, optimizers, step."""

    def __init__(self, rank: int, options: Options) -> None:
        torch.manual_seed(options.seed)
        self.rank, self.options = rank, options
        self.tokenizer = new_tokenizer()
        self.network = ShapesNetwork(len(self.tokenizer))
        self.averaged = ShapesNetwork(len(self.tokenizer))
        self.averaged.load_state_dict(self.network.state_dict())
        self.optimizer = torch.optim.AdamW(self.network.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.images, self.seconds = 0, 0, 0.0
        self.file = options.out / f"state-{rank}.pt"
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.averaged.load_state_dict(state["averaged"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        if options.compile:
            self.network.compile()

    def save(self) -> None:
        """Writes the resumable state of this process, and from the first one the weights and a picture."""
        state: dict[str, Any] = {"network": self.network.state_dict(), "averaged": self.averaged.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "images": self.images, "seconds": self.seconds}
        torch.save(state, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").replace(self.file)
        if self.rank == 0:
            export(self.averaged, self.tokenizer, self.options.out / "weights")
            tokens = encode(self.tokenizer, list(captions("evaluation", PREVIEW)))
            save_grid(sample(self.averaged, tokens, 10, seed=0), self.options.out / f"samples-{self.step:06d}.png")

    def advance(self, batches: Batches) -> float:
        """One optimizer step; returns the loss."""
        clean, noise, sigma, tokens = batches.at(self.step, self.rank)
        level = sigma.view(-1, 1, 1, 1)
        velocity = self.network((1 - level) * clean + level * noise, sigma, tokens)
        loss = F.mse_loss(velocity, noise - clean)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = self.options.learning_rate * rate_factor(self.step, self.options)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.images += self.options.batch * self.options.processes
        if self.step % self.options.average_every == 0 and self.options.processes > 1:
            average(self.network)
        if self.step % self.options.average_every == 0:
            decay = min(self.options.ema, (1 + self.step) / (10 + self.step)) ** self.options.average_every
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - decay)
        return float(loss.detach())


def train(rank: int, options: Options) -> None:
    """One process's whole run."""
    torch.set_num_threads(1)
    if options.processes > 1:
        store = dist.FileStore(str(options.out / "rendezvous"), options.processes)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=options.processes)
    trainer = Trainer(rank, options)
    batches = Batches(options, trainer.tokenizer)
    recent: list[float] = []
    before = time.perf_counter()
    while trainer.step < options.steps:
        recent.append(trainer.advance(batches))
        if trainer.step % 200 == 0:
            trainer.seconds += time.perf_counter() - before
            before = time.perf_counter()
            if rank == 0:
                row: dict[str, float] = {"step": trainer.step, "images": trainer.images}
                row |= {"loss": round(float(np.mean(recent)), 5), "seconds": round(trainer.seconds, 1)}
                with (options.out / "curve.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)
            if not math.isfinite(recent[-1]):
                raise SystemExit(f"the loss is {recent[-1]} at step {trainer.step}")
            recent.clear()
        if trainer.step % options.save_every == 0 or trainer.step == options.steps:
            trainer.save()
    if options.processes > 1:
        dist.destroy_process_group()


def main() -> None:
    options = parse_arguments(__doc__)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "rendezvous").unlink(missing_ok=True)
    if options.processes == 1:
        train(0, options)
    else:
        spawn(train, args=(options,), nprocs=options.processes)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
