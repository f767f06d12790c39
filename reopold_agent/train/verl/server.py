"""verl's vLLM server for our rollouts: pictures arrive by reference, and it runs on a CPU too."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from PIL import Image
from verl.plugin.platform import get_platform
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from reopold_agent.policies.vllm.worker import keep_weights_replaceable
from reopold_agent.train.verl.watch import Watch


class WorkerExtension(vLLMColocateWorkerExtension):
    """verl's extension of vLLM's worker process, for a worker whose device is the CPU."""

    def __new__(cls, **kwargs: Any) -> Any:
        """Prepares the process before vLLM loads the model."""
        keep_weights_replaceable()
        return super().__new__(cls, **kwargs)


class _WatchedEngine:
    """vLLM's engine, whose outputs a `Watch` sees."""

    def __init__(self, engine: Any, watch: Watch) -> None:
        self._engine, self._watch = engine, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._watch.noted(self._engine.generate(*args, **kwargs))


class Server(vLLMHttpServer):
    """One vLLM server of a replica (a Ray actor)."""

    @property
    def engine(self) -> Any:
        """vLLM's engine, which verl sets."""
        return self._engine

    @engine.setter
    def engine(self, engine: Any) -> None:
        self._watch = Watch()
        self._engine = _WatchedEngine(engine, self._watch)

    async def generate(self, *args: Any, stall_seconds: float, **kwargs: Any) -> Any:
        """Generates as verl's server; pictures may be references into Ray's object store.

        A picture is then moved to a node once, however many turns and servers need it.

        Args:
            *args, **kwargs: as of verl's server.
            stall_seconds: most seconds in which this server gives no request a token.

        Raises:
            ServerStalledError: it gave none; vLLM has then been told to forget this request.
        """
        pictures = kwargs.get("image_data")
        if pictures:
            arrays = await asyncio.gather(*[_resolved(picture) for picture in pictures])
            kwargs["image_data"] = [Image.fromarray(array) for array in arrays]
        return await self._watch.run(super().generate(*args, **kwargs), stall_seconds)

    def _get_worker_extension_cls(self) -> str:
        if get_platform().device_name == "cpu":
            return f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}"
        return str(super()._get_worker_extension_cls())


class Replica(vLLMReplica):
    """A group of `Server`; registered under verl's name ``vllm``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(Server)

    async def launch_servers(self) -> None:
        """Starts the servers; those of a teacher on the student's GPUs sleep until they score.

        The student's servers are started next and need the memory.
        """
        await super().launch_servers()
        if self.is_teacher_model and self.config.free_cache_engine:
            await self.sleep()


async def _resolved(picture: Any) -> Any:
    return await picture if isinstance(picture, ray.ObjectRef) else picture
