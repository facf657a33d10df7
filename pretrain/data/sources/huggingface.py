"""A data set that Hugging Face's ``datasets`` wrote with ``save_to_disk``, read with pyarrow alone.

The arrow files are mapped into memory, so that one row is read without its neighbors: random order costs
nothing extra.
"""

from functools import partial
from pathlib import Path
from typing import Any

from pretrain.data.decode import BrokenImage
from pretrain.data.sources.columns import Rows, image_bytes, image_column, pyarrow
from pretrain.data.sources.handles import Handles
from pretrain.errors import UserError
from pretrain.json_file import read_json

MAX_OPEN = 256  # files a process; an open one costs a mapping and no memory


class HuggingFaceSource(Rows):
    """The rows of a saved ``Dataset``, or of one split (several joined with ``+``) of a saved
    ``DatasetDict``, in their order.

    Args:
        root: the folder, with state.json or dataset_dict.json.
        split: required if a DatasetDict has several.
        column: the column of the images; "": the only one of this type.

    Raises:
        UserError: the folder or split does not exist; a file is missing or damaged; a selection of rows was
            not written out; there is no image column, or several; there is no row; pyarrow is missing.
    """

    def __init__(self, root: str, split: str = "", column: str = "") -> None:
        pa, _ = pyarrow("ipc")
        self.root = Path(root)
        self.files = [path for folder in _folders(self.root, split) for path in _data_files(folder)]
        sizes = []
        for path in self.files:
            try:
                table = _read_table(path)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"data.root: cannot read {path}: {str(error).splitlines()[0]}") from error
            self.column = column = image_column(table.schema, column, path)
            sizes.append(table.num_rows)
        super().__init__(root, sizes)
        self._open: Handles[Any] = Handles(MAX_OPEN)

    def name(self, index: int) -> str:
        """Such as ``train/data-00000-of-00002.arrow: row 17``, counted from 0."""
        file, row = self.place(index)
        return f"{self.files[file].relative_to(self.root)}: row {row}"

    def read(self, index: int) -> bytes:
        """The encoded image of a row; raises BrokenImage."""
        pa, _ = pyarrow("ipc")
        file, row = self.place(index)
        try:
            table = self._open.get(file, partial(_read_table, self.files[file]))
            return image_bytes(table[self.column][row], self.files[file].parent)
        except (pa.ArrowException, OSError) as error:
            raise BrokenImage(str(error).splitlines()[0]) from error


def _folders(root: Path, split: str) -> list[Path]:
    """The folders of the data sets: ``root``, or those of its splits."""
    if not (root / "dataset_dict.json").is_file():
        if not (root / "state.json").is_file():
            raise UserError(
                f"data.root: {root} holds neither state.json nor dataset_dict.json, so save_to_disk did not write it"
            )
        own = read_json(root / "state.json", "data.root").get("_split")
        if split and split != own:
            raise UserError(f"data.split={split}: {root} is the data set of one split, {own}")
        return [root]
    there = [str(name) for name in read_json(root / "dataset_dict.json", "data.root").get("splits", [])]
    wanted = split.split("+") if split else there
    if not set(wanted) <= set(there) or len(wanted) > 1 and not split:
        raise UserError(
            f"data.split={split}: {root} has the splits {', '.join(there) or '(none)'}; several are joined with +"
        )
    return [root / name for name in wanted]


def _data_files(folder: Path) -> list[Path]:
    """The arrow files of a data set, in their order."""
    state = read_json(folder / "state.json", "data.root")
    if state.get("_indices_data_files"):
        said = "holds a selection of rows (_indices_data_files), which is not applied here"
        raise UserError(f"data.root: {folder / 'state.json'} {said}: save it again with flatten_indices()")
    listed = state.get("_data_files")
    try:
        files = [folder / entry["filename"] for entry in listed]  # type: ignore[union-attr]
    except (TypeError, KeyError) as error:
        raise UserError(f"data.root: {folder / 'state.json'} does not say _data_files") from error
    for path in files:
        if not path.is_file():
            raise UserError(f"data.root: no file {path}, which {folder / 'state.json'} names")
    return files


def _read_table(path: Path) -> Any:
    """A ``pyarrow.Table`` over mapped memory; ``datasets`` writes the streaming format."""
    pa, ipc = pyarrow("ipc")
    return ipc.open_stream(pa.memory_map(str(path))).read_all()
