"""A page where bundles listen side by side: the browser's microphone, a file, or test speech.

    python -m icetransfer.serve --bundle egs/nl/exp/NAME/bundle
    python -m icetransfer.serve --bundle egs/nl/exp/EN/bundle --bundle egs/nl/exp/ML/bundle

A bundle is a folder that stage 11 makes, or an export of stage 8, or a folder with several tiers.
Each precision of each tier is a column of the page, and those that are chosen hear the same speech:
what each says as it comes, the delay of each word, the words that changed, and what it costs.

Only this machine can open the page, unless --host says otherwise.  Nothing that is said is kept.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from icetransfer.experiment import log, main
from icetransfer.serving.columns import find_columns
from icetransfer.serving.session import Limits
from icetransfer.serving.site import Site, is_everywhere, run_until_interrupted
from icetransfer.stage.command import command_parser

PORT = 8765


def _run(args: argparse.Namespace) -> None:
    columns = find_columns(args.bundle)
    for name in dict.fromkeys(column.bundle for column in columns):
        own = [column for column in columns if column.bundle == name]
        tiers = ", ".join(dict.fromkeys(column.tier for column in own))
        precisions = ", ".join(dict.fromkeys(column.precision for column in own))
        log.info("%s: %s; %s", name, tiers, precisions)
    site = Site(columns, args.host, Limits())
    is_local = args.host == "127.0.0.1" or is_everywhere(args.host)
    host = "localhost" if is_local else f"[{args.host}]" if ":" in args.host else args.host
    run_until_interrupted(site, host, args.port, args.threads)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is not a port: expected 1 to 65535, or 0 for any")
    return int(text)


def _main() -> None:
    parser = command_parser(__doc__, "docs/serve.md")
    parser.add_argument(
        "--bundle", type=Path, action="append", required=True, metavar="DIR",
        help="folder, or folder of tiers; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS",
        help="who may come: 0.0.0.0 for all that reach this machine (default: this machine only)",
    )  # fmt: skip
    parser.add_argument("--port", type=_port, default=PORT, help="default %(default)s")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, metavar="N",
        help="that decode (default: the processors)",
    )  # fmt: skip
    args = parser.parse_args()
    main(lambda: _run(args))


if __name__ == "__main__":
    _main()
