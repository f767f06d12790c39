"""Writes a run's student for other programs: ``python -m reopold_agent.train.export RUN DIR``.

DIR gets the whole model, with a LoRA adapter merged, tokenizer and picture processor; transformers,
vLLM and others load it. The files are compared with the student before they get their name.

settings:
  dtype=bfloat16   dtype of the weights: bfloat16 (default), float16 or float32
  push=ORG/NAME    also upload DIR to the hub; needs the extra `hub`, and `hf auth login`
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reopold_agent.cli.groups import check_once
from reopold_agent.cli.hydra import report_errors
from reopold_agent.cli.messages import program
from reopold_agent.errors import ConfigError, suggestion

_SETTINGS = {"dtype": "bfloat16", "push": ""}


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog=program(), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("dir", type=Path, help="folder to write; it must not exist")
    parser.add_argument("settings", nargs="*", help="key=value, as above")
    parser.add_argument("--push", metavar="ORG/NAME", default="", help="the same as push=ORG/NAME")
    options = parser.parse_args()
    with report_errors("\nStopped; nothing was written."):
        settings = _parsed(options.settings)
        # Imported here so that --help does not wait for PyTorch.
        from reopold_agent.train.export.export import check_push, export, push

        name = options.push or settings["push"]
        if name:
            check_push(name)
        read_back = export(options.run, options.dir, settings["dtype"])
        note = "compared with the student" if read_back else "not read back: too little memory"
        print(f"{options.dir}: {settings['dtype']}, {note}")
        if name:
            print(push(options.dir, name))
    return 0


def _parsed(words: list[str]) -> dict[str, str]:
    """Returns the settings, with their defaults.

    Raises:
        ConfigError: a word is not a setting, or given twice.
    """
    check_once(words)
    settings = dict(_SETTINGS)
    for word in words:
        key, equals, value = word.partition("=")
        if key not in settings or not equals:
            raise ConfigError(
                f"unknown setting '{word}'.\n{suggestion(key, settings)}Known: dtype=, push=."
            )
        settings[key] = value
    return settings


if __name__ == "__main__":
    sys.exit(main())
