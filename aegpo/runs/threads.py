"""With how many CPU threads a run computes: one number for every library that has threads of its own."""

from __future__ import annotations

import os

from aegpo.errors import AegpoError

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # the first is the one to ask with


def thread_variables(threads: int) -> dict[str, str]:
    """The environment of a process that is to compute with so many threads."""
    return dict.fromkeys(VARIABLES, str(threads))


def allowed(threads: int) -> int:
    """So many threads, or as many as the environment asks for, if those are fewer; of several variables the fewest.

    Raises:
        AegpoError: if a variable is no number of threads.
    """
    return min([threads, *(_number(name, os.environ[name]) for name in VARIABLES if os.environ.get(name))])


def fewer_threads(label: str, begun: int, now: int) -> str:
    """What is to be said of a run that goes on with fewer threads than it was begun with."""
    return (
        f"{label}: goes on with fewer threads than before: {begun} -> {now}, as the environment asks; sums are split "
        "otherwise, so bits may differ from a run without the change"
    )


def _number(name: str, text: str) -> int:
    first = text.split(",")[0].strip()  # "4,2" is OpenMP's for nested ones
    if not (first.isascii() and first.isdigit() and int(first) > 0):
        raise AegpoError(f"{name} is {text!r} in the environment; a number of threads such as 1 was expected, or none")
    return int(first)
