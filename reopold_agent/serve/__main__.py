"""Serves a model to training runs on other machines: ``python -m reopold_agent.serve model=DIR``.

A training run uses it with ``policy=server`` (docs/server.md). ``--help`` lists settings.
"""

from __future__ import annotations

import ipaddress
import signal
import sys

from omegaconf import DictConfig

from reopold_agent.cli.hydra import plain_values, run_hydra
from reopold_agent.config import build
from reopold_agent.serve.serving import ServeConfig, serving


def run(composed: DictConfig) -> None:
    """Serves until the process is asked to end."""
    config = build(ServeConfig, plain_values(composed))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with serving(config) as server:
        host, port = str(server.server_address[0]), server.server_address[1]
        guarded = "a token is needed" if server.token else "no token is needed"
        print(
            f"serving {config.checkpoint} ({server.served.policy}) at http://{host}:{port} "
            f"({guarded})",
            flush=True,
        )
        if not server.token and not _is_loopback(host):
            print(
                f"warning: anyone who can reach {host}:{port} can use this model; set a token in "
                f"{config.token_env or 'a variable and name it with token_env'}",
                file=sys.stderr,
                flush=True,
            )
        server.serve_forever()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main() -> None:
    """Runs the command. ``model=`` names a checkpoint here, not Hydra's group as in training."""
    sys.argv = [
        f"checkpoint={word.removeprefix('model=')}" if word.startswith("model=") else word
        for word in sys.argv
    ]
    run_hydra(run, "serve", sys.argv[1:], "\nStopped.")


if __name__ == "__main__":
    main()
