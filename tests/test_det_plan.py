"""A fine-tuning on data of one's own: its schedule, the plan before the first step, the best weights, going on from the
folder alone."""

import json
import shutil

import pytest
import torch
from coco_fixture import write_coco
from safetensors.torch import load_file
from test_torchvision_run import FLAGS, RECIPE, TINY, lines
from tool_fixture import load_tool

from det_plugin import plan
from det_plugin.best import FILE, Best, load, metadata_of
from det_plugin.plan import schedule, whole_schedule
from det_plugin.predict import load_detector
from det_plugin.protocol import protocol, with_overrides
from det_plugin.torchvision_engine import train as engine
from det_plugin.torchvision_engine.predict import load_model
from det_plugin.train import settings_of
from pretrain import device
from pretrain.errors import UserError
from pretrain.jobs.start import FILE as START
from pretrain.jobs.start import started
from pretrain.schedules import iterations
from pretrain.settings import above_zero, as_dict

COCO = protocol("coco-12ep", TINY)
OF_THE_SCHEDULE = ("max_iters", "milestones", "warmup_iters", "eval_every", "num_classes")
WORDS = [
    f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
    for key, value in as_dict(RECIPE).items()
    if value != as_dict(COCO)[key] and key not in OF_THE_SCHEDULE
]
WORDS += ["amp=false", *(f"backbone.{key}={value}" for key, value in FLAGS.items())]
BASE = ["--backbone", TINY, "--device", "cpu", "--workers", "0", "--engine", "torchvision"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


def test_a_schedule_keeps_the_protocols_proportions():
    whole = schedule(COCO, COCO.max_iters, {})
    assert whole == {
        key: getattr(COCO, key) for key in ("max_iters", "milestones", "warmup_iters", "eval_every")
    }
    assert schedule(COCO, 1000, {}) == {
        "max_iters": 1000,
        "milestones": (889, 963),
        "warmup_iters": 11,
        "eval_every": 226,
    }
    for n in range(1, 60):
        assert with_overrides(COCO, schedule(COCO, n, {})).max_iters == n
    assert schedule(COCO, 1000, {"eval_every": 5}).keys() == {"max_iters", "milestones", "warmup_iters"}


def test_iterations_alone_set_the_whole_schedule():
    fields = whole_schedule(COCO, {"max_iters": "1000", "lr": "1e-4", "eval_every": "50"})
    recipe = with_overrides(COCO, fields)
    assert (recipe.milestones, recipe.warmup_iters, recipe.eval_every) == ((889, 963), 11, 50)
    own = {"max_iters": "1000", "milestones": "500"}
    assert whole_schedule(COCO, own) == own and whole_schedule(COCO, {"lr": "1"}) == {"lr": "1"}


@pytest.mark.parametrize("epochs, n", [("50", 1600), (0.5, 16), (1e-9, 1)])
def test_epochs_are_iterations(epochs, n):
    assert iterations(above_zero("epochs", epochs), 500, 16) == n


@pytest.mark.parametrize("epochs", ["many", "0", "-1", "inf", "nan"])
def test_epochs_that_are_none(epochs):
    with pytest.raises(UserError, match="epochs=.* should be a number above 0"):
        above_zero("epochs", epochs)


def test_epochs_count_the_images_that_are_learned_from(data, tmp_path):
    def recipe(**fields):
        return settings_of(TINY, None, data, tmp_path, "coco-12ep", fields).protocol

    n = recipe(epochs="10", batch_size="1").max_iters // 10
    content = json.loads((data / "annotations" / "instances_train2017.json").read_text())
    annotated = {a["image_id"] for a in content["annotations"]}
    n_empty = len({image["id"] for image in content["images"]} - annotated)
    assert recipe(epochs="10", batch_size="1", keep_empty="false").max_iters == 10 * (n - n_empty)
    assert 1 < n <= len(content["images"])
    with pytest.raises(UserError, match="epochs=3 and max_iters=5 say it twice"):
        recipe(epochs="3", max_iters="5")


def detect(*words):
    load_tool("detect").main([*map(str, words)])


def test_a_protocol_of_thousands_of_epochs_is_refused(data, tmp_path):
    words = [*BASE, "--data", data, "--output", tmp_path / "run", *WORDS]
    with pytest.raises(
        UserError,
        match=r"22,128 iterations of 2 images are .* epochs of \d+ images; give epochs=50 .* or --yes",
    ):
        detect(*words)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run of four epochs by the command, and the same stopped before its last evaluation."""
    folder = tmp_path_factory.mktemp("runs")
    detect(*BASE, "--data", data, "--output", folder / "whole", *WORDS, "epochs=2", "eval_every=2", "lr=1e-3")
    return folder / "whole"


def test_the_plan_comes_before_the_first_step(stopped, data, tmp_path, capsys):
    words = [*WORDS, "epochs=2", "eval_every=2", "lr=1e-3"]
    detect(*BASE, "--data", data, "--output", tmp_path / "again", *words)
    said = capsys.readouterr().err
    n = int(said.split("plan: ")[1].split(" images")[0])
    total = 2 * -(-n // 2)
    assert (
        f"batch 2: {-(-n // 2)} iterations an epoch" in said
        and f"{total} iterations; evaluated every 2 on" in said
    )
    assert f"{TINY} from scratch on cpu, float32; into {tmp_path / 'again'}" in said
    assert lines(stopped)[-1]["iteration"] == total - 1


def test_a_folder_knows_how_it_was_started(stopped, data, tmp_path, capsys):
    """Its result and last checkpoint lost, --resume and --output alone give the same again."""
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    before = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    shutil.rmtree(max((run / "checkpoints").iterdir()))
    detect("--resume", "--output", run, "--workers", "1")
    after = json.loads((run / "result.json").read_text())
    assert after["metrics"] == before["metrics"] and after["config_hash"] == before["config_hash"]
    assert lines(run) == lines(stopped)
    with pytest.raises(UserError, match="--resume: .* has its settings; leave out"):
        detect("--resume", "--output", run, "lr=1")
    with pytest.raises(UserError, match="--data: give the data set"):
        detect("--output", run)
    (run / START).unlink()
    with pytest.raises(UserError, match=f"no {START}.*; give --data and the rest"):
        started(run, ["data"])


def test_the_best_weights_are_kept_beside_the_last(stopped):
    evaluations = [(line["iteration"] + 1, line["box_ap"]) for line in lines(stopped) if "box_ap" in line]
    assert len(evaluations) > 2
    iteration, box_ap = max(evaluations, key=lambda pair: (pair[1], -pair[0]))
    assert metadata_of(stopped / FILE) == {"iteration": str(iteration), "box_ap": repr(box_ap)}
    model, _, last = load_model(stopped)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    load(stopped, model, "last")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    load(stopped, model, "auto")
    best = load_file(stopped / FILE)
    assert all(torch.equal(value, best[key]) for key, value in model.state_dict().items())
    assert any(not torch.equal(best[key], state[key]) for key in state) == (iteration != last)
    assert load_detector(stopped, "cpu").classes == load_detector(stopped, "cpu", checkpoint="last").classes


@pytest.mark.parametrize("fitting, parts", [(16, 1), (8, 2), (3, 8), (1, 16)])
def test_the_largest_part_that_fits_is_taken(data, tmp_path, monkeypatch, capsys, fitting, parts):
    run = settings_of(TINY, None, data, tmp_path, "coco-12ep", {"batch_size": "16"}, accumulate=0)
    tried = []
    monkeypatch.setattr(device, "fits", lambda step, *_: step() or 16 // step.args[0] <= fitting)
    found = plan.fitted(run, torch.device("cuda", 0), tried.append)
    assert found.accumulate == parts and tried[-1] == found
    assert f"accumulate={parts}: {16 // parts} images at a time fit into cuda:0" in capsys.readouterr().err
    assert plan.fitted(run, torch.device("cpu"), tried.append).accumulate == 1
    assert plan.fitted(found, torch.device("cuda", 0), tried.append) is found
    monkeypatch.setattr(device, "fits", lambda *_: False)
    with pytest.raises(
        UserError, match="not even one image at a time .* --checkpointing, or a smaller image_size_px"
    ):
        plan.fitted(run, torch.device("cuda", 0), tried.append)
    monkeypatch.setattr(plan.distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match="accumulate: 0 is fitted by one process alone; give a number"):
        plan.fitted(run, torch.device("cuda", 0), tried.append)


@pytest.mark.parametrize("masks", ["on", "off"])
def test_a_trial_is_two_steps_with_as_many_objects_as_can_be(data, tmp_path, monkeypatch, masks):
    fields = {
        **{key: value for key, value in as_dict(RECIPE).items() if key not in ("name", "version")},
        "masks": masks,
    }
    run = settings_of(
        TINY, None, data, tmp_path, "coco-12ep", {**fields, "batch_size": 6}, model_kwargs=FLAGS, accumulate=3
    )
    losses, whole = [], engine.Trainer.step

    def step(self, samples):
        assert (
            len(samples) == 4 and self.micro_batch_size == 2
        )  # the gradients of one beside the other's activations
        losses.append(whole(self, samples))

    monkeypatch.setattr(engine.Trainer, "step", step)
    engine._try(run, torch.device("cpu"))
    assert len(losses) == 2 and ("loss_mask" in losses[0]) == (masks == "on")


def test_without_a_gpu_nothing_is_fitted(data, tmp_path):
    words = [*WORDS, "max_iters=1", "milestones=1", "warmup_iters=0", "--accumulate", "0"]
    detect(*BASE, "--data", data, "--output", tmp_path, *words)
    assert json.loads((tmp_path / START).read_text())["accumulate"] == 1


def judged(monkeypatch, scores):
    """Evaluations find these box APs, in turn."""
    found = iter(scores)
    monkeypatch.setattr(engine, "evaluate", lambda *_, **__: ({"box_ap": next(found)}, []))
    monkeypatch.setattr("det_plugin.figures.draw_page", lambda *_, **__: None)
    monkeypatch.setattr(engine, "in_words", str)


def test_patience_ends_a_run(data, tmp_path, capsys, monkeypatch):
    words = [
        *BASE,
        "--data",
        data,
        "--output",
        tmp_path,
        *WORDS,
        "max_iters=12",
        "milestones=11",
        "warmup_iters=0",
    ]
    judged(monkeypatch, [5.0, 7.0, 7.0, 6.5])
    detect(*words, "eval_every=2", "patience=2")
    said = capsys.readouterr()
    assert (
        "12 iterations; evaluated every 2 on" in said.err and "over after 2 without a better one" in said.err
    )
    assert "over after 8 iterations by patience=2; best: box AP 7.00 at iteration 4" in said.out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["metrics"]["box_ap"] == 6.5 and result["protocol"]["deviations"]["patience"] == [0, 2]
    assert metadata_of(tmp_path / FILE)["iteration"] == "4" and lines(tmp_path)[-1]["iteration"] == 7
    assert load_model(tmp_path)[2] == 8
    detect("--resume", "--output", tmp_path)  # it is over
    (tmp_path / "result.json").unlink()  # killed between the last evaluation and the result
    judged(monkeypatch, [6.5])
    detect("--resume", "--output", tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["box_ap"] == 6.5
    assert [line["box_ap"] for line in lines(tmp_path) if "box_ap" in line] == [5.0, 7.0, 7.0, 6.5]
    shutil.rmtree(max((tmp_path / "checkpoints").iterdir()))  # killed before
    (tmp_path / "result.json").unlink()
    judged(monkeypatch, [6.5])
    detect("--resume", "--output", tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["box_ap"] == 6.5


def test_patience_is_no_part_of_runs_without_it(data, tmp_path):
    def settings(**fields):
        return settings_of(TINY, None, data, tmp_path, "coco-12ep", fields).settings()["protocol"]

    assert "patience" not in settings() and settings(patience="3")["patience"] == 3
    assert "patience" not in settings(patience="0")
    with pytest.raises(UserError, match="patience"):
        settings(patience="-1")


def test_only_better_weights_are_kept(tmp_path):
    model = torch.nn.Linear(2, 1)
    best = Best(tmp_path, begins=True)
    for box_ap, iteration, kept in [(10.0, 5, 5), (10.0, 10, 5), (9.0, 15, 5), (12.5, 20, 20)]:
        best.keep(model, box_ap, iteration)
        assert metadata_of(tmp_path / FILE)["iteration"] == str(kept)
    assert Best(tmp_path, begins=False).box_ap == 12.5
    with pytest.raises(UserError, match="does not fit the run's detector"):
        load(tmp_path, torch.nn.Linear(3, 1), "best")
    (tmp_path / FILE).write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read .*; remove it to take the last weights"):
        load(tmp_path, model, "auto")
    Best(tmp_path, begins=True)
    assert not (tmp_path / FILE).exists()
    with pytest.raises(UserError, match="has no best.safetensors: it kept the last weights alone"):
        load(tmp_path, model, "best")


def test_the_protocol_itself_is_not_refused_on_coco(data, tmp_path, monkeypatch):
    run = settings_of(TINY, None, data, tmp_path, "coco-12ep", {})

    class Many:
        class_names = ("a",)
        pictures = range(117_266)

    both = type("Both", (), {"train": Many, "val": Many})
    plan.tell(run, both, torch.device("cpu"), begins=True)
    assert (tmp_path / START).is_file()
