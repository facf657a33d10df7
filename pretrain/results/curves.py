"""Curves of logged terms as inline SVG: a small panel for each, the runs overlaid on one scale of iterations.

Text and axes take the color of the page (`currentColor`), so that a panel reads on light and dark alike.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.results.runs import Log
from pretrain.results.schema import Result, ordered_terms

SCORES = ("box_ap", "mask_ap", "miou", "lr")  # after the losses
MOST_POINTS = 300
_INK = "#010203"  # stands for currentColor until the SVG is written
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
# Each as far from those before it as can be, for ordinary eyes and for those without one kind of cones (CIE Lab), among
# the colors that stand out from a white page and from a dark one (contrast 3 and more)
COLORS = ("#3380cc", "#e67300", "#99594d", "#b33380", "#664dd9", "#cc1a1a", "#d97399", "#b38c59")
_DASHES = {"solid": "-", "dashed": "--", "dotted": ":"}


@dataclass(frozen=True)
class Curve:
    """One run in a figure: its result, name, log, color, and dash as CSS calls it ("solid", ...)."""

    result: Result
    name: str
    log: Log
    color: str
    dash: str


def style_of(method: str, methods: Sequence[str], nth: int) -> tuple[str, str]:
    """Color and dash: the color tells the method, the same in every figure; the dash tells its nth run."""
    return COLORS[methods.index(method) % len(COLORS)], list(_DASHES)[nth % len(_DASHES)]


def terms_of(curves: Sequence[Curve]) -> tuple[list[str], list[str]]:
    """The terms to show, and the others (times, memory, ...) in alphabetical order.

    Shown are the runs' losses as they name them, :data:`SCORES`, every term with "loss" in its name, the
    probes, and those of evaluations (ap, top1, ...).
    """
    present = {term for curve in curves for terms in curve.log.values() for term in terms}
    losses = ordered_terms([curve.result for curve in curves], present)
    first = [*losses, *(term for term in SCORES if term in present and term not in losses)]
    rest = sorted(present - set(first))
    scores = re.compile(r"loss|^probe/|(^|[_/])(ap|ap50|ap75|acc|top1|miou|knn)($|[_/])", re.I)
    shown = [term for term in rest if scores.search(term)]
    return first + shown, [term for term in rest if term not in shown]


def panel(term: str, curves: Sequence[Curve], name: str) -> str:
    """One term against the iteration, as an <svg> element whose ids begin with `name` (unique in the page).

    A curve of more than :data:`MOST_POINTS` values is drawn as means over equal numbers of neighbors, with
    their smallest and largest value as a band.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name}
    settings |= {"font.size": 9, "font.family": "sans-serif"}
    settings |= dict.fromkeys(_INKED, _INK)
    with rc_context(settings):
        figure = Figure(figsize=(4.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            points = [(iteration, terms[term]) for iteration, terms in curve.log.items() if term in terms]
            if points:
                x, mean, low, high = _thinned(points)
                axes.plot(x, mean, _DASHES[curve.dash], color=curve.color, linewidth=1.6)
                if len(x) < 10:
                    axes.plot(x, mean, "o", color=curve.color, markersize=3.5, clip_on=False)
                axes.fill_between(x, low, high, color=curve.color, alpha=0.18, linewidth=0)
        last = max((iteration for curve in curves for iteration in curve.log), default=0)
        axes.set_xlim(0, max(last, 1))
        axes.set_title(term, loc="left", fontsize=10, fontweight="bold", parse_math=False)
        axes.set_xlabel("iteration")
        axes.ticklabel_format(axis="y", scilimits=(-2, 4))
        axes.grid(color=_INK, alpha=0.15, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        absent = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=absent)
    return _inline(file.getvalue(), name)


def _thinned(points: list[tuple[int, float]]) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, mean, minimum and maximum of at most MOST_POINTS groups of neighboring points."""
    size = -(-len(points) // MOST_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    values = [[value for _, value in part] for part in parts]
    x = [sum(iteration for iteration, _ in part) / len(part) for part in parts]
    return x, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _inline(svg: str, name: str) -> str:
    """An SVG file as an element of a page: no prolog, no namespaces, ids that no other panel has."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace(_INK, "currentColor")
