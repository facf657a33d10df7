"""What a comparison of starts over shares of the labels shows: its table, and the one sentence that it allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t

from pretrain.results.tables import NONE, Line, Table

CONFIDENCE = 0.95
Scores = Mapping[tuple[str, float], Mapping[int, float]]  # {(start, share): {seed: box AP in percent}}


@dataclass(frozen=True)
class Gain:
    """The paired difference of two starts at a share of the labels: mean and confidence interval over seeds."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def gain(one: Mapping[int, float], other: Mapping[int, float]) -> Gain | None:
    """Of two starts' scores by seed, seed by seed (Student's t); of one common seed without an interval; None: of none."""
    pairs = [one[seed] - other[seed] for seed in one if seed in other]
    if not pairs:
        return None
    n, mean = len(pairs), fmean(pairs)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(pairs) / n**0.5 if n > 1 else float("inf")
    return Gain(mean, mean - half, mean + half, n)


def sentence(scores: Scores, starts: Sequence[str], shares: Mapping[float, int], own: str) -> str:
    """What the numbers allow to say of ``own`` against the best of the other starts at each share.

    Args:
        starts: their names.
        shares: {share of the labels: number of images}.
        own: the start in question.
    """
    told = []
    for share, n_images in shares.items():
        mine = scores.get((own, share), {})
        others = [
            (fmean(by.values()), name) for name in starts if name != own and (by := scores.get((name, share)))
        ]
        if not mine or not others:
            continue
        _, best = max(others)
        found = gain(mine, scores[best, share])
        where = f"with {share:.0%} of the labels ({n_images} images)"
        if found is None:
            continue
        if found.n == 1:
            told.append(
                f"{where} {own} has {found.mean:+.1f} box AP against {best}, of one seed, which says nothing of chance"
            )
            continue
        spread = f"{found.mean:+.1f} box AP, {CONFIDENCE:.0%} interval {found.low:+.1f} to {found.high:+.1f}, {found.n} seeds"
        if found.is_shown:
            told.append(f"{where} {own} is {'better' if found.mean > 0 else 'worse'} than {best} ({spread})")
        else:
            told.append(f"{where} no difference from {best} is shown ({spread})")
    text = "; ".join(told)
    return f"{text[0].upper()}{text[1:]}." if text else f"No run of {own} and another start has ended yet."


def worth_table(scores: Scores, starts: Sequence[str], shares: Mapping[float, int], note: str) -> Table:
    """A row a start, a column a share: mean and sample standard deviation of the box AP over seeds.

    Args:
        shares: {share of the labels: number of images}.
        note: what the numbers allow to say.
    """
    columns = ["start", *(f"{share:.0%} ({n} images)" for share, n in shares.items())]
    lines, records = [], []
    for start in starts:
        cells = [start]
        for share, n_images in shares.items():
            found = list(scores.get((start, share), {}).values())
            spread = f" ± {stdev(found):.1f} (n={len(found)})" if len(found) > 1 else ""
            cells.append(f"{fmean(found):.1f}{spread}" if found else NONE)
            for seed, box_ap in scores.get((start, share), {}).items():
                own = {"start": start, "share": f"{share:g}", "images": str(n_images)}
                records.append({**own, "seed": str(seed), "box_ap": repr(box_ap)})
        lines.append(Line("plain", False, tuple(cells)))  # nothing published to stand out from
    numeric = range(1, len(columns))
    return Table.of(
        "Box AP in percent by start and share of the labels", columns, [lines], [note], numeric, records
    )
