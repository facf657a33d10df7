"""The ablation: what every job runs, what is run again, and the table. The tools themselves are stand-ins
here."""

import json
import os
import shlex
import signal
import threading
import time
from argparse import Namespace
from pathlib import Path

import pytest
from tool_fixture import load_tool

from det_plugin.protocol import protocol, with_overrides
from pretrain.cli import REQUEUE_CODE, command, fields_and_kwargs
from pretrain.config import load_config, run_protocol
from pretrain.errors import Interrupted, UserError
from pretrain.jobs import Runner, Stage, runner
from pretrain.results import Protocol, Result, write_result
from pretrain.results.ablation import Trial, ablation_table, changes
from pretrain.results.folder import unnamed
from pretrain.results.render import render
from pretrain.settings import flat

ROOT = Path(__file__).resolve().parents[1]
TOOL = vars(load_tool("ablation"))
TOY = ROOT / "configs" / "pretrain" / "toy.yaml"


def options(folder, **changed):
    return Namespace(
        **{"output": folder, "seeds": 3, "quick": False, "pretrain": [], "detection": []} | changed
    )


def result(kind, method="intertwined", seed=0, box_ap=10.0, deviations=None, config="a", **metrics):
    deviations = {"batch_size": [512, 32]} if deviations is None else deviations
    return Result(
        kind=kind,
        method=method,
        backbone="vit_tiny_patch16",
        effective_epochs=8.5,
        protocol=Protocol(name=f"{kind}-full", version=1, full=not deviations, deviations=deviations),
        metrics={"box_ap": box_ap, "mask_ap": box_ap / 2, **metrics}
        if kind == "detection"
        else {"loss": 1.0},
        seed=seed,
        config_hash=config,
        weights_hash=None,
        git_commit=None,
        packages={},
        hardware={},
        wall_time_s=1.0,
        peak_memory_mib=None,
    )


def trial(method="intertwined", seed=0, box_ap=10.0, deviations=None, **changed):
    return Trial(
        result("pretrain", method, seed, deviations=deviations, **changed),
        result("detection", method, seed, box_ap),
    )


# --- what is run ------------------------------------------------------------------------------------------


def pretraining_of(stage):
    """The config that a pre-training stage's command line asks for."""
    words = stage.command[3:]
    assert stage.command[:3] == command("pretrain") and words[:3] == ["--resume", "--config", "toy"]
    return load_config(words[2], words[3:])


def test_every_job_is_the_toy_with_what_its_row_changes(tmp_path):
    plan = TOOL["plan"](options(tmp_path))
    assert (
        list(plan) == [f"{row}/seed_{seed}" for seed in range(3) for row in TOOL["ROWS"]] and len(plan) == 15
    )
    toy = flat(load_config(TOY))
    changed = {}
    for name, (first, second) in plan.items():
        config = flat(pretraining_of(first))
        assert Path(config["run.output"]) == first.folder == tmp_path / name / "pretrain"
        assert str(config["run.seed"]) == name[-1] == second.command[second.command.index("--seed") + 1]
        assert second.command[second.command.index("--weights") + 1] == str(
            first.folder / "backbone.safetensors"
        )
        differs = {
            key: v for key, v in config.items() if v != toy[key] and not key.startswith(("run.", "data."))
        }
        changed.setdefault(name.split("/")[0], []).append(differs)
    off = {"masks.position_share": 0.0, "losses.position": 0.0}
    fixed = {"positions.encoding": "standard", "positions.augment": False}
    rows = {"table3_none": off | fixed, "table3_sampling": off, "table3_lpos": fixed, "method": {}}
    assert changed == {
        row: [keys] * 3
        for row, keys in (rows | {"reference_image": {"positions.reference": "image"}}).items()
    }


def test_the_rows_are_named_apart_and_say_what_they_change(tmp_path):
    plan = TOOL["plan"](options(tmp_path, seeds=1))
    configs = {name.split("/")[0]: pretraining_of(first) for name, (first, _) in plan.items()}
    assert (
        len({config.run.name for config in configs.values()}) == 5
        and configs["method"].run.name == "intertwined"
    )
    protocols = {row: run_protocol(config, 400) for row, config in configs.items()}
    assert changes(protocols["method"], protocols["reference_image"]) == "positions.reference crops → image"
    assert (
        changes(protocols["method"], protocols["table3_sampling"])
        == "losses.position 1.0 → 0.0; masks.position_share 0.5 → 0.0"
    )
    assert changes(protocols["method"], protocols["method"]) == ""


def test_the_detection_is_the_demos(tmp_path):
    demo = vars(load_tool("demo"))
    assert TOOL["DETECTION"] == demo["DETECTION"]
    data = demo["stages"](tmp_path)[0].command
    assert data[-6:] == TOOL["DATA"]


@pytest.mark.parametrize("word", ["max_iters=12", "iterations_it=12"])
def test_quick_and_other_settings_come_last(tmp_path, word):
    plan = TOOL["plan"](options(tmp_path, seeds=1, quick=True, pretrain=["optim.epochs=3"], detection=[word]))
    first, second = plan["method/seed_0"]
    config = pretraining_of(first)
    assert (config.optim.epochs, config.optim.warmup_epochs, config.backbone.depth) == (3, 1, 2)
    words = second.command[second.command.index("--resume") + 1 :]
    fields, model_kwargs = fields_and_kwargs(words)  # refuses a key that is given twice
    settings = with_overrides(protocol("coco-12ep", "vit_tiny_patch16"), fields)
    assert (settings.max_iters, settings.milestones, settings.batch_size, model_kwargs) == (12, (8, 9), 8, {})


@pytest.mark.parametrize("folder", ["/old/checkout/tools", "/site-packages/tools"])
def test_what_an_earlier_version_finished_is_done(tmp_path, folder):
    """It started other files, from another place, under the former names of settings."""
    for stage in TOOL["plan"](options(tmp_path, seeds=1))["method/seed_0"]:
        words = shlex.join(stage.command[3:]).replace("--config toy ", f"--config {TOY} ")
        old = words.replace("max_iters=", "iterations_it=").replace("eval_every=", "eval_period_it=")
        tool = {"pretrain": "pretrain", "det": "train_det"}[stage.kind]
        stage.folder.mkdir(parents=True)
        (stage.folder / "result.json").write_text("{}")
        stage.folder.with_suffix(".command").write_text(f"/old/bin/python3 {folder}/{tool}.py {old}")
        assert stage.state == "done"
        stage.folder.with_suffix(".command").write_text(f"/old/bin/python3 {folder}/{tool}.py {old} more")
        assert stage.state == "begun"
    compared = Stage("detect", tmp_path / "det", [], "posfield detect --seed 0 lr=1 weights=a")
    compared.folder.mkdir()
    compared.folder.with_suffix(".command").write_text("train_det --seed 0 lr=1 weights=a")
    assert compared.state == "begun"
    compared.folder.with_suffix(".command").write_text("train_det --seed 0 lr=1 weights=b")
    assert compared.state == "other settings" and "weights=b, asked for is weights=a;" in compared.difference


# --- how it is run ----------------------------------------------------------------------------------------


def run_jobs(jobs, n_at_once, seconds, launch=None):
    """A runner's outcome; ``launch`` stands in for its processes."""
    each = Runner(n_at_once, seconds)
    each.launch = launch or each.launch
    return each.run(jobs)


class Machine:
    """A launcher whose commands leave a result, or do what ``happens`` says for their folder."""

    def __init__(self, happens=None):
        self.happens, self.ran = happens or {}, []

    def __call__(self, command, log, seconds):
        folder = log.with_suffix("")
        self.ran.append("/".join(folder.parts[-2:]))
        what = self.happens.get("/".join(folder.parts[-2:]), 0)
        if what == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "result.json").write_text("{}")
        return None if what == "slow" else 0 if what == "empty" else what


def two_stage_jobs(folder, n=3, word="a"):
    return {
        f"j{i}": [Stage(kind, folder / f"j{i}" / kind, [kind, word]) for kind in ("pretrain", "det")]
        for i in range(n)
    }


def test_jobs_run_once_and_in_order(tmp_path):
    machine = Machine()
    assert run_jobs(two_stage_jobs(tmp_path), 1, 1e6, machine) == {"j0": "done", "j1": "done", "j2": "done"}
    assert machine.ran == ["j0/pretrain", "j0/det", "j1/pretrain", "j1/det", "j2/pretrain", "j2/det"]
    again = Machine()
    assert set(run_jobs(two_stage_jobs(tmp_path), 1, 1e6, again).values()) == {"done"} and again.ran == []


def test_a_failure_stops_its_own_job_alone_and_is_tried_again(tmp_path):
    machine = Machine({"j0/pretrain": 1, "j1/det": "empty"})
    ended = run_jobs(two_stage_jobs(tmp_path), 1, 1e6, machine)
    assert ended == {"j0": "failed", "j1": "failed", "j2": "done"}
    assert machine.ran == ["j0/pretrain", "j1/pretrain", "j1/det", "j2/pretrain", "j2/det"]
    again = Machine()
    assert set(run_jobs(two_stage_jobs(tmp_path), 1, 1e6, again).values()) == {"done"}
    assert again.ran == ["j0/pretrain", "j0/det", "j1/det"]


@pytest.mark.parametrize("what", ["slow", REQUEUE_CODE])
def test_what_was_cut_off_is_left(tmp_path, what):
    assert run_jobs(two_stage_jobs(tmp_path), 1, 1e6, Machine({"j1/pretrain": what})) == {
        "j0": "done",
        "j1": "left",
        "j2": "done",
    }


def test_a_result_of_another_command_is_not_taken_for_this_one(tmp_path):
    run_jobs(two_stage_jobs(tmp_path, 1), 1, 1e6, Machine())
    machine = Machine()
    run_jobs(two_stage_jobs(tmp_path, 1, "b"), 1, 1e6, machine)
    assert machine.ran == ["j0/pretrain", "j0/det"]


def test_what_has_no_time_to_end_is_not_begun(tmp_path, monkeypatch):
    clock = iter(
        range(0, 10_000, 10)
    )  # every look at it is 10 s later: a stage takes 10 s, and the next begins 10 s after it
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))
    machine = Machine()
    assert run_jobs(two_stage_jobs(tmp_path), 1, 55, machine) == {"j0": "done", "j1": "left", "j2": "left"}
    assert machine.ran == ["j0/pretrain", "j0/det"]


def test_jobs_run_beside_each_other(tmp_path):
    """Two jobs that each wait for the other to begin."""
    begun = set()

    def machine(command, log, seconds):
        begun.add(log.parent.name)
        until = time.monotonic() + 20
        while len(begun) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        return Machine()(command, log, seconds) if len(begun) == 2 else 1

    assert run_jobs(two_stage_jobs(tmp_path, 2), 2, 1e6, machine) == {"j0": "done", "j1": "done"}


SAVES = [
    "sh",
    "-c",
    "trap 'echo saved; exit' TERM; echo on; while :; do sleep 0.1; done",
]  # when it is asked to leave


def test_a_command_is_asked_to_leave_before_it_is_made_to(tmp_path):
    log = tmp_path / "log"
    assert Runner().launch(["sh", "-c", "echo one; exit 3"], log, 60) == 3
    assert Runner().launch(SAVES, log, 1.5) is None
    assert log.read_text().splitlines() == ["one", "on", "saved"]


def test_a_command_that_will_not_leave_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_S", 0.2)
    begun = time.monotonic()
    assert Runner().launch(["sh", "-c", "trap '' TERM; exec sleep 60"], tmp_path / "log", 0.5) is None
    assert time.monotonic() - begun < 20


def test_a_command_that_cannot_begin_fails_its_own_job_alone(tmp_path, capsys):
    jobs = two_stage_jobs(tmp_path)
    makes_a_result = ["sh", "-c", 'mkdir -p "$0" && echo "{}" >"$0/result.json"']
    for name, stages in jobs.items():
        jobs[name] = [
            Stage(s.kind, s.folder, [*makes_a_result, str(s.folder)] if name != "j1" else ["no-such-command"])
            for s in stages
        ]
    assert run_jobs(jobs, 2, 1e6) == {"j0": "done", "j1": "failed", "j2": "done"}
    assert "j1: " in (said := capsys.readouterr().out) and "no-such-command" in said


@pytest.fixture
def harmless_sigterm():
    """What comes too early or too late ends a test, not pytest."""
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    yield came
    signal.signal(signal.SIGTERM, before)


def test_a_sigterm_ends_all_that_runs_and_begins_nothing(tmp_path, harmless_sigterm):
    """Two jobs run, a third waits. The children save and are gone before the exception comes out; a second
    signal is no matter."""
    jobs = {
        f"j{i}": [Stage(kind, tmp_path / f"j{i}" / kind, SAVES) for kind in ("pretrain", "det")]
        for i in range(3)
    }
    logs = [tmp_path / f"j{i}" / "pretrain.log" for i in range(2)]

    def interrupt():
        patience = time.monotonic() + 20
        while (
            not all(log.is_file() and log.read_text() == "on\n" for log in logs)
            and time.monotonic() < patience
        ):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    with pytest.raises(Interrupted, match="SIGTERM"):
        thread.start()
        run_jobs(jobs, 2, 1e6)
    thread.join()
    assert (
        sorted(tmp_path.rglob("*.log")) == logs and [log.read_text() for log in logs] == ["on\nsaved\n"] * 2
    )
    assert not harmless_sigterm


def test_what_is_stopped_begins_no_more(tmp_path):
    processes = Runner()
    processes.stop()
    assert (
        processes.launch(["sh", "-c", "echo on"], tmp_path / "log", 60) is None
        and (tmp_path / "log").read_text() == ""
    )


# --- the table --------------------------------------------------------------------------------------------


def test_the_table_holds_mean_deviation_and_paired_difference():
    toy = {"optim.epochs": [100, 14]}
    image = {**toy, "positions.reference": ["crops", "image"]}
    trials = [trial(seed=seed, box_ap=ap, deviations=toy) for seed, ap in enumerate((10.0, 20.0, 30.0))]
    trials += [trial("image", seed, ap, deviations=image) for seed, ap in enumerate((11.0, 22.0, 33.0))]
    table = ablation_table(trials, "intertwined", "T")
    (method, other) = table.groups[0]
    assert method.cells[1:] == (
        "intertwined",
        "–",
        "20.0 ± 10.0 (n=3) ‡1",
        "–",
        "10.0 ± 5.0 (n=3) ‡1",
        "–",
        "0, 1, 2",
    )
    assert other.cells[2] == "positions.reference crops → image"
    assert other.cells[3] == "22.0 ± 11.0 (n=3) ‡1" and other.cells[6] == "+2.0 ± 1.0 (n=3)"
    assert table.records[1]["box_ap_gain"] == "2.0" and table.records[1]["box_ap_std"] == "11.0"
    assert any("It departs in: optim.epochs 100 → 14." in note for note in table.notes)
    assert any(
        note.startswith("‡1 detection-full, scaled down (1 change): batch_size 512 → 32.")
        for note in table.notes
    )
    assert "| **measured †** | **image** |" in render(table, "md")


def test_unfinished_ablations_have_a_table_too():
    table = ablation_table([trial("image", 1, 9.0)], "intertwined")
    assert table.groups[0][0].cells[2:] == ("–", "9.0 ‡1", "–", "4.5 ‡1", "–", "1")
    assert ablation_table([], "intertwined").groups == ((),)


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(UserError, match="'intertwined' differ in more than their seed"):
        ablation_table([trial(seed=0), trial(seed=1, config="b")], "intertwined")
    other = Trial(result("pretrain", "b"), result("detection", "b", deviations={}))
    with pytest.raises(UserError, match="2 fine-tuning protocols"):
        ablation_table([trial(), other], "intertwined")
    fitting = [run.with_changes(weights_hash="a") for run in (result("pretrain"), result("detection"))]
    ablation_table([Trial(*fitting)], "intertwined")
    for read in ("b", None):
        with pytest.raises(UserError, match="the fine-tuning of 'intertwined', seed 0, read other weights"):
            ablation_table([Trial(fitting[0], fitting[1].with_changes(weights_hash=read))], "intertwined")


# --- all of it --------------------------------------------------------------------------------------------


@pytest.fixture
def fake_tools(tmp_path, monkeypatch):
    """Scripts that leave what the real tools leave, at once; ``failing`` names a folder whose pre-training
    fails."""
    monkeypatch.setattr("subprocess.run", lambda command, **_: Namespace(returncode=0))  # the toy data
    machine = Namespace(ran=[], failing="", slow="")

    def fake(self, command, log, seconds):
        folder = log.with_suffix("")
        machine.ran.append(folder)
        if machine.slow and machine.slow in str(folder):
            return None
        if folder.name == "pretrain":
            if machine.failing and machine.failing in str(folder):
                return 1
            config = load_config(command[5], command[6:])
            protocol = run_protocol(config, 400)
            write_result(
                result("pretrain", config.run.name, config.run.seed, deviations=protocol.deviations), folder
            )
        else:
            before = json.loads((folder.parent / "pretrain" / "result.json").read_text())
            write_result(result("detection", before["method"], before["seed"], 10.0 + before["seed"]), folder)
        return 0

    monkeypatch.setattr(Runner, "launch", fake)
    return machine


def test_the_command_ends_in_a_table_of_all_rows(tmp_path, fake_tools, capsys):
    TOOL["main"](["--output", str(tmp_path), "--jobs", "2"])
    assert len(fake_tools.ran) == 30
    text = (tmp_path / "ablation.md").read_text()
    assert text in capsys.readouterr().out and text.count("11.0 ± 1.0 (n=3)") == 5
    methods = [
        line.split("|")[2].strip(" *") for line in text.splitlines() if line.startswith("| **measured")
    ]
    assert methods == [
        "intertwined, no sampling, no L\\_pos",
        "intertwined, no L\\_pos",
        "intertwined, no sampling",
        "intertwined",
        "intertwined, s of the image",
    ]
    assert len((tmp_path / "ablation.csv").read_text().splitlines()) == 6
    assert not unnamed(tmp_path, "ablation")
    TOOL["main"](["--output", str(tmp_path)])
    assert len(fake_tools.ran) == 30


def test_the_command_says_what_failed_and_what_is_left(tmp_path, fake_tools, capsys):
    fake_tools.failing, fake_tools.slow = "table3_lpos/seed_1", "method/seed_2"
    with pytest.raises(Interrupted, match="1 of 15 jobs are left.*; 1 of 15 jobs failed: table3_lpos/seed_1"):
        TOOL["main"](["--output", str(tmp_path)])
    fake_tools.slow = ""
    with pytest.raises(UserError, match="1 of 15 jobs failed: table3_lpos/seed_1"):
        TOOL["main"](["--output", str(tmp_path)])
    fake_tools.slow = "reference_image/seed_2"
    for stage in ("pretrain", "det"):
        (tmp_path / "reference_image" / "seed_2" / stage / "result.json").unlink()
    assert (tmp_path / "ablation.md").read_text().count("(n=2)") >= 2
    fake_tools.failing = ""
    with pytest.raises(Interrupted, match="1 of 15 jobs are left"):
        TOOL["main"](["--output", str(tmp_path)])
    fake_tools.slow = ""
    TOOL["main"](["--output", str(tmp_path)])
    assert (tmp_path / "ablation.md").read_text().count("11.0 ± 1.0 (n=3)") == 5
    (tmp_path / "reference_image" / "seed_2" / "det" / "result.json").write_text("{")
    with pytest.raises(UserError, match="1 of 15 jobs failed: reference_image/seed_2"):
        TOOL["main"](["--output", str(tmp_path)])
    assert (tmp_path / "ablation.md").read_text().count("11.0 ± 1.0 (n=3)") == 4
    assert "left out: reference_image/seed_2: " in capsys.readouterr().err


def test_the_command_passes_on_what_asks_it_to_stop(tmp_path, monkeypatch, harmless_sigterm):
    monkeypatch.setattr(
        "subprocess.run", lambda *_, **__: (signal.raise_signal(signal.SIGTERM), time.sleep(5))
    )
    with pytest.raises(Interrupted, match="SIGTERM"):  # exit code 85
        TOOL["main"](["--output", str(tmp_path)])
    signal.raise_signal(signal.SIGTERM)
    assert harmless_sigterm == [True]  # the handler of before is back


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--jobs", "0"], ["--max-minutes", "0.5"]])
def test_bad_numbers_are_named(arguments):
    with pytest.raises(UserError, match=arguments[0]):
        TOOL["main"](arguments)
