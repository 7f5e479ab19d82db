"""What `aegpo check --gpus N` says of one run on several GPUs, and that without it nothing is said."""

from __future__ import annotations

import json

import command_line
import pytest
from repository import ROOT

from aegpo.commands.footprints import gradient_sums
from aegpo.parallel.team import MOST_SUMMED_BY_TREE

ABLATION = str(ROOT / "experiments" / "ablation.yaml")
COMPARING = "rewards=[{kind: diversity, name: spread}]"


def check(*options: str) -> tuple[dict[str, list[str]], command_line.Done]:
    """The rows of the table by arm, and what was printed."""
    done = command_line.aegpo("check", ABLATION, *options)
    assert done.code == 0, done.stderr
    lines = done.stdout.partition("One run on")[2].splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    return {arm: cells for arm, *cells in rows}, done


def test_check_shows_how_evenly_a_step_is_shared_out_and_what_shards_buy():
    rows, done = check("--gpus", "8")
    assert set(rows) == {"grpo", "allocation", "selection", "aegpo", "control"}
    assert rows["grpo"] == ["null", "rollouts", "1.00", "0.00"]
    low, high = map(float, rows["aegpo"][2].split("-"))
    assert 1 <= low < high < 1.3
    assert "warning" not in done.stderr
    assert (
        "parallel.shards: the same results, to the bit, on any number of GPUs that is a power of two and divides it "
        "(of at most 100,000,000 trained weights); null: the number of the first start"
    ) in " ".join(done.stdout.split())  # it is wrapped at words


def test_without_the_option_nothing_is_said_of_gpus():
    plain, several = command_line.aegpo("check", ABLATION), command_line.aegpo("check", ABLATION, "--gpus", "2")
    assert "One run on" not in plain.stdout
    assert "shards" not in plain.stdout
    assert several.stdout.startswith(plain.stdout.partition("measured: ")[0])
    assert several.stdout.endswith("measured: " + plain.stdout.partition("measured: ")[2])


def test_shards_of_the_file_are_shared_out_and_a_reward_that_compares_keeps_prompts_whole():
    rows, done = check("--gpus", "2", "--set", "parallel.shards=8", "--set", COMPARING)
    assert {tuple(cells[:2]) for cells in rows.values()} == {("8", "prompts")}
    assert all(cells[3] == "0.00" for cells in rows.values())
    assert "warning" not in done.stderr
    assert check("--gpus", "16", "--set", COMPARING)[0]["grpo"][2] == "2.00"  # 8 prompts


@pytest.mark.parametrize(
    ("gpus", "shards", "message"),
    [
        (8, 4, "leaves 4 of 8 GPUs without work; use at most 4 GPUs, or set a multiple of 8: 'parallel.shards: 8'"),
        (8, 12, "cannot be shared out evenly among 8 GPUs, and results are those of one GPU to rounding only; use a "
                "number of GPUs that divides them, or set a multiple of 8: 'parallel.shards: 16'"),
        (3, 12, "has the same results, to the bit, on numbers of GPUs that are powers of two, on 3 to rounding only; "
                "use such a number where the bits matter"),
    ],
)  # fmt: skip
def test_shards_that_do_not_fit_are_a_warning_with_the_way_out(gpus, shards, message):
    _, done = check("--gpus", str(gpus), "--set", f"parallel.shards={shards}")
    assert f"warning: 'parallel.shards: {shards}' {message}\n" in done.stderr
    assert done.stderr.count("warning") == 1
    _, done = check("--gpus", str(gpus), "--set", f"arms.grpo.parallel.shards={shards}")
    assert f"warning: 'parallel.shards: {shards}' of grpo {message}\n" in done.stderr


@pytest.mark.parametrize("given", ["0", "-1", "65537", "1.5", "x"])
def test_a_number_of_gpus_that_none_can_have_is_refused(given):
    done = command_line.aegpo("check", ABLATION, "--gpus", given)
    assert done.code == 2
    assert "Invalid value for '--gpus'" in done.stderr


def test_sums_of_gradients_grow_with_the_shards_of_a_process():
    assert gradient_sums(10, 1, 1) == 0
    assert gradient_sums(10, 1, 16) == 4 * 40  # the sums of 8, 4, 2 and 1 shards, beside that of the last one
    assert gradient_sums(10, 4, 4) == 2 * 40  # its own, and another's
    assert gradient_sums(10, 4, 128) == 5 * 40
    assert gradient_sums(10, 3, 3) == gradient_sums(10, 8, 12) == 40  # not by a tree
    assert gradient_sums(MOST_SUMMED_BY_TREE + 1, 4, 4) == 4 * (MOST_SUMMED_BY_TREE + 1)


@pytest.fixture
def flux(tmp_path):
    """A file that fine-tunes FLUX.1-dev in full."""
    (tmp_path / "a.txt").write_text("a red circle\n")
    (tmp_path / "b.txt").write_text("a blue circle\n")
    model = {"kind": "flux", "path": "nobody/has-this"}
    parts = {"policy": {"train": "full"}, "rollouts": {"prompts_per_step": 1}, "rewards": ["palette"]}
    prompts = {"train": str(tmp_path / "a.txt"), "evaluation": str(tmp_path / "b.txt")}
    (tmp_path / "flux.yaml").write_text(json.dumps({"model": model, "prompts": prompts, **parts}))
    return str(tmp_path / "flux.yaml")


def held(file: str, *options: str) -> tuple[list[str], list[str]]:
    """Cells of the tables of memory and of phases."""
    done = command_line.aegpo("check", file, *options)
    assert done.code == 0, done.stderr
    lines = [line.split("│")[1:-1] for line in done.stdout.splitlines() if line.startswith("│ main ")]
    _, memory, _, phases = ([cell.strip() for cell in line[1:]] for line in lines)
    return memory, phases


@pytest.mark.slow
def test_check_prints_what_a_gpu_holds_by_phase_and_what_auto_chooses(flux):
    memory, phases = held(flux, "--gpus", "8", "--gpu-memory", "80")
    assert float(phases[0]) == pytest.approx(float(memory[7]) + 44.3, abs=0.11)  # a flat gradient of 4 bytes a weight
    assert memory[8] == "no"
    assert phases[4:] == ["auto: sharded", "yes"]
    assert held(flux, "--gpus", "8", "--gpu-memory", "1000")[1][4:] == ["auto: whole", "yes"]
    whole = "parallel.weights=whole"
    assert held(flux, "--gpus", "8", "--gpu-memory", "80", "--set", whole)[1][4:] == ["whole", "no"]


@pytest.mark.slow
def test_without_a_gpu_check_says_from_what_memory_on_weights_stay_whole(flux, monkeypatch):
    monkeypatch.setattr("aegpo.commands.check.gpu_memory", lambda: None)
    _, phases = held(flux, "--gpus", "8")
    assert phases[4].startswith("auto: whole from ")
    assert float(phases[4].rpartition(" ")[2]) == pytest.approx(float(phases[0]) / 0.8, abs=0.1)
    assert phases[5] == "?"
    assert held(flux, "--gpus", "1")[1][4] == "auto: whole"


@pytest.mark.slow
def test_gathering_nothing_while_sampling_is_the_least(flux):
    gathering, never = (
        held(flux, "--gpus", "8", "--gpu-memory", "80", "--set", f"parallel.gather={how}")[1]
        for how in ("sampling", "never")
    )
    assert gathering[:3] == never[:3]
    assert float(never[3]) < float(gathering[3]) - 20


def test_replicas_that_do_not_divide_the_gpus_are_refused(flux):
    done = command_line.aegpo("check", flux, "--gpus", "8", "--set", "parallel.replicas=3")
    assert done.code == 2
    assert "parallel.replicas: 3 does not divide the 8 processes of the run" in " ".join(done.stderr.split())
    assert "1, 2, 4, 8" in done.stderr
