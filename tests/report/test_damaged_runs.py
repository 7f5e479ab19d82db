"""A damaged file costs a report the run it belongs to, or less, and the report says what is left out and why."""

import pytest
from studies import AEGPO, GRPO, World, write_experiment

from aegpo.errors import AegpoError
from aegpo.report.recorded import read_study
from aegpo.report.summary import summarize

RUN = "aegpo/seed-0"
LEFT_OUT = "seed 0 of arm aegpo: left out of all tables: "
OF_A_RUN = {
    "metrics.jsonl": (b"#", "line 1 is not JSON"),
    "evaluations.jsonl": (b"{}\n", "line 1 is not such a row: step: field required"),
    "manifest.json": (b"#", "it is not JSON"),
}


@pytest.fixture
def study(tmp_path):
    return write_experiment(tmp_path, (GRPO, AEGPO), (0, 1), World(training_steps=4, every=2, prompts=4))


@pytest.mark.parametrize("name", OF_A_RUN)
def test_a_run_whose_record_is_damaged_is_left_out_and_named(study, name):
    content, why = OF_A_RUN[name]
    path = study / RUN / name
    path.write_bytes(content + path.read_bytes())
    found = read_study(study)
    assert set(found.runs) == {("grpo", 0), ("grpo", 1), ("aegpo", 1)}
    (note,) = found.notes
    assert note.startswith(f"{LEFT_OUT}cannot read {path}: {why}")
    assert "put" in note
    summarize(found)


def test_a_run_whose_manifest_is_gone_is_named(study):
    (study / RUN / "manifest.json").unlink()
    assert read_study(study).notes == (f"{LEFT_OUT}{study / RUN / 'manifest.json'} is gone; put it back",)


def test_the_run_of_another_seed_is_named(study):
    path = study / RUN / "manifest.json"
    path.write_bytes((study / "aegpo/seed-1/manifest.json").read_bytes())
    (note,) = read_study(study).notes
    assert note.startswith(f"{LEFT_OUT}{path.parent} has the run of arm 'aegpo', seed 1, by its manifest.json; put it")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timing.jsonl", "its wall-clock is left out"),
        ("finished.json", "goes on from the newest checkpoint"),
        ("images/step-000002.png", "is no picture: not shown"),
        ("dropped.jsonl", "who was left out is not known"),
    ],
)
def test_what_no_number_hangs_on_is_left_out_alone(study, name, said):
    (study / RUN / name).write_bytes(b"\xff\n")
    found = read_study(study)
    assert len(found.runs) == 4
    assert [note for note in found.notes if said in note and name in note]


def test_a_line_that_is_cut_short_is_said_of_a_finished_run_alone(study):
    path = study / RUN / "timing.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    note = read_study(study).notes[0]
    assert note == f"seed 0 of arm aegpo: {path}: line 5 is cut short: the wall-clock of that line is left out"
    (study / RUN / "finished.json").unlink()
    assert not [note for note in read_study(study).notes if "cut short" in note]


def test_without_its_order_the_arms_are_in_alphabetical_order_and_that_is_said(study):
    (study / "order.json").write_bytes(b'{"arms": ["grpo"')
    found = read_study(study)
    assert found.arms == ("aegpo", "grpo")
    assert found.notes[0].startswith("the order of the arms is lost, so they are in alphabetical order")


def test_if_no_run_can_be_read_the_error_names_each(study):
    for path in study.glob("*/*/metrics.jsonl"):
        path.write_bytes(b"#\n")
    with pytest.raises(AegpoError, match=r"no run can be read:(\n  seed \d of arm \w+: left out .*){4}"):
        read_study(study)
