"""A real Slurm of one controller and two nodes, all of them processes on loopback; for root only."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from realparts.process import Process, free_ports, wait_until

DEBIAN = ("slurmctld", "slurmd", "slurm-client", "munge")

# Processes are found by their parents and held by nothing: control groups belong to the host. The nodes claim more
# cores than there may be (config_overrides): Slurm is to hand them out, not to be right about them.
_CONF = """\
ClusterName=zds
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
KillWait=5
MinJobAge=300
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=4 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm; `env` makes its commands find it."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """What the commands of Slurm need to know."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run one of Slurm's commands and return what it prints."""
        done = subprocess.run(
            command, env={**os.environ, **self.env, **(env or {})}, cwd=cwd, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def nodes_ready(self) -> bool:
        """Whether both nodes wait for work."""
        try:
            return self.ask("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle", "idle"]
        except RuntimeError:
            return False

    def jobs(self, name: str = "") -> list[str]:
        """Return the numbers of the jobs that run or wait, of one name or all."""
        which = [f"--name={name}"] if name else []
        return self.ask("squeue", "--noheader", "--format=%A", *which).split()

    def running(self, name: str) -> list[str]:
        """Return the numbers of the jobs of this name that run."""
        return self.ask("squeue", "--noheader", "--format=%A", f"--name={name}", "--states=RUNNING").split()

    def state_of(self, job: str) -> str:
        """Return the state of a job, such as COMPLETED, also some minutes after its end."""
        fields = self.ask("scontrol", "show", "job", job)
        return next(word.removeprefix("JobState=") for word in fields.split() if word.startswith("JobState="))


@contextmanager
def run_slurm(folder: Path) -> Iterator[Slurm]:
    """Run munge, the controller and two nodes until the block ends; jobs that are left are ended too."""
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    port, n1, n2 = free_ports(3)
    host = socket.gethostname()
    (folder / "slurm.conf").write_text(_CONF.format(host=host, folder=folder, port=port, n1=n1, n2=n2))
    slurm = Slurm(folder)
    munge = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "munge.pid"}
    files = [f"--{option}={file}" for option, file in munge.items()]
    files += [f"--seed-file={folder / 'munge.seed'}", f"--log-file={folder / 'munge.log'}"]
    with ExitStack() as stack:

        def start(name: str, *command: str) -> Process:
            process = Process.start(name, command, folder=folder, env=slurm.env)
            stack.callback(process.end)
            return process

        # Forced, because folders of tests are not open to everybody.
        munged = start("munged", "/usr/sbin/munged", "--foreground", "--force", "--num-threads=1", *files)
        munged.wait_ready(munge["socket"].exists)
        controller = start("slurmctld", "/usr/sbin/slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            start(f"slurmd-{node}", "/usr/sbin/slurmd", "-D", "-N", node)
        controller.wait_ready(slurm.nodes_ready, timeout_s=60)
        stack.callback(_end_jobs, slurm)
        yield slurm


def _end_jobs(slurm: Slurm) -> None:
    """Cancel what is left and wait: steps have sessions of their own and would outlive their node."""
    if left := slurm.jobs():
        slurm.ask("scancel", *left)
        wait_until(lambda: not slurm.jobs(), what="the end of all Slurm jobs", timeout_s=30)
