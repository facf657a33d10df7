"""Folders, lists, COCO and tar shards, made by hand: order, random access, bad input."""

import os
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from source_fixture import contents, files, names, opened, write_shards, write_tar

from posfield.cli.predict import listed
from pretrain.config import load_config
from pretrain.data.datasets.listing import by_stem
from pretrain.data.decode import BrokenImage
from pretrain.data.sources import kind_of, open_source
from pretrain.data.sources.files import MAX_FILE_BYTES, Handles, Names, expand_braces, shown
from pretrain.data.sources.tar import scan_shard
from pretrain.errors import UserError

# Folders and lists


def test_a_folder_is_listed_by_path_nested_or_flat(tmp_path):
    there = ["b.JPG", "a-b/x.png", "a/y.webp", "a/deep/er/z.bmp", "B.jpeg", "ü.jpg"]
    files(tmp_path, *there, "notes.txt", "a/labels.json", "._b.JPG", ".hidden/x.jpg", "movie.jpg.mp4")
    source = opened(tmp_path)
    expected = sorted(there, key=str.encode)
    assert names(source) == expected and contents(source) == [name.encode() for name in expected]


def test_imagenets_layout_and_a_split(tmp_path):
    files(tmp_path, "train/n02/b.JPEG", "train/n01/a.JPEG", "val/n01/c.JPEG")
    assert names(opened(tmp_path)) == ["train/n01/a.JPEG", "train/n02/b.JPEG", "val/n01/c.JPEG"]
    assert names(opened(tmp_path, split="train")) == ["train/n01/a.JPEG", "train/n02/b.JPEG"]
    with pytest.raises(UserError, match=r"data\.split: no folder .*test"):
        opened(tmp_path, split="test")


def test_links_loops_and_names_that_are_no_text(tmp_path):
    files(tmp_path / "photos", "a/1.jpg", "b/2.jpg")
    files(tmp_path / "elsewhere", "3.jpg")
    (tmp_path / "photos" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "a" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "dangling.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "photos" / "self.jpg").symlink_to(tmp_path / "photos" / "self.jpg")
    source = opened(tmp_path / "photos")
    assert names(source) == ["a/1.jpg", "b/2.jpg", "c/3.jpg", "dangling.jpg", "self.jpg"]
    assert source.read(2) == b"3.jpg"
    for index in (3, 4):
        with pytest.raises(BrokenImage):
            source.read(index)
    if sys.platform == "linux":
        (tmp_path / "odd").mkdir()
        for name in (b"\xff.jpg", b"new\nline.jpg"):
            with open(os.path.join(os.fsencode(tmp_path / "odd"), name), "wb") as file:
                file.write(name)
        source = opened(tmp_path / "odd")
        assert names(source) == ["new\\nline.jpg", "\\xff.jpg"] and contents(source) == [
            b"new\nline.jpg",
            b"\xff.jpg",
        ]


def test_what_is_no_regular_file_is_broken_not_waited_for(tmp_path):
    (tmp_path / "photos" / "folder.jpg").mkdir(parents=True)
    files(tmp_path / "photos", "folder.jpg/in.jpg", "large.jpg")
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")
    os.truncate(tmp_path / "photos" / "large.jpg", MAX_FILE_BYTES + 1)
    (tmp_path / "photos" / "zeros.jpg").symlink_to("/dev/zero")
    source = opened(tmp_path / "photos")
    assert names(source) == ["folder.jpg/in.jpg", "large.jpg", "pipe.jpg", "zeros.jpg"]
    for index, reason in [(1, "bytes, more than"), (2, "no regular file"), (3, "no regular file")]:
        with pytest.raises(BrokenImage, match=reason):
            source.read(index)


def test_a_list_of_files(tmp_path):
    files(tmp_path, "data/a b.jpg", "data/c.jpg", "d.jpg")
    (tmp_path / "lists").mkdir()
    lines = [
        "\ufeff# mine",
        "../data/c.jpg",
        "",
        "../data/a b.jpg  ",
        str(tmp_path / "d.jpg"),
        "../data",
        "gone.jpg",
        "../data/c.jpg",
    ]
    (tmp_path / "lists" / "train.txt").write_text("\r\n".join(lines), encoding="utf-8")
    source = opened(tmp_path / "lists" / "train.txt")
    assert names(source) == [
        "../data/c.jpg",
        "../data/a b.jpg",
        str(tmp_path / "d.jpg"),
        "../data",
        "gone.jpg",
        "../data/c.jpg",
    ]
    assert [source.read(i) for i in (0, 1, 2, 5)] == [b"data/c.jpg", b"data/a b.jpg", b"d.jpg", b"data/c.jpg"]
    for index, reason in [(3, "a folder"), (4, "No such file")]:
        with pytest.raises(BrokenImage, match=reason):
            source.read(index)
    (tmp_path / "empty.lst").write_text("\n# nothing\n")
    with pytest.raises(UserError, match=r"no image is named in the list .*empty\.lst"):
        opened(tmp_path / "empty.lst")
    with pytest.raises(UserError, match=r"cannot read the list .*none\.txt"):
        opened(tmp_path / "none.txt", source="list")
    with pytest.raises(UserError, match=r"data\.split=train"):
        opened(tmp_path / "lists" / "train.txt", split="train")


def test_coco_by_split(tmp_path):
    files(
        tmp_path,
        "annotations/instances_train2017.json",
        "train2017/2.jpg",
        "train2017/1.jpg",
        "val2017/3.jpg",
    )
    files(tmp_path, "unlabeled2017/0.jpg")
    assert names(opened(tmp_path, split="train2017")) == ["train2017/1.jpg", "train2017/2.jpg"]
    both = opened(tmp_path, source="coco", split="unlabeled2017+train2017")
    assert names(both) == ["train2017/1.jpg", "train2017/2.jpg", "unlabeled2017/0.jpg"]
    with pytest.raises(UserError, match=r"data\.split: which .*\(train2017, unlabeled2017, val2017\)"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"data\.split: no folder .*train2014"):
        opened(tmp_path, split="train2014")


def test_names_are_two_arrays():
    items = [b"", b"a", b"\xff\0b", b"", "ü".encode()]
    packed = pickle.loads(pickle.dumps(Names(items)))
    assert len(packed) == 5 and [packed[i] for i in range(5)] == items
    assert {type(value) for value in vars(packed).values()} == {np.ndarray}
    assert len(Names([])) == 0 and shown(b"a\x1b[2J") == "a\\x1b[2J"


# Tar shards


def test_tar_shards_by_webdatasets_names(tmp_path):
    write_shards(tmp_path)
    source = opened(tmp_path)
    assert len(source) == 12 and source.name(5) == "train-000001.tar: n1/001.JPEG"
    assert contents(source) == [f"{shard}-{i}".encode() * 300 for shard in range(3) for i in range(4)]
    assert source.read(11) == b"2-3" * 300 and source.read(0) == b"0-0" * 300  # any order


def test_one_image_a_sample(tmp_path):
    long = "x" * 120  # beyond the 100 bytes of a plain header
    members = [
        ("a.seg.png", b"mask"),
        ("a.png", b"png"),
        ("a.jpg", b"jpg"),
        ("./d.e/b.webp", b"webp"),
        ("._c.jpg", b"fork"),
    ]
    members += [("c.v2.jpg", b"kind v2.jpg"), (f"{long}/ü.bmp", b"bmp"), ("d.cls", b"1"), ("e", b"nothing")]
    path = write_tar(tmp_path / "one.tar", members)
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("folder.jpg").replace(deep=False, uid=0))
        folder = tarfile.TarInfo("other.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    with pytest.warns(
        UserWarning, match=r"data\.root: 1 members are left out, the first is one\.tar: c\.v2\.jpg: a dot"
    ):
        source = opened(path)  # a.seg.png is a part of a sample that has its image, ._c.jpg is hidden
    expected = [("a.jpg", b"jpg"), ("./d.e/b.webp", b"webp"), (f"{long}/ü.bmp", b"bmp"), ("folder.jpg", b"")]
    assert [
        (source.name(i).removeprefix("one.tar: "), source.read(i)) for i in range(len(source))
    ] == expected


def test_shards_by_pattern_and_split(tmp_path):
    write_shards(tmp_path / "in [1]", 1)
    write_shards(tmp_path)
    (tmp_path / "train-000001.tar").rename(tmp_path / "val-000001.tar")
    assert len(opened(tmp_path / "{train-000000,val-000001}.tar")) == 8
    assert len(opened(tmp_path / "train-*.tar")) == 8
    assert len(opened(tmp_path / "in [1]" / "train-000000.tar")) == 4  # a file is no pattern
    assert names(opened(tmp_path, "tar", split="val"))[0].startswith("val-000001.tar")
    assert len(opened(tmp_path, "tar", split="in [1]")) == 4
    with pytest.raises(UserError, match=r"no file .*train-000001\.tar"):
        opened(tmp_path / "train-{000000..000002}.tar")
    with pytest.raises(UserError, match="no file is named"):
        opened(tmp_path / "test-*.tar")
    with pytest.raises(UserError, match=r"data\.split: no test\*\.tar"):
        opened(tmp_path, "tar", split="test")
    assert expand_braces("{a,b}-{08..11}.tar") == [
        f"{x}-{n}.tar" for x in "ab" for n in ("08", "09", "10", "11")
    ]
    with pytest.raises(UserError, match="counts down"):
        expand_braces("{3..1}.tar")


def test_a_split_ends_where_a_shards_name_goes_on_with_another_character(tmp_path):
    whole = write_shards(tmp_path / "whole", 1).joinpath("train-000000.tar").read_bytes()
    for name in (
        "train-0.tar",
        "train.1.tar",
        "train.tar",
        "train_extra-0.tar",
        "training.tar",
        "train2.tar",
        "a+b-0.tar",
        "aab-0.tar",
    ):
        (tmp_path / name).write_bytes(whole)
    (tmp_path / ".train-0.tar").write_bytes(b"hidden")
    for split, expected in (
        ("train", ["train-0.tar", "train.1.tar", "train.tar"]),
        ("train_extra", ["train_extra-0.tar"]),
        ("a+b", ["a+b-0.tar"]),
    ):
        assert [shard.name for shard in opened(tmp_path, "tar", split=split).shards] == expected
    assert len(opened(tmp_path, "tar").shards) == 8
    with pytest.raises(
        UserError, match=r"data\.split: no trai\*\.tar in .* \(\* begins with no letter, digit or _\)"
    ):
        opened(tmp_path, "tar", split="trai")


def test_members_left_out_for_a_dot_are_counted_once(tmp_path):
    for shard in range(2):
        members = [
            ("plain.jpg", b"x"),
            (f"d/my.photo{shard}.jpg", b"x"),
            ("d/my.other.PNG", b"x"),
            ("d/my.txt", b"x"),
        ]
        write_tar(tmp_path / f"{shard}.tar", members)
    with pytest.warns(
        UserWarning, match=r"data\.root: 4 members are left out, the first is 0\.tar: d/my\.photo0\.jpg"
    ) as said:
        assert names(opened(tmp_path)) == ["0.tar: plain.jpg", "1.tar: plain.jpg"]
    assert len(said) == 1


def test_a_damaged_shard_is_named_with_the_byte(tmp_path):
    whole = write_shards(tmp_path / "whole", 1).joinpath("train-000000.tar").read_bytes()
    with tarfile.open(tmp_path / "whole" / "train-000000.tar") as archive:
        headers = [member.offset for member in archive.getmembers()]
    path = tmp_path / "train-000000.tar"
    for cut in (headers[4] + 512 + 100, headers[5] + 200, headers[-1] + 512 + 1, 100):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf"{path}.* at byte \d+|{path} is cut off or no tar file"):
            scan_shard(path)
    path.write_bytes(whole[: headers[6]] + b"\1" * 512 + whole[headers[6] + 512 :])
    with pytest.raises(UserError, match=rf"{path} is damaged at byte {headers[6]}"):
        scan_shard(path)
    path.write_bytes(whole[: headers[6]])  # without the two empty blocks at its end, as some tools leave it
    assert len(scan_shard(path)[0]) == 2
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match="no tar file"):
        scan_shard(path)
    write_tar(path, [("a.cls", b"1")])
    with pytest.raises(UserError, match="no image .*KEY"):
        opened(path)
    for name in ("x.tar.gz", "x.tgz"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
        with pytest.raises(UserError, match="compressed; unpack"):
            opened(tmp_path / name)


def test_a_shard_that_shrinks_or_goes_is_broken_images(tmp_path):
    write_shards(tmp_path, 2)
    source = opened(tmp_path)
    os.truncate(tmp_path / "train-000000.tar", 512 * 4)
    (tmp_path / "train-000001.tar").unlink()
    for index, reason in [(3, "shorter"), (4, "No such file")]:
        with pytest.raises(BrokenImage, match=reason):
            source.read(index)


# All of them


def test_bad_roots_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for kind in ("folder", "coco", "tar", "parquet"):
        with pytest.raises(UserError, match=r"data\.(root|split): .*(none|empty)"):
            opened(tmp_path / "none", kind, split="train" if kind == "coco" else "")
        with pytest.raises(UserError, match=r"data\.(root|split): .*empty"):
            opened(tmp_path / "empty", kind, split="train" if kind == "coco" else "")
    with pytest.raises(UserError, match=r"data\.root: no images are given"):
        open_source(load_config(None, []).data)


def test_handles_keep_the_last_used():
    handles, log = Handles(2), []
    for key in "abacab":
        assert handles.get(key, lambda key=key: log.append(key) or key.upper()) == key.upper()
    assert log == ["a", "b", "c", "b"]
    assert pickle.loads(pickle.dumps(handles)).size == 2


def test_what_a_listing_leaves_out_is_counted_and_named(tmp_path, capsys):
    files(tmp_path, "a/y.TIF", "b/z.tiff", "c.jpg", "a/d.gif", "e.gif", "notes", ".hidden.gif", "f\n.heic")
    assert names(opened(tmp_path)) == ["a/y.TIF", "b/z.tiff", "c.jpg"]
    told = "left out, no images by their names: 2 .gif, 1 .heic, 1 no suffix in "
    assert capsys.readouterr().err == f"{told}{tmp_path}, the first a/d.gif\n"


def test_links_that_point_at_each_other(tmp_path):
    """As files and as folders; each real folder is listed once."""
    files(tmp_path, "a/x.jpg", "b/y.jpg")
    for name, target in (("l", "m"), ("m", "l"), ("l.jpg", "m.jpg"), ("m.jpg", "l.jpg")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "a" / "to").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "too").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "too").symlink_to(tmp_path / "a")
    found = {Path(name).name for name in names(opened(tmp_path))}
    assert found == {"x.jpg", "y.jpg", "l.jpg", "m.jpg"}  # the last two count as broken when they are read
    assert kind_of(str(tmp_path)) == "folder"
    assert {Path(file).name for file in by_stem(tmp_path).values()} == found
    assert len(listed([tmp_path], tmp_path / "out")) == 4
