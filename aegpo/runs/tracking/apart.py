"""Foreign clients at work beside a run: what the run draws from and listens to is as it was when they are done."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

# What torchrun and `accelerate launch` tell a process, by which accelerate would join a group of its own.
_LAUNCHED = (
    *("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_CPU_AFFINITY"),
    *("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "ACCELERATE_USE_SAGEMAKER"),
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def apart() -> Iterator[None]:
    """Inside, accelerate takes this process for one alone on a CPU, as it only tells a service something.

    After it, the global generators, the handlers of Ctrl-C and SIGTERM and accelerate's own state are what they were.
    """
    import torch

    drawn = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    main = threading.current_thread() is threading.main_thread()
    handlers = {each: signal.getsignal(each) for each in _SIGNALS} if main else {}
    try:
        with _alone():
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        torch.set_rng_state(drawn[2])
        for each, handler in handlers.items():
            if signal.getsignal(each) is not handler:
                signal.signal(each, handler)


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, accelerate has a state, which its loggers ask for; one that somebody made before is left alone."""
    from accelerate.state import PartialState

    if PartialState._shared_state:
        yield
        return
    hidden = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    try:
        PartialState(cpu=True)
    finally:
        os.environ.update(hidden)
    try:
        yield
    finally:
        PartialState._reset_state()
