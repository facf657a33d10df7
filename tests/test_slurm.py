"""posfield submit on a SLURM of two nodes: however a job is stopped, it ends in the files of a run that was left
alone. See tests/slurm_cluster.py."""

import os
import re
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from photos import TINY, last, write_photos
from runs_fixture import ROOT
from slurm_cluster import NODES, Cluster, until, why_not
from soak import differences

from pretrain.cli import command
from pretrain.jobs.stage import Stage
from pretrain.results.schema import read_result

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not() or "there is SLURM")]
N_IT, AT_IT = 60, 15  # iterations of a run, and about when it is stopped
WORDS = ["optim.batch_size=4", f"optim.epoch_iters={N_IT // 2}", "optim.epochs=2", "log.checkpoint_every=10"]


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, Cluster(Path(folder)) as running:
        yield running


class Work:
    """A folder of runs, and how they are submitted."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        self.photos = write_photos(folder / "photos")
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self.environment = {**cluster.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}

    def words(self, name, *more):
        words = last([*TINY, f"data.root={self.photos}", *WORDS, *more])
        return ["pretrain", *words, f"run.output={self.folder / name}"]

    def call(self, *line):
        done = subprocess.run(line, env=self.environment, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def alone(self, name, *more, ranks=1):
        """A run without SLURM that nothing happens to; its folder."""
        if not (self.folder / name).exists():
            several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            python, *line = command(*self.words(name, *more))
            self.call(python, *several * (ranks > 1), *line)
        return self.folder / name

    def submit(self, name, *more, start=(), options=()):
        """Submit a pre-training; the numbers of its jobs."""
        return self.submit_line(*options, "--", *self.words(name, *start, *more))

    def submit_line(self, *line):
        options = "--gpus 0 --cpus 1 --hours 1 --folder jobs/%j".split()
        said = self.call(*command("submit", *options, *line))
        return re.search("submitted (.*);", said)[1].split(", ")

    def n_lines(self, name):
        path = self.folder / name / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def until_iteration(self, name, n=AT_IT):
        until(lambda: self.n_lines(name) >= n, 90, f"iteration {n} of {name}: {self.said()}")

    def processes(self, name):
        """Numbers of the processes of a run."""
        word, found = f"run.output={self.folder / name}".encode(), []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if word in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def until_state(self, job, state, seconds=180):
        until(lambda: self.cluster.state(job) == state, seconds, f"job {job} {state}")

    def done(self, job, seconds=180):
        """Return when a job has ended well; what it said."""
        try:
            until(
                lambda: (
                    self.cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
                ),
                seconds,
                job,
            )
        finally:
            told = self.said(job)
        assert self.cluster.state(job) == "COMPLETED", f"{self.cluster.state(job)}: {told}"
        return told

    def said(self, job=""):
        """The logs of a job."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f"jobs/*/{job}*.err")))[-9000:]

    def unlike(self, name, alone):
        """In what a run's log, last checkpoint and weights differ from those of one that was left alone."""
        ours = self.folder / name
        weights = [folder / "backbone.safetensors" for folder in (ours, alone)]
        found = differences(ours, alone)
        return found + ["backbone.safetensors"] * (weights[0].read_bytes() != weights[1].read_bytes())


@pytest.fixture(scope="module")
def work(cluster, tmp_path_factory):
    return Work(cluster, tmp_path_factory.mktemp("slurm"))


def test_two_nodes(work):
    (job,) = work.submit("nodes", options=["--nodes", "2"])
    work.done(job)
    assert work.unlike("nodes", work.alone("alone2", ranks=2)) == []


def test_an_array(work):
    jobs = work.submit("array{index}", "run.seed={index}", options=["--array", "2"])
    for job, i in zip(jobs, range(2)):
        work.done(job)
        assert work.unlike(f"array{i}", work.alone(f"alone_seed{i}", f"run.seed={i}")) == []


def test_a_sweep_of_segmentation(work):
    """An array whose jobs are the runs of its grid; the one that ends last writes the sweep's result."""
    pytest.importorskip("mmseg")
    from ade_fixture import write_ade
    from test_seg_sweep import toy

    data = write_ade(work.folder / "ade", n_train=2, n_val=2)
    many, one = [
        ["segment", *toy(work.folder / name, data, lr_grid="1e-3"), "--resume", "--sweep"]
        for name in ("many", "one")
    ]
    for job in work.submit_line("--array", "2", "--", *many, "{index}"):
        work.done(job)
    work.call(*command(*one))
    results = [read_result(work.folder / name / "out") for name in ("many", "one")]
    assert results[0].metrics == results[1].metrics and results[0].metrics["seeds"] == 2
    assert results[0].protocol == results[1].protocol


def test_scontrol_requeue(work):
    (job,) = work.submit("requeued")
    work.until_iteration("requeued")
    work.call("scontrol", "requeue", job)
    said = work.done(job)
    assert "going on from" in said and "Traceback" not in said
    assert work.unlike("requeued", work.alone("alone")) == []


def test_scancel(work, monkeypatch):
    """It saves, and stays canceled; a comparison sees by its number that it may be begun again."""
    monkeypatch.setenv("SLURM_CONF", work.environment["SLURM_CONF"])
    (job,) = work.submit("canceled")
    stage = Stage("pretrain", work.folder / "canceled", ["posfield"])
    stage.note("job").write_text(job)
    work.until_iteration("canceled")
    assert stage.state == f"in the queue (job {job})"
    work.call("scancel", job)
    work.until_state(job, "CANCELLED", 60)
    assert stage.state == "begun"
    assert "stopped: SIGTERM; saved at iteration" in work.said(job)
    (job,) = work.submit("canceled", start=["--resume"])
    assert "going on from" in work.done(job)
    assert work.unlike("canceled", work.alone("alone")) == []


@pytest.mark.parametrize("partition", ["low", "patient"])
def test_preemption(work, partition):
    (job,) = work.submit(partition, options=["--partition", partition])
    work.until_iteration(partition)
    other = work.call(
        "sbatch",
        "--parsable",
        "--partition=high",
        "--exclusive",
        "--nodes=2",
        "--output=/dev/null",
        "--wrap=sleep 3",
    ).strip()
    work.until_state(other, "COMPLETED")
    said = work.done(job)
    assert "going on from" in said and "Traceback" not in said
    assert work.unlike(partition, work.alone("alone")) == []


def test_a_node_that_goes_down(work):
    (job,) = work.submit("down", options=["--nodes", "2"])
    work.until_iteration("down")
    dead = list(NODES)[1]
    work.cluster.kill_node(dead)
    until(lambda: work.cluster.state(job) != "RUNNING", 120, "the job's end")
    work.cluster.start_node(dead)
    assert "going on from" in work.done(job)
    assert work.unlike("down", work.alone("alone2", ranks=2)) == []


@pytest.mark.parametrize("notice_s, number", [(10, signal.SIGUSR1), (0, signal.SIGTERM)])
def test_the_time_limit(work, notice_s, number):
    """With notice, and with the SIGTERM of its end alone. The run is held still, so that it is not done before;
    SLURM's signals let it go on."""
    name = f"late{notice_s}"
    (job,) = work.submit(name, options=["--hours", str(2 / 60), "--notice-s", str(notice_s)])
    work.until_iteration(name)
    (pid,) = work.processes(name)
    os.kill(pid, signal.SIGSTOP)
    said = work.done(job, 300)
    assert f"stopped: {number.name}; saved at iteration" in said and "going on from" in said
    assert work.unlike(name, work.alone("alone")) == []
