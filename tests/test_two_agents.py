"""Two machines: two agents of torchrun, each with its own node rank and loopback address."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
from photos import TINY, last, write_photos
from runs_fixture import ROOT, torchrun
from slurm_cluster import free_port, until
from soak import differences

pytestmark = pytest.mark.slow
WORDS = ["optim.batch_size=4", "optim.epoch_iters=30", "optim.epochs=2", "log.checkpoint_every=5"]
TOOL = str(ROOT / "tools" / "train_ssl.py")


class Machines:
    """Two machines; the folder of each is its working folder."""

    def __init__(self, *folders):
        self.folders, self.agents = folders, []

    def start(self, words):
        """An agent on each."""
        port, python_path = (
            free_port(),
            os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        )
        for i, folder in enumerate(self.folders):
            line = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                "--nproc-per-node=1",
                f"--node-rank={i}",
            ]
            line += ["--master-addr=127.0.0.1", f"--master-port={port}", f"--local-addr=127.0.0.{2 + i}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
            with open(folder / "said", "ab") as said:
                agent = subprocess.Popen(
                    [*line, TOOL, *words], stdout=said, stderr=said, cwd=folder, env=environment
                )
            self.agents.append(agent)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for i in range(len(self.agents)):
            self.kill(i)

    def kill(self, i):
        """A machine is gone: its agent, and the process that it started."""
        agent = self.agents[i]
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True
        )
        for pid in [agent.pid, *map(int, children.stdout.split())]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()

    def codes(self, seconds=180):
        """How the agents ended."""
        until(lambda: all(agent.poll() is not None for agent in self.agents), seconds, "the agents' end")
        return [agent.returncode for agent in self.agents]

    def said(self, i):
        return (self.folders[i] / "said").read_text()


def machines(tmp_path, *names):
    folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    return Machines(*folders)


@pytest.fixture
def words(tmp_path):
    return last([*TINY, f"data.root={write_photos(tmp_path / 'photos', n=8)}", *WORDS])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_one_machine_dies_and_both_go_on(tmp_path, words, parallel):
    words, run = [*words, f"step.parallel={parallel}"], tmp_path / "run"
    torchrun(2, TOOL, *words, f"run.output={tmp_path / 'alone'}")
    words += [f"run.output={run}"]
    with machines(tmp_path, "one", "two").start(words) as pair:
        log = run / "metrics.jsonl"
        until(lambda: log.exists() and log.read_bytes().count(b"\n") > 12, 120, "iteration 12")
        pair.kill(1)
        assert pair.codes() == [1, -signal.SIGKILL]
    with machines(tmp_path, "one", "two").start([*words, "--resume"]) as pair:
        assert pair.codes() == [0, 0], pair.said(0)[-3000:] + pair.said(1)[-3000:]
        assert re.search("going on from .*it_000000[12]", pair.said(0))
    assert differences(run, tmp_path / "alone") == []


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_folder_that_one_machine_does_not_see_is_named(tmp_path, words, parallel):
    """A relative folder, and each machine has a disk of its own."""
    words = [*words, f"step.parallel={parallel}", "run.output=run", "optim.epochs=1"]
    with machines(tmp_path, "one", "two").start(last(words)) as pair:
        assert 0 not in pair.codes()
        told = pair.said(0) + pair.said(1)
    assert f"error: run: {tmp_path / 'two' / 'run'} on " in told, told[-5000:]
    assert "is not the folder of the first process; all machines must see one folder" in told
