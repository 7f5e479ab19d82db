"""Shards: what three processes write while they go on, any others read, one without a group included."""

from __future__ import annotations

import pickletools
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from teams import failures_in_team
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from aegpo.errors import CheckpointError
from aegpo.parallel.dtensors import own_part, own_slices, sharded, whole
from aegpo.runs.sharded_files import checksum, described, read_into, read_whole, write

pytestmark = pytest.mark.slow
SIZE = 3
SHAPES = {"policy/odd": (7, 3), "policy/few": (2, 5), "ema/one": (5,), "optimizer/odd/exp_avg": (6, 2, 2)}


def of(name: str, seed: int = 0) -> torch.Tensor:
    """A whole tensor, the same in every process."""
    rng = torch.Generator().manual_seed(seed + len(name))
    return torch.randn(SHAPES[name], generator=rng).to(torch.bfloat16 if name.startswith("ema") else torch.float32)


def written(team, folder, tensors):
    sums = {}
    write(folder, tensors, team.aside(), sums.update).wait()
    assert {name.removeprefix("shards/") for name in sums} == {path.name for path in folder.iterdir()}
    return sums


def what_three_wrote_is_read_whole(team, folder):
    mesh = init_device_mesh("cpu", (SIZE,))
    parts = {name: own_part(of(name), distribute_tensor(of(name, 1), mesh, [Shard(0)])) for name in SHAPES}
    sums = written(team, folder / "shards", parts)
    assert all(checksum(folder / name) == value for name, value in sums.items())
    found = read_whole(folder / "shards")
    assert found.keys() == SHAPES.keys()
    assert all(torch.equal(value, of(name)) and value.dtype == of(name).dtype for name, value in found.items())
    assert read_whole(folder / "shards", ["ema"]).keys() == {"ema/one"}


def other_numbers_of_processes_read_their_rows(team, folder):
    """After the first check."""
    team.told("written")
    for ranks in ([0, 1], [2]):
        mesh = DeviceMesh("cpu", ranks)
        if team.place.rank in ranks:
            like = {name: distribute_tensor(of(name, 1), mesh, [Shard(0)]) for name in SHAPES}
            read_into(folder / "shards", like)
            for name, tensor in like.items():
                assert torch.equal(tensor.to_local(), of(name)[own_slices(tensor)])
        team.told("read")


def of_replicas_one_writes(team, folder):
    mesh = init_device_mesh("cpu", (SIZE, 1), mesh_dim_names=("replicas", "shards"))
    block = fully_shard(nn.Linear(4, 6), mesh=mesh)
    torch.manual_seed(5)
    values = {"policy/weight": torch.randn(6, 4), "policy/bias": torch.randn(6)}
    parts = {name: own_part(value, dict(block.named_parameters())[name[7:]]) for name, value in values.items()}
    written(team, folder / "replicas", parts)
    names = [name for path in (folder / "replicas").iterdir() for name in load_file(path)]
    assert sorted(names) == ["policy/bias", "policy/weight"]
    assert all(torch.equal(value, values[name]) for name, value in read_whole(folder / "replicas").items())


def training_goes_on_meanwhile(team, folder):
    """What is written is what was there when it began; and the optimizer's moments are written and read as weights."""
    torch.manual_seed(3)
    block = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5))
    fully_shard(block[0])
    fully_shard(block, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1)

    def step():
        block(torch.ones(2, 5) * (1 + team.place.rank)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def state():
        names = [name for name, _ in block.named_parameters()]
        moments = optimizer.state_dict()["state"]
        found = {f"policy/{name}": weight.detach() for name, weight in block.named_parameters()}
        return found | {f"optimizer/{names[i]}/{key}": v for i, each in moments.items() for key, v in each.items()}

    step()
    before, parts = {name: whole(value).clone() for name, value in state().items()}, sharded(state())
    assert {name.rsplit("/", 1)[1] for name in state().keys() - parts.keys()} == {"step"}
    sums = {}
    writing = write(folder / "async", parts, team.aside(), sums.update)
    for _ in range(20):
        step()
    team.told("trained on")
    writing.wait()
    assert writing.done()
    assert len(sums) == 2 * SIZE
    found = read_whole(folder / "async")
    assert found.keys() == parts.keys()
    assert all(torch.equal(value, before[name]) for name, value in found.items())
    assert not torch.equal(whole(state()["policy/0.weight"]), found["policy/0.weight"])
    read_into(folder / "async", parts)  # into the weights themselves
    assert torch.equal(whole(state()["policy/0.weight"]), found["policy/0.weight"])


def who_cannot_write_is_told_to_all(team, folder):
    mesh = init_device_mesh("cpu", (SIZE,))
    (folder / "refused").mkdir(exist_ok=True)
    if team.place.rank == 1:
        (folder / "refused" / "shard-00002-model-00001-of-00001.safetensors").mkdir()
    team.told("in the way")
    with pytest.raises(IsADirectoryError):
        written(team, folder / "refused", {"policy/odd": distribute_tensor(of("policy/odd"), mesh, [Shard(0)])})


CHECKS = (
    what_three_wrote_is_read_whole,
    other_numbers_of_processes_read_their_rows,
    of_replicas_one_writes,
    training_goes_on_meanwhile,
    who_cannot_write_is_told_to_all,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Where the checks worked, and what failed."""
    folder = tmp_path_factory.mktemp("shards")
    return folder, failures_in_team(SIZE, CHECKS, folder)


@pytest.fixture
def shards(made):
    return made[0] / "shards"


@pytest.mark.parametrize("name", [check.__name__ for check in CHECKS])
def test_in_a_team_of_three(made, name):
    assert name not in made[1], "\n".join(made[1][name])


def test_a_process_without_a_group_reads_what_three_wrote(shards):
    assert not dist.is_initialized()
    found = read_whole(shards)
    assert all(torch.equal(found[name], of(name)) for name in SHAPES)
    into = {"policy/odd": torch.zeros(7, 3)}
    read_into(shards, into)
    assert torch.equal(into["policy/odd"], of("policy/odd"))


def test_nothing_is_pickled(shards):
    names = sorted(path.name for path in (shards).iterdir())
    assert names == [f"shard-0000{r}-model-0000{p}-of-00003.safetensors" for r in (1, 2, 3) for p in (1, 2, 3)]
    for path in (shards).iterdir():
        with pytest.raises(ValueError, match=r"opcode|pickle"):
            list(pickletools.genops(path.read_bytes()))


def test_shards_that_are_not_all_of_a_tensor_are_refused(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "shards")
    (tmp_path / "shards" / "shard-00001-model-00003-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"shards holds \d+ of the \d+ numbers of 'policy/\w+', and 0 parts twice"
    ):
        described(tmp_path / "shards")
    other = shards / "shard-00002-model-00003-of-00003.safetensors"
    shutil.copy(other, tmp_path / "shards" / "x.safetensors")
    with pytest.raises(CheckpointError, match="and 1 parts twice"):
        described(tmp_path / "shards")
    (tmp_path / "shards" / "x.safetensors").write_bytes(b"none")
    with pytest.raises(CheckpointError, match="shards cannot be read"):
        described(tmp_path / "shards")
    with pytest.raises(CheckpointError, match="shards cannot be read"):
        read_into(tmp_path / "shards", {"policy/odd": torch.zeros(7, 3)})


def test_what_is_not_sharded_is_left_alone():
    plain = torch.ones(2)
    assert whole(plain) is plain
    assert own_part(plain, torch.zeros(2)) is plain
    assert sharded({"x": plain}) == {}
