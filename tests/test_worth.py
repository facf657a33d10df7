"""Whether pre-training pays: shares of the labels, the runs, what may be said of the numbers, the table and the plot."""

import json

import cv2
import pytest
import yaml
from coco_fixture import write_coco
from photos import write_photos
from scipy.stats import ttest_rel
from test_det_plan import WORDS
from test_torchvision_run import TINY, backbone_file
from tool_fixture import load_tool

from det_plugin.coco.annotations import read_split
from pretrain.errors import Interrupted, UserError
from pretrain.results.folder import unnamed
from pretrain.results.render import render
from pretrain.results.worth import gain, sentence, worth_table


def test_a_gain_is_paired_by_seed_with_students_interval():
    one, other = {0: 30.0, 1: 33.0, 2: 31.5, 7: 1.0}, {2: 29.0, 0: 28.0, 1: 32.0}
    found = gain(one, other)
    expected = ttest_rel([30.0, 33.0, 31.5], [28.0, 32.0, 29.0]).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high)) and found.n == 3
    assert found.mean == pytest.approx((2 + 1 + 2.5) / 3) and found.is_shown == (expected.low > 0)
    assert not gain({0: 3.0}, {0: 1.0}).is_shown and gain({0: 3.0}, {1: 1.0}) is None


SHARES = {0.1: 24, 1.0: 240}


def test_the_sentence_says_no_more_than_the_numbers():
    scores = {
        ("mine", 0.1): {0: 30.0, 1: 31.0, 2: 30.5},
        ("dino", 0.1): {0: 20.0, 1: 21.2, 2: 20.4},
        ("none", 0.1): {0: 1.0, 1: 2.0, 2: 3.0},
        ("mine", 1.0): {0: 50.0, 1: 54.0, 2: 51.0},
        ("dino", 1.0): {0: 51.0, 1: 52.0, 2: 52.5},
    }
    told = sentence(scores, ["none", "dino", "mine"], SHARES, "mine")
    assert told.startswith(
        "With 10% of the labels (24 images) mine is better than dino (+10.0 box AP, 95% interval +"
    )
    assert "; with 100% of the labels (240 images) no difference from dino is shown (-0.2 box AP" in told
    worse = {
        key: {seed: -value for seed, value in by.items()} for key, by in scores.items() if key[0] != "none"
    }
    assert "mine is worse than dino" in sentence(worse, ["dino", "mine"], SHARES, "mine")
    single = {key: {0: by[0]} for key, by in scores.items()}
    assert "of one seed, which says nothing of chance" in sentence(single, ["dino", "mine"], SHARES, "mine")
    assert sentence({}, ["dino", "mine"], SHARES, "mine") == "No run of mine and another start has ended yet."


def test_the_table_has_a_row_a_start_and_a_record_a_run():
    scores = {("a", 0.1): {0: 10.0, 1: 12.0}, ("b", 0.1): {0: 5.5}}
    table = worth_table(scores, ["a", "b"], SHARES, "what may be said")
    text = render(table, "md")
    assert "| a | 11.0 ± 1.4 (n=2) | – |" in text and "| b | 5.5 | – |" in text
    assert "what may be said" in text
    rows = render(table, "csv").splitlines()
    assert rows == ["start,share,images,seed,box_ap", "a,0.1,24,0,10.0", "a,0.1,24,1,12.0", "b,0.1,24,0,5.5"]


def worth(*words):
    load_tool("worth").main([*map(str, words)])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--starts", "none"], "nothing to compare; give two, or one and --photos"),
        (["--starts", "none,nowhere.pth"], "no file nowhere.pth; give none for random weights"),
        (["--starts", "none,none"], "two are called none; rename one"),
        (["--starts", "none", "--photos", "photos"], "epochs: say how long .* batch_size=16 epochs=50"),
        (["--starts", "none,none", "--shares", "0.1,2"], "--shares: 2 is more than all"),
        (["--starts", "none,none", "--shares", "0.1,-1"], "--shares='-1' should be a number above 0"),
    ],
)
def test_what_cannot_be_compared_is_told(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        worth("--data", tmp_path, "--output", tmp_path / "out", *words)


def test_starts_are_compared_on_nested_shares_stopped_and_gone_on(tmp_path, monkeypatch, capsys):
    data = write_coco(tmp_path / "coco")
    one = backbone_file(tmp_path / "one.safetensors", seed=1)
    output = tmp_path / "worth"
    words = ["--data", data, "--photos", write_photos(tmp_path / "photos"), "--starts", f"none,{one}"]
    words += ["--backbone", TINY, "--shares", "0.4,1", "--seeds", "1", "--output", output]
    words += ["--engine", "torchvision", "--device", "cpu", "--workers", "0", "max_iters=2", "eval_every=2"]
    small = "optim.epochs=1 optim.warmup_epochs=1 optim.batch_size=3 crops.n_local=0 heads.n_prototypes=24 log.tensorboard=false"
    fields = [word for word in WORDS if not word.startswith("backbone.")]
    tool = load_tool("worth")
    monkeypatch.setattr(tool.Runner, "run", lambda self, jobs: dict.fromkeys(jobs, "left"))  # stopped at once
    with pytest.raises(Interrupted, match="of 7 runs are left: start it again"):
        worth(*words, "--pretrain", small, *fields)
    assert "No run of photos and another start has ended yet." in (output / "worth.md").read_text()
    monkeypatch.undo()
    worth(*words, "--pretrain", small, *fields)
    said = capsys.readouterr().out
    names, parts = {}, {}
    for share in ("0.4", "1"):
        file = output / "data" / f"share_{share}.yaml"
        train, val = (read_split(file, split, num_classes=3, training=False) for split in ("train", "val"))
        names[share], parts[share] = (
            {p.file_name for p in train.pictures},
            {p.file_name for p in val.pictures},
        )
        assert yaml.safe_load(file.read_text())["train"]["images"] == str(data / "train2017")
    assert names["0.4"] < names["1"] and parts["0.4"] == parts["1"] and names["0.4"]
    rows = (output / "worth.csv").read_text().splitlines()[1:]
    assert sorted(row.rsplit(",", 1)[0] for row in rows) == sorted(
        f"{start},{share},{len(names[share])},0"
        for start in ("none", "one", "photos")
        for share in ("0.4", "1")
    )
    for row in rows:
        start, share, _, seed, box_ap = row.split(",")
        result = json.loads((output / start / f"share_{share}" / f"seed_{seed}" / "result.json").read_text())
        assert result["metrics"]["box_ap"] == float(box_ap)
    assert cv2.imread(str(output / "worth.png")).std() > 10 and "photos" in said
    assert not unnamed(output, "worth")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("result.json")}
    worth(*words, "--pretrain", small, *fields)  # all is done: nothing is run again
    assert {path: path.stat().st_mtime_ns for path in output.rglob("result.json")} == before
    other = write_coco(tmp_path / "other")
    file = other / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "images": content["images"][:-1], "annotations": [
        a for a in content["annotations"] if a["image_id"] != content["images"][-1]["id"]]}))  # fmt: skip
    with pytest.raises(
        UserError, match="is of other labels: .* holds another comparison; choose another --output"
    ):
        worth(*[other if word == data else word for word in words], "--pretrain", small, *fields)
