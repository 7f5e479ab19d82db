"""Evaluates the fenced blocks of a page as its reader would, in order, in a folder of its own; sybil finds them.

A comment before a block says what is not plain from it, as in `<!--- block: slow -->`:

    slow            the slow tests run it; else its commands are accepted, as `run` is anyway, and statements compile
    accepted: WHY   its commands are accepted by the command line, their files load, and that is all
    cheap           `aegpo run` is run with the smallest steps there are
    printed         a text that the block before printed: its words are looked for
    measured        a text that was measured elsewhere, as the page says
    file NAME       a text that is a file
    tree            a text that is the tree of a run's folder
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

import nox.registry
import typer
from accelerate.commands.launch import launch_command_parser
from command_line import aegpo
from repository import ROOT
from sybil import Document, Example, Region
from sybil.parsers.markdown import CodeBlockParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer
from torch.distributed import run as torchrun

from aegpo import testing
from aegpo.commands.cli import app
from aegpo.config.loading import load_experiment_file
from aegpo.plugin.manager import load_registries, plugin_manager

LANGUAGES = ("bash", "python", "yaml", "text")
LASTING = ("run", "serve-reward", "watch", "push")  # commands that go on for long
LAUNCHERS = re.compile(
    r"((?:\w+=\S+ )*)(torchrun|accelerate launch) (.*?)-m (?=aegpo )"
)  # of a command that others test
CHEAP = {  # the smallest run that still evaluates, branches and checkpoints
    "training_steps": 2,
    "prompts": "{train_count: 8, evaluation_count: 4}",
    "rollouts": "{prompts_per_step: 2, rollouts_per_step: 24, denoising_steps: 5}",
    "optimizer.rollouts_per_update": 24,
    "evaluation.images": 4,
}
CHECKS = {"rewards": testing.check_reward, "signals": testing.check_signal}
TITLE = re.compile(r"# (\S+\.\w+)\n")


@dataclass
class Reader:
    """Who reads a page and does what it says."""

    folder: Path  # where commands are given
    weights: Path  # of a small network, for cheap runs
    slow: bool = False
    said: str = ""  # of the next block
    printed: str = ""  # by the last block of commands
    plugins: list[str] = field(default_factory=list)
    names: dict[str, object] = field(default_factory=lambda: {"__name__": "page"})  # of statements

    def bash(self, text: str) -> None:
        """Every command is accepted; where it does not take long, it is given."""
        said, self.printed = self.take(), ""
        for line in lines_of(text):
            program, *words = shlex.split(unlaunched(line), comments=True)
            if program == "aegpo":
                self.command(words, said)
            else:
                PROGRAMS[program](words)

    def command(self, words: list[str], said: str) -> None:
        """Accepts a line of `aegpo` with its file, arms and seeds; runs it unless it is lasting or said not to be."""
        if "--help" not in words:
            accepted(words)
        if said.startswith("accepted") or (said == "slow" and not self.slow):
            return
        if words[0] not in LASTING or said in ("slow", "cheap"):
            small = [word for key, value in CHEAP.items() for word in ("--set", f"{key}={value}")]
            small += ["--set", f"model.weights={self.weights}"]
            done = aegpo(*words, *(small if said == "cheap" else ()))
            assert done.code == 0, done.stdout + done.stderr
            self.printed += done.stdout

    def python(self, text: str) -> None:
        """A module whose parts conform, if it begins with the name of a file; else statements that run."""
        said = self.take()
        if found := TITLE.match(text):
            (self.folder / found[1]).write_text(text, encoding="utf-8")
            self.plugins.append(found[1])
            conforms([Path(each).stem for each in self.plugins])
        else:
            code = compile(text, "page", "exec")
            if said != "slow" or self.slow:
                exec(code, self.names)

    def yaml(self, text: str) -> None:
        """An experiment file, which loads with every arm and seed; the first line is its path."""
        self.take()
        found = TITLE.match(text)
        assert found, f"the block must begin with a comment that names its file:\n{text}"
        path = self.folder / found[1]
        path.write_text(text, encoding="utf-8")
        file = load_experiment_file(path, load_registries(plugin_manager(self.plugins)))
        assert file.name == path.stem
        assert all(file.experiment(arm, seed).seed == seed for arm in file.arms for seed in file.seeds)

    def text(self, text: str) -> None:
        """What was printed, measured, or is a file; one of which is said."""
        said = self.take()
        if said.startswith("file "):
            (self.folder / said.removeprefix("file ")).write_text(text, encoding="utf-8")
        elif said == "printed":
            missing = [word for word in text.split() if word not in self.printed and word != "..."]
            assert not missing, f"{missing} not in what was printed:\n{self.printed}"
        else:
            assert said in ("measured", "tree"), f"a comment must say what this is:\n{text}"

    def take(self) -> str:
        """What was said of this block."""
        said, self.said = self.said, ""
        return said


def unlaunched(line: str) -> str:
    """The command that a launcher starts, whose own options exist; another line as it is."""
    found = LAUNCHERS.match(line)
    if found is None:
        return line
    _, launcher, words = found.groups()
    given = [*words.split(), "-m", "aegpo"]
    if launcher == "torchrun":
        torchrun.get_args_parser().parse_args(given)
    else:
        launch_command_parser().parse_args(given)
    return line[found.end() :]


def accepted(words: list[str]) -> None:
    """A line of `aegpo` whose options exist, and whose file loads with the arms and seeds it names."""
    name, *rest = words
    given = typer.main.get_command(app).commands[name].make_context(name, list(rest)).params
    if "file" not in given or Path(given["file"]).is_dir():
        return
    registries = load_registries(plugin_manager(given["plugin"]))
    file = load_experiment_file(Path(given["file"]), registries, given["overrides"])
    assert set(given.get("arm") or ()) <= set(file.arms)
    assert set(given.get("seed") or ()) <= set(file.seeds)


def conforms(modules: list[str]) -> None:
    """The parts of the newest module pass the check of their kind."""
    sys.modules.pop(modules[-1], None)  # that of another page
    own = [
        (registry.axis, entry)
        for registry in load_registries(plugin_manager(modules))
        for entry in registry
        if entry.source == modules[-1]
    ]
    assert own, f"{modules[-1]} registers nothing"
    for axis, entry in own:
        CHECKS[axis](entry.spec())


def nox_session(words: list[str]) -> None:
    """`nox` alone, or with a session or tag that is there."""
    nox.registry._REGISTRY.clear()
    load(ROOT / "noxfile.py")
    sessions = nox.registry.get()
    assert words[:1] in ([], ["-s"], ["-t"])
    tags = {tag for session in sessions.values() for tag in session.tags}
    assert set(words[1:2]) <= (tags if words[:1] == ["-t"] else set(sessions))


def python_line(words: list[str]) -> None:
    """Tests that are there, a tool with its arguments, or a script of the documentation, which tests of its own run."""
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[2:] if word not in ("-m", "not faults"))
    elif words[0] == "-m":
        assert words[1:2] == ["mkdocs"]
    elif words[0] == "-c":
        exec(compile(words[1], "page", "exec"), {"__name__": "page"})
    elif words[0].startswith("tools/"):
        assert load(ROOT / words[0]).command_line().parse_args(words[1:])
    else:
        assert (ROOT / words[0]).is_file()
        assert not words[1:]


def installed(words: list[str]) -> None:
    """`pip install` of an extra that is there."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"aegpo\[(\w+)\]", " ".join(words)):
        assert f"\n{extra} = [" in project


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


def set_up(words: list[str]) -> None:
    """The README's two lines, which CI runs word for word."""
    assert words[:3] == ["-m", "venv", ".venv"]


PROGRAMS = {"nox": nox_session, "python": python_line, "pip": installed, "python3": set_up}


def lines_of(text: str) -> list[str]:
    """The commands of a block, with lines that go on joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def commands(path: Path, first: str) -> Iterator[list[str]]:
    """The words of every command on a page that begins with a word."""
    for example in page(path):
        if example.region.evaluator.func is _evaluate and example.region.evaluator.args == ("bash",):
            for line in lines_of(str(example.parsed)):
                words = shlex.split(unlaunched(line), comments=True)
                if words[0] == first:
                    yield words[1:]


def page(path: Path) -> Document:
    """A page with its blocks, each of a language that is evaluated, and what is said of them."""
    return Document.parse(str(path), _blocks, _announcements)


def read(path: Path, reader: Reader) -> None:
    """Does what the page says."""
    document = page(path)
    document.namespace["reader"] = reader
    for example in document:
        example.evaluate()
    assert not reader.said, f"{path} says {reader.said!r} of no block"


def _blocks(document: Document) -> Iterator[Region]:
    for language in LANGUAGES:
        yield from CodeBlockParser(language, partial(_evaluate, language))(document)


def _announcements(document: Document) -> Iterator[Region]:
    for found in DirectiveInHTMLCommentLexer(directive="block", arguments=r"[^\n]*?")(document):
        yield Region(found.start, found.end, found.lexemes["arguments"].strip(), partial(_announce))


def _evaluate(language: str, example: Example) -> None:
    getattr(example.namespace["reader"], language)(str(example.parsed))


def _announce(example: Example) -> None:
    example.namespace["reader"].said = example.parsed
