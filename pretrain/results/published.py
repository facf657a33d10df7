"""Published numbers as data: the paper's tables (`published_results.csv`) and dense evaluations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pretrain.errors import UserError
from pretrain.files import read_csv

HERE = Path(__file__).parent
NUMBERS = ("effective_epochs", "box_ap", "mask_ap", "ade20k_miou")


@dataclass(frozen=True)
class PublishedRow:
    """One row of the paper's table `table` ("1", "4a", ...). AP and mIoU in percent; None: not printed.

    All rows are 12-epoch COCO fine-tuning but Table 2's (50 epochs); mIoU is ADE20K with a linear decoder.

    recipe     our pre-training recipe of the row; "" where there is none (the public files).
    changes    the ablation that makes the row from its recipe (`pretrain/recipes/ablation`); "": none.
    names      under which a run may report the row, beside `method`.
    registers  of the backbone, where its label does not tell them.
    """

    table: str
    method: str
    backbone: str
    effective_epochs: float | None
    box_ap: float | None
    mask_ap: float | None
    ade20k_miou: float | None
    note: str
    recipe: str = ""
    changes: str = ""
    names: tuple[str, ...] = ()
    registers: int = 0

    @property
    def scores(self) -> dict[str, float | None]:
        """By the names of the csv."""
        return {name: getattr(self, name) for name in NUMBERS[1:]}

    @property
    def labels(self) -> dict[str, str]:
        """Of a csv. The protocols are the paper's own schedules (appendix B): our protocols are a reading of them."""
        detection = f"{50 if self.table == '2' else 12} epochs" if self.box_ap is not None else ""
        segmentation = "160k iterations" if self.ade20k_miou is not None else ""
        return {"table": self.table, "detection_protocol": detection, "segmentation_protocol": segmentation}

    @property
    def about(self) -> str:
        """The note of a table."""
        return f"Table {self.table}" + (f": {self.note}" if self.note else "")


@dataclass(frozen=True)
class PublishedDense:
    """What a method's authors, or those who compared it, report of its frozen features on one labeled set.

    scores  {metric, named as in a `result.json` of the kind "dense": percent}, those that were published.
            In-context mIoU is that of the public Hummingbird evaluation, which matches classes (Hungarian)
            before it counts.
    """

    set: str
    method: str
    backbone: str
    scores: Mapping[str, float]
    note: str
    effective_epochs: ClassVar[float | None] = None

    @property
    def labels(self) -> dict[str, str]:
        """Of a csv."""
        return {"set": self.set, "protocol": ""}

    @property
    def about(self) -> str:
        """The note of a table."""
        return self.note


def published_dense() -> list[PublishedDense]:
    """Every row of `published_dense.csv`, in its order; its further columns are metrics."""
    rows = []
    for row in read_csv(HERE / "published_dense.csv"):
        words = {key: row.pop(key) for key in ("set", "method", "backbone", "note")}
        scores = {name: float(text) for name, text in row.items() if text}
        rows.append(PublishedDense(**words, scores=scores))
    return rows


def published_rows() -> list[PublishedRow]:
    """Every row of `published_results.csv`, in its order."""
    rows = []
    for row in read_csv(HERE / "published_results.csv"):
        typed: dict[str, Any] = {key: float(row[key]) if row[key] else None for key in NUMBERS}
        typed["names"] = tuple(name.strip() for name in row["names"].split(";") if name)
        rows.append(PublishedRow(**{**row, **typed, "registers": int(row["registers"] or 0)}))
    return rows


def rows_of_tables(rows: list[PublishedRow], tables: str) -> list[PublishedRow]:
    """The rows of some tables ("1,2,7"; "4" means 4a and 4b) or "all". UserError names an unknown one."""
    if tables == "all":
        return list(rows)
    wanted = [name.strip() for name in tables.split(",")]
    known = sorted({row.table for row in rows})
    for name in wanted:
        if name not in {t for table in known for t in (table, table.rstrip("abc"))}:
            raise UserError(f"no published table {name!r}: there are {', '.join(known)}, or all")
    return [row for row in rows if row.table in wanted or row.table.rstrip("abc") in wanted]
