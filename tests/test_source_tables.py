"""Images in parquet files and Hugging Face folders; and what all kinds of source have in common."""

import json
import multiprocessing
import pickle
import sys

import numpy as np
import pytest
from source_fixture import contents, files, names, opened, write_shards

from pretrain.data.decode import BrokenImage
from pretrain.data.sources import SHIPPED, kind_of
from pretrain.errors import UserError

pa = pytest.importorskip("pyarrow")
pytest.importorskip("datasets")
import pyarrow.parquet as pq  # noqa: E402

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(*numbers):
    return [{"bytes": f"image {i}".encode() * 50, "path": f"{i}.jpg"} for i in numbers]


def table(rows, **columns):
    return pa.table({"image": pa.array(rows, IMAGE), "label": list(range(len(rows))), **columns})


def save_to_disk(folder, parts, split="train"):
    """A folder as ``Dataset.save_to_disk`` leaves it: streams of record batches, state.json,
    dataset_info.json."""
    folder.mkdir(parents=True)
    listed = []
    for k, rows in enumerate(parts):
        name = f"data-{k:05}-of-{len(parts):05}.arrow"
        content = table(rows)
        with pa.ipc.new_stream(str(folder / name), content.schema) as writer:
            writer.write_table(content, max_chunksize=2)
        listed.append({"filename": name})
    (folder / "state.json").write_text(
        json.dumps({"_data_files": listed, "_split": split, "_format_type": None})
    )
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_parquet_by_row(tmp_path, compression):
    for k, rows in enumerate([images(*range(5)), images(), images(5, 6, 7)]):
        path = tmp_path / f"train-{k:05}-of-00003.parquet"
        pq.write_table(table(rows), path, row_group_size=2, compression=compression)
    pq.write_table(table(images(9)), tmp_path / "test-00000-of-00001.parquet")
    source = opened(tmp_path, split="train")
    assert contents(source) == [row["bytes"] for row in images(*range(8))]
    assert source.name(7) == "train-00002-of-00003.parquet: row group 1, row 0"
    order = np.random.default_rng(0).permutation(8)
    assert [source.read(int(i)) for i in order] == [f"image {i}".encode() * 50 for i in order]
    assert len(opened(tmp_path)) == 9 and len(opened(tmp_path / "t*.parquet")) == 9


def test_the_image_column(tmp_path):
    pictures = [b"a", b"b"]
    columns = {"plain": pa.array(pictures, pa.large_binary()), "text": ["x", "y"]}
    pq.write_table(table(images(0, 1), **columns), tmp_path / "x.parquet")
    with pytest.raises(
        UserError, match=r"data\.image_column: which of .*x\.parquet's columns\? Of images: image, plain"
    ):
        opened(tmp_path)
    assert contents(opened(tmp_path, column="plain")) == pictures
    assert contents(opened(tmp_path, column="image")) == [row["bytes"] for row in images(0, 1)]
    for column, said in [
        ("picture", "no column picture, only image, label"),
        ("text", "text in .* is string, neither"),
    ]:
        with pytest.raises(UserError, match=rf"data\.image_column: .*{said}"):
            opened(tmp_path, column=column)
    with pytest.raises(UserError, match=r"data\.image_column=image: there are no columns"):
        opened(files(tmp_path / "photos", "a.jpg"), column="image")
    pq.write_table(pa.table({"label": [1]}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="Of images: none"):
        opened(tmp_path / "none.parquet")


def test_rows_without_bytes(tmp_path):
    files(tmp_path, "sub/there.jpg")
    rows = [
        {"bytes": None, "path": "sub/there.jpg"},
        {"bytes": None, "path": "gone.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    pq.write_table(table(rows), tmp_path / "x.parquet")
    save_to_disk(tmp_path / "saved", [rows])
    files(tmp_path / "saved", "sub/there.jpg")
    for source in (opened(tmp_path / "x.parquet"), opened(tmp_path / "saved")):
        assert source.read(0) == b"sub/there.jpg"
        for index, reason in [(1, "No such file"), (2, "without an image"), (3, "without an image")]:
            with pytest.raises(BrokenImage, match=reason):
                source.read(index)


def test_damaged_tables_are_named(tmp_path):
    pq.write_table(table(images(0)), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot read .*x\.parquet"):
        opened(tmp_path)
    saved = save_to_disk(tmp_path / "saved", [images(0, 1), images(2)])
    arrow = saved / "data-00001-of-00002.arrow"
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read .*data-00001-of-00002\.arrow"):
        opened(saved)
    arrow.unlink()
    with pytest.raises(UserError, match=r"no file .*data-00001-of-00002\.arrow"):
        opened(saved)
    (saved / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"state\.json cannot be read"):
        opened(saved)
    (saved / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json does not say _data_files"):
        opened(saved)
    pq.write_table(table([]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no row in"):
        opened(tmp_path / "x.parquet")


def test_a_saved_hugging_face_data_set(tmp_path):
    source = opened(save_to_disk(tmp_path / "one", [images(0, 1, 2, 3, 4), images(5, 6)]))
    assert contents(source) == [row["bytes"] for row in images(*range(7))]
    assert source.name(6) == "data-00001-of-00002.arrow: row 1"
    assert len(opened(tmp_path / "one", split="train")) == 7
    with pytest.raises(UserError, match=r"data\.split=test: .* one split, train"):
        opened(tmp_path / "one", split="test")
    for split, rows in (("train", images(1, 2)), ("test", images(3))):
        save_to_disk(tmp_path / "dict" / split, [rows], split)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert names(opened(tmp_path / "dict", split="test")) == ["test/data-00000-of-00001.arrow: row 0"]
    assert contents(opened(tmp_path / "dict", split="train+test")) == [
        row["bytes"] for row in images(1, 2, 3)
    ]
    for split in ("", "val"):
        with pytest.raises(UserError, match=rf"data\.split={split}: .* has the splits train, test"):
            opened(tmp_path / "dict", split=split)
    with pytest.raises(UserError, match="neither state.json nor dataset_dict.json"):
        opened(tmp_path, "huggingface")


def test_a_selection_of_a_hugging_face_data_set_is_not_taken_for_the_whole(tmp_path):
    """As ``select``, ``filter`` and ``shuffle`` leave it: all rows, and beside them which of these it
    means, in what order."""
    state = save_to_disk(tmp_path / "some", [images(0, 1, 2)]) / "state.json"
    saved = json.loads(state.read_text())
    for indices in ([], None):
        state.write_text(json.dumps({**saved, "_indices_data_files": indices}))
        assert len(opened(tmp_path / "some")) == 3
    state.write_text(json.dumps({**saved, "_indices_data_files": [{"filename": "indices.arrow"}]}))
    with pytest.raises(
        UserError,
        match=r"state\.json holds a selection .* is not applied here: save it again with flatten_indices",
    ):
        opened(tmp_path / "some")


def test_without_a_package_the_message_says_which_to_install(tmp_path, monkeypatch):
    save_to_disk(tmp_path / "saved", [images(0)])
    pq.write_table(table(images(0)), tmp_path / "x.parquet")
    for package, root in (("datasets", "saved"), ("pyarrow", "x.parquet")):
        monkeypatch.delitem(sys.modules, "pretrain.data.sources.tables", raising=False)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"pip install {package}"):
            opened(tmp_path / root)


def test_what_datasets_itself_saves(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": images(*range(7)), "label": list(range(7))}
    train, test = (datasets.Dataset.from_dict(rows, features).select(range(n)) for n in (7, 2))
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path, num_shards={"train": 2, "test": 1})
    source = opened(tmp_path, split="train+test")
    assert contents(source) == [row["bytes"] for row in images(*range(7), 0, 1)]
    assert source.name(4) == "train/data-00001-of-00002.arrow: row 0"
    train.shuffle(seed=0).save_to_disk(tmp_path / "some")  # written out, as all versions since 2.0 do
    assert sorted(contents(opened(tmp_path / "some"))) == [row["bytes"] for row in images(*range(7))]


# All kinds


def every_kind(folder):
    """A source of each kind, and the contents of its images."""
    files(folder / "folder", "a.jpg", "b.jpg", "c.jpg")
    files(folder / "coco", "train2017/a.jpg", "train2017/b.jpg", "annotations/instances_train2017.json")
    (folder / "list.txt").write_text("folder/c.jpg\nfolder/a.jpg\n")
    write_shards(folder / "tar")
    (folder / "parquet").mkdir()
    pq.write_table(table(images(0, 1, 2, 3)), folder / "parquet" / "x.parquet", row_group_size=1)
    save_to_disk(folder / "huggingface", [images(0, 1), images(2)])
    roots = {"folder": "folder", "list": "list.txt", "coco": "coco", "tar": "tar", "parquet": "parquet"}
    roots["huggingface"] = "huggingface"
    return {
        kind: opened(folder / root, split="train2017" if kind == "coco" else "")
        for kind, root in roots.items()
    }


def test_auto_tells_the_kind(tmp_path):
    assert every_kind(tmp_path).keys() == set(SHIPPED)
    for kind in SHIPPED:
        assert kind_of(str(tmp_path / ("list.txt" if kind == "list" else kind))) == kind
    files(tmp_path / "folder", "originals.tar", "originals.parquet")
    assert kind_of(str(tmp_path / "folder")) == "folder"  # images beside an archive
    files(tmp_path / "classes", "n01.tar", "n01/a.jpg")
    assert kind_of(str(tmp_path / "classes")) == "folder"
    files(tmp_path / "shards", "train/x.tar", "train/index.json")
    assert kind_of(str(tmp_path / "shards"), "train") == "tar"
    assert kind_of(str(tmp_path / "x-{000..123}.tar")) == kind_of(str(tmp_path / "*.tar")) == "tar"
    (tmp_path / "x.zip").write_text("")
    for root, said in [
        (tmp_path / "x.zip", r"x\.zip is neither"),
        (tmp_path / "none", "no file or folder .*none"),
    ]:
        with pytest.raises(UserError, match=rf"data\.root: .*{said}"):
            kind_of(str(root))


def _read_all(source, queue):
    queue.put([source.read(i) for i in reversed(range(len(source)))][::-1])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_open_for_themselves(tmp_path, method):
    context = multiprocessing.get_context(method)
    sources, expected = every_kind(tmp_path), {}
    for kind, source in sources.items():
        expected[kind] = contents(source)  # opens what there is to open before the fork
        assert contents(pickle.loads(pickle.dumps(source))) == expected[kind]
    kinds = (
        list(sources) if method == "fork" else ["tar"]
    )  # a spawned process imports all anew, which is slow
    for kind in kinds:
        queue = context.Queue()
        worker = context.Process(target=_read_all, args=(sources[kind], queue))
        worker.start()
        assert queue.get(timeout=60) == expected[kind]
        worker.join()
        assert contents(sources[kind]) == expected[kind]
