"""A stand-in for vLLM's engine: the same calls, answers computed from the request's seed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np


class FakeEngine:
    """The part of `vllm.LLMEngine` that `VllmEngine` uses.

    ``fault(number, prompt)`` is asked for every request, numbered from 0: None answers it,
    "abort" ends it as vLLM does, "refuse" raises in ``add_request``, "die" raises in ``step``,
    "slow" goes on for ever, "hang" stops the engine as soon as it has nothing else to do, "ids" and
    "short" answer about other ids, "infinite" has a log-prob that is not finite.
    """

    def __init__(
        self,
        image_token_id: int | None = None,
        stop_id: int = 2,
        fault: Callable[[int, Mapping[str, Any]], str | None] = lambda number, prompt: None,
    ) -> None:
        self._image, self._stop, self._fault = image_token_id, stop_id, fault
        self._waiting: dict[str, tuple[Mapping[str, Any], Any, str | None]] = {}
        self._number = 0
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.aborted: list[str] = []
        self.released = threading.Event()
        self.engine_core = SimpleNamespace(shutdown=lambda: self.calls.append(("shutdown", ())))

    def add_request(self, name: str, prompt: Mapping[str, Any], parameters: Any) -> str:
        fault = self._fault(self._number, prompt)
        self._number += 1
        if fault == "refuse":
            raise ValueError("the prompt is too long")
        self._waiting[name] = (prompt, parameters, fault)
        return name

    def abort_request(self, names: list[str]) -> None:
        self.aborted += names
        for name in names:
            self._waiting.pop(name, None)

    def step(self) -> list[Any]:
        outputs = []
        for name, (prompt, parameters, fault) in list(self._waiting.items()):
            if fault == "die":
                raise RuntimeError("EngineDeadError")
            if fault not in ("slow", "hang"):
                del self._waiting[name]
                outputs.append(self._answer(name, prompt, parameters, fault))
        if not outputs:
            stopped = all(fault == "hang" for _, _, fault in self._waiting.values())
            self.released.wait(None if stopped else 0.02)  # vLLM waits for the next token
        return outputs[::-1]

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append((method, args))
        return [1]

    def reset_prefix_cache(self) -> bool:
        self.calls.append(("reset_prefix_cache", ()))
        return True

    def reset_encoder_cache(self) -> None:
        self.calls.append(("reset_encoder_cache", ()))

    def _answer(self, name: str, prompt: Mapping[str, Any], parameters: Any, fault: Any) -> Any:
        ids = self._expanded(prompt)
        if fault == "ids":
            ids[-1] += 1
        if fault == "short":
            ids = ids[:-1]
        scoring = getattr(parameters, "prompt_logprobs", None) is not None
        rng = np.random.default_rng(0 if scoring else parameters.seed)
        count = 1 if scoring else int(rng.integers(1, parameters.max_tokens + 1))
        sampled = rng.integers(10, 20, count).tolist()
        if count < parameters.max_tokens:
            sampled[-1] = self._stop
        logprobs = (-rng.exponential(1.0, count)).tolist()
        values = [-float(i + 1) for i in range(1, len(ids))]  # differs between positions
        if fault == "infinite":
            values[-1] = logprobs[-1] = -float("inf")
        return SimpleNamespace(
            finished=True,
            request_id=name,
            prompt_token_ids=ids,
            prompt_logprobs=SimpleNamespace(token_ids=ids[1:], logprobs=values),
            outputs=[
                SimpleNamespace(
                    token_ids=sampled,
                    logprobs=SimpleNamespace(logprobs=logprobs),
                    finish_reason="abort" if fault == "abort" else "stop",
                )
            ],
        )

    def _expanded(self, prompt: Mapping[str, Any]) -> list[int]:
        pictures = list(prompt.get("multi_modal_data", {}).get("image", ()))
        ids: list[int] = []
        for token in prompt["prompt_token_ids"]:
            if token == self._image:
                picture = pictures.pop(0)
                ids += [token] * (picture.width * picture.height // 784)
            else:
                ids.append(token)
        assert not pictures
        return ids


def fake_vllm() -> dict[str, Any]:
    """Modules to put in ``sys.modules`` in the place of vLLM's."""
    module = SimpleNamespace(SamplingParams=SimpleNamespace)
    kinds = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
    return {"vllm": module, "vllm.sampling_params": kinds}
