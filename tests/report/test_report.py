import io
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from aegpo.errors import AegpoError
from aegpo.report import write_report
from aegpo.report.recorded import read_study
from aegpo.report.summary import summarize
from aegpo.report.terminal import show
from aegpo.report.wording import verdict

SEEDS = (0, 1, 2)
VERSIONS = {"python": "3.11.9", "torch": "2.13.0", "tensorboard": None}


@dataclass(frozen=True)
class Arm:
    """An arm whose true effects are known; gains grow over training as 1 - exp(-3 step / steps)."""

    name: str
    gains: dict[str, float]  # evaluation label -> true mean gain
    forwards: int = 640  # of the rollouts of a step
    probe_forwards: int = 0
    trained_edges: int = 600
    frozen: int = 0  # policies evaluated at a trained edge, beside the one that learns
    entropy: bool = False
    allocates: bool = False
    chosen: int = 10  # denoising steps a prompt
    noise: float | None = None  # left in the images; None: not recorded
    probe: dict | None = None  # of the experiment
    rewards: tuple[dict, ...] = ({"kind": "palette", "name": None, "weight": 1.0},)


@dataclass(frozen=True)
class World:
    """How runs vary: the noise of the synthetic folder."""

    training_steps: int = 40
    every: int = 5
    prompts: int = 48
    seed_spread: float = 0.006
    prompt_spread: float = 0.05
    noise: float = 0.05
    texts: tuple[str, ...] = ()
    draw: int = 7  # which prompts, and so how hard they are


GRPO = Arm("grpo", {"palette": 0.05, "scene": 0.01})
ALLOCATION = Arm("allocation", {"palette": 0.056, "scene": 0.01}, probe_forwards=160, entropy=True, allocates=True)
SELECTION = Arm("selection", {"palette": 0.06, "scene": 0.005}, 420, 160, 320, entropy=True, chosen=4)
AEGPO = Arm("aegpo", {"palette": 0.1, "scene": 0.02}, 420, 160, 320, entropy=True, allocates=True, chosen=4)
RANDOM = Arm("random-steps", {"palette": 0.045, "scene": -0.06}, 420, 0, 320, chosen=4)
ARMS = (GRPO, ALLOCATION, SELECTION, AEGPO, RANDOM)


def write_experiment(folder, arms, seeds=SEEDS, world=World(), order=True):
    for arm in arms:
        for seed in seeds:
            write_run(folder, arm, seed, world, world.training_steps)
    if order:
        order_file = {"arms": [arm.name for arm in arms], "seeds": list(seeds)}
        (folder / "order.json").write_text(json.dumps(order_file))
    return folder


def write_run(folder, arm, seed, world, steps_done):
    run = folder / arm.name / f"seed-{seed}"
    (run / "images").mkdir(parents=True)
    (run / "manifest.json").write_text(json.dumps(manifest(arm, seed, world)))
    # the base and what is hard about a prompt are the same in every run
    shared, own = np.random.default_rng(world.draw), np.random.default_rng((11, seed, *arm.name.encode()))
    prompts = world.texts or tuple(f"{number} red circles on a <blue> background" for number in range(world.prompts))
    base = {label: shared.uniform(0.3, 0.7, len(prompts)) for label in arm.gains}
    hard = {label: shared.normal(0, world.prompt_spread, len(prompts)) for label in arm.gains}
    luck = {label: own.normal(0, world.seed_spread) for label in arm.gains}
    evaluations, metrics, timing = [], [], [{"step": 0, "seconds": {"evaluation": 2.0}}]
    for step in range(steps_done + 1):
        due = step % world.every == 0 or step == world.training_steps
        if due:
            grown = (1 - np.exp(-3 * step / world.training_steps)) / (1 - np.exp(-3))
            scores = {
                label: base[label]
                + grown * (gain + hard[label] + luck[label] + own.normal(0, world.noise, len(prompts)))
                for label, gain in arm.gains.items()
            }
            evaluations.append(evaluation_row(step, scores, base, prompts))
            write_grid(run / "images" / f"step-{step:06}.png", step * arm.gains["palette"])
        if step:
            metrics.append(metrics_row(arm, step, own))
            seconds = {"probe": 0.4 if arm.entropy else 0.0, "plan": 0.001, "rollout": arm.forwards / 400}
            seconds |= {"reward": 0.2, "update": arm.trained_edges / 200} | ({"evaluation": 2.0} if due else {})
            timing.append({"step": step, "seconds": seconds})
    for name, rows in (("evaluations", evaluations), ("metrics", metrics), ("timing", timing)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if steps_done == world.training_steps:
        (run / "finished.json").write_text(json.dumps({"step": steps_done}))
    return run


def manifest(arm, seed, world):
    experiment = {
        "name": "ablation",
        "training_steps": world.training_steps,
        "seed": seed,
        "rollouts": {"prompts_per_step": 8, "rollouts_per_step": 64, "denoising_steps": 10},
        "rewards": list(arm.rewards),
        "allocator": {"kind": "entropy", "least": 4} if arm.allocates else {"kind": "uniform"},
        "selector": {"kind": "entropy-peak", "top_k": 4} if arm.chosen < 10 else {"kind": "uniform"},
        "evaluation": {"every": world.every, "denoising_steps": None, "images": 4},
    } | ({} if arm.probe is None else {"probe": arm.probe})
    made_with = {"versions": VERSIONS, "plugins": [["aegpo-jpeg", "0.1.0"]], "commit": "3da94a6"}
    return {"format": 1, "arm": arm.name, "seed": seed, "experiment": experiment, "threads": 1, **made_with}


def evaluation_row(step, scores, base, prompts):
    def table(values):
        return {label: each.tolist() for label, each in values.items()}

    return {"step": step, "scores": table(scores), "base_scores": table(base), "prompts": prompts}


def metrics_row(arm, step, rng):
    spent = {"forwards": arm.forwards, "probe_forwards": arm.probe_forwards, "trained_edges": arm.trained_edges}
    spent["work"] = arm.forwards + arm.probe_forwards + (3 + arm.frozen) * arm.trained_edges
    spent |= {} if arm.noise is None else {"residual_noise": arm.noise + 0.01 * (step % 2)}
    entropy = delta = None
    counts, selected = [8] * 8, [sorted(rng.choice(10, arm.chosen, replace=False).tolist()) for _ in range(8)]
    if arm.entropy:
        level = 2.2 + 0.5 * np.exp(-((np.arange(10) - 3) ** 2) / 4) + rng.normal(0, 0.08, (8, 1))
        entropy = level + rng.normal(0, 0.03, (8, 10))
        delta = 0.01 * (step - 1) * rng.uniform(0.4, 1.6, 8)
        if arm.chosen < 10:
            selected = [sorted(np.argsort(-row)[: arm.chosen].tolist()) for row in entropy]
        if arm.allocates and step > 1:
            shares = np.argsort(np.argsort(delta))
            counts = (4 + shares + (shares > 3)).tolist()
    return {
        "step": step,
        "metrics": {"reward": 0.5, "loss": 0.01, **spent},
        "prompts": [f"prompt {index}" for index in range(8)],
        "counts": counts,
        "selected": selected,
        "entropy": None if entropy is None else entropy.tolist(),
        "delta": None if delta is None else delta.tolist(),
    }


def write_grid(path, strength):
    pixels = np.full((64, 64, 3), 230, dtype=np.uint8)
    pixels[8:56, 8:56] = (200, max(0, 120 - int(30 * strength)), 60)
    Image.fromarray(pixels).save(path)


def report(folder, width=160):
    with (folder / "terminal.txt").open("w") as file:
        path = write_report(folder, Console(file=file, width=width))
    numbers = json.loads((folder / "report" / "summary.json").read_text())
    return path.read_text(), numbers, (folder / "terminal.txt").read_text()


def numbers_of(folder):
    summary = summarize(read_study(folder))
    return {**asdict(summary), "verdict": verdict(summary)}


def score(numbers, arm, label="palette"):
    return next(row for row in numbers["scores"] if (row["arm"], row["label"]) == (arm, label))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "ablation"
    folder.mkdir()
    return write_experiment(folder, ARMS)


@pytest.fixture(scope="module")
def reported(written):
    return report(written)


def test_known_gains_are_recovered_and_the_large_difference_is_found(reported):
    _, numbers, _ = reported
    for arm in ARMS:
        for label, gain in arm.gains.items():
            assert score(numbers, arm.name, label)["gain"] == pytest.approx(gain, abs=0.025)
    difference = score(numbers, "aegpo")["difference"]
    assert difference["over_seeds"]["low"] > 0
    assert difference["mean"] == pytest.approx(0.05, abs=0.02)
    assert score(numbers, "grpo")["difference"] is None


def test_the_numbers_are_those_of_a_calculation_by_hand(written, reported):
    _, numbers, _ = reported

    def gains(arm, seed):
        lines = (written / arm / f"seed-{seed}" / "evaluations.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        return np.array(last["scores"]["palette"]) - np.array(last["base_scores"]["palette"])

    by_seed = [float((gains("selection", seed) - gains("grpo", seed)).mean()) for seed in SEEDS]
    difference = score(numbers, "selection")["difference"]
    assert difference["by_seed"] == pytest.approx(by_seed)
    half = 4.302653 * np.std(by_seed, ddof=1) / np.sqrt(3)
    assert difference["over_seeds"]["low"] == pytest.approx(np.mean(by_seed) - half, rel=1e-5)
    assert difference["smallest_detectable"] == pytest.approx(5.653489 * np.std(by_seed, ddof=1) / np.sqrt(3), rel=1e-5)


def test_the_verdict_names_the_winner_and_the_guard_that_fell(reported):
    _, numbers, terminal = reported
    text = " ".join(numbers["verdict"])
    assert re.match(r"On palette, (.* and )?aegpo gained more than grpo", numbers["verdict"][0])
    assert "rose on held-out prompts in grpo, selection, aegpo and random-steps; not beyond doubt in allocation" in text
    assert score(numbers, "allocation")["gain_interval"]["low"] < 0
    assert re.search(
        r"guard scene, which no arm optimised, fell in random-steps \(-0\.0\d+\): a sign of reward hack", text
    )
    assert numbers["verdict"][0] in terminal


def test_arms_without_a_difference_get_no_winner(tmp_path):
    arms = [Arm(name, {"palette": 0.05, "scene": 0.0}) for name in ("grpo", "b", "c")]
    numbers = numbers_of(write_experiment(tmp_path, arms, world=World(seed_spread=0.02)))
    assert numbers["verdict"][0] == "No difference to grpo that these 3 seeds can resolve."
    sizes = [score(numbers, name)["difference"]["smallest_detectable"] for name in ("b", "c")]
    shown = re.search(r"With 3 seeds a true difference of ([\d.]+) to ([\d.]+)", " ".join(numbers["verdict"]))
    assert [float(each) for each in shown.groups()] == pytest.approx(sorted(sizes), abs=6e-3)


def test_a_winner_that_does_not_survive_the_correction_is_not_announced_without_it(tmp_path):
    arms = [Arm(name, {"palette": gain}) for name, gain in (("grpo", 0.05), ("b", 0.08), ("c", 0.05), ("d", 0.05))]
    world = World(training_steps=2, every=2, seed_spread=0.007)
    numbers = numbers_of(write_experiment(tmp_path, arms, seeds=(24, 25, 26, 27), world=world))
    difference = score(numbers, "b")["difference"]
    assert difference["p"] < 0.05 < difference["p_holm"] == pytest.approx(3 * difference["p"])
    assert numbers["verdict"][0] == "On palette, b gained more than grpo, but not once corrected for 3 comparisons."


def test_intervals_cover_known_gains_and_false_winners_are_rare(tmp_path):
    arms, covered, found = [Arm(name, {"palette": 0.05}) for name in ("a", "b")], 0, 0
    for trial in range(80):
        folder = tmp_path / str(trial)
        folder.mkdir()
        world = World(training_steps=2, every=2, prompts=12, seed_spread=0.02, draw=trial)
        numbers = numbers_of(write_experiment(folder, arms, seeds=range(3 * trial, 3 * trial + 3), world=world))
        interval = score(numbers, "a")["gain_interval"]
        covered += interval["low"] < 0.05 < interval["high"]
        found += score(numbers, "b")["difference"]["p"] < 0.05
    # 76 and 4 expected; chance goes beyond these bounds about once in 200 draws
    assert covered >= 71
    assert found <= 9


def test_costs_count_the_probe_and_three_for_each_trained_edge(reported):
    _, numbers, _ = reported
    costs = {row["arm"]: row for row in numbers["costs"]}
    assert costs["grpo"]["cost"] == 40 * (640 + 3 * 600)
    assert costs["aegpo"]["forwards"] == 40 * (420 + 160)
    assert costs["aegpo"]["probe_forwards"] == 40 * 160
    assert costs["aegpo"]["relative_cost"] == pytest.approx((580 + 960) / 2440)
    assert costs["grpo"]["training_seconds"] == pytest.approx(40 * (0.001 + 1.6 + 0.2 + 3.0))
    assert costs["grpo"]["total_seconds"] == pytest.approx(40 * 4.801 + 9 * 2.0)


def test_the_probe_is_told_as_a_share_of_a_step_beside_how_exact_it_is(tmp_path):
    whole = {"block": "joint", "steps": "all", "rows": "all", "samples": 1, "refresh": 1, "source": "probe"}
    fewer = replace(AEGPO, name="fewer-rows", probe={**whole, "rows": 12, "source": "rollout"})
    arms = (GRPO, replace(AEGPO, probe=whole), fewer)
    html, numbers, terminal = report(write_experiment(tmp_path, arms))
    exact, cheap = numbers["probes"]
    assert (exact["arm"], exact["forwards"], exact["exact"]) == ("aegpo", 160, True)
    assert exact["forwards_share"] == pytest.approx(160 / 580)
    assert exact["seconds"] == pytest.approx(0.4)
    assert exact["seconds_share"] == pytest.approx(0.4 / (0.4 + 0.001 + 1.05 + 0.2 + 1.6))
    assert (cheap["arm"], cheap["exact"]) == ("fewer-rows", False)
    row = r"aegpo +source probe, samples 1, steps all, rows all, refresh 1 +160 +27\.6 % +0\.40 +12\.3 % +exact"
    assert re.search(row, terminal)
    assert re.search(r"fewer-rows +source rollout, samples 1, steps all, rows 12, .* not measured", terminal)
    assert "What the entropy probe cost" in html


def test_noise_left_in_images_gets_a_panel_where_it_was_recorded(tmp_path):
    arms = (replace(GRPO, noise=0.0), replace(AEGPO, noise=0.02), RANDOM)
    html, numbers, terminal = report(write_experiment(tmp_path, arms))
    assert [row["arm"] for row in numbers["noise"]] == ["grpo", "aegpo"]
    assert numbers["noise"][1] == pytest.approx({"arm": "aegpo", "mean": 0.025, "low": 0.02, "high": 0.03})
    assert "Noise left in training images" in html
    assert re.search(r"aegpo +0\.0250 +0\.0200 +0\.0300", terminal)
    assert (tmp_path / "report" / "noise.png").exists()


def test_neither_probe_nor_noise_is_mentioned_where_there_is_none(tmp_path):
    html, numbers, terminal = report(write_experiment(tmp_path, (GRPO, RANDOM)))
    assert numbers["probes"] == numbers["noise"] == []
    for text in (html, terminal):
        assert "entropy probe cost" not in text
        assert "Noise left" not in text
    assert not (tmp_path / "report" / "noise.png").exists()


def test_evaluations_that_were_lost_are_named(tmp_path):
    write_experiment(tmp_path, (GRPO, AEGPO), seeds=(0, 1))
    for arm, seed, kept in (("grpo", 1, (0, 1, 4, 5, 6, 7, 8)), ("aegpo", 0, (8,)), ("aegpo", 1, ())):
        path = tmp_path / arm / f"seed-{seed}" / "evaluations.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[index] for index in kept))
    html, numbers, terminal = report(tmp_path, width=250)
    nothing = "the arm's curve has nothing there"
    notes = [
        "seed 1 of arm aegpo: 40 of 40 steps, not marked finished or last step not evaluated",
        "seed 0 of arm aegpo: evaluations.jsonl lacks the evaluation before training and the evaluations after steps "
        f"5, 10, 15, 20, 3 more; {nothing}",
        "seed 1 of arm aegpo: evaluations.jsonl lacks the evaluation before training and the evaluations after steps "
        f"5, 10, 15, 20, 4 more; {nothing}",
        f"seed 1 of arm grpo: evaluations.jsonl lacks the evaluations after steps 10, 15; {nothing}",
    ]
    assert numbers["notes"] == notes
    assert all(note in terminal for note in notes)
    assert html.count("evaluations.jsonl lacks") == 3


def test_reaching_the_baseline_is_told_in_steps_forwards_and_seconds(reported):
    _, numbers, _ = reported
    reach = {row["arm"]: row for row in numbers["reach"]}
    steps = reach["aegpo"]["steps"]
    assert 0 < steps < 30
    assert reach["aegpo"]["forwards"] == pytest.approx(steps * 580)
    assert reach["aegpo"]["seconds"] == pytest.approx(steps * (0.4 + 0.001 + 1.05 + 0.2 + 1.6))
    assert reach["grpo"]["steps"] is not None  # by its own final score, which is a mean taken in another order
    assert reach["grpo"]["steps"] <= 40
    assert numbers["target"] == pytest.approx(score(numbers, "grpo")["final"])


def test_an_arm_that_never_reaches_the_baseline_is_said_not_to(tmp_path):
    arms = (GRPO, Arm("weak", {"palette": -0.05, "scene": 0.0}, frozen=1))
    html, numbers, terminal = report(write_experiment(tmp_path, arms))
    assert [row["steps"] for row in numbers["reach"] if row["arm"] == "weak"] == [None]
    assert "not reached" in html
    assert "not reached" in terminal
    assert numbers["verdict"][0] == "On palette, weak gained less than grpo."
    assert {row["arm"]: row["cost"] for row in numbers["costs"]}["weak"] == 40 * (640 + 4 * 600)  # a frozen policy too


def test_unfinished_and_missing_runs_are_named_and_left_out(tmp_path):
    world = World()
    write_experiment(tmp_path, (GRPO,), world=world)
    write_run(tmp_path, AEGPO, 0, world, 40)
    write_run(tmp_path, AEGPO, 2, world, 12)
    write_run(tmp_path, RANDOM, 0, world, 40)
    (tmp_path / "order.json").write_text(json.dumps({"arms": ["grpo", "aegpo"], "seeds": [0, 1, 2]}))
    html, numbers, terminal = report(tmp_path)
    notes = [
        "seed 1 of arm aegpo: not started",
        "seed 2 of arm aegpo: 12 of 40 steps",
        "seed 0 of arm random-steps is in the folder but not in the experiment: left out",
    ]
    assert numbers["notes"] == notes
    for note in notes:
        assert note in html
        assert note in terminal
    assert score(numbers, "aegpo")["seeds"] == [0]
    assert score(numbers, "aegpo")["difference"]["over_seeds"] is None
    assert "with 1 seed no interval over seeds is possible" in numbers["verdict"][0]
    assert not any(row["arm"] == "random-steps" for row in numbers["scores"])


def test_one_seed_has_an_interval_over_prompts_that_says_so(tmp_path):
    html, numbers, _ = report(write_experiment(tmp_path, (GRPO, AEGPO), seeds=(4,)))
    assert numbers["verdict"][0] == "No verdict between arms: with 1 seed no interval over seeds is possible."
    assert score(numbers, "grpo")["gain_interval"]["low"] < 0.05 < score(numbers, "grpo")["gain_interval"]["high"]
    assert "(prompts only)" in html


def test_a_run_that_has_only_begun_still_gets_a_page(tmp_path):
    write_run(tmp_path, GRPO, 0, World(), 0)
    html, numbers, _ = report(tmp_path)
    assert numbers["verdict"] == ["No run is finished, so there is no verdict yet."]
    assert "seed 0 of arm grpo: 0 of 40 steps" in html


def test_a_line_that_was_being_written_is_left_out_but_a_damaged_one_is_refused(tmp_path):
    write_experiment(tmp_path, (GRPO,), seeds=(0,))
    path = tmp_path / "grpo" / "seed-0" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 41, "metr')
    assert read_study(tmp_path).runs["grpo", 0].steps_done == 40
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(AegpoError, match=r"cannot read .*metrics\.jsonl"):
        read_study(tmp_path)


def test_arms_evaluated_on_different_prompts_are_refused(tmp_path):
    write_run(tmp_path, GRPO, 0, World(texts=("one", "two")), 40)
    write_run(tmp_path, AEGPO, 0, World(texts=("one", "three")), 40)
    with pytest.raises(AegpoError, match=r"grpo seed 0 was evaluated at step 0 on other prompts than aegpo seed 0"):
        read_study(tmp_path)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(AegpoError, match="no run in"):
        write_report(tmp_path, Console())


def test_several_trained_rewards_are_judged_by_their_weighted_sum(tmp_path):
    rewards = ({"kind": "palette", "name": None, "weight": 2.0}, {"kind": "scene", "name": "layout", "weight": 0.5})
    gains = {"palette": 0.05, "layout": 0.04, "guard": 0.0}
    folder = write_experiment(tmp_path, [Arm("a", gains, rewards=rewards), Arm("b", gains, rewards=rewards)])
    numbers = numbers_of(folder)
    assert numbers["headline"] == "weighted sum"
    both = 2 * score(numbers, "a", "palette")["gain"] + 0.5 * score(numbers, "a", "layout")["gain"]
    assert score(numbers, "a", "weighted sum")["gain"] == pytest.approx(both)
    trained = {row["label"]: row["trained"] for row in numbers["scores"]}
    assert trained == {"weighted sum": True, "palette": True, "layout": True, "guard": False}


def test_every_plot_is_a_small_png(written, reported):
    plots = sorted((written / "report").glob("*.png"))
    assert [path.stem for path in plots] == ["allocation", "curves", "gains", "seconds", "steps"]
    for path in plots:
        assert path.stat().st_size < 200_000
        with Image.open(path) as image:
            assert image.width >= 900


def test_the_page_loads_nothing_from_elsewhere_and_is_well_formed(reported):
    html, _, _ = reported

    class Reader(HTMLParser):
        open_tags, links, ids = [], [], []

        def handle_starttag(self, tag, attributes):
            values = dict(attributes)
            self.links += [values[name] for name in ("src", "href", "xlink:href") if name in values]
            self.ids += [values["id"]] if "id" in values else []
            if tag not in ("meta", "img", "link", "br"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

        def handle_startendtag(self, tag, attributes):
            self.handle_starttag(tag, attributes)
            if tag not in ("meta", "img", "link", "br"):
                self.open_tags.pop()

    reader = Reader()
    reader.feed(html)
    assert reader.open_tags == []
    assert reader.links
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in reader.links)
    assert {link[1:] for link in reader.links if link.startswith("#")} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert "<script" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html


def test_names_and_prompts_are_escaped(tmp_path):
    arms = [Arm("<b>$x$</b>", {"palette": 0.1, "<i>": 0.0}), Arm("[bold]&", {"palette": 0.1, "<i>": 0.0})]
    html, _, terminal = report(write_experiment(tmp_path, arms))
    assert "<b>" not in re.sub(r"<!--.*?-->", "", html)
    assert "<i>" not in html
    assert "&lt;b&gt;$x$&lt;/b&gt;" in html
    assert "&lt;blue&gt;" in html
    assert "[bold]&" in terminal


def test_the_page_says_what_differed_between_arms_and_what_made_it(reported):
    html, _, _ = reported
    assert "allocator.kind" in html
    assert "selector.top_k" in html
    assert "rollouts.rollouts_per_step" not in html
    assert "aegpo-jpeg" in html
    assert "3da94a6" in html
    assert "48 held-out prompts" in html


def test_the_grid_before_training_is_shown_once_if_it_is_the_same(reported, written):
    html, _, _ = reported
    assert html.count("<img ") == 1 + len(ARMS)
    assert "before training, every arm" in html


def test_a_narrow_terminal_gets_tables_that_fit(written):
    stream = io.StringIO()
    show(summarize(read_study(written)), written / "report.html", Console(file=stream, width=80))
    lines = [line for line in stream.getvalue().splitlines() if not line.startswith("report:")]
    assert max(map(len, lines)) <= 80
    interval = r"\[\+0\.\d+, \+0\.\d+\]"
    assert re.search(rf"aegpo +0\.\d+ +\+0\.\d+ +{interval} +\+0\.\d+ +{interval}", stream.getvalue())
    assert "only on the page: seeds, p (Holm), base, CI also prompts, detectable" in stream.getvalue()


def test_importing_the_report_imports_neither_torch_nor_matplotlib():
    code = "import sys, aegpo.report; print([name for name in ('torch', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_without_an_order_file_arms_are_alphabetical(tmp_path):
    write_experiment(tmp_path, (GRPO, AEGPO), order=False)
    study = read_study(tmp_path)
    assert study.arms == ("aegpo", "grpo")
    assert verdict(summarize(study))[0].startswith("On palette, grpo gained less than aegpo")
    assert Path(study.folder) == tmp_path


def test_observers_that_a_run_was_left_without_are_named(tmp_path):
    folder = write_experiment(tmp_path / "study", (GRPO,), seeds=(0,))
    row = {"step": 7, "event": "aegpo_on_step_end", "observer": "tracker 'far'", "error": "ConnectionError: gone"}
    (folder / "grpo" / "seed-0" / "dropped.jsonl").write_text(json.dumps(row) + "\n")
    told = "seed 0 of arm grpo, step 7: tracker 'far' failed with ConnectionError: gone, and the run went on without it"
    assert told in read_study(folder).notes
