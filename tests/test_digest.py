"""What tells one data set from another, and how a pre-training goes on over other data."""

import json

import pytest
import torch
from photos import TINY, last, write_photos
from source_fixture import opened, write_tar

from pretrain.checkpoints import newest, save
from pretrain.cli import resumed
from pretrain.config import load_config
from pretrain.data.digest import FileSizes, difference
from pretrain.errors import UserError
from pretrain.results.schema import read_result
from pretrain.train import train
from pretrain.trainer import Trainer

IMAGES = {"a.jpg": b"image a", "b.jpg": b"image b", "c.jpg": b"image c"}


def put(folder, images):
    folder.mkdir(parents=True)
    for name, content in images.items():
        (folder / name).write_bytes(content)
    return folder


def of_folder(folder, images):
    return opened(put(folder, images))


def of_list(folder, images):
    put(folder, images)
    (folder / "list.txt").write_text("".join(f"{name}\n" for name in images))
    return opened(folder / "list.txt")


def of_coco(folder, images):
    put(folder / "train2017", images)
    (folder / "annotations").mkdir()
    return opened(folder, split="train2017")


def of_tar(folder, images):
    return opened(write_tar(folder / "train-000000.tar", images.items()))


def of_parquet(folder, images):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir()
    file = folder / f"{next(iter(images))}.parquet"
    parquet.write_table(pa.table({"image": list(images.values())}), file, row_group_size=1)
    return opened(folder)


def of_huggingface(folder, images):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"image": list(images.values())}).save_to_disk(folder, num_shards=len(images))
    return opened(folder)


@pytest.mark.parametrize("source", [of_folder, of_list, of_coco, of_tar, of_parquet, of_huggingface])
def test_a_digest_knows_number_names_and_sizes_and_no_root(tmp_path, source):
    def values(name, images):
        return source(tmp_path / name, images).digest().values()

    before = values("before", IMAGES)
    assert before == values("moved", IMAGES) and before["images"] == 3
    fewer = dict(list(IMAGES.items())[:2])
    assert difference(before, values("fewer", fewer)) == "3 images before, 2 now"
    longer = {name: content * 100 * (name == "b.jpg") or content for name, content in IMAGES.items()}
    assert difference(before, values("longer", longer)) == "other sizes of files"
    if source is not of_huggingface:  # it names its files itself
        renamed = {f"0{name}": content for name, content in IMAGES.items()}
        assert difference(before, values("renamed", renamed)) == "other names"


def test_the_order_of_a_list_counts_and_a_missing_file_is_no_error(tmp_path):
    backwards = dict(reversed(IMAGES.items()))
    before, other = of_list(tmp_path / "a", IMAGES), of_list(tmp_path / "b", backwards)
    assert difference(before.digest().values(), other.digest().values()) == "other names"
    (tmp_path / "a" / "b.jpg").unlink()
    assert before.digest().sizes().tolist() == [7, -1, 7]
    assert FileSizes(lambda index: b"a\0b", 1).wait().tolist() == [-1]
    assert FileSizes(lambda index: b"", 0).wait().tolist() == []


def settings(tmp_path, *extra):
    words = [*TINY, f"data.root={tmp_path / 'photos'}", f"run.output={tmp_path / 'run'}", *extra]
    return load_config(None, last(words))


@pytest.fixture
def begun(tmp_path):
    """Three of six iterations over six photographs."""
    torch.set_num_threads(1)
    write_photos(tmp_path / "photos")
    train(settings(tmp_path), stop_after=3)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda at: (at / "003.jpg").rename(at / "033.jpg"), "other names"),
        (lambda at: write_photos(at, seed=1), "other sizes of files"),
        (lambda at: write_photos(at, n=12), "6 images before, 12 now"),
    ],
)
def test_resume_tells_other_images_and_goes_on_over_them_when_asked(begun, capsys, change, told):
    """With six or with twelve images the schedule stays that of six: two iterations an epoch, six in all."""
    change(begun / "photos")
    with pytest.raises(UserError, match=rf"^resume: .*it_00000003 .*\({told}\); .*--data-changed$"):
        train(settings(begun), resume="auto")
    train(settings(begun), resume="auto", stop_after=5, data_changed=True)
    assert f"over other data ({told})" in capsys.readouterr().err
    # the new images are the run's now
    folder = train(settings(begun), resume="auto")
    assert "other data" not in capsys.readouterr().err
    found, _ = newest(folder)
    assert found.iteration == 6 and found.meta["progress"]["data_changes"] == [f"iteration 3: {told}"]
    result = read_result(folder)
    assert result.protocol.deviations["data"] == ["the same to the end", f"iteration 3: {told}"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    straight = train(
        settings(begun, f"run.output={begun / 'straight'}", f"data.root={write_photos(begun / 'six')}")
    )
    expected = [json.loads(line)["lr"] for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == expected
    assert result.effective_epochs == read_result(straight).effective_epochs


def test_a_moved_folder_is_the_same_data(begun, capsys):
    (begun / "photos").rename(begun / "elsewhere")
    folder = train(settings(begun, f"data.root={begun / 'elsewhere'}"), resume="auto")
    assert "data" not in read_result(folder).protocol.deviations
    assert "other data" not in capsys.readouterr().err


def test_a_checkpoint_of_before_is_compared_by_number_and_says_so(begun, capsys):
    found, _ = newest(begun / "run")
    meta = {key: value for key, value in found.meta.items() if key not in ("digest", "iteration", "layout")}
    save(begun / "run", found.iteration, found.tensors(), meta, keep=1)
    write_photos(begun / "photos", seed=1)
    train(settings(begun), resume="auto", stop_after=4)
    assert "only the number of images is compared" in capsys.readouterr().err
    # the next one holds a digest
    write_photos(begun / "photos", seed=2)
    with pytest.raises(UserError, match="other sizes of files"):
        train(settings(begun), resume="auto")


def test_a_start_does_not_wait_for_a_slow_disk(tmp_path, monkeypatch):
    """The sizes are looked up after the first step, and waited for by the first checkpoint."""
    torch.set_num_threads(1)
    write_photos(tmp_path / "photos")
    reached, begun, waited, one = list[int](), list[int](), list[int](), Trainer.step
    begin = FileSizes.begin
    monkeypatch.setattr(FileSizes, "begin", lambda self: begun.append(len(reached)) or begin(self))
    monkeypatch.setattr(FileSizes, "wait", lambda self: waited.append(len(reached)) or self.found)
    monkeypatch.setattr(Trainer, "step", lambda self, *a, **k: reached.append(1) or one(self, *a, **k))
    train(settings(tmp_path), stop_after=3)
    assert begun == [1, 2, 3] and waited == [3]


def test_the_command_that_goes_on_accepts_no_further_change(monkeypatch):
    monkeypatch.setattr("sys.argv", ["posfield pretrain"])
    words = ["--resume", "--data-changed", "data.root=x"]
    assert resumed(words) == "posfield pretrain --resume data.root=x"
