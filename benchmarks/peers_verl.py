"""What lets verl 0.9.1 start on a CPU, for the case ``verl`` of ``peers.py``.

verl knows CUDA, ROCm and NPU. It imports this module in each of its processes
(``VERL_USE_EXTERNAL_MODULES``), which registers by verl's own interfaces

* a platform for the CPU, this project's;
* verl's vLLM server with an extension of its workers that has vLLM keep weights which can be
  replaced, and so not packed for oneDNN, as ``engine=verl`` does;

and begins the process group of a training worker, because on a CPU verl asks PyTorch for the
backend ``cpu:gloo,cpu:gloo``, which that refuses. verl's FSDP engine is registered for CUDA and
NPU; a variable of verl's (``VERL_ENGINE_DEVICE``) takes it on a CPU too. What a step computes is
verl's own code.
"""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from verl.workers.rollout.replica import RolloutReplicaRegistry

from reopold_agent.train.verl import platform  # noqa: F401  # registers itself


def _replica() -> Any:
    import ray
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

    class Server(vLLMHttpServer):  # type: ignore[misc]
        def _get_worker_extension_cls(self) -> str:
            return "reopold_agent.train.verl.server.WorkerExtension"

    class Replica(vLLMReplica):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.server_class = ray.remote(Server)

    return Replica


RolloutReplicaRegistry.register("vllm", _replica)
if "WG_PREFIX" in os.environ and not dist.is_initialized():  # one of verl's training workers
    dist.init_process_group("gloo")
