"""SLURM on one machine: munged, slurmctld and two nodes, with names, ports and files of their own in one folder.

Each node is a slurmd in namespaces of its own (host name, /etc/hosts, processes): the nodes find each other by
name, and one that is killed takes all of its processes along, as a machine does that loses its power.

apt-get install --no-install-recommends slurm-wlm munge
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "unshare")
NODES = {"pfnode0": "127.0.0.2", "pfnode1": "127.0.0.3"}
# cred_expire: how long a job that was put back has to wait, else 120 s. SlurmdTimeout: when a node that says
# nothing is down. GraceTime: what a preempted job of "patient" gets to save in; one of "low" is killed at once.
CONFIG = """
ClusterName=posfield
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=10
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=patient Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


def why_not() -> str:
    """The reason why there can be no cluster here; empty: there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)"
    tried = subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    return "" if tried.returncode == 0 else "nodes need unshare, which is for root"


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Cluster:
    """A running cluster; a context. ``environment`` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={free_port()} CPUs=4 RealMemory=1000"
            for name, address in NODES.items()
        )
        values = {"folder": self.folder, "controller": free_port(), "user": os.environ.get("USER", "root")}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values, nodes=nodes))
        hosts = "".join(f"{address} {name}\n" for name, address in NODES.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        paths = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid"}
        paths |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in paths.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *options)
        until(lambda: (self.folder / "munge.socket").exists(), 20, "munged")
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.start_node(node)
        self.wait_for_nodes()

    def _daemon(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.environment
            )

    def start_node(self, name: str) -> None:
        """Switch a node on."""
        begin = (
            f"hostname {name} && mount --bind {self.folder / 'hosts'} /etc/hosts && slurmd -D -N {name}; true"
        )
        own = ("--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
        self._daemon(name, "unshare", *own, "bash", "-c", begin)

    def kill_node(self, name: str) -> None:
        """Switch a node off, as a power cut does: all of its processes are gone."""
        self._daemons[name].kill()
        self._daemons.pop(name).wait()

    def wait_for_nodes(self) -> None:
        """Return when all nodes are idle."""
        until(
            lambda: self.told("sinfo", "-hN", "-p", "low", "-o", "%T").split() == ["idle"] * len(NODES),
            60,
            "nodes",
        )

    def told(self, *command: str) -> str:
        """What one of SLURM's commands prints; empty where it fails."""
        return subprocess.run(command, capture_output=True, text=True, env=self.environment).stdout.strip()

    def state(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED``, ... of a job; empty: SLURM does not know it."""
        return self.told("squeue", "-h", "--states=all", "-j", job, "-o", "%T")

    def stop(self) -> None:
        """End everything that was started."""
        if "slurmctld" in self._daemons:
            self.told("scancel", "--signal=KILL", "--user", self.told("id", "-un"))
        for name in reversed(list(self._daemons)):
            process = self._daemons.pop(name)
            process.send_signal(signal.SIGKILL if name in NODES else signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def until(holds: Callable[[], object], seconds: float, what: str) -> None:
    """Return as soon as something holds; AssertionError where it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)
