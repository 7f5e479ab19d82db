"""torchrun on one node of a job, which ends once the process that started it is gone.

    python -m aegpo.clusters.node --nnodes=2 ... -m aegpo run FILE

What torchrun starts watches torchrun; nobody would watch torchrun itself, whose processes are sessions of their own.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from aegpo.core.processes import PARENT, parent

_GRACE = 600  # seconds that processes have to end their step and save it: torchrun's own 30 are too few


def main() -> None:
    """Runs torchrun with the words of the command line."""
    waiting = parent()
    os.environ.pop(PARENT, None)  # of what torchrun starts it is torchrun
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_GRACE))
    # torch 2.13 leaves the addresses of the first attempt in a store that attempts share.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if waiting is not None:
        threading.Thread(target=_watch, args=(waiting,), daemon=True).start()
    from torch.distributed.run import main as torchrun

    torchrun(sys.argv[1:])


def _watch(waiting: int) -> None:
    while os.getppid() == waiting:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
