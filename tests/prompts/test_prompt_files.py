"""Files of prompts as people have them: read as what they are, or refused with the line and what would be right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worlds import GaussianSpec, small_experiment

from aegpo.core.records import Prompt
from aegpo.core.sections import DatasetPrompts, PromptsSpec
from aegpo.errors import AegpoError
from aegpo.prompts.datasets import read_dataset
from aegpo.prompts.files import read_file, read_places
from aegpo.prompts.problems import PromptProblems, problems

CAT, DOG = Prompt(0, "a cat", {"style": "photo"}), Prompt(1, "a dog", {"style": "oil, thick"})
OBJECTS = [{"prompt": "a cat", "style": "photo"}, {"prompt": "a dog", "style": "oil, thick"}]
LINES = "".join(json.dumps(each) + "\n" for each in OBJECTS)
READ = {
    "p.jsonl": LINES,
    "P.NDJSON": LINES.replace("\n", "\r\n"),
    "p.json": json.dumps(OBJECTS, indent=1),
    "p.csv": 'prompt,style\r\na cat,photo\r\n\r\na dog,"oil, thick"\r\n',
    "p.tsv": "style\tprompt\nphoto\ta cat\noil, thick\ta dog\n",
    "marked.csv": "\ufeffprompt,style\na cat,photo\na dog,\"oil, thick\"\n",
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), READ.items())
def test_a_file_is_read_as_what_its_name_says(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_file(tmp_path / name) == (CAT, DOG)


def test_a_parquet_file_has_rows_with_what_json_has_of_them(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"prompt": ["a cat", "a dog"], "style": ["photo", "oil, thick"], "thumbnail": [b"\x89PNG", b""]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "p.parquet")
    assert read_file(tmp_path / "p.parquet") == (CAT, DOG)
    categories = pyarrow.array(["a cat", "a cat"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"prompt": categories}), tmp_path / "q.parquet")
    assert list(read_places(tmp_path / "q.parquet")) == [f"{tmp_path}/q.parquet, row {number}" for number in (0, 1)]
    parquet.write_table(pyarrow.table({"prompt": ["a cat", None]}), tmp_path / "null.parquet")
    with pytest.raises(AegpoError, match=r"null\.parquet, row 1 has no prompt; a text was expected"):
        read_file(tmp_path / "null.parquet")


def test_only_a_newline_ends_a_line(tmp_path):
    strange = "a cat\u2028on\x85a\u2029mat\x0bby\x0cnight"
    (tmp_path / "p.txt").write_text(f"{strange}\r\na dog\n", encoding="utf-8", newline="")
    assert [each.text for each in read_file(tmp_path / "p.txt")] == [strange, "a dog"]
    row = json.dumps({"prompt": "a cat", "note": strange}, ensure_ascii=False)
    (tmp_path / "p.jsonl").write_text(f"{row}\n", encoding="utf-8", newline="")
    assert read_file(tmp_path / "p.jsonl") == (Prompt(0, "a cat", {"note": strange}),)
    (tmp_path / "p.csv").write_text('prompt,note\n"a cat\non a mat",\n', encoding="utf-8", newline="")
    assert read_file(tmp_path / "p.csv") == (Prompt(0, "a cat\non a mat", {"note": None}),)


REFUSED = [
    ("p.xlsx", b"PK", "p.xlsx: .xlsx is no kind of file of prompts; known: .txt, .jsonl, .ndjson, .json, .csv, .tsv, "),
    ("p.yaml", b"- a cat\n", "p.yaml: .yaml is no kind of file of prompts"),
    ("p.jsonl.gz", b"\x1f\x8b", "p.jsonl.gz: .gz is no kind of file of prompts"),
    ("p.txt", "a cat\n".encode("utf-16"), "p.txt, line 1: UTF-16 text; save it as UTF-8"),
    ("p.csv", "prompt\na cat\n".encode("utf-32"), "p.csv, line 1: UTF-32 text; save it as UTF-8"),
    ("p.txt", "a cat\n".encode("utf-16-le"), "p.txt, line 1: a byte 0, which text does not have"),
    ("p.txt", b"a dog\na caf\xe9\n", "p.txt, line 2: not UTF-8 text (byte 0xe9); save it as UTF-8"),
    ("p.txt", b"a cat\ra dog\n", "p.txt, line 1 has a carriage return alone; only a newline ends a line"),
    ("p.txt", b"\n \n", "p.txt has no prompts; it should have one a line"),
    ("p.json", b"[]", "p.json has no prompts; it should have a list of them"),
    ("p.json", b'{"prompt": "a"}\n{"prompt": "b"}', "line 2, column 1: Extra data; one value a line is a .jsonl file"),
    ("p.jsonl", b"[\n", "p.jsonl, line 1 is not JSON: Expecting value, column 2; a list of all prompts is a .json"),
    ("p.jsonl", b'{"prompt": null}', "p.jsonl, line 1 has null as 'prompt'; a text"),
    ("p.jsonl", b'{"prompt": ["a", "b"]}', """p.jsonl, line 1 has ["a", "b"] as 'prompt'; a text"""),
    ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1 is not JSON: the key 'prompt' is given twice"),
    ("p.jsonl", b'{"prompt": "a", "score": NaN}', "line 1 is not JSON: NaN is no number of JSON"),
    ("p.jsonl", b'{"prompt": "a", "score": 1e999}', "line 1 is not JSON: 1e999 is no number of JSON"),
    ("p.jsonl", b'"\\ud83d cat"', "line 1 is not JSON: \\ud83d is half of a character"),
    ("p.jsonl", b'{"prompt": "a", "x": ' + b"[" * 40 + b"]" * 40 + b"}", "lie more than 32 deep in one another"),
    ("p.jsonl", b"[" * 100_000, "line 1 is not JSON: lists and objects lie more than 32 deep"),
    ("p.jsonl", b'{"prompt": "a", "image": "x\\u0000"}', "cannot be the path of an image: "),
    ("p.jsonl", b'{"prompt": "a", "image": "' + b"x" * 5000 + b'"}', "p.jsonl, line 1: no image 'xxx"),
    ("p.csv", b"Prompt,style\na,b\n", "line 1, which names the columns between commas, has no column 'prompt', but "
     "'Prompt', 'style'; rename 'Prompt'"),
    ("p.csv", b"prompt;style\na;b\n", "between commas, has no column 'prompt', but 'prompt;style'; call the column"),
    ("p.csv", b"prompt,style\na,b\nc, d, e\n", "p.csv, line 3 has 3 values for 2 columns"),
    ("p.csv", b"prompt,style\na,b\n,b\n", "p.csv, line 3 has no prompt; a text was expected: fill it in"),
    ("p.csv", b"prompt,prompt\na,b\n", "p.csv, line 1 names the column 'prompt' twice"),
    ("p.csv", b'prompt\n"a cat\n', "p.csv, line 2 is no row of separated values: a double quote is left open"),
    ("p.csv", b'prompt\n"a" cat\n', "p.csv, line 2 is no row of separated values: "),
    ("p.tsv", b"prompt\na\rb\n", "line 2 is no row of separated values: it has a carriage return alone"),
    ("p.txt", b'a cat\n{"prompt": "a dog"}\n', "p.txt, line 2 is one of a .jsonl file, not a prompt; rename the file"),
    ("p", b"style,prompt\nphoto,a cat\n", "p, line 1 is one of a .csv file, not a prompt; rename the file"),
    ("p.txt", b"prompt\tstyle\na cat\tphoto\n", "p.txt, line 1 is one of a .tsv file, not a prompt; rename the file"),
    ("p.parquet", b"PAR1 and nothing else", "p.parquet is no Parquet file that can be read: "),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_what_is_no_file_of_prompts_is_refused_with_its_line_and_the_way_out(tmp_path, name, content, message):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AegpoError) as error:
        read_file(tmp_path / name)
    assert message in str(error.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(AegpoError, match="it is a folder; name a file in it, or write it as a dataset"):
        read_file(tmp_path)
    with pytest.raises(AegpoError, match="it is no regular file"):
        read_file(Path("/dev/null"))
    with pytest.raises(AegpoError, match="File name too long"):
        read_file(tmp_path / ("x" * 300))


# --- what is not used ------------------------------------------------------------------------------------------------


def said(**prompts) -> list[tuple[str, str, bool]]:
    experiment = small_experiment(GaussianSpec(), prompts=PromptsSpec(**prompts))
    return [(".".join(map(str, each.location)), each.message, each.warning) for each in problems(experiment)]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Ten prompts to train on, of which 'cat 9' is held out, and one that occurs twice."""
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("".join(f"cat {number}\n" for number in range(10)))
    Path("held.txt").write_text("cat 9\n")
    Path("twice.txt").write_text("a cat\na dog\na cat\n")
    return tmp_path


def test_prompts_of_a_file_that_are_not_used_are_told(files):
    train, twice = Path("train.txt"), Path("twice.txt")
    assert said(train=train, evaluation=twice, train_count=10) == [
        ("prompts.evaluation", "1 of 3 prompts of twice.txt repeat another and are asked as often as they are there, "
         "such as line 3, which is line 1 again; remove them if that is not meant", True)
    ]  # fmt: skip
    assert said(train=train, evaluation=Path("held.txt"), train_count=6, evaluation_count=1, shared="drop") == [
        ("prompts.shared", "1 of 10 prompts of train.txt are held out and not trained on", True),
        ("prompts.train_count", "only the first 6 of 9 prompts of train.txt are trained on; 9 takes all", True),
    ]
    assert said(train=train, evaluation=twice, evaluation_count=2) == [
        ("prompts.evaluation_count", "only the first 2 of 3 prompts of twice.txt are evaluated; 3 takes all", True)
    ]


def test_what_looks_like_another_kind_of_file_and_may_be_a_prompt_is_one(tmp_path):
    lines = ["fast, prompt, delivery", '{"scene": "a cat"}', "{prompt}", "prompt"]
    (tmp_path / "p.txt").write_text("".join(f"{line}\n" for line in lines))
    assert [each.text for each in read_file(tmp_path / "p.txt")] == lines


def test_columns_that_json_lacks_are_told(files):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"prompt": ["a cat", "a dog"], "style": ["photo", "oil"], "thumbnail": [b"\x89PNG", b""]}
    parquet.write_table(pyarrow.table(columns), "p.parquet")
    told = "column 'thumbnail': values that JSON lacks, such as bytes or dates; not read"
    assert said(train=Path("p.parquet"), evaluation=Path("held.txt")) == [("prompts.train", f"p.parquet: {told}", True)]
    pytest.importorskip("datasets")
    source = DatasetPrompts(dataset=str(files), file="p.parquet")
    assert read_dataset(source).unused == (f"{source.label}: {told}",)


def test_lists_that_no_run_could_use_are_refused_at_load_with_their_keys(files):
    train, held_out = Path("train.txt"), Path("held.txt")
    ((place, message, warning),) = said(train=train, evaluation=held_out)
    assert (place, warning) == ("prompts.evaluation", False)
    assert message.startswith("1 of 1 evaluation prompts are trained on too, such as 'cat 9'")
    ((place, message, warning),) = said(train=Path("held.txt"), evaluation=Path("twice.txt"))
    assert (place, warning) == ("prompts.train", False)
    assert message.startswith("1 training prompts are fewer than the 2 of a step")
    assert [place for place, *_ in said(train=Path("gone.txt"), evaluation=Path("gone.txt"))] == [
        "prompts.train",
        "prompts.evaluation",
    ]


def test_lists_that_arms_share_are_read_once(files):
    spec = PromptsSpec(train=Path("train.txt"), evaluation=Path("twice.txt"))
    arms = [small_experiment(GaussianSpec(), prompts=spec, training_steps=steps) for steps in (1, 2)]
    read = PromptProblems()
    assert read.of(arms[0]) is read.of(arms[1])


def test_rows_of_a_dataset_that_are_not_used_are_told(tmp_path):
    pytest.importorskip("datasets")
    texts = ["a cat", None, "a dog", " ", "a cat", "a cow"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    source = DatasetPrompts(dataset=str(tmp_path))
    found = read_dataset(source, {("a cow", ())}, count=1)
    assert found.prompts == (Prompt(0, "a cat"),)
    assert [line.removeprefix(f"{source.label}: ") for line in found.unused] == [
        "2 of 6 rows have no prompt and are left out",
        "1 of 6 rows repeat a prompt and are left out",
        "1 of 3 prompts are held out and are not trained on",
        "the first 1 of 2 prompts are used",
    ]
    (tmp_path / "train.jsonl").write_text('{"prompt": ["a red circle", "one red disc"]}\n')
    with pytest.raises(AegpoError, match=r"row 0 has \[\"a red circle\", \"one red disc\"\] in column 'prompt'; "):
        read_dataset(DatasetPrompts(dataset=str(tmp_path)))
