"""One self-contained html page of the given runs: scores and tables, pictures side by side, curves, figures, hardware,
versions and hashes.

    posfield report RUNS... --output report.html [--title TITLE] [--layout list|paper|dense] [--tables 1]

RUNS are run folders, result.json files, or folders above them. A run folder holds result.json and,
optionally, metrics.jsonl, probes.jsonl and figures/*.png with figures/captions.json. What cannot be read is
left out and named; the exit code is 2 then.
"""

from pathlib import Path

from pretrain.cli import command_parser
from pretrain.files import write_text
from pretrain.results.report import LAYOUTS, build_report
from pretrain.results.runs import read_all, read_run, tell_left_out


def main(arguments: list[str]) -> None:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUNS")
    add("--output", type=Path, required=True)
    add("--title", default="Results")
    add("--layout", choices=LAYOUTS, default="list", help="of the tables: see posfield table")
    add("--tables", default="", help='published ones to show too: "1,2,7", "all", ... (none)')
    add("--against", default="", metavar="METHOD", help="see posfield table")
    options = parser.parse_args(arguments)

    runs, left = read_all(options.runs, read_run)
    left += [line for run in runs for line in run.left_out]
    asked = options.title, options.tables, options.layout, options.against
    write_text(options.output, build_report(runs, *asked, n_left_out=len(left)))
    print(f"{options.output}: {len(runs)} runs")
    tell_left_out(left, len(runs))
