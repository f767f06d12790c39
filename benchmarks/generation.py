"""Generation with slots, batching and a kept KV cache against one ``model.generate`` per turn.

    python benchmarks/generation.py [--episodes 32] [--repeats 3]

Both play the same greedy episodes of the embedded task (the tokens are compared); only the policy
behind the rollout differs. Printed: seconds in generation, best of the repeats, and their ratio.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import demo_config, demo_loop, last_line

from reopold_agent.policies.transformers_policy import TransformersPolicy
from reopold_agent.rollout.runner import EpisodeSpec
from reopold_agent.types import Completion, Request, Sampling, Trajectory


class OneByOne:
    """A policy that calls ``model.generate`` for every turn of every episode."""

    def __init__(self, policy: TransformersPolicy) -> None:
        self.policy = policy

    def generator(self, sampling: Sampling) -> OneByOneGenerator:
        return OneByOneGenerator(self.policy)

    def score(self, trajectories: Sequence[Trajectory], **_: Any) -> Any:
        raise RuntimeError("only generates")


class OneByOneGenerator:
    def __init__(self, policy: TransformersPolicy) -> None:
        self.policy, self.requests = policy, list[Request]()
        policy.adapter.model.eval()

    @property
    def in_flight(self) -> int:
        return len(self.requests)

    def submit(self, requests: Sequence[Request]) -> None:
        self.requests += requests

    def release(self, key: int) -> None:
        pass

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        if not self.requests:
            return []
        request = self.requests.pop(0)
        adapter = self.policy.adapter
        ids = torch.tensor([request.ids])
        vision: Any = adapter.vision
        pixel_values, grids = vision.patches(request.images)
        model: Any = adapter.model
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == adapter.image_token_id).int(),
            pixel_values=pixel_values,
            image_grid_thw=grids,
            do_sample=False,
            max_new_tokens=request.max_tokens,
            eos_token_id=sorted(self.policy.stop_ids),
            suppress_tokens=self.policy.banned.tolist(),
            pad_token_id=0,
        )
        new = tuple(out[0, ids.shape[1] :].tolist())
        finish = "stop" if new[-1] in self.policy.stop_ids else "length"
        zeros = (0.0,) * len(new)
        return [Completion(request.key, new, zeros, zeros, finish)]  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    loop = demo_loop(demo_config(), Path(tempfile.mkdtemp()))
    episodes = [EpisodeSpec("eval", i) for i in range(options.episodes)]
    seconds: dict[str, list[float]] = {"batched": [], "one by one": []}
    ids: dict[str, list[list[int]]] = {}
    # The teacher: it plays the episodes that a trained student plays, with its tool calls.
    policy = loop.roles.teacher
    policies: dict[str, Any] = {"batched": policy, "one by one": OneByOne(policy)}
    for _ in range(options.repeats):
        for name, policy in policies.items():
            played = loop.evaluation.runner.run(policy, episodes, Sampling(temperature=0), (0,))
            seconds[name].append(loop.evaluation.runner.stats.generate_seconds)
            ids[name] = [t.ids.tolist() for t in played]
    turns = sum(len(t.turns) for t in played)
    tokens = sum(t.response_tokens for t in played)
    same = sum(a == b for a, b in zip(*ids.values(), strict=True))
    print(f"{options.episodes} episodes, {turns} turns, {tokens} sampled tokens, one thread")
    print(f"episodes with equal ids: {same} of {options.episodes}")
    fast, slow = min(seconds["batched"]), min(seconds["one by one"])
    print(f"batched with slots {fast:.3f} s, one by one {slow:.3f} s, ratio {slow / fast:.1f}")
    last_line({"batched_over_one_by_one": fast / slow})


if __name__ == "__main__":
    main()
