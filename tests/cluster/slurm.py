"""A Slurm cluster of one node that lives in a temporary folder: munged, slurmctld and slurmd, started and stopped.

Needs Debian's slurm-wlm and root. By hand: `python -m tests.cluster.slurm` starts one and waits for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
TASKS = 8  # that the node says it has room for, whatever the machine has

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
JobRequeue=1
KillWait=20
MinJobAge=3600
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={tasks}
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """A running cluster.

    Attributes:
        folder: everything of it. environment: what its commands need to find it.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, dict(environment)

    def __call__(self, *words: object, timeout: float = 120, **environment: str) -> str:
        """What a Slurm command prints.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            raise RuntimeError(f"{words}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}")
        return done.stdout

    def submit(self, script: Path, *flags: object, **environment: str) -> int:
        """sbatch; the job's number. What it prints goes to its folder, `NUMBER.out` or `NUMBER_TASK.out`."""
        array = any(str(flag).startswith("--array") for flag in flags) or "#SBATCH --array" in script.read_text()
        output = script.parent / ("%A_%a.out" if array else "%j.out")
        return int(self("sbatch", "--parsable", "-o", output, *flags, script, **environment))

    def tasks(self, job: int) -> dict[int, dict[str, str]]:
        """What `scontrol show job` knows, by array task; a job without tasks is task 0."""
        tasks = {}
        for block in self("scontrol", "show", "job", job).strip().split("\n\n"):
            fields = dict(re.findall(r"(\w+)=(\S*)", block))
            if fields.get("ArrayTaskId", "0").isdigit():  # else the tasks that wait, together
                tasks[int(fields.get("ArrayTaskId", "0"))] = fields
        return tasks

    def wait(self, job: int, tasks: int = 1, seconds: float = 600) -> dict[int, dict[str, str]]:
        """`tasks(job)` once all of them have ended.

        Raises:
            TimeoutError: they have not.
        """
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

        def over() -> bool:
            states = [task["JobState"] for task in self.tasks(job).values()]
            return len(states) == tasks and all(state in ended for state in states)

        wait_until(over, seconds, lambda: f"{self.tasks(job)}\n{self.logs()}")
        return self.tasks(job)

    def logs(self) -> str:
        """The last lines of the daemons' logs."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in self.folder.glob("*.log")
        )


def wait_until(true: Callable[[], object], seconds: float, why: Callable[[], str]) -> None:
    """Ask again and again.

    Raises:
        TimeoutError: it is not true after so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(why())
        time.sleep(0.2)


@contextlib.contextmanager
def slurm_cluster() -> Iterator[Slurm]:
    """Start a cluster, and leave nothing of it: jobs are cancelled, daemons end, the folder goes.

    Raises:
        RuntimeError: a program is missing, or a daemon does not come up.
    """
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid():
        raise RuntimeError(f"needs root and Debian's slurm-wlm; missing: {missing}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    slurm = Slurm(folder, {**environment, "SLURM_CONF": str(folder / "slurm.conf")})
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> None:
        with open(folder / f"{words[0]}.start.log", "wb") as log:
            daemons.append(subprocess.Popen(words, env=slurm.environment, stdout=log, stderr=log))

    try:
        folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        controller, daemon = _free_ports(2)
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=platform.node().split(".")[0],
                controller=controller,
                daemon=daemon,
                folder=folder,
                tasks=TASKS,
            )
        )
        files = {"key-file": key, "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        files["log-file"] = "munge.log"
        start("munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in files.items()))
        wait_until((folder / "munge.socket").exists, 30, slurm.logs)
        start("slurmctld", "-D")
        start("slurmd", "-D")

        def idle() -> bool:
            if any(each.poll() is not None for each in daemons):
                raise RuntimeError(slurm.logs())
            with contextlib.suppress(RuntimeError):
                return slurm("sinfo", "-h", "-o", "%T").strip() == "idle"
            return False

        wait_until(idle, 60, slurm.logs)
        yield slurm
    finally:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired, OSError):
            slurm("scancel", "--partition=all", "--signal=KILL", "--full")
            slurm("scancel", "--partition=all")
            wait_until(lambda: not slurm("squeue", "-h", "-t", "R,CG").strip(), 30, slurm.logs)
        for each in reversed(daemons):
            each.terminate()
            try:
                each.wait(20)
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in found:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in found]


if __name__ == "__main__":
    with slurm_cluster() as cluster, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", file=sys.stderr)
        while True:
            time.sleep(1)
