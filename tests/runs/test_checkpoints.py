import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from aegpo.errors import CheckpointError
from aegpo.runs.checkpoints import Checkpoint, load_latest, load_step, save

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.complex64,
]


def checkpoint(step, value=0.0):
    tensors = {
        "policy/weight": torch.full((3, 2), value + step),
        "optimizer/weight/exp_avg": torch.arange(4.0) * step,
        "rng/torch": torch.get_rng_state(),
    }
    return Checkpoint(step, tensors, {"updates": step, "parts": {"allocator": {"seen": [1, 2]}}})


def same(left, right):
    return (
        left.step == right.step
        and left.state == right.state
        and left.tensors.keys() == right.tensors.keys()
        and all(torch.equal(left.tensors[name], right.tensors[name]) for name in left.tensors)
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    bits = torch.randint(0, 2, (5, 16), dtype=torch.uint8)
    tensor = bits.bool() if dtype is torch.bool else torch.randint(0, 256, (5, 16), dtype=torch.uint8).view(dtype)
    save(tmp_path, Checkpoint(1, {"policy/x": tensor}, {}), keep=1)
    loaded = load_latest(tmp_path).tensors["policy/x"]
    assert loaded.dtype == dtype
    assert loaded.shape == tensor.shape
    assert torch.equal(loaded.view(torch.uint8), tensor.view(torch.uint8))


def test_scalars_empty_tensors_views_and_tied_weights_come_back(tmp_path):
    weight = torch.randn(4, 6, requires_grad=True)
    tensors = {
        "policy/scalar": torch.tensor(0.1, dtype=torch.float64),
        "policy/empty": torch.zeros(0, 3),
        "policy/weight": weight,
        "policy/tied": weight,
        "policy/transposed": weight.t(),
        "policy/rows": weight[1:3],
    }
    save(tmp_path, Checkpoint(7, tensors, {}), keep=1)
    loaded = load_latest(tmp_path)
    assert loaded.step == 7
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded.tensors[name].shape == tensor.shape
        assert torch.equal(loaded.tensors[name], tensor), name


def test_a_checkpoint_without_tensors_or_state_comes_back(tmp_path):
    save(tmp_path, Checkpoint(3, {}, {}), keep=1)
    assert load_latest(tmp_path) == Checkpoint(3, {}, {})


def test_state_keeps_floats_and_big_integers_exactly(tmp_path):
    state = {"float": 0.1 + 0.2, "rng": 2**127 - 1, "none": None, "nested": {"list": [1, "two", False]}}
    save(tmp_path, Checkpoint(3, {}, state), keep=1)
    assert load_latest(tmp_path).state == state


def test_each_prefix_has_a_file_of_its_own_and_nothing_is_pickled(tmp_path):
    path = save(tmp_path, checkpoint(10), keep=2)
    assert path == tmp_path / "step-000010"
    assert names(path) == [
        "checksums.json",
        "optimizer.safetensors",
        "policy.safetensors",
        "rng.safetensors",
        "state.json",
    ]


def test_a_sparse_tensor_is_an_error_that_leaves_the_last_checkpoint(tmp_path):
    save(tmp_path, checkpoint(1), keep=1)
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(CheckpointError, match=r"'part/reward/x' has the layout .*; only dense"):
        save(tmp_path, Checkpoint(2, {"part/reward/x": sparse}, {}), keep=1)
    assert load_latest(tmp_path).step == 1


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from aegpo.runs.checkpoints import Checkpoint, save
from aegpo.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # no file may grow beyond
tensors = {"policy/w": torch.zeros(int(sys.argv[2]))}
try:
    save(Path(sys.argv[1]), Checkpoint(2, tensors, {"text": "x" * int(sys.argv[3])}), keep=1)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize(("weights", "letters"), [(100_000, 1), (1, 100_000)], ids=["tensors", "state"])
def test_a_disk_that_takes_no_more_is_an_error_that_leaves_the_last_checkpoint(tmp_path, weights, letters):
    save(tmp_path, checkpoint(1), keep=1)
    words = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(weights), str(letters)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stdout.startswith(f"the checkpoint of step 2 cannot be written to {tmp_path}: "), done.stderr
    assert "File too large" in done.stdout
    assert done.stdout.endswith(
        "; checkpoints that are there: 1; make room or mend the disk, then give the same command again\n"
    )
    assert names(tmp_path) == ["step-000001"]
    assert load_latest(tmp_path, report=pytest.fail).step == 1


def test_no_folder_and_an_empty_folder_mean_no_checkpoint(tmp_path):
    assert load_latest(tmp_path / "none") is None
    assert load_latest(tmp_path) is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        save(tmp_path, checkpoint(step), keep=2)
    assert names(tmp_path) == ["step-000015", "step-000020"]
    assert load_latest(tmp_path).step == 20


def test_steps_of_more_than_six_digits_are_ordered_as_numbers(tmp_path):
    save(tmp_path, checkpoint(999_999), keep=2)
    save(tmp_path, checkpoint(1_000_000), keep=2)
    assert load_latest(tmp_path).step == 1_000_000


def test_checkpoints_of_a_future_that_was_given_up_are_deleted(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, checkpoint(step), keep=3)
    save(tmp_path, checkpoint(10, value=0.5), keep=1)
    assert names(tmp_path) == ["step-000010"]
    assert same(load_latest(tmp_path), checkpoint(10, value=0.5))


def cut_short(path):
    file = path / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path):
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def edit_state(path):
    (path / "state.json").write_text((path / "state.json").read_text().replace("10", "11"))


DAMAGES = {
    "policy.safetensors has a wrong checksum": cut_short,
    "optimizer.safetensors has a wrong checksum": flip_a_bit,
    "state.json has a wrong checksum": edit_state,
    "rng.safetensors is missing": lambda path: (path / "rng.safetensors").unlink(),
    "checksums.json is missing": lambda path: (path / "checksums.json").unlink(),
    "checksums.json cannot be read": lambda path: (path / "checksums.json").write_text('{"form'),
    "checksums.json is not of format 1": lambda path: (path / "checksums.json").write_text('{"format": 2}'),
    "checksums.json lists no checksums": lambda path: (path / "checksums.json").write_text('{"format": 1}'),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path, message):
    save(tmp_path, checkpoint(5), keep=2)
    DAMAGES[message](save(tmp_path, checkpoint(10), keep=2))
    reports = []
    assert same(load_latest(tmp_path, report=reports.append), checkpoint(5))
    assert len(reports) == 1
    assert "step-000010" in reports[0]
    assert message in reports[0]


def test_damage_is_a_warning_where_nobody_asked_for_reports(tmp_path):
    save(tmp_path, checkpoint(5), keep=2)
    cut_short(save(tmp_path, checkpoint(10), keep=2))
    with pytest.warns(UserWarning, match="damaged and passed over"):
        load_latest(tmp_path)


def test_if_all_are_damaged_the_error_names_each_and_the_way_out(tmp_path):
    for step in (5, 10):
        cut_short(save(tmp_path, checkpoint(step), keep=2))
    with pytest.raises(CheckpointError) as caught:
        load_latest(tmp_path, report=lambda line: None)
    message = str(caught.value)
    assert "step-000010: policy.safetensors has a wrong checksum" in message
    assert "step-000005: policy.safetensors has a wrong checksum" in message
    assert message.endswith("put back an intact one, or start the run over with --fresh")


def test_a_checkpoint_of_another_run_is_as_good_as_damaged(tmp_path):
    mine, other = ({"arm": "grpo", "seed": seed, "experiment": "a" * 64} for seed in (0, 1))
    save(tmp_path, dataclasses.replace(checkpoint(5), run=mine), keep=2)
    save(tmp_path, dataclasses.replace(checkpoint(10), run=other), keep=2)
    reports = []
    loaded = load_latest(tmp_path, report=reports.append, run=mine)
    assert loaded.step == 5
    assert "step-000010: state.json is of another run, arm 'grpo', seed 1, experiment aaaaaaaa; this" in reports[0]
    with pytest.raises(CheckpointError, match="is of another run"):
        load_step(tmp_path, 10, run=mine)
    assert load_step(tmp_path, 10, run=other).step == 10
    save(tmp_path, checkpoint(15), keep=2)  # as versions wrote it that noted no run
    assert load_latest(tmp_path, run=mine).step == 15


def test_a_checkpoint_under_the_name_of_another_step_or_without_one_of_its_files_is_damaged(tmp_path):
    save(tmp_path, checkpoint(5), keep=2).rename(tmp_path / "step-000007")
    with pytest.raises(CheckpointError, match=r"state\.json is of step 5"):
        load_step(tmp_path, 7)
    path = save(tmp_path / "other", checkpoint(5), keep=2)
    (path / "rng.safetensors").unlink()
    sums = json.loads((path / "checksums.json").read_text())
    del sums["sha256"]["rng.safetensors"]
    (path / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match=r"rng\.safetensors is missing"):
        load_step(tmp_path / "other", 5)


def test_strangers_files_among_checkpoints_are_left_alone(tmp_path):
    for name in ("step-000007", "step-abc", ".x.tmp"):
        (tmp_path / name).write_text("x")
    save(tmp_path, checkpoint(5), keep=1)
    assert load_latest(tmp_path).step == 5
    assert names(tmp_path) == [".x.tmp", "step-000005", "step-000007", "step-abc"]
    with pytest.raises(CheckpointError, match="is a file where the checkpoint of step 7 goes; move it"):
        save(tmp_path, checkpoint(7), keep=1)


def test_a_damaged_checkpoint_can_be_written_again(tmp_path):
    save(tmp_path, checkpoint(5), keep=2)
    cut_short(save(tmp_path, checkpoint(10), keep=2))
    save(tmp_path, checkpoint(10), keep=2)
    assert names(tmp_path) == ["step-000005", "step-000010"]
    assert same(load_latest(tmp_path), checkpoint(10))


def test_a_crash_between_moving_the_old_away_and_the_new_in_place_leaves_the_old(tmp_path):
    path = save(tmp_path, checkpoint(10), keep=1)
    path.rename(tmp_path / ".replaced-step-000010")
    assert same(load_latest(tmp_path), checkpoint(10))
    save(tmp_path, checkpoint(20), keep=1)
    assert names(tmp_path) == ["step-000020"]


def test_leftovers_of_a_writer_that_died_are_ignored_and_cleaned(tmp_path):
    save(tmp_path, checkpoint(5), keep=2)
    half = tmp_path / ".step-000010.tmp"
    half.mkdir()
    (half / "policy.safetensors").write_bytes(b"half")
    assert load_latest(tmp_path).step == 5
    save(tmp_path, checkpoint(10), keep=2)
    assert names(tmp_path) == ["step-000005", "step-000010"]


WRITER = """
import sys
from pathlib import Path
import torch
from aegpo.runs.checkpoints import Checkpoint, load_latest, load_step, save
torch.set_num_threads(1)
folder = Path(sys.argv[1])
latest = load_latest(folder, report=lambda line: sys.exit("damaged: " + line))
first = 0 if latest is None else latest.step
print(first, flush=True)
for step in range(first + 1, 10**6):
    names = [f"{prefix}/{index}" for prefix in ("policy", "optimizer") for index in range(9)]
    tensors = {name: torch.full((64, 64), float(step)) for name in names}
    for _ in range(2):  # the second one replaces the first
        save(folder, Checkpoint(step, tensors, {"step": step}), keep=1)
"""


@pytest.mark.slow
def test_a_writer_killed_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    last = 0
    for attempt in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert int(writer.stdout.readline()) >= last
        time.sleep(0.3 + 0.0137 * attempt)  # hundreds of saves, ended in the middle of one
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        found = load_latest(tmp_path, report=pytest.fail)
        assert found.step == found.state["step"] > last
        assert all(bool((tensor == found.step).all()) for tensor in found.tensors.values())
        last = found.step


def test_a_state_that_is_no_json_is_refused_before_anything_is_replaced(tmp_path):
    save(tmp_path, checkpoint(5), keep=1)
    with pytest.raises(TypeError):
        save(tmp_path, Checkpoint(5, {}, {"x": object()}), keep=1)
    assert json.loads((tmp_path / "step-000005" / "state.json").read_text())["step"] == 5
