"""Makes the weights that `reopold_agent.demo` ships (see README.md). From the top of a checkout:

``python -m examples.embedded_models digits|digits_vocab2|... [--out DIR] ...``
"""

from __future__ import annotations

import argparse
import importlib
import sys


def main() -> int:
    """Runs the chosen recipe; ``NAME --help`` lists its options."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.embedded_models",
        description="Makes the weights that the package ships. NAME --help lists the options.",
    )
    names = ("digits", "digits_vocab2", "arithmetic", "branches", "figures", "hints", "generalist")
    parser.add_argument("name", choices=names)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the recipe")
    chosen = parser.parse_args()
    # Imported when chosen: each recipe loads its own tasks.
    recipe = importlib.import_module(f"examples.embedded_models.{chosen.name}.build")
    status: int = recipe.main(chosen.options)
    return status


if __name__ == "__main__":
    sys.exit(main())
