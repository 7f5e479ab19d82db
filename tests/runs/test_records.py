import json
import random
from pathlib import Path

import pytest

from aegpo.errors import CheckpointError
from aegpo.runs.records import MetricsRow, Row, RowFile, TimingRow, read_document, read_rows, write_document

OLD = Path(__file__).parents[1] / "data" / "run-0.1.0" / "small"


def rows(path, count=3, first=1):
    file = RowFile(path)
    for step in range(first, first + count):
        file.append({"step": step, "seconds": {"rollout": step / 8, "learning": 0.25}})
    return path.read_bytes()


def steps(path):
    read = read_rows(path, TimingRow)
    return [row["step"] for row in read.rows], read.damage


def test_rows_come_back_with_where_each_ends(tmp_path):
    content = rows(tmp_path / "timing.jsonl")
    read = read_rows(tmp_path / "timing.jsonl", TimingRow)
    assert [row["step"] for row in read.whole()] == [1, 2, 3]
    assert content[: read.ends[0]].count(b"\n") == 1
    assert read.ends[-1] == len(content)


def test_a_file_that_grows_over_several_starts_is_as_one_written_at_once(tmp_path):
    rows(tmp_path / "two", 1)
    rows(tmp_path / "two", 2, first=2)
    assert (tmp_path / "two").read_bytes() == rows(tmp_path / "one")


def test_any_flipped_bit_ends_the_rows_before_it(tmp_path):
    path, rng = tmp_path / "timing.jsonl", random.Random(0)
    content = rows(path)
    ends = read_rows(path, TimingRow).ends
    for _ in range(300):
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        found, damage = steps(path)
        assert damage is not None, (place, bit)
        assert found == [1, 2, 3][: sum(end <= place for end in ends)]


@pytest.mark.parametrize(
    ("lines", "kept"),
    [((0, 0, 1, 2), [1]), ((0, 2), [1]), ((1, 2), []), ((0, 1, 2, 0, 1, 2), [1, 2, 3]), ((1, 0, 2), [])],
    ids=["a row twice", "a row missing", "the first missing", "all of it twice", "another order"],
)
def test_rows_that_are_missing_twice_or_in_another_order_are_noticed(tmp_path, lines, kept):
    path = tmp_path / "timing.jsonl"
    whole = rows(path).splitlines(keepends=True)
    path.write_bytes(b"".join(whole[line] for line in lines))
    found, damage = steps(path)
    assert found == kept
    assert "was changed, or what is before it was, or is missing or there twice: its crc32 is wrong" in str(damage)
    with pytest.raises(CheckpointError, match=rf"cannot read .*timing\.jsonl: line {len(kept) + 1} was changed"):
        read_rows(path, TimingRow).whole()


def test_a_row_that_was_being_written_is_left_out_in_silence(tmp_path):
    path = tmp_path / "timing.jsonl"
    path.write_bytes(rows(path) + b'{"step": 4, "seco')
    read = read_rows(path, TimingRow)
    assert len(read.whole()) == 3
    assert str(read.damage) == "line 4 is cut short"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"[]", "is not such a row: it: input should be"),
        (b"{}", "is not such a row: step: field required"),
        (b'{"step": 4, "seconds": {}, "crc33": "00000000"}', "is not such a row: crc33: extra inputs"),
        (b'{"step": true, "seconds": {}}', "is not such a row: step: input should be a valid integer"),
        (b"\xff", "is not JSON: "),
        (b"[" * 100_000, "is not JSON: nested too deeply"),
        (b"", "is not JSON: "),
    ],
)
def test_a_line_that_is_no_row_is_damage_with_its_number_and_why(tmp_path, line, why):
    path = tmp_path / "timing.jsonl"
    path.write_bytes(rows(path) + line + b"\n")
    found, damage = steps(path)
    assert found == [1, 2, 3]
    assert str(damage).startswith(f"line 4 {why}")


def test_rows_without_checksums_are_read_and_the_first_with_one_counts_them_in(tmp_path):
    old = (OLD / "aegpo" / "seed-0" / "metrics.jsonl").read_bytes()
    assert b"crc32" not in old
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(old)
    count = len(read_rows(path, MetricsRow).whole())
    assert count > 0
    row = {**json.loads(old.splitlines()[-1]), "step": 99}
    RowFile(path).append(row)
    assert read_rows(path, MetricsRow).damage is None
    path.write_bytes(path.read_bytes().replace(b": 0.", b": 1.", 1))
    damaged = read_rows(path, MetricsRow)
    assert damaged.damage is not None
    assert damaged.damage.line == count + 1


def test_a_missing_file_has_no_rows_and_a_folder_is_refused(tmp_path):
    assert read_rows(tmp_path / "none", Row).rows == ()
    with pytest.raises(CheckpointError, match=r"cannot read .*: Is a directory"):
        read_rows(tmp_path, Row)


def test_any_flipped_bit_of_a_document_is_noticed(tmp_path):
    path, rng = tmp_path / "order.json", random.Random(0)
    write_document(path, {"arms": ["grpo", "aegpo"], "seeds": [0, 1]})
    assert read_document(path, ("arms", "seeds"), "") == {"arms": ["grpo", "aegpo"], "seeds": [0, 1]}
    content = path.read_bytes()
    for _ in range(300):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"cannot read .*order\.json: .*; delete it"):
            read_document(path, ("arms", "seeds"), "delete it")


def test_a_document_without_a_checksum_is_read_and_one_with_another_key_is_not(tmp_path):
    path = tmp_path / "order.json"
    path.write_text('{"arms": []}')
    assert read_document(path, ("arms",), "") == {"arms": []}
    path.write_text('{"arms": [], "crc33": ""}')
    with pytest.raises(CheckpointError, match="the key 'crc33' is none of its keys; it is damaged, or of a newer"):
        read_document(path, ("arms",), "")
