"""The rivals' own code and aegpo side by side, on the same small networks; README.md says how and what was changed.

    python tools/bench_rivals --flow-grpo PATH --flow-factory PATH --dance-grpo PATH --mix-grpo PATH
                              --branch-grpo PATH --ddpo PATH

Each PATH is a checkout of that project; those that are not given are left out. Nothing is downloaded and nothing in the
checkouts is changed. The figures are printed and written to tools/BENCHMARKS.md, section `rivals`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from bench import RECORD, machine, write_section

from aegpo.core.sections import OptimizerSpec
from bench_rivals import models, ours
from bench_rivals.cases import PROMPTS, Case
from bench_rivals.tables import Comparison, section
from bench_rivals.turns import Series, SideError, environment, take_turns

RIVALS = ("flow_grpo", "flow_factory", "dance_grpo", "mix_grpo", "branch_grpo", "ddpo")  # modules here
RETAIN = "retain"  # the optimizer's option that keeps graphs of sampled steps for the first update
HELD_OUT = "two the"


def command_line() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in RIVALS:
        title = importlib.import_module(f"bench_rivals.{name}").TITLE
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="PATH", help=f"a checkout of {title}")
    parser.add_argument("--turns", type=int, default=5, help="measured steps of each side, after one to warm up")
    parser.add_argument("--group", type=int, default=4, help="rollouts of each of two prompts; for trees 2, 4, 8, 16")
    parser.add_argument("--updates", type=int, nargs="+", default=[1, 2], choices=[1, 2], help="of a training step")
    parser.add_argument(
        "--retain", nargs="+", help="values of aegpo's optimizer.retain; default: never, auto if it has that"
    )
    parser.add_argument("--device", default="cpu", help="cpu: processor time of one thread; cuda: wall-clock")
    parser.add_argument("--work", type=Path, help="folder for networks and logs, kept; default: a temporary one")
    parser.add_argument("--print-only", action="store_true", help="leave tools/BENCHMARKS.md as it is")
    return parser


def main() -> None:
    """Measures, prints and records."""
    options = command_line().parse_args()
    given = {name: path for name in RIVALS if (path := getattr(options, name)) is not None}
    if not given:
        raise SystemExit("no checkout was given; name one at least, e.g. --flow-grpo PATH")
    for name, path in given.items():
        if not path.is_dir():
            raise SystemExit(f"--{name.replace('_', '-')}: {str(path)!r} is no folder; give a checkout")
    work = options.work or Path(tempfile.mkdtemp(prefix="bench_rivals-"))
    load, begin = os.getloadavg()[0], datetime.datetime.now(tz=datetime.UTC)
    environment(options.device, work.resolve())
    torch.set_num_threads(1)
    found, interrupted = list[Comparison](), False
    try:
        for each in compared(given, options, work.resolve()):
            found.append(each)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; what was measured until then is printed, not recorded")
    finally:
        if options.work is None:
            shutil.rmtree(work)
    words = [f"--{name.replace('_', '-')} PATH" for name in given]
    words += [f"--turns {options.turns} --group {options.group} --device {options.device}"]
    words += [f"--updates {' '.join(map(str, options.updates))}"]
    minutes = (datetime.datetime.now(tz=datetime.UTC) - begin).total_seconds() / 60
    lines = [
        f"`python tools/bench_rivals {' '.join(words)}`, {begin:%Y-%m-%d}, {machine(1)}; load average {load:.1f} at "
        f"the start, {os.getloadavg()[0]:.1f} at the end, {minutes:.0f} minutes.",
        "",
        *section(found, options),
    ]
    print("\n".join(lines))
    if not (options.print_only or interrupted):
        write_section(RECORD, f"rivals, {torch.device(options.device).type}", lines)


def compared(given: dict[str, Path], options: argparse.Namespace, work: Path) -> Iterator[Comparison]:
    """One comparison for each rival and number of updates; one that fails says why, and the others go on."""
    for name, checkout in given.items():
        rival = importlib.import_module(f"bench_rivals.{name}")
        for updates in options.updates:
            folder = work / f"{name}-{updates}"
            shutil.rmtree(folder, ignore_errors=True)
            series = sides(rival, name, checkout, folder, updates, options)
            failure = None
            try:
                take_turns(series, options.turns)
            except SideError as error:
                failure = str(error)
                print(f"{rival.TITLE}, {updates} updates: {failure}")
            found = Comparison(rival.TITLE, rival.TREE, updates, series[0], series[1:], failure)
            print(f"{rival.TITLE}, {updates} updates: {found.brief()}", flush=True)
            yield found


def sides(
    rival: ModuleType, name: str, checkout: Path, folder: Path, updates: int, options: argparse.Namespace
) -> list[Series]:
    """The rival, and aegpo with each way to retain."""
    model, shared = folder.parent / rival.FAMILY, folder / "shared"
    if not model.exists():
        models.write(rival.FAMILY, model)
    shared.mkdir(parents=True)
    (shared / "train.txt").write_text("\n".join(PROMPTS) + "\n")
    (shared / "held_out.txt").write_text(f"{HELD_OUT}\n")
    retained: list[str | None] = [None]
    if RETAIN in OptimizerSpec.model_fields:
        retained = list(options.retain or ("never", "auto"))
    series = []
    for module, retain in ((name, None), *(("ours", each) for each in retained)):
        own = folder / (module if retain is None else f"ours-{retain}")
        own.mkdir()
        case = Case(checkout.resolve(), model, shared, own, options.device, options.group, updates, retain)
        if module == "ours":
            ours.write_experiment(case, rival.method(case))
        series.append(Series(module, case))
    return series
