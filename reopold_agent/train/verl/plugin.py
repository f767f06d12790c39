"""The module that verl imports first in every process (``VERL_USE_EXTERNAL_MODULES`` names it).

Registers our vLLM server in verl's replica registry and, where ``VERL_PLATFORM=cpu``, the CPU
platform. Kept light: heavy modules are imported when they are used.
"""

from __future__ import annotations

import os
from typing import Any

from verl.workers.rollout.replica import RolloutReplicaRegistry

if os.environ.get("VERL_PLATFORM", "").lower() == "cpu":
    from reopold_agent.train.verl import platform  # noqa: F401  # registers itself


def _server() -> Any:
    from reopold_agent.train.verl.server import Replica

    return Replica


RolloutReplicaRegistry.register("vllm", _server)
