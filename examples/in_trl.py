"""TRL's GRPOTrainer on an environment of this project."""

import sys

import gymnasium
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from reopold_agent.envs.trl import environment_factory, reward, rows


def make_env():
    """Makes the environment; a game without pictures, for a text model."""
    name = "reopold_agent.envs:reopold/Gymnasium-v0"
    return gymnasium.make(name, gym_id="FrozenLake-v1", show="text").unwrapped


trainer = GRPOTrainer(
    model=sys.argv[1],
    args=GRPOConfig(
        "in_trl",
        max_steps=int(sys.argv[2]),
        max_completion_length=128,
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=Dataset.from_list(rows(make_env, limit=1000)),
    environment_factory=environment_factory(make_env),
    reward_funcs=reward,
)
trainer.train()
