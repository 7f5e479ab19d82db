"""How much memory is free, and that what a process frees is there for its next use."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from aegpo.core import memory
from aegpo.core.memory import free_bytes

CPU = torch.device("cpu")
MEMINFO = ["MemTotal:       24684092 kB", "MemFree:        20801192 kB", "MemAvailable:   2048 kB"]
FAULTS = """
import resource, sys
import torch
from aegpo.core.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(2**24) for _ in range(4)]  # of 64 MiB each, more than the library keeps by itself
    del held
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(after - before)
"""


def test_free_is_what_the_machine_says_within_the_limit_of_a_container(monkeypatch):
    files = {"/proc/meminfo": MEMINFO, "/sys/fs/cgroup/memory.max": ["max"], "/sys/fs/cgroup/memory.current": ["500"]}
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(path, []))
    assert free_bytes(CPU) == 2048 * 1024
    files["/sys/fs/cgroup/memory.max"] = ["1500"]
    assert free_bytes(CPU) == 1000
    files["/sys/fs/cgroup/memory.max"] = ["400"]
    assert free_bytes(CPU) == 0
    files.clear()
    assert 0 < free_bytes(CPU) < 2**50  # half of what there is


def test_this_machine_has_some():
    assert free_bytes(CPU) > 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the GNU C library")
def test_memory_that_was_freed_is_not_fetched_again():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "give back")
    )
    assert kept < 0.5 * given_back
