"""What a watched folder says of its runs: how each stands, what evaluations found, and that nothing is changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from studies import AEGPO, GRPO, RANDOM, World, write_experiment, write_run

from aegpo.errors import AegpoError
from aegpo.report.watch import page
from aegpo.report.watch.folder import Watched
from aegpo.report.watch.standing import Reader
from aegpo.runs.child_processes import GOES_ON
from aegpo.runs.folders import locked

WORLD = World(training_steps=20, prompts=12)


@pytest.fixture
def folder(tmp_path):
    """An experiment that is half done: grpo is finished, aegpo at step 12 of 20, random-steps has not begun."""
    root = tmp_path / "ablation"
    for seed in (0, 1):
        write_run(root, GRPO, seed, WORLD, 20)
        write_run(root, AEGPO, seed, WORLD, 12)
    order = {"arms": ["grpo", "aegpo", RANDOM.name], "seeds": [0, 1]}
    (root / "order.json").write_text(json.dumps(order))
    return root


def standing(folder, arm, seed=0):
    return Reader(folder / arm / f"seed-{seed}", arm, seed).standing()


def gone() -> int:
    """The id of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def begun_by(run, process: int, log: str = "") -> None:
    (run / ".lock").write_text(f"\0 {process}")
    if log:
        (run / "run.log").write_text(f"--- aegpo run\n{log}\n")


def texts(html: str) -> str:
    return " ".join(re.sub("<[^>]+>", " ", html).split())


def test_runs_that_wait_run_are_finished_and_have_ended_are_told_apart(folder):
    begun_by(folder / "aegpo" / "seed-0", os.getpid())
    begun_by(folder / "aegpo" / "seed-1", gone())
    states = {(each.arm, each.seed): each.state for each in Watched(folder).standings()}
    assert states == {
        ("grpo", 0): "finished",
        ("grpo", 1): "finished",
        ("aegpo", 0): "running",
        ("aegpo", 1): "died",
        (RANDOM.name, 0): "waiting",
        (RANDOM.name, 1): "waiting",
    }


@pytest.mark.parametrize(
    ("log", "state", "why"),
    [
        ("aegpo seed 0: interrupted\n" + GOES_ON + "  aegpo run", "stopped", "the same command goes on from here"),
        ("error: reward 'x' failed\nit broke", "failed", "reward 'x' failed"),
        ("aegpo seed 0: step 12/20", "died", "the same command goes on from step 10"),
    ],
)
def test_the_log_says_how_a_run_ended(folder, log, state, why):
    run = folder / "aegpo" / "seed-0"
    (run / "checkpoints" / "step-000010").mkdir(parents=True)
    begun_by(run, gone(), log)
    found = standing(folder, "aegpo")
    assert (found.state, found.why) == (state, why)


def test_without_a_log_a_run_that_saved_its_last_step_was_stopped(folder):
    run = folder / "aegpo" / "seed-0"
    begun_by(run, gone())
    assert standing(folder, "aegpo").state == "died"
    (run / "checkpoints" / "step-000012").mkdir(parents=True)
    assert standing(folder, "aegpo").state == "stopped"


def test_the_log_of_an_earlier_start_says_nothing_of_this_one(folder):
    run = folder / "aegpo" / "seed-0"
    begun_by(run, gone(), "error: an earlier failure")
    os.utime(run / "run.log", (1, 1))
    assert standing(folder, "aegpo").state == "died"


def test_a_run_whose_lock_is_held_runs(folder):
    with locked(folder / RANDOM.name / "seed-0"):
        found = standing(folder, RANDOM.name)
    assert (found.state, found.total, found.step) == ("running", None, 0)


def test_a_record_that_grows_without_a_process_here_is_written_on_another_machine(folder):
    run = folder / "aegpo" / "seed-0"
    begun_by(run, gone())
    reader, seen = Reader(run, "aegpo", 0), []
    rows = (run / "metrics.jsonl").read_text().splitlines()
    for step in (13, 14, 15):
        row = json.dumps(json.loads(rows[-1]) | {"step": step})
        (run / "metrics.jsonl").write_text("\n".join([*rows, row]) + "\n")
        rows.append(row)
        seen.append(reader.standing().state)
    assert seen == ["died", "running", "running"]


def test_steps_cost_and_time_are_counted_and_left_is_known_of_what_runs(folder):
    begun_by(folder / "aegpo" / "seed-0", os.getpid())
    found = standing(folder, "aegpo")
    metrics = [json.loads(line) for line in (folder / "aegpo" / "seed-0" / "metrics.jsonl").open()]
    assert (found.step, found.total) == (12, 20)
    assert found.cost == sum(row["metrics"]["work"] for row in metrics)
    assert found.forwards == 12 * (AEGPO.forwards + AEGPO.signal_forwards)
    assert found.left == pytest.approx(found.seconds / 12 * 8)
    assert standing(folder, "grpo").left is None


def test_a_last_line_that_is_half_written_is_read_once_it_is_whole(folder):
    run = folder / "aegpo" / "seed-0"
    reader, whole = Reader(run, "aegpo", 0), (run / "metrics.jsonl").read_bytes()
    for name in ("metrics.jsonl", "evaluations.jsonl", "timing.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b'{"step": 13, "metr')
    assert reader.standing().step == 12
    assert len(Watched(folder).found().of("aegpo")) == 2
    row = json.dumps(json.loads(whole.splitlines()[-1]) | {"step": 13})
    (run / "metrics.jsonl").write_bytes(whole + row.encode() + b"\n")
    assert reader.standing().step == 13


def test_a_run_that_starts_over_is_counted_anew(folder):
    run = folder / "aegpo" / "seed-0"
    reader = Reader(run, "aegpo", 0)
    assert reader.standing().step == 12
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n")
    assert reader.standing().step == 3


def test_a_guard_below_the_bases_interval_is_red_and_a_trained_reward_is_not(tmp_path):
    bad = type(GRPO)("bad", {"palette": -0.2, "scene": -0.9})
    html = page.results(Watched(write_experiment(tmp_path / "ablation", (GRPO, bad), (0, 1), WORLD)))
    assert html.count('class="fell"') == 3  # the score, the gain, and the plot's heading
    assert "below the base's interval: bad" in texts(html).replace("&#39;", "'")
    assert "palette (trained)" in html


def test_arms_are_overlaid_in_a_plot_for_each_score_with_images_by_step(folder):
    html = page.results(Watched(folder))
    assert html.count("<svg ") == 2
    assert 'data-steps="0 5 10"' in html  # of aegpo
    assert 'data-steps="0 5 10 15 20"' in html
    assert '<span class="dot" style="background:#888888"></span>grpo' in html
    assert RANDOM.name not in html.partition("<h2>Samples")[0]  # nothing is known of it


def test_before_any_run_has_started_the_page_says_so(tmp_path):
    (tmp_path / "ablation").mkdir()
    (tmp_path / "ablation" / "order.json").write_text(json.dumps({"arms": ["grpo", "aegpo"], "seeds": [0]}))
    watched = Watched(tmp_path / "ablation")
    assert "No run has started yet." in page.progress(watched)
    assert texts(page.progress(watched)).count("waiting") == 3
    assert "<svg" not in page.results(watched)


def test_there_is_another_version_once_there_is_another_evaluation(folder):
    watched = Watched(folder)
    before = watched.version()
    assert watched.version() == before
    with (folder / "aegpo" / "seed-0" / "metrics.jsonl").open("a") as file:
        file.write("{}")
    assert watched.version() == before
    write_run(folder, RANDOM, 0, WORLD, 5)
    assert watched.version() != before
    assert len(watched.found().of(RANDOM.name)) == 1


def test_names_and_prompts_are_text_in_the_page(tmp_path):
    odd = type(GRPO)("<img src=x>", {"palette": 0.1, "<script>": 0.1})
    watched = Watched(write_experiment(tmp_path / "<b>", (odd,), (0,), WORLD))
    html = page.whole_page(watched, "1", page.results(watched))
    assert "<img src=x>" not in html
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_damaged_run_is_named_and_the_others_are_shown(folder):
    (folder / "grpo" / "seed-1" / "evaluations.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    html = page.results(Watched(folder))
    assert "Not everything can be read" in html
    assert "seed 1 of arm grpo" in html
    assert html.count("<svg ") == 2


def test_a_damaged_order_is_named_and_arms_are_found(folder):
    watched = Watched(folder)
    (folder / "order.json").write_text("{")
    assert {each.arm for each in watched.standings()} == {"grpo", "aegpo"}
    assert "order.json" in page.results(watched)


def test_a_folder_that_goes_away_ends_nothing(folder):
    watched = Watched(folder)
    watched.standings()
    folder.rename(folder.with_name("moved"))
    assert watched.standings() == []
    assert "is gone" in page.results(watched)


def test_watching_changes_nothing(folder):
    def contents():
        return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}

    before = contents()
    watched = Watched(folder)
    page.whole_page(watched, watched.version(), page.results(watched))
    assert contents() == before


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nowhere", "no such folder; name the one that 'aegpo run' writes to, OUT/NAME"),
        (".", "it has no order.json and no ARM/seed-S; did you mean {}/ablation?"),
        ("ablation/grpo/seed-0", "it has no order.json and no ARM/seed-S; did you mean {}/ablation?"),
        ("empty", "it has no order.json and no ARM/seed-S; name the one that 'aegpo run' writes to, OUT/NAME"),
    ],
)
def test_a_folder_that_is_no_experiments_is_a_message_of_a_line(folder, place, told):
    (folder.parent / "empty").mkdir()
    with pytest.raises(AegpoError) as caught:
        Watched(folder.parent / place)
    assert str(caught.value).endswith(told.format(folder.parent))
    assert "\n" not in str(caught.value)


def test_only_images_of_the_folder_are_given_out(folder):
    watched = Watched(folder)
    assert watched.image("grpo", 0, 5) == folder / "grpo" / "seed-0" / "images" / "step-000005.png"
    (folder.parent / "seed-0" / "images").mkdir(parents=True)
    (folder.parent / "seed-0" / "images" / "step-000005.png").write_bytes(b"x")
    for asked in (("..", 0, 5), ("grpo", 7, 5), ("grpo", 0, 6), (str(folder.parent), 0, 5)):
        assert watched.image(*asked) is None
