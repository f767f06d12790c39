"""Looks at runs in the browser: ``python -m reopold_agent.view RUN [RUN2]``.

A local page over a training run or an evaluation: curves, episodes with their pictures and crop
boxes, each token by reward, mask or entropy; a run that is still going is followed. With a
second run both stand side by side. ``--export`` writes one HTML file to send instead.
"""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from reopold_agent.command import errors_for_people
from reopold_agent.errors import ConfigError
from reopold_agent.viewer.export import DEFAULT_LIMIT, export_page
from reopold_agent.viewer.run import Run
from reopold_agent.viewer.server import HOST, PORT, ViewerServer


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; serves until Ctrl-C."""
    options = _parser().parse_args(argv)
    with errors_for_people():
        if len(options.runs) > 2:
            raise ConfigError("one run, or two side by side, can be shown, not more.")
        if options.limit < 0:
            raise ConfigError("--limit must not be negative.")
        if not 0 <= options.port < 65536:
            raise ConfigError("--port must lie in 0 to 65535 (0: any free one).")
        runs = [Run(folder) for folder in options.runs]
        if options.export is not None:
            print(export_page(runs, options.export, limit=options.limit))
            return 0
        _serve(runs, options.port, browser=not options.no_browser)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m reopold_agent.view",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a training or an evaluation"
    )
    parser.add_argument("--export", type=Path, metavar="FILE", help="write one HTML file and end")
    parser.add_argument(
        "--limit",
        type=int,
        default=DEFAULT_LIMIT,
        help="episodes of a run in the exported file (%(default)s)",
    )
    parser.add_argument(
        "--port", type=int, default=PORT, help="%(default)s, or the next that is free; 0: any"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    return parser


def _serve(runs: Sequence[Run], port: int, *, browser: bool) -> None:
    with ViewerServer(runs, port) as server:
        print(f"{' and '.join(str(run.folder) for run in runs)}\n{server.url}  (Ctrl-C ends)")
        remote = "SSH_CONNECTION" in os.environ
        if remote:
            used = server.server_address[1]
            there = f"{getpass.getuser()}@{socket.gethostname()}"
            print(f"On your own machine first:\n  ssh -N -L {used}:{HOST}:{used} {there}")
        sys.stdout.flush()
        if browser and not remote:
            webbrowser.open(server.url)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    sys.exit(main())
