"""A training loop of one's own: the embedded student learns from the embedded teacher."""

import gymnasium
import torch

from reopold_agent.common.pixels import PixelLimits
from reopold_agent.objectives import reopold_loss
from reopold_agent.policies.batch import TrajectoryBatch
from reopold_agent.policies.loading import ModelSpec, load_model
from reopold_agent.rollout.chat import ChatRenderer
from reopold_agent.rollout.runner import EpisodeSpec, RolloutLimits, RolloutRunner
from reopold_agent.types import Sampling

steps, tasks, cpu = 8, 32, torch.device("cpu")
models = [load_model(ModelSpec(f"demo:{role}"), role, cpu) for role in ("student", "teacher")]
chat = ChatRenderer(models[0].tokenizer)
student, teacher = (
    model.policy(forbidden_ids=chat.forbidden_ids, stop_ids=chat.stop_ids) for model in models
)
runner = RolloutRunner(
    lambda: gymnasium.make("reopold_agent.envs:reopold/PixelReasoner-v0", max_turns=3),
    chat, models[0].vision, limits=RolloutLimits(max_response_tokens=256, max_turns=3),
    prompt_pixels=PixelLimits(112**2, 112**2), observation_pixels=PixelLimits(56**2, 56**2),
)  # fmt: skip
optimizer = torch.optim.AdamW(models[0].adapter.model.parameters(), lr=3e-4, weight_decay=0.0)

for step in range(steps):
    episodes = [EpisodeSpec("train", step * tasks + i) for i in range(tasks)]
    played = [t for t in runner.run(student, episodes, Sampling(), (0, step)) if t.trainable]
    batch, scores = TrajectoryBatch.build(student.adapter, played), teacher.score(played)
    loss, metrics = reopold_loss(
        batch.scatter(student.logprobs(batch)[0]), batch.aligned([t.logp for t in played]),
        batch.aligned([each.logp for each in scores]), batch.aligned([t.entropy for t in played]),
        batch.aligned([t.loss_mask for t in played]), step=step, switch_step=steps // 2,
    )  # fmt: skip
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    success = sum(t.success for t in played) / len(played)
    print(f"step {step}: success {success:.2f}, token reward {metrics['reward_mean']:.3f} nats")
