"""Shows runs in the browser: ``python -m reopold_agent.view RUN [RUN2]``.

Serves a local page about a training run or an evaluation: curves, episodes with their pictures and
crop boxes, each token by reward, mask or entropy. A run that is still going is followed; two runs
are shown side by side. ``--export`` writes the page to one HTML file instead.
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

from reopold_agent.cli.hydra import report_errors
from reopold_agent.errors import ConfigError
from reopold_agent.view.export import DEFAULT_LIMIT, export_page
from reopold_agent.view.run import Run
from reopold_agent.view.server import HOST, PORT, ViewerServer


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, which serves until Ctrl-C, and returns its exit status."""
    options = _parser().parse_args(argv)
    with report_errors():
        if len(options.runs) > 2:
            raise ConfigError("more than two runs cannot be shown. Give one, or two to compare.")
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
    parser.add_argument("--export", type=Path, metavar="FILE", help="write one HTML file and exit")
    parser.add_argument(
        "--limit",
        type=int,
        default=DEFAULT_LIMIT,
        help="episodes of a run in the exported file (%(default)s)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=PORT,
        help="%(default)s or the next free port; 0: any free port",
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    return parser


def _serve(runs: Sequence[Run], port: int, *, browser: bool) -> None:
    with ViewerServer(runs, port) as server:
        print(f"{' and '.join(str(run.folder) for run in runs)}\n{server.url}  (Ctrl-C stops)")
        remote = "SSH_CONNECTION" in os.environ
        if remote:
            used = server.server_address[1]
            there = f"{getpass.getuser()}@{socket.gethostname()}"
            print(f"First run on your own machine:\n  ssh -N -L {used}:{HOST}:{used} {there}")
        sys.stdout.flush()
        if browser and not remote:
            webbrowser.open(server.url)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    sys.exit(main())
