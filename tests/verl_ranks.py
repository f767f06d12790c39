"""One rank of verl's FSDP engine on the CPU, for a test: passes over rows, without Ray or servers.

``python verl_ranks.py RANK WORLD PORT JOB FOLDER`` reads a pickled list of `Case`, the same on all
ranks, and writes each case's results to ``FOLDER/CASE-RANK.pt``.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from reopold_agent.objectives import Reopold
from reopold_agent.policies.attention import IMPLEMENTATION
from reopold_agent.types import FloatArray, Trajectory


@dataclass(frozen=True)
class Case:
    """A checkpoint's folder, each rank's rows, and the tokens of a micro-batch."""

    name: str
    model: Path
    rows: list[list[Trajectory]]
    tokens: int


OBJECTIVE = Reopold(switch_step=1)


def run(case: Case, rank: int) -> dict[bool, dict[str, Any]]:
    """Returns by packed or not: log-probs and entropies of this rank's rows, gradients of all."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    from reopold_agent.train.verl.loss import ObjectiveLoss
    from reopold_agent.train.verl.training import FsdpEngine

    kinds = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    engine = FsdpEngine(
        HFModelConfig(
            path=str(case.model),
            override_config={"attn_implementation": IMPLEMENTATION + "sdpa"},
            use_remove_padding=True,
        ),
        FSDPEngineConfig(
            strategy="fsdp2", model_dtype="fp32", mixed_precision=kinds, use_torch_compile=False
        ),
        FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        CheckpointConfig(save_contents=["model", "hf_model"]),
    )
    engine.initialize()
    found = {}
    for packed in (False, True):
        with engine.eval_mode():
            output = engine.infer_batch(batch(case, rank, packed, calculate_entropy=True))
        scored = {
            name: [row.clone() for row in output["model_output"][name].unbind()]
            for name in ("log_probs", "entropy")
        }
        with engine.train_mode():
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(
                batch(case, rank, packed), ObjectiveLoss(OBJECTIVE, weighted=True)
            )
            gradients = {
                name: parameter.grad.full_tensor().clone()
                for name, parameter in engine.module.named_parameters()
            }
        found[packed] = {**scored, "gradients": gradients}
        # Also between the passes: afterwards the model must compute as before.
        engine.save_checkpoint(str(case.model.with_suffix(".saved")))
    return found


def importance_weights(trajectory: Trajectory) -> FloatArray:
    """Weights that differ between the tokens of a trajectory."""
    return np.linspace(0.5, 2.0, len(trajectory.ids), dtype=np.float32)


def batch(case: Case, rank: int, packed: bool, **more: Any) -> Any:
    """Returns this rank's rows as verl's trainer sends them."""
    from verl.utils.tensordict_utils import assign_non_tensor, list_of_dict_to_tensordict

    from reopold_agent.train.verl.loss import STEP, THRESHOLD, WEIGHTS
    from reopold_agent.train.verl.records import to_row

    rows = []
    for trajectory in case.rows[rank]:
        start = trajectory.prompt_length
        old = torch.from_numpy(trajectory.logp[start:])
        entropy = torch.from_numpy(trajectory.entropy[start:])
        weight = torch.from_numpy(importance_weights(trajectory)[start:])
        values = {"old_log_probs": old, "entropy": entropy, WEIGHTS: weight}
        rows.append({**to_row(trajectory), **values})
    data = list_of_dict_to_tensordict(rows)
    assign_non_tensor(
        data,
        use_remove_padding=packed,
        use_dynamic_bsz=True,
        max_token_len_per_gpu=case.tokens,
        temperature=1.0,
        **{STEP: 0, THRESHOLD: "null", **more},
    )
    return data


if __name__ == "__main__":
    rank, world, port, job, folder = sys.argv[1:]
    os.environ.update(
        VERL_PLATFORM="cpu",
        VERL_USE_EXTERNAL_MODULES="reopold_agent.train.verl.plugin",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
        RANK=rank,
        LOCAL_RANK=rank,
        WORLD_SIZE=world,
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with open(job, "rb") as stream:
        cases = pickle.load(stream)
    for case in cases:
        torch.save(run(case, int(rank)), Path(folder) / f"{case.name}-{rank}.pt")
    dist.destroy_process_group()
