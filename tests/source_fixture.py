"""Image sources of every layout, small and made by hand."""

import io
import tarfile

from pretrain.data.sources import DataSettings, open_source


def opened(root, source="auto", split="", column=""):
    return open_source(DataSettings(root=str(root), source=source, split=split, image_column=column))


def contents(source):
    return [source.read(i) for i in range(len(source))]


def names(source):
    return [source.name(i) for i in range(len(source))]


def files(folder, *paths):
    """Files that hold their own relative path."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(path.encode())
    return folder


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_shards(folder, n_shards=3, n=4):
    for shard in range(n_shards):
        members = []
        for i in range(n):
            key = f"n{shard}/{i:03}"
            members += [
                (f"{key}.cls", b"7"),
                (f"{key}.JPEG" if i % 2 else f"{key}.jpg", f"{shard}-{i}".encode() * 300),
            ]
            members += [(f"{key}.json", b"{}")]
        write_tar(folder / f"train-{shard:06}.tar", members)
    return folder
