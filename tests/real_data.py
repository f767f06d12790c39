"""Real data, which the repository does not ship.

``REOPOLD_REAL_DATA`` names a folder with it (CONTRIBUTING.md says what lies where). Tests that need
a file which is not there are skipped; `conftest` counts them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "REOPOLD_REAL_DATA"


def find_real_data(*parts: str) -> Path | None:
    """Returns the path of a file or folder of the real data, or None where it is missing.

    The paper's text may also lie beside the folder: it is no data to train on.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    home = Path(folder).expanduser().absolute()
    places = [home, home.parent] if parts[0] == "paper" else [home]
    return next((path for place in places if (path := place.joinpath(*parts)).exists()), None)


def real_data(*parts: str) -> Path:
    """Returns the path of a file or folder of the real data; skips the test without it."""
    path = find_real_data(*parts)
    if path is None:
        pytest.skip(f"needs {'/'.join(parts)} in the folder that {VARIABLE} names")
    return path
