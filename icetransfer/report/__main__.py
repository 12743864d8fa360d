"""The report of a sweep: the answer, the gap, every WER and CER, what it cost, what is missing.

    python -m icetransfer.report --results results/mini
    python -m icetransfer.report --results results/mini --publish RESULTS.md

Reads the sweep's plan.json and the wer.json files of its cells; writes report.html (one page, to be
opened anywhere), report.md with figures/, and the data beside it: results.csv, report.json,
gap.json, gap.md and a plot.  Everything in the pages is made of report.json alone, so a published
copy can be checked against its data (`tests/unit/report/test_results.py`).
"""

from pathlib import Path

from icetransfer import experiment
from icetransfer.report.terminal import show
from icetransfer.report.write import publish, write_report
from icetransfer.stage.command import command_parser


def _main() -> None:
    parser = command_parser(__doc__, "docs/statistics.md")
    parser.add_argument("--results", type=Path, required=True, help="as results/mini")
    parser.add_argument(
        "--publish", type=Path, metavar="FILE.md", help="also write this file, and its data beside"
    )
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[2]

    def run() -> None:
        show(write_report(args.results, root), args.results)
        if args.publish:
            publish(args.results, args.publish)
            print(f"published: {args.publish}")

    experiment.main(run)


if __name__ == "__main__":
    _main()
