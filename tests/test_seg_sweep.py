"""The sweep: which runs it has, how they go on and fail, its one result, and how the tables show it."""

import signal
import statistics
import sys
from dataclasses import replace

import pytest
from tool_fixture import load_tool

pytest.importorskip("mmseg")
pytest.importorskip("seg_plugin")

from ade_fixture import write_ade

from pretrain.cli import REQUEUE_CODE, command
from pretrain.errors import Interrupted, UserError
from pretrain.jobs import Runner
from pretrain.log import say
from pretrain.results.report import build_report
from pretrain.results.runs import find_results, read_run
from pretrain.results.schema import Protocol, Result, read_result, write_result
from pretrain.results.tables import comparison_table
from pretrain.signals import SIGNALS, interruptible
from seg_plugin.protocol import not_swept, protocol, with_overrides
from seg_plugin.run import SegmentationRun
from seg_plugin.sweep import conclude, points, status, sweep


@pytest.fixture
def run(tmp_path):
    return SegmentationRun(
        "vit_small_patch16", None, tmp_path / "none", tmp_path / "sweep", protocol(), device="cpu"
    )


def leave(point, miou, deviations=None, **changes):
    """What a run of the grid leaves, without running it."""
    departs = {**(deviations or {}), **not_swept(point.protocol)}
    fields = dict(
        kind="segmentation", method="ours", backbone="vit_small_patch16", effective_epochs=400.0,
        protocol=Protocol(name=point.protocol.name, version=1, full=False, deviations=departs),
        metrics={"miou": miou, "macc": miou + 1, "aacc": 90.0, "iou": {"wall": miou, "sky": miou - 1}},
        seed=point.seed, config_hash=f"{point.protocol.lr:g}-{point.protocol.weight_decay:g}", weights_hash=None, git_commit=None,
        packages={}, hardware={}, wall_time_s=10.0, peak_memory_mib=100.0 + miou, created="2026-01-31T12:00:00+00:00",
    )  # fmt: skip
    return write_result(Result(**(fields | changes)), point.output)


def leave_all(run):
    """A whole grid: the third setting has the best mean, another one the best single run."""
    mious = [40, 41, 42, 43, 45, 46, 30, 49, 20, 21, 22, 23, 24, 25, 26, 27]
    for point, miou in zip(points(run), mious):
        leave(point, float(miou))


# --- the result


def test_the_whole_grid_is_the_protocol(run):
    assert len(points(run)) == 16 and len({point.output for point in points(run)}) == 16
    assert {(p.protocol.lr, p.protocol.weight_decay, p.seed) for p in points(run)} == {
        (lr, wd, seed) for lr in (8e-5, 3e-5, 1e-5, 8e-6) for wd in (1e-2, 1e-4) for seed in (0, 1)
    }
    leave_all(run)
    result = read_result(conclude(run))
    assert result.protocol == Protocol(name="ade20k-160k", version=1, full=True, deviations={})
    metrics = result.metrics
    assert (
        metrics["miou"] == 45.5
        and metrics["miou_std"] == statistics.stdev([45, 46])
        and metrics["seeds"] == 2
    )
    assert metrics["miou_by_seed"] == {"0": 45.0, "1": 46.0} and (metrics["lr"], metrics["weight_decay"]) == (
        3e-5,
        1e-2,
    )
    assert metrics["macc"] == 46.5 and metrics["iou"] == {"wall": 45.5, "sky": 44.5}
    assert len(metrics["grid"]) == 8 and metrics["grid"]["lr 3e-05, weight decay 0.0001"]["miou"] == 39.5
    assert metrics["grid"]["lr 8e-05, weight decay 0.01"]["miou_std"] == statistics.stdev([40, 41])
    assert (result.wall_time_s, result.peak_memory_mib, result.seed, result.method) == (
        160.0,
        149.0,
        0,
        "ours",
    )


@pytest.mark.parametrize("index", [0, 7, 15])
def test_a_grid_that_lacks_a_run_has_no_result(run, index):
    leave_all(run)
    (points(run)[index].output / "result.json").unlink()
    assert conclude(run) is None and not (run.output / "result.json").exists()


def test_what_departs_in_a_run_departs_in_the_sweep(run):
    grid = replace(run, protocol=with_overrides(protocol(), {"lr_grid": "1e-3", "seeds": "1"}))
    changed = {"lr_grid": [[8e-5], [1e-3]], "seeds": [2, 1], "lr": [8e-5, 1e-3], "max_iters": [160_000, 20]}
    for point in points(grid):
        leave(point, 30.0, changed)
    result = read_result(conclude(grid))
    assert result.protocol.deviations == {key: changed[key] for key in ("lr_grid", "seeds", "max_iters")}
    assert "miou_std" not in result.metrics and result.metrics["seeds"] == 1


def test_runs_that_are_not_of_one_sweep_are_named(run, tmp_path):
    leave_all(run)
    other = points(run)[3]
    leave(other, 30.0, {"max_iters": [160_000, 20]})
    with pytest.raises(UserError, match="lr_8e-05_wd_0.0001/seed_1 and .*seed_0 follow different recipes"):
        conclude(run)
    leave(other, 30.0, weights_hash="0123456789ab")
    with pytest.raises(UserError, match="lr_8e-05_wd_0.0001/seed_1 is a run of other weights"):
        conclude(run)


def test_concluding_twice_gives_the_same_bytes(run):
    leave_all(run)
    first = conclude(run).read_bytes()
    assert conclude(run).read_bytes() == first
    assert sorted(path.name for path in run.output.iterdir()) == ["README.txt", "points", "result.json"]


def test_status(run):
    leave(points(run)[2], 33.333)
    lines = status(run).splitlines()
    assert len(lines) == 16 and lines[2].endswith("seed_0  done  33.33") and lines[3].endswith("  -")


# --- the tables


def test_the_tables_show_the_sweep_in_place_of_its_runs(run, tmp_path):
    leave_all(run)
    unfinished = [read_result(path) for path in find_results([run.output])]
    assert len(unfinished) == 16 and all(not result.protocol.full for result in unfinished)
    table = comparison_table(unfinished, [], "all")
    assert all("scaled down" in line.cells[8] for group in table.groups for line in group)

    conclude(run)
    assert find_results([tmp_path]) == find_results([run.output]) == [run.output / "result.json"]
    assert len(find_results([run.output / "points"])) == 16  # who asks for them gets them
    point = points(run)[0].output
    assert find_results([point]) == find_results([point / "result.json"]) == [point / "result.json"]
    (line,) = [
        line for group in comparison_table([read_result(run.output)], [], "all").groups for line in group
    ]
    assert line.cells[6] == "45.5 ± 0.7 (n=2)" and line.cells[8] == "ade20k-160k" and line.cells[9] == "0, 1"
    assert not line.scaled
    notes = comparison_table([read_result(run.output)], [], "all").notes
    assert any("sample standard deviation" in note for note in notes)
    page = build_report([read_run(path) for path in find_results([run.output])])
    assert "45.5 ± 0.7 (n=2)" in page and "grid / lr 3e-05, weight decay 0.01 / miou" in page


# --- running


def toy(tmp_path, data, **overrides):
    numbers = dict(
        num_classes=4, reduce_zero_label=True, max_iters=1, val_every=1, batch_size=1, resize_px="64,32", crop_px=32,
        slide_crop_px=32, slide_stride_px=32, lr_grid="1e-3, 8e-5", weight_decay_grid="1e-2",
    )  # fmt: skip
    words = [f"{key}={value}" for key, value in {**numbers, **overrides}.items()]
    words += [
        "backbone.depth=1",
        "backbone.pos_grid=4",
        "--backbone",
        "vit_tiny_patch16",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    return ["--data", str(data), "--dataset", "ade20k", "--output", str(tmp_path / "out"), *words]


def in_this_process(tool):
    """A runner's launch that calls the tool's main, and says what a process would: its exit code."""

    def launch(self, line, log, seconds):
        assert line[:3] == command("segment")
        try:
            tool(list(line[3:]))
        except UserError as error:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(f"{error}\n")
            return 2
        except Interrupted:
            return REQUEUE_CODE
        return 0

    return launch


@pytest.fixture
def tool(monkeypatch):
    """The tool, whose sweep starts its runs in this process."""
    main = load_tool("segment").main
    monkeypatch.setattr(Runner, "launch", in_this_process(main))
    return main


def test_the_sweep_goes_on_after_a_failure_and_runs_nothing_twice(tool, tmp_path, capsys):
    words = toy(tmp_path, write_ade(tmp_path / "ade", n_train=2, n_val=2))
    blocked = tmp_path / "out" / "points" / "lr_0.001_wd_0.01" / "seed_1"
    blocked.mkdir(parents=True)
    (blocked / "result.json").write_text("{}")  # of another kind of run
    message = r"sweep: 1 of 4 runs failed: lr_0.001_wd_0.01/seed_1 \(logs in .*points"
    with (
        pytest.raises(UserError, match=message),
        pytest.warns(UserWarning, match="the sweep has no result: .*seed_1"),
    ):
        tool([*words, "--sweep"])
    assert (
        len(list((tmp_path / "out" / "points").glob("*/*/result.json"))) == 4
        and not (tmp_path / "out" / "result.json").exists()
    )
    assert "another kind of run" in (blocked.with_suffix(".log")).read_text()
    (blocked / "result.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "points").glob("*/*/result.json")}
    assert len(before) == 3
    tool([*words, "--sweep"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    result = read_result(tmp_path / "out")
    assert capsys.readouterr().out.endswith(f"result: {tmp_path / 'out' / 'result.json'}\n")
    assert set(result.metrics["grid"]) == {"lr 0.001, weight decay 0.01", "lr 8e-05, weight decay 0.01"}
    assert result.metrics["miou"] == max(setting["miou"] for setting in result.metrics["grid"].values())
    assert {"lr_grid", "max_iters"} <= set(result.protocol.deviations)
    assert not {"sweep", "lr", "weight_decay"} & set(result.protocol.deviations)
    for path in before:
        assert "sweep" in read_result(path).protocol.deviations


def test_the_job_of_an_array_that_ends_last_writes_the_result(tmp_path, capsys):
    main = load_tool("segment").main
    words = toy(tmp_path, write_ade(tmp_path / "ade", n_train=2, n_val=2), lr_grid="1e-3")
    with pytest.raises(UserError, match="there is no run 2; the grid has 0 to 1"):
        main([*words, "--sweep", "2"])
    main([*words, "--sweep", "1", "--resume"])
    assert not (tmp_path / "out" / "result.json").exists()
    main([*words, "--sweep", "0", "--resume"])
    assert read_result(tmp_path / "out").metrics["seeds"] == 2
    capsys.readouterr()
    main([*words, "--sweep", "status"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["0", "1"]
    (tmp_path / "out" / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="holds a single run; a sweep takes a folder of its own"):
        main([*words, "--sweep", "0"])


def test_the_command_of_a_run_is_the_sweeps_without_its_own_words():
    command_of_a_run = load_tool("segment").command_of_a_run
    words = ["--weights", "w", "lr_grid=1e-3", "--data", "d"]
    wanted = command("segment", *words, "--resume", "--sweep")
    further = ["--jobs", "4", "--resume", "--sweep"]
    for given in (["--sweep", *words], [*words, "--sweep"], ["--sweep", "all", *words], [*words, *further]):
        assert command_of_a_run(given) == wanted, given


def test_words_that_do_not_fit(tmp_path):
    main = load_tool("segment").main
    words = toy(tmp_path, tmp_path)
    for further, message in (
        (["--sweep", "x"], "--sweep: 'x' is no number of a run"),
        (["--jobs", "2"], "--jobs 2"),
        (["--sweep", "--jobs", "0"], "--jobs 0"),
        (["lr=1e-3", "--sweep"], "lr=1e-3 has no effect; give lr_grid"),
        (["--seed", "-1"], "--seed: -1 is less than 0"),
        (["--workers", "-1"], "--workers: -1 is less than 0"),
    ):
        with pytest.raises(UserError, match=message):
            main([*words, *further])


def test_an_interrupted_run_leaves_the_sweep_to_be_started_again(run, monkeypatch):
    monkeypatch.setattr(Runner, "launch", lambda self, command, log, seconds: REQUEUE_CODE)
    with pytest.raises(Interrupted, match="16 of 16 runs are left"):
        sweep(run, ["tool"])
    ended = iter([REQUEUE_CODE, 2] * 8)  # what failed does not keep the rest from going on
    monkeypatch.setattr(Runner, "launch", lambda self, command, log, seconds: next(ended))
    with pytest.raises(
        Interrupted,
        match="8 of 16 runs are left: start it again; sweep: 8 of 16 runs failed: lr_8e-05_wd_0.01/seed_1, ",
    ):
        sweep(run, ["tool"])
    for variable, value in (("RANK", "0"), ("WORLD_SIZE", "2")):  # of torchrun: the runs would inherit it
        with monkeypatch.context() as told, pytest.raises(UserError, match="one process starts all runs"):
            told.setenv(variable, value)
            sweep(run, ["tool"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_either_signal_of_a_scheduler_ends_a_sweep(number):
    """And what is begun at that moment does not inherit that signals are ignored."""
    before = signal.signal(number, lambda *_: None)
    try:
        with pytest.raises(Interrupted, match=f"by a {number.name}: start it again"), interruptible():
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)
                assert signal.SIG_IGN not in map(signal.getsignal, SIGNALS)
    finally:
        signal.signal(number, before)


def test_the_ranks_of_a_run_say_once_where_its_result_is(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        say("result: out/result.json")
    assert capsys.readouterr().out == "result: out/result.json\n"


def test_runs_at_a_time_have_a_gpu_each(run, monkeypatch):
    """As many at a time as there are slots, each with the GPU of a slot that is free."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    tool = [sys.executable, "-c", "import os, sys; print(sys.argv[1], os.environ['CUDA_VISIBLE_DEVICES'])"]
    with pytest.raises(UserError, match="16 of 16 runs failed"):  # there is no result
        sweep(replace(run, device="cuda"), tool, n_at_once=2)
    said = [path.read_text().split() for path in run.output.rglob("*.log")]
    assert sorted(int(index) for index, _ in said) == list(range(16)) and {gpu for _, gpu in said} == {
        "2",
        "5",
    }
