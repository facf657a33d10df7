"""One self-contained html page of the given runs: summary, curves, tables, figures, hashes.

    posfield report RUNS... --output report.html [--title TITLE] [--layout list|paper|dense] [--tables 1]

RUNS are run folders, result.json files, or folders above them. A run folder holds result.json and,
optionally, metrics.jsonl, probes.jsonl and figures/*.png with figures/captions.json.
"""

import argparse
from pathlib import Path

from pretrain.files import write_text
from pretrain.results.report import LAYOUTS, build_report
from pretrain.results.runs import find_results, read_run


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--title", default="Results")
    parser.add_argument("--layout", choices=LAYOUTS, default="list", help="of the tables: see make_table.py")
    tables = 'published tables: a comma list such as "1,2,7", or "all"; 1 when left out'
    parser.add_argument("--tables", default="", help=tables)
    parser.add_argument("--against", default="", metavar="METHOD", help="see make_table.py")
    options = parser.parse_args(arguments)

    runs = [read_run(path) for path in find_results(options.runs)]
    page = build_report(runs, options.title, options.tables, options.layout, options.against)
    write_text(options.output, page)
    print(f"{options.output}: {len(runs)} runs")
