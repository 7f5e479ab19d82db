"""Sharded weights on one GPU: what a mesh of one process holds, by phase, beside what `aegpo check` says by arithmetic.

A mesh of one has all of it, so that nothing becomes smaller; but what is gathered comes on top, in the dtype it is
gathered in, and is given back, as on many GPUs. What a GPU of eight holds follows by division.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from aegpo.core.experiment import Experiment
from aegpo.core.phases import phases
from aegpo.core.processes import Place
from aegpo.core.records import Conditioning, Prompt
from aegpo.models.adapters import add_adapters
from aegpo.models.pipeline.loading import DTYPES
from aegpo.models.pipeline.model import PipelineModel
from aegpo.models.pipeline.options import PipelineOptions
from aegpo.parallel.dtensors import whole
from aegpo.parallel.link import Link
from aegpo.parallel.sharding import Gather, Sharding
from aegpo.parallel.team import Team
from aegpo.runs.sharded_files import SHARDS, read_into, write
from aegpo.train.optimizers import make_optimizer
from gpu_sections.networks import flux, random_weights
from gpu_sections.sections import Job, Row, Value
from gpu_sections.steps import GiB, Subject, now, opened

SHARE = 0.15  # of FLUX's blocks: 3 of 19 and 6 of 38, 2 billion weights
NEAR = 0.1  # how far a measured phase may be from what is said of it, as a share
OFF = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # how far a velocity of gathered weights may be, as a share
FULL = Subject("flux_aegpo", "aegpo", flux)


@dataclass(frozen=True)
class Subjected:
    """A model on the device and what it is asked."""

    experiment: Experiment
    model: PipelineModel
    cond: Conditioning  # of one prompt

    def velocity(self, latents: int) -> Tensor:
        """Of so many noises, the same in every call."""
        device = self.cond.text.device
        noise = torch.randn((latents, *self.model.latent_shape), generator=torch.Generator().manual_seed(0)).to(device)
        rows = torch.zeros(latents, dtype=torch.long, device=device)
        return self.model.velocity(noise, self.model.sigmas(4)[1].expand(latents), self.cond.select(rows))


def sharded(job: Job) -> Iterator[Row]:
    """FLUX with fewer blocks, fine-tuned in full, over a mesh of one process, gathered both ways; a checkpoint."""
    with random_weights(job.device, job.dry), _team(job) as team:
        for gather in ("sampling", "never"):
            yield from _gathering(job, team, gather)
            gc.collect()
            if job.device == "cuda":
                torch.cuda.empty_cache()


@contextmanager
def _team(job: Job) -> Iterator[Team]:
    """One process that sends to itself: by NCCL, or by gloo where there is no GPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = Place(address="127.0.0.1", port=free.getsockname()[1])
    team = Team(place, Link(place), 1)
    team.use(2, torch.device(job.device))
    yield team
    team.leave()


def _gathering(job: Job, team: Team, gather: Gather) -> Iterator[Row]:
    subject, loading = _loaded(job)
    spec, policy = subject.experiment.model, subject.model.policy
    assert isinstance(spec, PipelineOptions)
    computes_in = DTYPES[spec.dtype]
    with torch.no_grad():
        before = subject.velocity(1)
    sharding = Sharding(team, team.mesh(1), gather)
    sharding.spread("policy", policy, computes_in)
    subject.model.shard_base(lambda base: sharding.spread("base", base, computes_in))
    told: dict[str, Value] = {
        "gather": gather,
        "backend": "gloo" if job.dry else "nccl",
        "weights_millions": round(sum(weight.numel() for weight in policy.parameters()) / 1e6, 1),
        "gathered_in": str(computes_in).removeprefix("torch."),
    }
    with torch.no_grad():
        after = subject.velocity(1)
    off = float((after - before).norm() / before.norm())
    yield {"what": "velocity", **told, "off": round(off, 7), "at_most": OFF[computes_in], "ok": off <= OFF[computes_in]}
    yield {"what": "loading", **told, "gib": _gib(loading), "said_gib": None, "ratio": None, "ok": None}
    footprint = spec.footprint(subject.experiment)
    assert footprint is not None
    assert footprint.shares is not None
    said = phases(footprint, 1, "sharded", gather=gather)
    assert said is not None
    most = _training(job, subject, sharding)
    yield {"what": "training", **told, **_beside(most, said.training)}
    most, kept = _sampling(job, subject, sharding)
    yield {"what": "sampling", **told, **_beside(most, said.sampling)}
    if gather == "sampling":
        yield {"what": "gathered", **told, **_beside(kept, footprint.shares.network)}
        yield _saved(job, subject, told)


def _loaded(job: Job) -> tuple[Subjected, int | None]:
    """The model with all weights trained and its frozen copy, and the bytes that it took at most to get there."""
    pipeline = FULL.make(job.dry, SHARE)
    experiment = opened(job, FULL, pipeline, {"policy.train": "full", "model.gradient_checkpointing": True})
    spec, device = experiment.model, torch.device(job.device)
    _reset(job)
    model = spec.build(device)
    assert isinstance(model, PipelineModel)
    add_adapters(model.policy, experiment.policy)
    with model.frozen("base"):
        pass  # now it is copied
    cond = model.encode([Prompt(0, "a red circle")])
    return Subjected(experiment, model, cond), _peak(job)


def _training(job: Job, subject: Subjected, sharding: Sharding) -> int | None:
    """Bytes held at most while a state is learned from, with moments that are there already."""
    weights = [weight for weight in subject.model.policy.parameters() if weight.requires_grad]
    optimizer, rows, most = (
        make_optimizer(weights, subject.experiment.optimizer),
        subject.experiment.largest_batch,
        None,
    )
    for _ in range(2):  # the first step makes the moments
        _reset(job)
        with sharding.in_lockstep(1, lambda: None):
            subject.velocity(rows).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        most = _peak(job)
        optimizer.zero_grad(set_to_none=True)
        sharding.changing()
    return most


@torch.no_grad()
def _sampling(job: Job, subject: Subjected, sharding: Sharding) -> tuple[int | None, int]:
    """Bytes held at most while the policy samples, then its base; and those that stay gathered of the policy."""
    rows, before = subject.experiment.rollouts.latents_at_once, _alive()
    _reset(job)
    subject.velocity(rows)
    kept = _alive() - before
    with subject.model.frozen("base"):
        subject.velocity(rows)
    sharding.changing()
    return _peak(job), kept


def _alive() -> int:
    """Bytes of all tensors that are there."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if type(each) in (Tensor, Parameter):
            storage = each.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _beside(found: int | None, said: int) -> Row:
    """What was measured, if it was, beside what is said of it."""
    ratio = None if found is None else found / said
    near = None if ratio is None else abs(ratio - 1) <= NEAR
    return {"gib": _gib(found), "said_gib": _gib(said), "ratio": None if ratio is None else round(ratio, 4), "ok": near}


def _saved(job: Job, subject: Subjected, told: Row) -> Row:
    """Sharded tensors where they are, written as a checkpoint has them, and read into others."""
    found = {f"policy/{name}": weight.detach() for name, weight in subject.model.policy.named_parameters()}
    tensors = {name: each for name, each in found.items() if isinstance(each, DTensor)}
    assert tensors.keys() == found.keys()
    group, folder, begin = dist.group.WORLD, job.folder / SHARDS, now(job.device)
    assert group is not None
    writing = write(folder, tensors, group)
    returned = now(job.device) - begin
    files = len(writing.sums())
    seconds = {"goes_on_after_seconds": round(returned, 2), "seconds": round(now(job.device) - begin, 2)}
    read = {name: torch.zeros_like(each) for name, each in tensors.items()}
    read_into(folder, read)
    same = all(whole(read[name]).equal(whole(each)) for name, each in tensors.items())
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {"what": "checkpoint", **told, "gib": round(size / GiB, 3), "files": files, **seconds, "ok": same}


def _reset(job: Job) -> None:
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(job: Job) -> int | None:
    return torch.cuda.max_memory_allocated() if job.device == "cuda" else None


def _gib(size: int | None) -> float | None:
    return None if size is None else round(size / GiB, 3)
