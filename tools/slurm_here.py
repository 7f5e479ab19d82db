"""A Slurm of two nodes for a while, both this machine, from Debian's packages in a folder: nothing is installed.

    python tools/slurm_here.py FOLDER COMMAND...

Downloads what it needs with apt into FOLDER (3.5 MB, once), starts slurmctld and slurmd, runs the command with Slurm's
own first on PATH, and ends them. Nobody is asked who he is (auth/none), and it listens on every address of this
machine: for machines that nobody else reaches.
"""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "libmunge2", "libhwloc15")
PATIENCE = 30.0  # seconds for the nodes to be there
CONFIGURATION = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/%n.log
PluginDir={libraries}/slurm-wlm
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
JobRequeue=1
KillWait=60
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""
NODES = ("here-1", "here-2")
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores} State=UNKNOWN\n"


def unpacked(folder: Path) -> Path:
    """Debian's packages, unpacked below a folder."""
    root = folder / "root"
    if root.is_dir():
        return root
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *PACKAGES], cwd=archives, check=True)
    for archive in sorted(archives.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)
    for name in ("slurmctld", "slurmd", "slurmstepd"):  # Debian's `alternatives` would make these names
        (root / "usr/sbin" / name).symlink_to(f"{name}-wlm")
    return root


def configured(root: Path, folder: Path) -> dict[str, str]:
    """The environment of Slurm's commands, with a configuration of two nodes, both this one."""
    state, libraries = folder / "state", root / "usr/lib/x86_64-linux-gnu"
    for name in ("controller", *NODES):
        (state / name).mkdir(parents=True, exist_ok=True)
    host, cores = socket.gethostname().split(".")[0], len(os.sched_getaffinity(0))
    here = {"host": host, "user": getpass.getuser(), "state": state, "libraries": libraries}
    written = CONFIGURATION.format(controller=_free_port(), **here)
    nodes = "".join(NODE.format(name=name, host=host, port=_free_port(), cores=cores) for name in NODES)
    head, sign, partition = written.partition("PartitionName=")
    written = head + nodes + sign + partition
    (folder / "slurm.conf").write_text(written, encoding="utf-8")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")
    path = os.pathsep.join([f"{root}/usr/bin", f"{root}/usr/sbin", os.environ["PATH"]])
    found = f"{libraries}/slurm-wlm{os.pathsep}{libraries}"
    return {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "LD_LIBRARY_PATH": found}


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Inside, Slurm is there; the environment of its commands.

    Raises:
        RuntimeError: if its nodes do not come up.
    """
    folder = folder.resolve()
    root = unpacked(folder)
    environment = configured(root, folder)
    with ExitStack() as held:
        below = root / "usr/sbin"
        daemons = [["slurmd", "-D", "-c", "-d", f"{below}/slurmstepd", "-N", name] for name in NODES]
        for words in (["slurmctld", "-D", "-c"], *daemons):
            held.enter_context(_running([f"{below}/{words[0]}", *words[1:]], folder, environment))
        begin = time.monotonic()
        while (told := _asked(["sinfo", "--noheader", "--format", "%D %t"], environment)).strip() != "2 idle":
            if time.monotonic() - begin > PATIENCE:
                raise RuntimeError(f"Slurm's nodes did not come up ({told.strip()}); see {folder}/*.out and its state")
            time.sleep(0.5)
        yield environment
        _asked(["scancel", "--user", getpass.getuser()], environment)


@contextmanager
def _running(words: list[str], folder: Path, environment: dict[str, str]) -> Iterator[None]:
    with (folder / f"{Path(words[0]).name}.out").open("ab") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=environment)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def _asked(words: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def main() -> int:
    """Runs a command beside Slurm; its exit code."""
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    with slurm(Path(sys.argv[1])) as environment:
        return subprocess.run(sys.argv[2:], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
