"""How the paper lays out its Tables 1, 2, 3, 4, 5 and 7: their columns, and what stands for the csv's
rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field

COCO, ADE20K = "coco-12ep", "ade20k-160k"  # the protocols of all tables but the second
SCORES = {"box_ap": "AP box", "mask_ap": "AP mask", "ade20k_miou": "mIoU"}


@dataclass(frozen=True)
class Layout:
    """One of the paper's tables.

    Attributes:
        title: what it shows.
        protocols: the fine-tunings whose scores it holds.
        keys: the columns that say what a row is.
        parts: (heading, table of the csv) of its groups of rows.
        cells: {method in the csv: what stands under ``keys``}; of any other, its name and its effective
            epochs.
        own_rows: whether measured rows without a published one stand in it.
    """

    title: str
    protocols: tuple[str, ...] = (COCO,)
    keys: tuple[str, ...] = ("Method", "Eff. Ep.")
    parts: tuple[tuple[str, str], ...] = ()
    cells: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    own_rows: bool = False

    @property
    def scores(self) -> dict[str, str]:
        """{name in the csv: column}."""
        return {
            name: head for name, head in SCORES.items() if name != "ade20k_miou" or ADE20K in self.protocols
        }


LAYOUTS = {
    "1": Layout("COCO and ADE20K", (COCO, ADE20K), parts=(("", "1"),), own_rows=True),
    "2": Layout("COCO after 50 epochs of fine-tuning", ("coco-50ep",), parts=(("", "2"),), own_rows=True),
    "3": Layout(
        "what the two parts bring",
        keys=("Pos. enc. sampling", "L_pos"),
        parts=(("", "3"),),
        cells={
            "no position sampling no L_pos": ("", ""),
            "position sampling": ("✓", ""),
            "L_pos": ("", "✓"),
            "position sampling + L_pos": ("✓", "✓"),
        },
    ),
    "4a": Layout(
        "distribution of s",
        keys=("Dist.",),
        parts=(("", "4a"),),
        cells={"s constant": ("Const.",), "s uniform": ("Uniform",), "s Beta(2,5)": ("Beta(2, 5)",)},
    ),
    "4b": Layout(
        "resolution of P",
        keys=("Pos. size",),
        parts=(("", "4b"),),
        cells={"P 19x19": ("19 × 19",), "P 50x50": ("50 × 50",)},
    ),
    "5a": Layout(
        "shape of the position masks",
        keys=("Pos. mask",),
        parts=(("", "5a"),),
        cells={"box-wise position mask": ("Box-wise",), "cross-wise position mask": ("Cross-wise",)},
    ),
    "5b": Layout(
        "share of the images with either mask",
        keys=("Content vs. pos.",),
        parts=(("", "5b"),),
        cells={
            "100% content": ("100% content masks",),
            "100% position": ("100% position masks",),
            "50% each": ("50% each",),
        },
    ),
    "7": Layout(
        "COCO and ADE20K, with the official DINOv2",
        (COCO, ADE20K),
        parts=(("", "1"), ("On 142M dataset", "7")),
        own_rows=True,
    ),
}
