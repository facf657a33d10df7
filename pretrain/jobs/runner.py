"""The runner: jobs of one or more stages, on this machine or on SLURM. What is done is not run again."""

import fcntl
import math
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from pretrain.cli import REQUEUE_CODE
from pretrain.errors import UserError
from pretrain.files import write_text
from pretrain.jobs.slurm import Queue
from pretrain.jobs.stage import DONE, FAILED, GRACE_S, LEFT, OTHER, QUEUED, Stage, is_to_begin, locked
from pretrain.signals import interruptible


class Runner:
    """Runs jobs until they are done or the time is over. One that fails does not stop the others.

    submitit's local executor runs no stage here: it hides the exit code, ends a job that is over time after
    one second, and its log carries no lock.

    Args:
        n_at_once: jobs that run at a time.
        seconds: the time that all have together. A stage is not started when less is left than the longest of
            its kind took; one that is cut off may take GRACE_S longer.
        n_gpus: of each job; 0: nobody shares the GPUs out.
        queue: hands the stages to SLURM instead.

    Raises:
        UserError: there are not so many GPUs.
    """

    def __init__(
        self, n_at_once: int = 1, seconds: float = math.inf, n_gpus: int = 0, queue: Queue | None = None
    ) -> None:
        self._n_at_once, self._queue = 1 if queue else n_at_once, queue
        self._until, self._took = time.monotonic() + seconds, dict[str, float]()
        self._gpus: SimpleQueue[str | None] = SimpleQueue()
        for group in gpu_groups(n_at_once, n_gpus) if n_gpus and not queue else [None] * n_at_once:
            self._gpus.put(group)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        self._lock = Lock()  # nothing starts once all that runs is being ended

    def run(self, jobs: Mapping[str, Sequence[Stage]]) -> dict[str, str]:
        """Run the stages of every job that are not done, in order.

        Args:
            jobs: {name: its stages}; they are begun in this order.

        Returns:
            {name: ``done`` | ``left`` (there was no time, or it goes on elsewhere) | ``failed`` | ``in the
            queue`` (handed to SLURM just now)}.

        Raises:
            Interrupted: SIGTERM or SIGUSR1 came, and was passed on to all that ran.
        """
        if self._n_at_once > 1:  # they share the cores
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._n_at_once)))

        def outcome(name: str) -> str:
            try:
                return self._run_job(name, jobs[name])
            except OSError as error:  # a command or a log that cannot be opened, a full disk
                print(f"{name}: {error}", flush=True)
                return FAILED

        with interruptible(), ThreadPoolExecutor(self._n_at_once) as pool:
            try:
                return dict(zip(jobs, pool.map(outcome, jobs)))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()

    def _run_job(self, name: str, stages: Sequence[Stage]) -> str:
        for stage in stages:
            state = stage.state
            if state == DONE:
                continue
            if not is_to_begin(state):
                print(f"{name}: {state}", flush=True)
                return FAILED if state == OTHER else LEFT
            begun = time.monotonic()
            if self._until - begun <= self._took.get(stage.kind, 0.0):
                return LEFT
            if stage.identity:  # without one the command decides whether the folder is its own
                stage.sign()
            if self._queue:
                print(f"{name}: submitted {self._queue.submit(stage)}", flush=True)
                return QUEUED
            stage.folder.parent.mkdir(parents=True, exist_ok=True)
            stage.note("run").unlink(missing_ok=True)
            code = self.launch(stage.command, stage.log, self._until - begun)
            needed = time.monotonic() - begun
            write_text(stage.note("run"), str(REQUEUE_CODE if code is None else code))
            how = "no time" if code is None else f"exit code {code}"
            print(f"{name} {stage.kind}: {how} after {needed:.0f} s", flush=True)
            if code in (None, REQUEUE_CODE):
                return LEFT
            if code or not stage.has_result:
                return FAILED
            stage.sign()
            self._took[stage.kind] = max(self._took.get(stage.kind, 0.0), needed)
        return DONE

    def launch(self, command: Sequence[str], log: Path, seconds: float) -> int | None:
        """Run a command and append its output to ``log``. When its time is over it gets a SIGTERM, so that it
        can save, then a SIGKILL. A command whose log another process has locked is not started.

        Returns:
            its exit code; None where its time was over, or all were stopped.

        Raises:
            OSError: the command or its log cannot be opened.
        """
        gpus = self._gpus.get()
        try:
            with open(log, "a") as file, self._lock:
                if self._stopped:
                    return None
                if not locked(file, fcntl.LOCK_EX):
                    print(f"{log.with_suffix('')}: another process runs it", flush=True)
                    return REQUEUE_CODE
                # else torchrun's agent serves a store for its ranks, on every address of the machine
                environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
                if gpus is not None:
                    environment["CUDA_VISIBLE_DEVICES"] = gpus
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
                self._running.add(process)
            try:
                code = process.wait(max(seconds, 0.0))
                # one that was stopped may not have saved yet, and torchrun says 1 of all
                return None if self._stopped and code else code
            except subprocess.TimeoutExpired:
                end([process])
                return None
            finally:
                with self._lock:
                    self._running.remove(process)
        finally:
            self._gpus.put(gpus)

    def stop(self) -> None:
        """Start nothing any more, and end what runs."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        end(running)


def gpu_groups(n_at_once: int, n_each: int = 1) -> list[str | None]:
    """For each of ``n_at_once`` jobs the ``n_each`` GPUs that it sees; None where there is no choice.

    Raises:
        UserError: there are fewer than a job needs.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if n_each > max(1, len(names)):
        raise UserError(f"a run on {n_each} GPUs: there are {len(names)} here")
    if len(names) <= n_each:
        return [None] * n_at_once
    groups = [",".join(names[i : i + n_each]) for i in range(0, len(names) - n_each + 1, n_each)]
    return [groups[slot % len(groups)] for slot in range(n_at_once)]


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminate processes, kill those that still run after GRACE_S, and wait for all."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
