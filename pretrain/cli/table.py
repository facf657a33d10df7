"""Published numbers, and beside them what the given runs measured.

    posfield table RUNS... --format md|csv|latex|html [--layout list|paper|dense] [--tables 1,2,3,4,5,7]
        [--output FILE]
    posfield table RUNS... --against dinov2r

RUNS are run folders, result.json files, or folders above them. Without any, the published numbers alone. The
layout "list" has a row for each method and source. "paper" is that of the paper's tables: mean over seeds,
standard deviation and difference beside the published number. A pre-training's own result among RUNS says
which row its fine-tunings belong to; else their method's name does. Dense evaluations have a table of their
own, set by set, alone where nothing else was measured or first with the layout "dense". A result that cannot be
read is left out and named; the exit code is 2 then.
"""

import sys
from pathlib import Path

from pretrain.cli import command_parser
from pretrain.files import write_text
from pretrain.results.pages import page
from pretrain.results.render import FORMATS, render_all
from pretrain.results.report import LAYOUTS, tables_of
from pretrain.results.runs import read_all, tell_left_out
from pretrain.results.schema import read_result


def main(arguments: list[str]) -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUNS")
    add("--format", choices=FORMATS, default="md")
    add("--layout", choices=LAYOUTS, default="list")
    add("--tables", default="", help='published ones: "1,2,7", ... or "all" (list: 1; paper: all)')
    against = "dense: differences to this one, before a post-training"
    add("--against", default="", metavar="METHOD", help=against)
    add("--output", type=Path, help="file to write; standard output when left out")
    options = parser.parse_args(arguments)

    results, left = read_all(options.runs, read_result)
    tables = tables_of(results, options.layout, options.tables, options.against)
    if options.format == "csv":  # one table a file: their columns differ
        written, *others = [table for table in tables if table.records]
        left_out = [table.title for table in others if table.records[0].keys() != written.records[0].keys()]
        if left_out:
            print(f"left out of csv: {', '.join(left_out)}", file=sys.stderr)
    text = render_all(tables, options.format)
    if options.format == "html":
        text = page("Tables", {"Results": text})
    if options.output is None:
        sys.stdout.write(text)
    else:
        write_text(options.output, text)
    tell_left_out(left, len(results))
