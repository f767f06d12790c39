"""Converts requests to vLLM's form, and checks and converts its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from reopold_agent.errors import ModelError, NonFiniteError
from reopold_agent.types import (
    Completion,
    EncodedImage,
    FloatArray,
    IntArray,
    Request,
    Sampling,
    Trajectory,
)


def prompt_of(
    ids: Sequence[int] | IntArray, images: Sequence[EncodedImage], image_token_id: int | None
) -> dict[str, Any]:
    """Converts a sequence to vLLM's prompt: one placeholder per picture, which vLLM expands.

    Args:
        ids: the whole sequence with one placeholder per merged patch.
        images: in the order of their placeholders.
        image_token_id: id of the placeholder; None for text-only models.

    Raises:
        ModelError: placeholders and pictures do not match.
    """
    plain = [int(i) for i in ids]
    if not images:
        if image_token_id is not None and image_token_id in plain:
            raise ModelError("image placeholder tokens without a picture")
        return {"prompt_token_ids": plain}
    if image_token_id is None:
        raise ModelError("this model takes no pictures, but the environment shows some")
    short: list[int] = []
    at = 0
    for image in images:
        try:
            start = plain.index(image_token_id, at)
        except ValueError:
            raise ModelError("a picture has no image placeholder tokens") from None
        end = start + image.tokens
        if plain[start:end] != [image_token_id] * image.tokens:
            raise ModelError(f"fewer image placeholder tokens than the {image.tokens} of a picture")
        short += [*plain[at:start], image_token_id]
        at = end
    if image_token_id in plain[at:]:
        raise ModelError("more image placeholder tokens than the pictures need")
    return {
        "prompt_token_ids": [*short, *plain[at:]],
        "multi_modal_data": {"image": [Image.fromarray(image.pixels) for image in images]},
    }


def sampling_parameters(
    request: Request, sampling: Sampling, stop_ids: frozenset[int], *, seeded: bool
) -> Any:
    """Returns ``vllm.SamplingParams`` for a turn.

    Args:
        request: the turn.
        sampling: temperature and top_p.
        stop_ids: a turn ends with the first of these, unless the request has its own.
        seeded: seed it with 63 bits of the request's stream.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    seed = int(np.random.SeedSequence(request.seed).generate_state(1, np.uint64)[0] >> 1)
    return SamplingParams(
        max_tokens=request.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed if seeded else None,
        stop_token_ids=sorted(request.stop_ids or stop_ids),
        ignore_eos=True,  # only the given stop ids end a turn
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def scoring_parameters(*, seeded: bool) -> Any:
    """Returns ``vllm.SamplingParams`` for the log-probs of a whole sequence.

    Args:
        seeded: turns have seeds. On a CPU one request without makes vLLM ignore the others' seeds.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        seed=0 if seeded else None,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def completion_of(request: Request, output: Any, stop_ids: frozenset[int]) -> Completion:
    """Returns the turn that vLLM sampled, with entropies of zero, which vLLM does not compute.

    Raises:
        ModelError: vLLM continued other ids than the request's, or its answer is incomplete.
    """
    _same_ids(request.ids, output.prompt_token_ids, f"sequence {request.key}")
    (answer,) = output.outputs
    ids = tuple(int(i) for i in answer.token_ids)
    logp = tuple(float(value) for value in answer.logprobs.logprobs)
    if not ids or len(logp) != len(ids) or not np.isfinite(logp).all():
        raise ModelError(
            f"vLLM answered with {len(ids)} tokens and {len(logp)} log-probs, or some that are "
            "not finite"
        )
    return Completion(
        key=request.key,
        ids=ids,
        logp=logp,
        entropy=(0.0,) * len(ids),
        finish="stop" if ids[-1] in (request.stop_ids or stop_ids) else "length",
    )


def scores_of(trajectory: Trajectory, output: Any) -> FloatArray:
    """Returns log-probs of the student's tokens, (L,) float32, 0 where ``loss_mask`` is false.

    Raises:
        ModelError: vLLM scored other ids than the trajectory's, or not all of them (peers were
            off by some positions: ms-swift #9011).
        NonFiniteError: a value is not finite.
    """
    length = len(trajectory.ids)
    _same_ids(trajectory.ids, output.prompt_token_ids, f"task {trajectory.task_id}")
    given = output.prompt_logprobs
    # Entry i is for token i given those before it; the first token has no log-prob.
    _same_ids(trajectory.ids[1:], given.token_ids, f"the log-probs of task {trajectory.task_id}")
    values = np.zeros(length, dtype=np.float32)
    values[1:] = np.where(trajectory.loss_mask[1:], given.logprobs, 0.0)
    if not np.isfinite(values).all():
        raise NonFiniteError(
            f"vLLM's log-probs of task {trajectory.task_id} are not finite: the student sampled "
            "an id that this model's vocabulary masks"
        )
    return values


def _same_ids(ours: Sequence[int] | IntArray, theirs: Sequence[int], what: str) -> None:
    if len(ours) != len(theirs):
        raise ModelError(
            f"{what}: vLLM read {len(theirs)} tokens instead of {len(ours)}; a picture became "
            "another number of tokens there"
        )
    differing = np.nonzero(np.asarray(ours) != np.asarray(theirs))[0]
    if len(differing):
        first = int(differing[0])
        raise ModelError(
            f"{what}: vLLM read id {theirs[first]} instead of {ours[first]} at position {first}"
        )
