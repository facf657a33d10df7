"""Images in a column of parquet files.

To reach a row, the image column of its whole row group is read; each process keeps the last two groups. In
the random order of training that is one row group for each image, which is slow if they are large (Hugging
Face writes 100 to 1,000 rows). Tar shards, or the folder that ``save_to_disk`` of ``datasets`` writes, are
faster.
"""

from functools import partial
from typing import Any

from pretrain.data.decode import BrokenImage
from pretrain.data.sources.columns import Rows, image_bytes, image_column, pyarrow
from pretrain.data.sources.files import whole_files
from pretrain.data.sources.handles import Handles
from pretrain.errors import UserError

MAX_OPEN = 16  # files a process
MAX_GROUPS = 2  # row groups a process


class ParquetSource(Rows):
    """The rows of all files, by file name.

    Args:
        root: a .parquet file, a folder of them, or a pattern such as ``train-*.parquet``.
        split: a sub-folder, or the start of the files' names.
        column: the column of the images; "": the only one of this type.

    Raises:
        UserError: a file is missing or damaged; there is no image column, or several; there is no row;
            pyarrow is missing.
    """

    def __init__(self, root: str, split: str = "", column: str = "") -> None:
        pa, pq = pyarrow("parquet")
        self.files = whole_files(root, split, ".parquet")
        self.groups: list[tuple[int, int]] = []  # file, row group in it
        sizes: list[int] = []
        for k, path in enumerate(self.files):
            try:
                with pq.ParquetFile(path) as file:
                    self.column = column = image_column(file.schema_arrow, column, path)
                    groups = range(file.metadata.num_row_groups)
                    sizes += [file.metadata.row_group(group).num_rows for group in groups]
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"data.root: cannot read {path}: {str(error).splitlines()[0]}") from error
            self.groups += [(k, group) for group in groups]
        super().__init__(root, sizes)
        self._open: Handles[Any] = Handles(MAX_OPEN)
        self._read: Handles[Any] = Handles(MAX_GROUPS)

    def name(self, index: int) -> str:
        """Such as ``train-00000-of-00002.parquet: row group 3, row 17``, counted from 0."""
        part, row = self.place(index)
        file, group = self.groups[part]
        return f"{self.files[file].name}: row group {group}, row {row}"

    def read(self, index: int) -> bytes:
        """The encoded image of a row; raises BrokenImage."""
        pa, _ = pyarrow("parquet")
        part, row = self.place(index)
        file, group = self.groups[part]
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
