"""Published numbers, and beside them what the given runs measured.

    python tools/make_table.py RUNS... --format md|csv|latex|html [--layout list|paper] [--tables 1,2,3,4,5,7] [--output FILE]

RUNS are run folders, result.json files, or folders above them. Without any, the published numbers alone. The layout "list" has a
row for each method and source. "paper" is that of the paper's tables: mean over seeds, standard deviation and difference beside the
published number. A pre-training's own result among RUNS says which row its fine-tunings belong to; else their method's name does.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else tools/pretrain.py shadows the package

import argparse

from pretrain.cli import run
from pretrain.results.paper import paper_tables
from pretrain.results.render import FORMATS, render_all
from pretrain.results.report import page
from pretrain.results.runs import find_results
from pretrain.results.schema import read_result
from pretrain.results.tables import comparison_table, pretraining_table, segmentation_table


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUNS")
    parser.add_argument("--format", choices=FORMATS, default="md")
    parser.add_argument("--layout", choices=("list", "paper"), default="list")
    parser.add_argument("--tables", help='published tables: a comma list such as "1,2,7", or "all" (list: 1; paper: all)')
    parser.add_argument("--output", type=Path, help="file to write; standard output when left out")
    options = parser.parse_args(arguments)

    results = [read_result(path) for path in find_results(options.runs)]
    if options.layout == "paper":
        tables = paper_tables(results, options.tables or "all")
    else:
        tables = [comparison_table(results, table=options.tables or "1")]
    further = [table for table in (segmentation_table(results), pretraining_table(results)) if table is not None]
    if options.format == "csv" and further:  # one table a file: their columns differ
        print(f"left out of csv: {', '.join(table.title for table in further)}", file=sys.stderr)
        further = []
    text = render_all([*tables, *further], options.format)
    if options.format == "html":
        text = page("Tables", {"Results": text})
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)
