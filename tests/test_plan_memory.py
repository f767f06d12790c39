"""Whole plans: memory of a GPU by hand, what does not fit, seconds from FLOPs and rates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from running import composed

from reopold_agent.config import TrainConfig
from reopold_agent.errors import ConfigError, UnknownNameError
from reopold_agent.plan.estimate import Plan, make_plan
from reopold_agent.plan.hardware import GIB, Gpu, assumed_rates, find_gpu
from reopold_agent.plan.memory import TrainerMemory
from reopold_agent.plan.workload import PictureLoad, Workload, assumed_workload
from reopold_agent.policies.architecture import find_architecture

EPISODES = Workload(2, 3, 10, PictureLoad(), 4, 4, 0, PictureLoad(), {})


def test_a_trainer_s_memory_by_hand() -> None:
    shape = find_architecture("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    count, tokens = shape.parameters, 8192
    trainer = TrainerMemory(
        ranks=4,
        tokens=tokens,
        compute_bytes=2,
        master_bytes=4,
        checkpointing=True,
        trained=count,
        logits=tokens * 152064,
        offload=False,
    )
    assert trainer.resident(shape) == {"weights": count, "optimizer": 2 * count}  # 4 and 8 over 4
    held = trainer.updating(shape, EPISODES)
    assert held["gradients"] == count
    layer = 3584 * 3584 * 2 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert held["gathered"] == 2 * (2 * layer + 2 * 152064 * 3584)
    one_layer = 8 * 3584 + 2 * (3584 + 1024) + 4 * 18944
    assert held["activations"] == 2 * tokens * (28 * 3584 + one_layer)
    assert held["logits"] == 3 * 2 * tokens * 152064
    assert replace(trainer, offload=True).resident(shape) == {}
    free = replace(trainer, checkpointing=False).updating(shape, EPISODES)
    assert free["activations"] == 2 * tokens * 28 * one_layer


def plan(*words: str, gpu: str = "h100_80gb", **changes: Any) -> Plan:
    config, _ = composed(*words)
    student = find_architecture(config.model.student.path)
    teacher = find_architecture(config.model.teacher.path) if config.model.teacher else None
    made = assumed_workload(config, student.vision is not None, {})
    card = find_gpu(gpu)
    schedule = changes.pop("schedule", None)
    return make_plan(
        config, student, teacher, replace(made, **changes), card, assumed_rates(card), schedule
    )


def test_a_teacher_behind_a_server_takes_no_memory_here() -> None:
    words = ("env=pixel_reasoner", "model=qwen2_5_vl_3b")
    here, there = (
        plan(*words, *more).memory[0].phases["update"]
        for more in ((), ("policy=server", "policy.teacher.urls=[http://gpu2:8100]"))
    )
    assert dict(here) == {**there, "teacher": 2 * 8_292_166_656}


def test_what_fits_is_not_complained_about() -> None:
    made = plan("recipe=paper_math_1_5b")
    assert not [line for line in made.warnings if "does not fit" in line]
    for role in made.memory:
        assert 0 < role.peak[1] < made.gpu.memory


@pytest.mark.parametrize(
    ("words", "gpu", "said"),
    [
        (("engine=local", "recipe=paper_math_7b"), "h100_80gb", "Use engine=verl over several"),
        (("recipe=paper_math_7b",), "a100_40gb", "engine.student_server.memory_share"),
        (
            ("recipe=paper_math_7b", "engine.teacher_server.tensor_parallel=1"),
            *("a100_40gb", "Raise engine.teacher_server.tensor_parallel"),
        ),
        (
            ("recipe=paper_math_7b", "engine.teacher_server={tensor_parallel: 1,memory_share: .8}"),
            *("h100_80gb", "a teacher's server cannot start"),
        ),
        (
            ("recipe=paper_math_1_5b", "engine.max_tokens_per_micro_batch=200000"),
            *("h100_80gb", "Lower engine.max_tokens_per_micro_batch"),
        ),
        (
            ("recipe=paper_math_7b", "engine.student_server.memory_share=0.15"),
            *("h100_80gb", "a student's server cannot start"),
        ),
        (
            ("recipe=paper_math_1_5b", "engine.teacher_gpus_per_node=2"),
            *("h100_80gb", "which 6 GPUs cannot divide evenly"),
        ),
        (
            ("recipe=paper_math_1_5b", "rollout.concurrency=8"),
            *("h100_80gb", "rollout.concurrency=8 x engine.rollout_workers=8"),
        ),
        (("recipe=paper_math_7b",), "h100_80gb", "they run in waves"),
        (("recipe=paper_geometry_3b",), "h100_80gb", "flash_attention_2 packs them"),
        (
            ("recipe=paper_geometry_3b", "engine.gpus_per_node=6", "batch.mini_batch=32",
             "engine.teacher_gpus_per_node=2"),
            *("h100_80gb", "the rollout waits for the teacher"),
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_reported_with_a_remedy(
    words: tuple[str, ...], gpu: str, said: str
) -> None:
    warnings = plan(*words, gpu=gpu).warnings
    assert any(said in line for line in warnings), warnings


def test_seconds_follow_from_flops_and_rates() -> None:
    made = plan("recipe=paper_math_1_5b", schedule="shared")
    achieved = made.rates.train.value * 8
    assert made.seconds.update == pytest.approx(made.flops.update / achieved)
    assert made.seconds.teacher == pytest.approx(made.flops.teacher / achieved)
    assert made.gpu_hours == pytest.approx(made.seconds.total * 300 * 8 / 3600)
    pools = plan("recipe=paper_math_1_5b")
    assert pools.seconds.update == pytest.approx(2 * made.seconds.update)  # four GPUs, not eight
    double = plan("recipe=paper_math_1_5b", "engine.nodes=2")
    assert double.seconds.update == pytest.approx(pools.seconds.update / 2)
    assert double.seconds.generate < pools.seconds.generate


def test_one_gpu_does_all_in_turn() -> None:
    made = plan("engine=local", "recipe=paper_math_1_5b")
    assert (made.layout.gpus, made.seconds.sync, made.seconds.overlap) == (1, 0.0, False)
    assert {"teacher"} <= made.memory[0].phases["update"].keys()
    adapters = plan(
        *("engine=local", "recipe=paper_math_1_5b"),
        "model.student.lora={r: 16, lora_alpha: 32, target_modules: all-linear}",
    )
    assert adapters.memory[0].phases["update"]["optimizer"] < GIB
    assert adapters.flops.update < made.flops.update


def test_no_teacher_no_time_for_it() -> None:
    made = plan(
        "recipe=paper_math_1_5b", "objective=grpo", "model.teacher=null", "evaluation.teacher=false"
    )
    assert made.seconds.teacher == made.flops.teacher == 0
    assert made.layout.student == 8
    assert [role.role for role in made.memory] == ["student"]


def test_objectives_without_own_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="not sft"):
        plan("objective=sft")
    with pytest.raises(ConfigError, match="schedule must be one of"):
        plan(schedule="turns")
    with pytest.raises(ConfigError, match="does not divide its"):
        plan("recipe=paper_math_7b", "engine.teacher_server.tensor_parallel=3")
    with pytest.raises(ConfigError, match="both need some"):
        plan("recipe=paper_math_7b", "engine.teacher_gpus_per_node=0", schedule="pools")


def test_a_teacher_on_the_students_gpus_is_planned_so() -> None:
    shared = ("recipe=paper_math_7b", "engine.teacher_gpus_per_node=0")
    assert plan(*shared) == plan(*shared, schedule="shared")
    assert plan("recipe=paper_math_7b").layout.schedule == "pools"


def test_gpus_and_rates() -> None:
    card = find_gpu("h100_80gb")
    assert isinstance(card, Gpu)
    made = assumed_rates(card, mfu=0.5, bandwidth_share=0.25, iteration_seconds=0.01)
    assert made.train.value == made.score.value == 0.5 * 989e12
    assert made.bandwidth.value == 0.25 * 3.35e12
    assert made.iteration.value == 0.01
    assert "given" in made.train.source
    assert "fitted" in assumed_rates(card).train.source
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match="mfu is a share"):
            assumed_rates(card, mfu=wrong)
    with pytest.raises(UnknownNameError, match="Did you mean 'h100_80gb'"):
        find_gpu("h100_80g")


def test_configurations_are_the_run_s_own() -> None:
    assert isinstance(plan("recipe=paper_agentic").config, TrainConfig)
