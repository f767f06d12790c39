"""Runs for the tests of the viewer: rows as they are on disk, and a server over folders."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reopold_agent.view.run import Run
from reopold_agent.view.server import ViewerServer


def train_row(step: int, index: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of ``trajectories.jsonl`` with one prompt token and three of the student."""
    return {
        "kind": "train",
        "step": step,
        "who": "student",
        "task_id": f"task-{index}",
        "index": index,
        "sample": 0,
        "success": True,
        "reward": 1.0,
        "stop_reason": "answer",
        "seconds": 0.5,
        "prompt": "<|im_start|>user\n<|image_pad|>*4Which?<|im_end|>",
        "prompt_length": 1,
        "response_tokens": 3,
        "turns": [{"start": 1, "end": 4, "text": "abc", "finish": "stop", "tool_call": None}],
        "images": [],
        "info": {},
        "ids": [0, 1, 2, 3],
        "loss_mask": [0, 1, 1, 1],
        "logp": [0.0, -1.0, -2.0, -3.0],
        "entropy": [0.0, 0.1, 0.2, 0.3],
        "teacher_logp": [0.0, -2.0, -2.0, -2.5],
        "token_reward": [0.0, -1.0, 0.0, 0.5],
        "kept": [0, 1, 0, 1],
        "tokens": ["q", "a", "b", "c"],
        **changes,
    }


def answer_row(index: int, **changes: Any) -> dict[str, Any]:
    """A row of ``responses.jsonl``."""
    return {
        "benchmark": "demo",
        "index": index,
        "sample": 0,
        "id": f"q{index}",
        "question": "Which?",
        "answers": ["7"],
        "kind": "number",
        "category": "",
        "options": [],
        "group": {},
        "response": "I do not know",
        "extracted": None,
        "correct": False,
        "how": "nothing",
        "undecided": True,
        "stop": "answer",
        "error": None,
        "turns": [{"text": "I do not know", "observation": "", "tool": None}],
        "pictures": [],
        "tokens": 4,
        "seconds": 0.1,
        **changes,
    }


def write(path: Path, rows: list[Any], end: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end, encoding="utf-8")


@contextmanager
def serving(*folders: Path) -> Iterator[ViewerServer]:
    with ViewerServer([Run(folder) for folder in folders], 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
