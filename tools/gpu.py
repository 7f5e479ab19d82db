"""What only a GPU can show, in one command; nothing is downloaded.

    python tools/gpu.py                                    # every section, most valuable first, in 9 minutes
    python tools/gpu.py --section entropy --section sd35   # some of them
    python tools/gpu.py --dry                              # every section on a CPU, with tiny sizes, in a minute
    python tools/gpu.py --collect-wheels wheels            # before: what a machine without a network may lack
    python tools/gpu.py --wheels wheels                    # there: runs on what is installed and on these
    python tools/gpu.py --render gpu.jsonl                 # after: its rows as section `gpu` of tools/BENCHMARKS.md

Every number is a row of JSON, printed and appended to --rows at once, so a run that is cut off has told what it found.
A section that fails says so in a row, and the next one goes on; one that does not fit into what is left of --minutes
is left out, in a row too. Exit code 1 if any failed. Networks are the published architectures with random weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_sections.sections import Method, Record, Section

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    "entropy",
    "sd35",
    "flux",
    "precision",
    "moments",
    "compile",
    "offload",
    "batches",
    "ablation",
    "bits",
    "nccl",
    "sharded",
)
ROWS = Path("gpu.jsonl")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",  # processes are forked
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a look at CUDA must not keep forked processes from it
}


def sections() -> list[Section]:
    """All of them, in their order; imports everything that they need."""
    from gpu_sections import entropy, learning, processes, sharded, steps, variants
    from gpu_sections.sections import Section

    return [
        Section(
            "entropy", "are the CUDA backends of attention entropy exact, and what do they cost?", entropy.entropy, 40
        ),
        Section("sd35", "what does a step of sd35_aegpo.yaml take?", steps.sd35_step, 80),
        Section("flux", "what does a step of flux_aegpo.yaml, arm lora, take?", steps.flux_step, 120),
        Section("precision", "do bfloat16 and float16 learn as float32 does?", learning.precision, 85),
        Section("moments", "do moments of 8 bits learn?", learning.moments, 15),
        Section("compile", "what does compiling blocks save, and when?", variants.compiled, 240),
        Section("offload", "what does waiting in main memory cost?", variants.offload, 60),
        Section("batches", "how many states at once keep a GPU busy?", variants.micro_batches, 40),
        Section("ablation", "does a GPU learn what a CPU learns?", processes.ablation, 20),
        Section("bits", "have 1, 2 and 4 processes the same bits on one GPU?", processes.bits, 200),
        Section("nccl", "does NCCL carry what processes tell each other?", processes.nccl, 15),
        Section("sharded", "do sharded weights hold what `check` says, by phase?", sharded.sharded, 90),
    ]


def command_line() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", action="append", choices=NAMES, help="which ones (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of them together (default: 9)")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU: shows that the sections run")
    parser.add_argument("--rows", type=Path, default=ROWS, help=f"file that rows are appended to (default: {ROWS})")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install from there what is missing, and run on it")
    parser.add_argument("--collect-wheels", type=Path, metavar="DIR", help="download them there; runs nothing")
    parser.add_argument("--write", action="store_true", help="afterwards, write section `gpu` of tools/BENCHMARKS.md")
    parser.add_argument("--render", type=Path, metavar="FILE", help="write that section from these rows; runs nothing")
    return parser


def main() -> int:
    """Does what was asked; 1 if a section failed."""
    parser = command_line()
    given = parser.parse_args()
    if given.dry and given.write:
        parser.error("--dry measures nothing that is worth writing; leave --write out")
    sys.path.insert(0, str(ROOT))
    if given.collect_wheels is not None:
        from gpu_sections.wheels import collect

        collect(given.collect_wheels)
        return 0
    if given.wheels is not None:
        from gpu_sections.wheels import enter

        enter(given.wheels.resolve(), sys.argv)
    os.environ.update(QUIET)
    failed = False if given.render is not None else run(given)
    if given.write or given.render is not None:
        from gpu_sections.markdown import write

        write(given.render or given.rows)
    return int(failed)


def run(given: argparse.Namespace) -> bool:
    """Runs the chosen sections; True if one failed."""
    begin = time.monotonic()
    if given.dry:
        os.environ["OMP_NUM_THREADS"] = "1"
    from gpu_sections.machine import described, quiet
    from gpu_sections.sections import Record

    chosen = [section for section in sections() if section.name in (given.section or NAMES)]
    quiet()
    common, method = described(given.dry)
    record = Record(given.rows, common)
    record.add("machine", {"seconds_to_import": round(time.monotonic() - begin, 1), "minutes": given.minutes})
    deadline = begin + 60 * given.minutes
    fine = [one(section, given.dry, deadline, record, method) for section in chosen]
    return not all(fine)


def one(section: Section, dry: bool, deadline: float, record: Record, method: Method) -> bool:
    """Runs a section, or says that there is no time for it; True unless it failed."""
    from gpu_sections.sections import run_apart

    left = deadline - time.monotonic()
    if not dry and left < section.seconds:
        record.add(section.name, {"skipped": f"{left:.0f} s are left, it takes about {section.seconds:.0f}"})
        return True
    return run_apart(section, dry, deadline, record, method)


if __name__ == "__main__":
    sys.exit(main())
