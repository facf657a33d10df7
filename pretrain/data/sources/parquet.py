"""Images in a column of parquet files.

A row group is read whole (of the image column) to reach one of its rows, and the last two stay in memory in each process. In
the random order of a training that is one row group an image: slow where they are large (Hugging Face writes 100 to 1,000
rows). Such data goes faster as tar shards, or as the folder that ``save_to_disk`` of ``datasets`` leaves.
"""

from functools import partial
from typing import Any

import numpy as np

from pretrain.data.decode import BrokenImage
from pretrain.data.sources.columns import image_bytes, image_column, pyarrow
from pretrain.data.sources.files import whole_files
from pretrain.data.sources.handles import Handles
from pretrain.errors import UserError

MAX_OPEN = 16  # files a process
MAX_GROUPS = 2  # row groups a process


class ParquetSource:
    """The rows of all files, by file name.

    Args:
        root: a .parquet file, a folder of them, or a pattern such as ``train-*.parquet``.
        split: a sub-folder of the folder, or what the names of its files start with.
        column: the column of the images; "": the only one of such a type.

    Raises:
        UserError: no file, a damaged one, no or several image columns, no row, or no pyarrow.
    """

    def __init__(self, root: str, split: str = "", column: str = "") -> None:
        pa, pq = pyarrow("parquet")
        self.files = whole_files(root, split, ".parquet")
        groups: list[tuple[int, int, int]] = []
        for k, path in enumerate(self.files):
            try:
                with pq.ParquetFile(path) as file:
                    self.column = column = image_column(file.schema_arrow, column, path)
                    rows = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"data.root: cannot read {path}: {str(error).splitlines()[0]}") from error
            groups += [(k, g, n) for g, n in enumerate(rows)]
        self.groups = np.array(groups, np.int64).reshape(-1, 3)  # file, row group in it, rows
        self.ends = np.cumsum(self.groups[:, 2])  # rows up to and with each group
        if not len(self):
            raise UserError(f"data.root: no row in {root}")
        self._open: Handles[Any] = Handles(MAX_OPEN)
        self._read: Handles[Any] = Handles(MAX_GROUPS)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def _place(self, index: int) -> tuple[int, int, int]:
        """File, row group in it, row in the group."""
        at = int(np.searchsorted(self.ends, index, side="right"))
        file, group, rows = self.groups[at].tolist()
        return file, group, index - (int(self.ends[at]) - rows)

    def name(self, index: int) -> str:
        """As ``train-00000-of-00002.parquet: row group 3, row 17``, both from 0."""
        file, group, row = self._place(index)
        return f"{self.files[file].name}: row group {group}, row {row}"

    def read(self, index: int) -> bytes:
        """The encoded image of a row; raises BrokenImage."""
        pa, _ = pyarrow("parquet")
        file, group, row = self._place(index)
        try:
            column = self._read.get((file, group), partial(self._read_group, file, group))
        except (pa.ArrowException, OSError) as error:
            raise BrokenImage(f"row group {group} cannot be read: {str(error).splitlines()[0]}") from error
        return image_bytes(column[row], self.files[file].parent)

    def _read_group(self, file: int, group: int) -> Any:
        """The image column of a row group, as ``pyarrow.ChunkedArray``."""
        _, pq = pyarrow("parquet")
        opened = self._open.get(file, partial(pq.ParquetFile, self.files[file]))
        return opened.read_row_group(group, columns=[self.column], use_threads=False)[self.column]
