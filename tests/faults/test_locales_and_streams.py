"""Locales without most letters, streams that are full, closed or gone, terminals of any size, odd variables."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

import pytest
from surroundings import Surroundings, results_in
from warm import CALM, ROOT, Ended

LOCALES: dict[str, dict[str, str | None]] = {
    "LANG=C": {"LANG": "C", "LC_ALL": "C"},
    "ASCII streams": {"PYTHONIOENCODING": "ascii"},
    "POSIX locale without UTF-8 mode": {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1 streams": {"PYTHONIOENCODING": "latin-1"},
}
# What the embedded world asks of prompts is English and ASCII, so that the other letters stand beside them: the
# original wrote them into the prompts, which the rewards refuse in any locale, by name and line.
TRAINING = (
    "a red circle",
    "two blue squares",
    "a green square",
    "four purple circles",
    "a blue circle",
    "two red squares",
)
HELD_OUT = ("a green circle", "two purple squares", "a red square", "two green circles")
LETTERS = ("é", "💥", "漢字", "\u202e", "ß", "ü")
REWARD = "rewards=[{kind: palette, name: 'Fär💥'}]"
SEVERAL = ("--set", "seeds=[0, 1]")
locales = pytest.mark.parametrize("environment", LOCALES.values(), ids=LOCALES)


@pytest.fixture(scope="module")
def letters(surroundings: Surroundings) -> tuple[str, ...]:
    """Options that bring letters of many alphabets: metadata of prompts, and a reward's label."""
    for name, prompts in (("training", TRAINING), ("held-out", HELD_OUT)):
        lines = [json.dumps({"prompt": text, "note": LETTERS[i]}, ensure_ascii=False) for i, text in enumerate(prompts)]
        (surroundings.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    files = ("--set", "prompts.train=training.jsonl", "--set", "prompts.evaluation=held-out.jsonl")
    return (*files, "--set", REWARD)


@locales
def test_unicode_prompts_and_labels(surroundings: Surroundings, tmp_path, letters, environment):
    ended = surroundings.run("run", "spec.yaml", "--out", tmp_path, *letters, environment=environment)
    surroundings.expect(ended)
    row = json.loads((tmp_path / "tiny/main/seed-0/metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert any("Fär💥" in key for key in row["metrics"]), row["metrics"]


@locales
def test_check(surroundings: Surroundings, letters, environment):
    surroundings.expect(surroundings.run("check", "spec.yaml", *letters, environment=environment))


@locales
def test_a_mistake_in_unicode(surroundings: Surroundings, environment):
    surroundings.write("ü.yaml", "bäd: 💥\n")
    surroundings.expect(surroundings.run("check", "ü.yaml", environment=environment), 2, words=["unknown key"])


@locales
def test_prompts_that_are_refused_are_shown(surroundings: Surroundings, environment):
    """The original's prompts: refused, and the message degrades."""
    (surroundings.folder / "held.txt").write_text("ein roter Kreis ü\n二\n💥💥\nd\n", encoding="utf-8")
    ended = surroundings.run("check", "spec.yaml", "--set", "prompts.evaluation=held.txt", environment=environment)
    surroundings.expect(ended, 2, words=["line 1", "is not a sentence of the embedded world"])


@locales
def test_several_with_children(surroundings: Surroundings, tmp_path, letters, environment):
    ended = surroundings.run("run", "spec.yaml", "--out", tmp_path, *letters, *SEVERAL, environment=environment)
    surroundings.expect(ended)


def terminal(folder: Path, words: list[object], size: tuple[int, int], environment: Mapping[str, str]) -> Ended:
    """Runs a command in a terminal of so many rows and columns."""
    child, end = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update({**CALM, "PYTHONPATH": str(ROOT), "TERM": "xterm", **environment})
        os.environ.pop("COLUMNS", None)
        os.execv(sys.executable, [sys.executable, "-m", "aegpo", *map(str, words)])
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    data = b""
    while True:
        try:
            chunk = os.read(end, 65536)
        except OSError:  # the other end is gone
            break
        if not chunk:
            break
        data += chunk
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, data.decode(errors="replace"), 0, 0, hangs=False)


TERMINALS = {
    "80 x 24": ((24, 80), {}, ()),
    "3 x 10": ((3, 10), {}, ()),
    "dumb, several": ((24, 80), {"TERM": "dumb"}, SEVERAL),
}


@pytest.mark.parametrize(("size", "environment", "options"), TERMINALS.values(), ids=TERMINALS)
def test_terminal(surroundings: Surroundings, tmp_path, size, environment, options):
    words = ["run", "spec.yaml", "--out", tmp_path, *options]
    surroundings.expect(terminal(surroundings.folder, words, size, environment), same=tmp_path)


def test_streams_check_into_head(surroundings: Surroundings):
    ended = surroundings.shell("AEGPO check spec.yaml | head -1; echo code ${PIPESTATUS[0]}")
    surroundings.expect(ended, words=["code 0"])
    assert "BrokenPipe" not in ended.out


def test_streams_run_into_head_and_goes_on_afterwards(surroundings: Surroundings, tmp_path):
    """Stricter than it was, which took a run that died of its output: it ends as the reference."""
    line = f"AEGPO run spec.yaml --out {tmp_path} | head -1; echo code ${{PIPESTATUS[0]}}"
    surroundings.expect(surroundings.shell(line), words=["code 0"])
    assert results_in(tmp_path) == surroundings.results
    again = surroundings.run("run", "spec.yaml", "--out", tmp_path)
    surroundings.expect(again, words=["finished before"], same=tmp_path)


STREAMS = {"full": ("> /dev/full", 2), "closed": (">&-", 0), "errors closed": ("2>&-", 0)}


@pytest.mark.parametrize(("redirection", "code"), STREAMS.values(), ids=STREAMS)
def test_streams_stdout(surroundings: Surroundings, tmp_path, redirection, code):
    """Stricter than it was: the run ends as the reference, and a disk that lost its output is said."""
    ended = surroundings.shell(f"AEGPO run spec.yaml --out {tmp_path} {redirection}")
    surroundings.expect(ended, code)
    assert results_in(tmp_path) == surroundings.results


def test_streams_stdin_closed(surroundings: Surroundings, tmp_path):
    surroundings.expect(surroundings.shell(f"AEGPO run spec.yaml --out {tmp_path} <&-"), same=tmp_path)


VARIABLES: dict[str, tuple[tuple[int, ...], dict[str, str | None]]] = {
    "AEGPOPARENT=abc": ((2,), {"AEGPOPARENT": "abc"}),
    "OMP_NUM_THREADS=abc": ((0, 2), {"OMP_NUM_THREADS": "abc", "MKL_NUM_THREADS": None}),
    "CUDA_VISIBLE_DEVICES=7": ((0,), {"CUDA_VISIBLE_DEVICES": "7"}),
}


@pytest.mark.parametrize(("codes", "environment"), VARIABLES.values(), ids=VARIABLES)
def test_variables(surroundings: Surroundings, tmp_path, codes, environment):
    ended = surroundings.run("run", "spec.yaml", "--out", tmp_path, environment=environment)
    surroundings.expect(ended, *codes)


def test_variables_aegpo_block_plugins_nothing(surroundings: Surroundings):
    ended = surroundings.run("check", "spec.yaml", environment={"AEGPO_BLOCK_PLUGINS": "nothing"})
    surroundings.expect(ended, 2)


def test_variables_omp_num_threads_1_holds_in_children(surroundings: Surroundings, tmp_path):
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": None}
    words = ("run", "spec.yaml", "--out", tmp_path, *SEVERAL, "--jobs", "1")
    surroundings.expect(surroundings.run(*words, environment=threads))
    assert json.loads((tmp_path / "tiny/main/seed-0/manifest.json").read_text())["threads"] == 1
