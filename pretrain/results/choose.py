"""Which tables the given results make."""

from collections.abc import Sequence

from pretrain.results.dense import dense_table
from pretrain.results.paper import paper_tables
from pretrain.results.schema import Result
from pretrain.results.tables import (
    Table,
    comparison_table,
    posttraining_table,
    pretraining_table,
    segmentation_table,
)

LAYOUTS = ("list", "paper", "dense")


def tables_of(
    results: Sequence[Result], layout: str = "list", published: str = "", against: str = ""
) -> list[Table]:
    """All tables that have something to show, the one that was asked for first.

    Args:
        layout: "list": a row for each method and source; "paper": the paper's tables; "dense": published and
            measured dense evaluations. Of dense results alone there is no other table, unless ``published``
            asks for it.
        published: the paper's tables to show ("1", "1,2,7" or "all"); "": list 1, paper all.
        against: of :func:`dense_table`.

    Raises:
        UserError: an unknown published table, or method to compare with.
    """
    kinds = {result.kind for result in results}
    dense = dense_table(results, against=against) if "dense" in kinds or layout == "dense" else None
    has_others = bool(kinds & {"detection", "segmentation"})
    comparisons: list[Table] = []
    if has_others or published or dense is None:
        if layout == "paper":
            comparisons = paper_tables(results, published or "all")
        elif layout == "list" or has_others:
            comparisons = [comparison_table(results, table=published or "1")]
    first = [dense, *comparisons] if layout == "dense" else [*comparisons, dense]
    tables = [*first, segmentation_table(results), posttraining_table(results), pretraining_table(results)]
    return [table for table in tables if table is not None]
