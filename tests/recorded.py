"""Trajectories out of a run's ``trajectories.jsonl``, and a model that scores them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from reopold_agent.policies.loading import LoadedModel
from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.types import EncodedImage, StopReason, Trajectory


def trajectory(row: dict[str, Any], folder: Path, model: LoadedModel) -> Trajectory:
    from PIL import Image

    images: list[EncodedImage] = []
    for image in row["images"]:
        assert model.vision is not None
        pixels = np.asarray(Image.open(folder / image["picture"]).convert("RGB"))
        images.append(model.vision.adopt(pixels))
    names = [n for n in ("logp", "entropy", "teacher_logp") if row[n] is not None]
    arrays = {n: np.array(row[n], np.float32) for n in names}
    return Trajectory(
        task_id=row["task_id"],
        index=row["index"],
        sample=row["sample"],
        prompt_length=row["prompt_length"],
        ids=np.array(row["ids"]),
        loss_mask=np.array(row["loss_mask"], np.bool_),
        images=images,
        turns=[],
        stop_reason=StopReason(row["stop_reason"]),
        reward=row["reward"],
        success=row["success"],
        **arrays,
    )


def policy(model: LoadedModel) -> TransformersPolicy:
    chat = ChatRenderer(model.tokenizer)
    return model.policy(
        forbidden_ids=chat.forbidden_ids, stop_ids=chat.stop_ids, max_tokens_per_pass=16384
    )
