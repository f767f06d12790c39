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
    """A checkpoint's folder, each rank's rows, the tokens of a micro-batch, and an adapter."""

    name: str
    model: Path
    rows: list[list[Trajectory]]
    tokens: int
    lora: dict[str, Any] | None = None
    dtype: str = "float32"

    @property
    def saved(self) -> Path:
        """Where the ranks save the model."""
        return self.model.with_name(f"{self.name}.saved")


OBJECTIVE = Reopold(switch_step=1)
SEED = 7
"""Of a new adapter."""

RATE, EPS = 0.1, 0.1
"""AdamW's, for the adapter's first update: without a large ``eps`` only a gradient's sign counts,
which for many is that of a rounding error."""


def run(case: Case, rank: int) -> dict[Any, Any]:
    """Returns by packed or not: log-probs and entropies of this rank's rows, gradients of all.

    An adapter has made one update before. With it come ``sent``, the weights for servers, and
    ``loaded``, the log-probs after its weights were changed and loaded from the checkpoint.
    """
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig

    from reopold_agent.train.verl.compose import verl_lora
    from reopold_agent.train.verl.loss import ObjectiveLoss
    from reopold_agent.train.verl.training import FsdpEngine

    kinds = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    engine = FsdpEngine(
        HFModelConfig(
            path=str(case.model),
            override_config={"attn_implementation": IMPLEMENTATION + "sdpa"},
            use_remove_padding=True,
            **verl_lora(case.lora, case.dtype),
        ),
        FSDPEngineConfig(
            strategy="fsdp2",
            model_dtype="fp32",
            mixed_precision=kinds,
            use_torch_compile=False,
            seed=SEED,
        ),
        FSDPOptimizerConfig(
            lr=2 * RATE,
            lr_warmup_steps=2,  # so that the only update has half the rate
            weight_decay=0.0,
            clip_grad=1e9,
            total_training_steps=10,
            override_optimizer_config={"eps": EPS},
        ),
        CheckpointConfig(
            save_contents=["model", "optimizer", "extra"] if case.lora else ["model", "hf_model"],
            load_contents=["model", "optimizer", "extra"] if case.lora else ["model"],
            save_lora_only=case.lora is not None,
        ),
    )
    engine.initialize()
    if case.lora is not None:
        with engine.train_mode():
            engine.optimizer_zero_grad()
            loss = ObjectiveLoss(OBJECTIVE, weighted=True)
            engine.forward_backward_batch(batch(case, rank, packed=True), loss)
            engine.optimizer_step()
    found: dict[Any, Any] = {}

    def scores(packed: bool) -> dict[str, list[torch.Tensor]]:
        with engine.eval_mode():
            output = engine.infer_batch(batch(case, rank, packed, calculate_entropy=True))
        return {
            name: [row.clone() for row in output["model_output"][name].unbind()]
            for name in ("log_probs", "entropy")
        }

    for packed in (False, True):
        scored = scores(packed)
        with engine.train_mode():
            engine.optimizer_zero_grad()
            engine.forward_backward_batch(
                batch(case, rank, packed), ObjectiveLoss(OBJECTIVE, weighted=True)
            )
            gradients = {
                name: parameter.grad.full_tensor().clone()
                for name, parameter in engine.module.named_parameters()
                if parameter.grad is not None
            }
        found[packed] = {**scored, "gradients": gradients}
        # Also between the passes: afterwards the model must compute as before.
        engine.save_checkpoint(str(case.saved))
    if case.lora is not None:
        weights, told = engine.get_per_tensor_param(layered_summon=False, base_sync_done=True)
        assert told is None
        found["sent"] = {name: value.clone() for name, value in weights}
        with torch.no_grad():
            for parameter in engine.module.parameters():
                if parameter.requires_grad:
                    parameter.mul_(3.0)
        engine.load_checkpoint(str(case.saved))
        found["loaded"] = scores(packed=True)["log_probs"]
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
