"""The comparison table: published rows, and beside them what the given runs measured.

    python tools/make_table.py RUNS... --format md|csv|latex|html [--tables 1] [--output FILE]

RUNS are run folders, result.json files, or folders above them. Without any, the published rows alone.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # else tools/pretrain.py shadows the package

import argparse

from pretrain.cli import run
from pretrain.results.render import FORMATS, render
from pretrain.results.runs import find_results
from pretrain.results.schema import read_result
from pretrain.results.tables import comparison_table, pretraining_table, segmentation_table


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUNS")
    parser.add_argument("--format", choices=FORMATS, default="md")
    parser.add_argument("--tables", default="1", help='published tables: a comma list such as "1,2,7", or "all"')
    parser.add_argument("--output", type=Path, help="file to write; standard output when left out")
    options = parser.parse_args(arguments)

    results = [read_result(path) for path in find_results(options.runs)]
    tables = [comparison_table(results, table=options.tables), segmentation_table(results), pretraining_table(results)]
    first, *further = [table for table in tables if table is not None]
    if options.format == "csv" and further:  # one table a file: their columns differ
        print(f"left out of csv: {', '.join(table.title for table in further)}", file=sys.stderr)
        further = []
    text = "\n".join(render(table, options.format) for table in (first, *further))
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run(main)
