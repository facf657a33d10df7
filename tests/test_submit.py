"""posfield submit: the job as sbatch gets it, its ranks, and how it comes back. SLURM's commands are
stand-ins that record."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import submitit
from tool_fixture import load_tool

from posfield.cli import COMMANDS
from posfield.cli.submit import found
from pretrain.cli import command
from pretrain.errors import UserError
from pretrain.jobs.slurm import (
    RESUMABLE,
    Resources,
    ToolJob,
    rank_environment,
    sbatch_script,
    tool_jobs,
)

ROOT = Path(__file__).resolve().parents[1]
# A tool that is taken away from its nodes in its first life: SLURM's notice comes, it saves and leaves with
# the requeue code.
TOOL = """
import json, os, signal, sys, time
from pathlib import Path
folder, rank, left = Path(sys.argv[-1]), os.environ.get("RANK", "0"), []
signal.signal(signal.SIGUSR1, lambda number, frame: left.append(number))
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
life = len(list(folder.glob(f"{rank}_*.json")))
(folder / f"{rank}_{life}.json").write_text(json.dumps([sys.argv[1:-1], {n: os.environ.get(n) for n in names}]))
until = time.monotonic() + 30  # as ranks do in their first reduction: none leaves before all have come
while len(list(folder.glob(f"*_{life}.json"))) < int(os.environ.get("WORLD_SIZE", 1)) and time.monotonic() < until:
    time.sleep(0.01)
if "--resume" not in sys.argv:
    os.kill(os.getppid(), signal.SIGUSR2)
    while not left and time.monotonic() < until:
        time.sleep(0.01)
    sys.exit(85 if left else 3)
"""
# A tool whose ranks have to find each other.
SUM = """
import sys, torch
from pretrain import distributed
distributed.start("cpu")
total = distributed.sum_over_ranks(torch.tensor([float(distributed.rank() + 1)]))
if distributed.is_main():
    open(sys.argv[1], "w").write(f"{total.item():g} of {distributed.world_size()}")
distributed.stop()
"""
STAND_INS = {
    "sbatch": 'cp "$1" "$RECORD/script.sh"; echo "Submitted batch job 4242"',
    "scontrol": 'echo "$@" >> "$RECORD/scontrol"',
    # every task of a job step, without srun's own options
    "srun": """while [ "${1#-}" != "$1" ]; do
    case "$1" in --output|--error) shift;; esac
    echo "$1" >> "$RECORD/srun"; shift
done
n=0
while [ $n -lt $SLURM_NTASKS ]; do
    SLURM_PROCID=$n SLURM_LOCALID=$n "$@" & n=$((n + 1))
done
wait""",
}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder in which a job is submitted."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def submit(work):
    return load_tool("submit").main


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder that records what sbatch, srun and scontrol were asked for."""
    programs, record = tmp_path / "bin", tmp_path / "record"
    programs.mkdir()
    record.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(record))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return record


def write_tool(folder, text=TOOL, name="pretrain.py"):
    path = folder / name
    path.write_text(text)
    return path


def directives(text):
    """{option: value} of the #SBATCH lines; a flag has no value."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.M))


def lives(folder):
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*_*.json"))}


# --- the script -------------------------------------------------------------------------------------------


def test_a_dry_run_shows_every_directive(submit, work, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")  # no SLURM is needed
    tool = write_tool(tmp_path)
    options = "--nodes 2 --gpus 4 --cpus 6 --mem-gb 200 --hours 1.5 --partition fast --notice-s 90 --slurm account=a exclusive=true"
    submit([*options.split(), "--dry-run", "--", str(tool), "--config", "a b.yaml", "run.output=x"])
    text = capsys.readouterr().out
    logs = work / "runs/jobs/%j"
    assert directives(text) == {
        "account": "a",
        "cpus-per-task": "6",
        "error": f"{logs}/%j_0_log.err",
        "exclusive": "",
        "gpus-per-node": "4",
        "job-name": "pretrain",
        "mem": "204800M",
        "nodes": "2",
        "ntasks-per-node": "4",
        "open-mode": "append",
        "output": f"{logs}/%j_0_log.out",
        "partition": "fast",
        "requeue": "",
        "signal": "USR2@90",
        "time": "90",
    }
    assert text.startswith("#!/bin/bash\n") and "\nsrun --unbuffered --output" in text
    assert "--cpus-per-task=6 --kill-on-bad-exit=1 " in text and f"-m submitit.core._submit {logs}" in text
    assert (
        "RANK=0..7 WORLD_SIZE=8 LOCAL_RANK=0..3 python ../pretrain.py --config 'a b.yaml' run.output=x"
        in text
    )
    assert "python ../pretrain.py --resume --config 'a b.yaml' run.output=x" in text
    assert not (work / "runs").exists()


def test_an_array_gives_every_job_its_number(submit, tmp_path, capsys):
    tool = write_tool(tmp_path, name="train_seg.py")
    submit(
        [
            "--array",
            "3",
            "--at-once",
            "2",
            "--gpus",
            "0",
            "--dry-run",
            "--",
            str(tool),
            "--sweep",
            "{index}",
            "run.seed={index}",
        ]
    )
    text = capsys.readouterr().out
    assert directives(text)["array"] == "0-2%2" and "gpus-per-node" not in directives(text)
    assert "%A_%a" in directives(text)["output"] and "RANK=" not in text
    jobs = tool_jobs([str(tool), "--sweep", "{index}", "run.seed={index}"], 3)
    assert [job.command[1:] for job in jobs] == [("--sweep", str(i), f"run.seed={i}") for i in range(3)]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--dry-run"], "no command"),
        (["--dry-run", "--", "nothing.py"], "nothing.py"),
        (["--dry-run", "--", "README.md"], "README.md"),
        (["--array", "2", "--dry-run", "--", "TOOL"], "--array 2"),
        (["--dry-run", "--", "TOOL", "seed={index}"], "--array 0"),
        (["--nodes", "0", "--dry-run", "--", "TOOL"], "nodes=0 should be"),
        (["--gpus", "-1", "--dry-run", "--", "TOOL"], "gpus=-1 should be"),
        (["--hours", "0.01", "--dry-run", "--", "TOOL"], "hours=0.01 is not longer"),
        (["--slurm", "account", "--dry-run", "--", "TOOL"], "account"),
        (["--nodes", "2", "--local", "--", "TOOL"], "--local"),
        (["--", "TOOL"], "sbatch"),
    ],
)
def test_bad_jobs_are_named(submit, tmp_path, monkeypatch, arguments, named):
    monkeypatch.setenv("PATH", "")
    tool = str(write_tool(tmp_path))
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=re.escape(named)):
        submit([tool if word == "TOOL" else word for word in arguments])


def test_a_folder_that_hides_the_package_is_refused(submit, tmp_path, monkeypatch):
    """python -m has the working folder first on its path, so a job would run that file on import."""
    tool = write_tool(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="takes pretrain.py for the package"):
        submit(["--dry-run", "--", str(tool)])


def test_the_tools_that_resume_are_known():
    """A tool that takes --resume gets it when its job comes back."""
    option = r'add(_argument)?\(\s*"--resume"|fine_tuning_parser\('
    files = {name: ROOT / f"{module.replace('.', '/')}.py" for name, (module, _) in COMMANDS.items()}
    assert {name for name, path in files.items() if re.search(option, path.read_text())} == set(RESUMABLE)


def test_a_command_of_ours_a_file_or_a_program(tmp_path, monkeypatch):
    """However one writes it: the job runs it in any folder, and resumes it if it is one of ours."""
    tool = write_tool(tmp_path, name="train_det.py")
    monkeypatch.chdir(ROOT)
    ours = command("detect", "--weights", "w")
    for words in (["detect"], ["posfield", "detect"], ["/somewhere/posfield", "detect"]):
        assert found([*words, "--weights", "w"]) == ours
    (job,) = tool_jobs(ours)
    assert job.words == ["posfield", "detect", "--weights", "w"]
    assert job.resumed().words == ["posfield", "detect", "--resume", "--weights", "w"]
    (job,) = tool_jobs(found(["evaluate", "dense", "a", "--resume", "b"]))
    assert job.resumed().words == ["posfield", "evaluate", "dense", "--resume", "a"]
    for words in ([str(tool)], ["python", str(tool)], ["python3", os.path.relpath(tool)]):
        assert found([*words, "a"]) == [sys.executable, str(tool), "a"]
    job = ToolJob((sys.executable, str(tool), "a"))
    assert job.resumed().command == (sys.executable, str(tool), "--resume", "a")
    assert found(["tools/train_seg.py"]) == [sys.executable, str(ROOT / "tools" / "train_seg.py")]
    assert found(["/bin/sh", "-c", "true"]) == ["/bin/sh", "-c", "true"] and found(["sh"])[0].endswith("/sh")
    (job,) = tool_jobs(["/bin/sh", "pretrain"])
    assert job.resumed() == job and job.words == ["/bin/sh", "pretrain"]
    with pytest.raises(UserError, match="nothing is no command of posfield, no Python file and no program"):
        found(["nothing"])


# --- the job ----------------------------------------------------------------------------------------------


def test_a_job_comes_back_with_resume():
    tool = (sys.executable, "/somewhere/pretrain.py")
    again = ToolJob((*tool, "--config", "c.yaml")).checkpoint()
    assert again.function == ToolJob((*tool, "--resume", "--config", "c.yaml"))
    assert again.args == () and again.kwargs == {}
    assert again.function.resumed() == again.function
    # never back to 1000
    for start in (["--resume"], ["--resume", "1000"], ["--resume=runs/a"], ["--resume", "auto", "--resume"]):
        began = ToolJob((*tool, "--config", "c.yaml", *start, "run.seed=1"))
        assert began.resumed().command[2:] == ("--resume", "--config", "c.yaml", "run.seed=1")
    assert ToolJob((*tool, "run.seed=1", "--resume")).resumed().command[2:] == ("--resume", "run.seed=1")
    other = ToolJob((sys.executable, "/somewhere/demo.py", "a"))
    assert other.resumed() == other


class Task:
    """What submitit says of one task."""

    USR_SIG = "USR2"

    def __init__(self, rank=0, n=1, nodes=1, job_id="4242"):
        self.global_rank, self.num_tasks, self.num_nodes, self.raw_job_id = rank, n, nodes, job_id
        self.local_rank, self.hostnames = rank % (n // nodes), [f"node{i}" for i in range(nodes)]


def test_every_rank_is_told_what_torchrun_would_tell():
    assert rank_environment(Task()) == {}
    assert rank_environment(Task(rank=5, n=8, nodes=2)) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": str(20_000 + 4242),
    }
    assert rank_environment(Task(n=2))["MASTER_ADDR"] == "127.0.0.1"
    ports = {rank_environment(Task(n=2, job_id=str(4242 + i)))["MASTER_PORT"] for i in range(100)}
    assert len(ports) == 100


@pytest.fixture
def task(monkeypatch):
    """A job's task, and what submitit's own handler was called with."""
    calls, before = [], [(number, signal.getsignal(number)) for number in (signal.SIGUSR2, signal.SIGTERM)]

    def begin(rank, n):
        monkeypatch.setattr(submitit, "JobEnvironment", lambda: Task(rank, n))
        signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(number))
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # submitit's own does nothing either
        return calls

    yield begin
    for number, handler in before:
        signal.signal(number, handler)


def python_job(text):
    return ToolJob((sys.executable, "-c", text))


def test_only_the_requeue_code_of_the_first_rank_puts_the_job_back(task):
    calls = task(0, 1)
    python_job("")()
    task(0, 1)
    with pytest.raises(RuntimeError, match="exit code 2"):
        python_job("raise SystemExit(2)")()
    assert calls == []
    task(0, 1)
    python_job("raise SystemExit(85)")()
    assert calls == [signal.SIGUSR2]
    task(1, 2)
    with pytest.raises(SystemExit) as end:
        python_job("raise SystemExit(85)")()
    assert end.value.code == 0 and calls == [signal.SIGUSR2]


@pytest.mark.parametrize(
    "said, is_put_back", [("RUNNING None", True), ("COMPLETING TimeLimit", True), ("COMPLETING None", False)]
)
def test_a_job_that_slurm_ends_stays_ended(tmp_path, task, monkeypatch, said, is_put_back):
    """After scancel a job saves and leaves with the requeue code, too: it must not come back."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho {said}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    calls = task(0, 1)
    with nullcontext() if is_put_back else pytest.raises(SystemExit, match="85"):
        python_job("raise SystemExit(85)")()
    assert calls == [signal.SIGUSR2] * is_put_back


NOTICE = (
    "import os, signal, time; os.kill(os.getpid(), signal.SIGUSR2); os.kill(os.getppid(), signal.SIGUSR2);"
)


def test_a_command_that_does_not_listen_is_put_back_at_the_notice(task):
    """Or does not listen yet. submitit's handler ends the first task with a code of its own, which must
    come through. SLURM's own signal, which all processes get, does nothing to the command."""
    calls = task(0, 1)

    def leave(number, frame):
        calls.append(number)
        sys.exit(144)

    signal.signal(signal.SIGUSR2, leave)
    with pytest.raises(SystemExit) as end:
        python_job(NOTICE + "time.sleep(60)")()
    assert calls == [signal.SIGUSR2] and end.value.code == 144


def test_a_program_that_ends_well_after_the_notice_is_done(task):
    calls = task(0, 1)
    ToolJob(("/bin/sh", "-c", "trap 'exit 0' USR1; kill -USR2 $PPID; while :; do sleep 0.1; done"))()
    assert calls == []


def test_a_sigterm_reaches_the_command(task):
    task(0, 1)
    with pytest.raises(RuntimeError, match="exit code 7"):
        ToolJob(
            ("/bin/sh", "-c", "trap 'exit 7' TERM; sleep 0.5; kill -TERM $PPID; while :; do sleep 0.1; done")
        )()


def test_an_exception_in_the_task_ends_the_command(task, tmp_path):
    """submitit's local executor ends a job by a SIGINT."""
    task(0, 1)
    begun = f"import os, signal; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()));"
    with pytest.raises(KeyboardInterrupt):
        python_job(f"{begun} os.kill(os.getppid(), signal.SIGINT); import time; time.sleep(60)")()
    with suppress(ChildProcessError):  # Popen has seen its end already
        _, status = os.waitpid(int((tmp_path / "pid").read_text()), 0)
        assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_job_that_slurm_started_again_resumes(tmp_path, task, monkeypatch):
    tool = write_tool(tmp_path, "import sys\nsys.exit(0 if '--resume' in sys.argv else 7)")
    job = ToolJob((sys.executable, str(tool)))
    task(0, 1)
    with pytest.raises(RuntimeError, match="pretrain.py ended with exit code 7"):
        job()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    task(0, 1)
    job()


# --- whole ways -------------------------------------------------------------------------------------------


def test_the_whole_way_through_sbatch(submit, cluster, work, tmp_path, capsys):
    """Submitted, run on 2 tasks, given notice, put back once, run again with --resume."""
    tool, out = write_tool(tmp_path), tmp_path / "out"
    out.mkdir()
    command = ["--gpus", "2", "--hours", "2", "--name", "j", "--", str(tool), "run.seed=1", str(out)]
    submit(command)
    assert "submitted 4242" in capsys.readouterr().out
    script = (cluster / "script.sh").read_text()
    submit(["--dry-run", *command])
    assert capsys.readouterr().out.startswith(script)  # the dry run shows it to the letter
    variables = {
        "SLURM_JOB_ID": "4242",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    for _ in range(2):
        subprocess.run(
            ["bash", str(cluster / "script.sh")], env=os.environ | variables, check=True, timeout=60
        )
    assert (cluster / "scontrol").read_text() == "requeue 4242\n"
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "24242"}
    assert lives(out) == {
        f"{rank}_{life}": [
            ["--resume"] * life + ["run.seed=1"],
            {"RANK": str(rank), "LOCAL_RANK": str(rank), **ranks},
        ]
        for rank in (0, 1)
        for life in (0, 1)
    }
    results = {path.name for path in (work / "runs/jobs/4242").glob("*_result.pkl")}
    assert results == {"4242_0_result.pkl", "4242_1_result.pkl"}


@pytest.mark.parametrize("job, kept", [("", {"SLURM_CONF", "SBATCH_ACCOUNT"}), ("7", {"SLURM_CONF"})])
def test_sbatch_is_told_where_slurm_is(submit, cluster, tmp_path, monkeypatch, job, kept):
    """From within a job too, whose other variables are not those of the new one."""
    (cluster.parent / "bin" / "sbatch").write_text(
        "#!/bin/sh\nenv > $RECORD/env; echo Submitted batch job 4242\n"
    )
    monkeypatch.setenv("SLURM_CONF", "/etc/other.conf")
    monkeypatch.setenv("SBATCH_ACCOUNT", "a")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    submit(["--", str(write_tool(tmp_path))])
    told = {line.partition("=")[0] for line in (cluster / "env").read_text().splitlines()}
    assert {name for name in told if name.startswith(("SLURM_", "SBATCH_"))} == kept


def test_the_script_of_an_array_is_shown_to_the_letter(submit, cluster, work, tmp_path, capsys):
    tool = write_tool(tmp_path)
    submit(["--array", "3", "--", str(tool), "seed={index}"])
    assert "submitted 4242_0, 4242_1, 4242_2" in capsys.readouterr().out
    shown = sbatch_script(Resources(name="pretrain"), Path("runs/jobs/%j"), 3)
    assert (cluster / "script.sh").read_text() == shown
    seeds = [
        submitit.core.utils.DelayedSubmission.load(path).function.command[2:]
        for path in sorted(work.rglob("*_submitted.pkl"))
    ]
    assert seeds == [("seed=0",), ("seed=1",), ("seed=2",)]


def test_a_job_here_is_given_notice_and_comes_back(submit, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tool, out = write_tool(tmp_path), tmp_path / "out"
    out.mkdir()
    submit(["--gpus", "0", "--local", "--folder", str(tmp_path / "jobs"), "--", str(tool), str(out)])
    assert {name: arguments for name, (arguments, _) in lives(out).items()} == {
        "0_0": [],
        "0_1": ["--resume"],
    }


def test_ranks_of_a_job_here_find_each_other(submit, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tool = write_tool(tmp_path, SUM, "sum.py")
    folder = str(tmp_path / "jobs")
    submit(
        [
            "--gpus",
            "0",
            "--ranks",
            "2",
            "--local",
            "--folder",
            folder,
            "--",
            str(tool),
            str(tmp_path / "total"),
        ]
    )
    assert (tmp_path / "total").read_text() == "3 of 2"


def test_a_job_that_fails_here_names_its_logs(submit, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tool = write_tool(tmp_path, "raise SystemExit(2)", "bad.py")
    with pytest.raises(UserError, match="its logs are in"):
        submit(["--gpus", "0", "--local", "--folder", str(tmp_path / "jobs"), "--", str(tool)])
