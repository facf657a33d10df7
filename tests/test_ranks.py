"""Several processes: they equal one, however the work is shared out, and come back when one dies."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from photos import TINY, last, write_photos
from runs_fixture import ROOT, differences, torchrun
from slurm_cluster import free_port, until

from pretrain.config import load_config
from pretrain.jobs.compare import TORCHRUN
from pretrain.train import train
from pretrain.weights import read_checkpoint

EXACT = [
    "run.precision=float64",
    "backbone.drop_path=0.0",
    "optim.batch_size=4",
    "optim.epoch_iters=1",
    "optim.epochs=5",
]


def pretrain(output, *words, options=()):
    """tools/train_ssl.py on two ranks; returns stderr."""
    return torchrun(
        2, ROOT / "tools" / "train_ssl.py", f"run.output={output}", *last([*TINY, *words]), options=options
    )


@pytest.fixture
def photos(tmp_path):
    torch.set_num_threads(1)
    return f"data.root={write_photos(tmp_path / 'photos', n=8)}"


@pytest.mark.parametrize(
    "extra",
    [[], ["losses.centering=sinkhorn_knopp", "step.accumulate=2"], ["positions.encoding=rotary"]],
    ids=["centering", "sinkhorn in parts", "rotary"],
)
def test_two_gloo_ranks_equal_one_at_double_batch(tmp_path, photos, extra):
    """float64, drop path 0, exact mode: losses, parameters, moments and centers after 5 steps."""
    train(load_config(None, last([*TINY, photos, f"run.output={tmp_path / 'one'}", *EXACT, *extra[:1]])))
    pretrain(tmp_path / "two", photos, *EXACT, *extra)
    assert differences(tmp_path / "one", tmp_path / "two", 5) == []


def test_fsdp2_equals_ddp_and_its_checkpoint_goes_on_anywhere(tmp_path, photos):
    """Sharded parameters and optimizer: the same numbers; resumed on one process; the last checkpoint is
    one file."""
    pretrain(tmp_path / "ddp", photos, *EXACT, "step.accumulate=2")
    sharded = [
        photos,
        *EXACT,
        "step.parallel=fsdp2",
        "step.accumulate=2",
        "log.checkpoint_every=2",
        "log.keep_checkpoints=9",
    ]
    pretrain(tmp_path / "fsdp", *sharded)
    assert differences(tmp_path / "ddp", tmp_path / "fsdp", 5) == []
    folders = {
        path.name: {file.name for file in path.iterdir()}
        for path in (tmp_path / "fsdp" / "checkpoints").iterdir()
    }
    assert "state.safetensors" in folders["it_00000005"] and "index.json" in folders["it_00000004"]
    a, b = (read_checkpoint(tmp_path / run / "backbone.safetensors").state for run in ("ddp", "fsdp"))
    for key, value in a.items():  # float64 to 1e-9, rounded to float32
        torch.testing.assert_close(b[key], value, rtol=1e-6, atol=1e-8)
    # from the shards of iteration 2, on one process without shards
    train(load_config(None, last([*TINY, *sharded, f"run.output={tmp_path / 'fsdp'}"])), resume="2")
    assert differences(tmp_path / "ddp", tmp_path / "fsdp", 5) == []


def listening(pid):
    """{port: addresses, as the system writes them} of the sockets that a process and its children listen on."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    parents, family, held, found = dict(zip(table[::2], table[1::2])), {str(pid)}, set(), {}
    for _ in range(5):  # generations
        family |= {child for child, parent in parents.items() if parent in family}
    for each in family:
        with suppress(OSError):  # it has ended meanwhile
            held |= {os.readlink(link) for link in Path("/proc", each, "fd").iterdir()}
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(path).read_text().splitlines()[1:]:
            words = line.split()
            (address, port), state, inode = words[1].split(":"), words[3], words[9]
            if state == "0A" and f"socket:[{inode}]" in held:
                found.setdefault(int(port, 16), []).append(address)
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp6").exists(), reason="Linux says who listens")
@pytest.mark.parametrize("how", ["a task of SLURM", "compare"])
def test_ranks_of_one_machine_meet_on_the_loopback(tmp_path, how):
    """No store serves any other address."""
    script = tmp_path / "meet.py"
    script.write_text(MEET)
    words = [sys.executable, str(script), str(tmp_path / "port")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if how == "compare":
        words[1:1] = TORCHRUN
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    else:
        environment |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE) as process:
        until((tmp_path / "port").exists, 60, "the ranks")
        now = listening(process.pid)
        process.communicate(b"end")
    port = int((tmp_path / "port").read_text())
    assert now[port] == ["0100007F"] and not {"0" * 8, "0" * 32} & {
        x for where in now.values() for x in where
    }
    assert process.returncode == 0


MEET = """
import os, sys
from pathlib import Path
from pretrain import distributed
distributed.start("cpu")
part = Path(sys.argv[1]).with_name("part")
part.write_text(os.environ["MASTER_PORT"])
part.rename(sys.argv[1])
sys.stdin.read() if "TORCHELASTIC_RUN_ID" not in os.environ else __import__("time").sleep(3)
distributed.stop()
"""


def test_another_number_of_ranks_goes_on_without_repeats(tmp_path, photos):
    """Two ranks for 2 steps, then one to the end: as one from the start, so no image was repeated or left
    out."""
    train(load_config(None, last([*TINY, photos, f"run.output={tmp_path / 'one'}", *EXACT])))
    often = ["log.checkpoint_every=2", "log.keep_checkpoints=9"]
    pretrain(tmp_path / "both", photos, *EXACT, *often)
    train(
        load_config(None, last([*TINY, photos, f"run.output={tmp_path / 'both'}", *EXACT, *often])),
        resume="2",
    )
    assert differences(tmp_path / "one", tmp_path / "both", 5) == []


def test_a_killed_rank_comes_back_under_torchrun(tmp_path, photos):
    """kill -9 of one rank at iteration 3: torchrun starts both again, they go on from a checkpoint and end
    as if nothing was."""
    pretrain(tmp_path / "straight", photos, *EXACT)
    (tmp_path / "sitecustomize.py").write_text(KILLER.format(marker=str(tmp_path / "killed")))
    environment = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment}"
    try:
        often = ["log.checkpoint_every=1", "--resume"]
        error = pretrain(tmp_path / "killed_run", photos, *EXACT, *often, options=["--max-restarts=2"])
    finally:
        os.environ["PYTHONPATH"] = environment
    assert (tmp_path / "killed").read_text() == "rank 1 at iteration 3" and "going on from" in error
    assert differences(tmp_path / "straight", tmp_path / "killed_run", 5) == []


KILLER = """
import os, signal, sys
if os.environ.get("RANK") == "1" and not os.path.exists({marker!r}):
    import importlib.abc, importlib.util

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "pretrain.trainer":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module

            def exec_module(module):
                load(module)
                step = module.Trainer.step

                def killed(self, *arguments, **named):
                    if self.iteration == 3:
                        open({marker!r}, "w").write("rank 1 at iteration 3")
                        os.kill(os.getpid(), signal.SIGKILL)
                    return step(self, *arguments, **named)

                module.Trainer.step = killed

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())
"""
