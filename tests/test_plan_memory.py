"""Whole plans: memory of a GPU by hand, what does not fit, seconds from FLOPs and rates."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from running import composed, load_script

from reopold_agent.config import TrainConfig
from reopold_agent.errors import ConfigError, UnknownNameError
from reopold_agent.plan.estimate import Plan, make_plan
from reopold_agent.plan.hardware import GIB, Gpu, assumed_rates, find_gpu
from reopold_agent.plan.memory import TrainerMemory
from reopold_agent.plan.passes import Pass, divide, padding_share
from reopold_agent.plan.workload import assumed_workload
from reopold_agent.policies.architecture import find_architecture


def test_the_page_has_the_table_of_all_cases() -> None:
    page = (Path(__file__).parents[1] / "docs" / "plan.md").read_text("utf-8")
    assert f"| {' | '.join(plan_memory.HEADER)} |" in page
    for case in plan_memory.CASES:
        rows = re.findall(rf"^\| {case} \|.*\| ([\d.]+) \|$", page, re.MULTILINE)
        assert len(rows) == 2, case
        assert all(0.85 < float(ratio) < 1.15 for ratio in rows), case


plan_memory = load_script(Path(__file__).parents[1] / "benchmarks" / "plan_memory.py")


def trainer(count: float, **changes: Any) -> TrainerMemory:
    base = TrainerMemory(
        ranks=4,
        sharded=True,
        compute_bytes=2,
        master_bytes=4,
        trained=count,
        adapters=False,
        checkpointing=True,
        dense_mask=False,
        offload=False,
    )
    return replace(base, **changes)


def test_a_trainer_s_memory_by_hand() -> None:
    shape = find_architecture("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    count, tokens = shape.parameters, 8192
    full = Pass(rows=4, longest=4096, tokens=tokens, packed=True)
    whole = trainer(count)
    assert whole.resident(shape) == {"weights": count, "optimizer": 2 * count}  # 4 and 8 over 4
    assert trainer(count, offload=True).resident(shape) == {}
    held = whole.updating(shape, full, 0)
    assert held["gradients"] == count
    layer = 3584 * 3584 * 2 + 2 * 3584 * 512 + 3 * 3584 * 18944
    # Two layers and a buffer, gradients of one; the output embedding's in float32 to be summed.
    assert held["gathered"] == 2 * 4 * layer + 4 * 152064 * 3584
    one_layer = 8 * 3584 + 2 * (3584 + 1024) + 4 * 18944
    live = one_layer + 2 * 18944 + 3584
    assert held["activations"] == 2 * tokens * (28 * 3584 + live)
    assert held["head"] == 14 * 2**25  # whatever the tokens
    free = trainer(count, checkpointing=False).updating(shape, full, 0)
    assert free["activations"] == 2 * tokens * (27 * one_layer + live)
    adapters = trainer(4e7, adapters=True).updating(shape, full, 0)
    assert adapters["gradients"] == 4e7
    assert adapters["gathered"] == 2 * 3 * layer


def test_padding_takes_memory() -> None:
    """Four rows of 1024, 1024, 2048 and 4096 tokens as 4 x 4096, and a mask with its copy."""
    shape = find_architecture("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    rows = Pass(rows=4, longest=4096, tokens=8192, packed=False)
    packed = trainer(1e9).updating(shape, replace(rows, packed=True), 0)
    padded = trainer(1e9, dense_mask=True).updating(shape, rows, 0)
    assert padded["activations"] == 2 * packed["activations"] + 3 * 4 * 4096**2


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_hold_every_row(by_rows: bool, packed: bool) -> None:
    lengths = [100.0, 200, 300, 400, 1000]
    passes = divide(lengths, 1000, packed=packed, by_rows=by_rows)
    assert sum(each.rows for each in passes) == 5
    assert sum(each.tokens for each in passes) == 2000
    if by_rows:  # similar lengths together
        assert [each.rows for each in passes] == ([1, 4] if packed else [1, 2, 2])
        assert all(each.computed <= 1000 for each in passes)
    else:  # as verl: two of equal size, whatever the padding
        assert sorted(each.tokens for each in passes) == [1000, 1000]
        assert sum(each.computed for each in passes) == (2000 if packed else 1000 + 4 * 400)
    assert padding_share(passes) == (
        0 if packed else pytest.approx(1 - 2000 / (2600 - by_rows * 400))
    )


def test_one_long_row_is_a_micro_batch() -> None:
    assert [each.rows for each in divide([10, 5000], 1000, packed=True, by_rows=True)] == [1, 1]


@pytest.mark.parametrize(
    ("case", "phase"),
    [
        ("3B, packed, all weights", "update"),
        ("7B, padded, LoRA", "update"),
        ("Qwen3-VL", "update"),
    ],
)
def test_memory_is_what_pytorch_counts(case: str, phase: str) -> None:
    """With one layer of the real widths; `benchmarks/plan_memory.py` does it with all layers."""
    student = "model.student.path=Qwen/Qwen3-VL-2B-Instruct"
    words = plan_memory.CASES.get(case, ("recipe=paper_agentic", "engine.packed=true", student))
    line = plan_memory.compare(case, words, phase, layers=1)
    assert line.planned == pytest.approx(line.tracked, rel=0.15)


def plan(*words: str, gpu: str = "h100_80gb", **changes: Any) -> Plan:
    config, _ = composed(*words)
    student = find_architecture(config.model.student.path)
    teacher = find_architecture(config.model.teacher.path) if config.model.teacher else None
    made = assumed_workload(config, student.vision and student.vision.pixels_per_token, {})
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
            # Eight GPUs cannot share the 28 attention heads of its teacher's shape.
            ("recipe=paper_math_7b", "engine.teacher_gpus_per_node=0", "model.teacher.path="
             "Skywork/Skywork-OR1-7B", "engine.teacher_server.tensor_parallel=4"),
            *("rtx_4090", "Give the teacher more GPUs than these 8,"),
        ),
        (
            ("recipe=paper_math_7b", "engine.teacher_server={tensor_parallel: 1,memory_share: .8}"),
            *("h100_80gb", "a teacher's server cannot start"),
        ),
        (
            ("recipe=paper_math_7b", "engine.max_tokens_per_micro_batch=400000"),
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
        (("recipe=paper_geometry_3b", "engine.packed=false"), "h100_80gb", "are padding"),
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


def test_generating_ahead_needs_another_copy_at_the_same_time() -> None:
    words = ("engine=local", "recipe=paper_math_1_5b")
    waits, ahead = plan(*words), plan(*words, "engine.ahead=1")
    before, after = waits.memory[0].phases, ahead.memory[0].phases
    copy = 4 * waits.student.parameters + 2 * waits.student.parameters  # float32, and bfloat16
    cache = before["rollout"]["KV cache"]
    for phase, more in (("rollout", copy), ("old log-probs", copy + cache)):
        total = sum(before[phase].values())
        assert sum(after[phase].values()) == pytest.approx(total + more)
    assert after["update"]["sampler"] == copy
    lora = "model.student.lora={r: 16, lora_alpha: 32, target_modules: all-linear}"
    adapters = plan(*words, lora, "engine.ahead=1").memory[0].phases["update"]
    assert adapters["sampler"] < 0.6 * copy, "frozen weights are shared"


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
    with pytest.raises(ConfigError, match="does not divide the 4 GPUs"):
        plan("recipe=paper_math_7b", "engine.teacher_server.tensor_parallel=3")
    with pytest.raises(ConfigError, match="both need some"):
        plan("recipe=paper_math_7b", "engine.teacher_gpus_per_node=0", schedule="pools")


def test_a_teacher_on_the_students_gpus_is_planned_so() -> None:
    shared = ("recipe=paper_math_7b", "engine.teacher_gpus_per_node=0")
    assert plan(*shared) == plan(*shared, schedule="shared")
    assert plan("recipe=paper_math_7b").layout.schedule == "pools"


def test_a_shared_teacher_sleeps_and_wakes() -> None:
    """No GPUs of its own: its servers take turns with the student's and the trainer."""
    apart = plan("recipe=paper_agentic")
    shared = plan("recipe=paper_agentic", "engine.teacher_gpus_per_node=0")
    assert (shared.layout.schedule, shared.layout.student, shared.layout.teacher) == (
        "shared",
        8,
        8,
    )
    (role,) = shared.memory
    # At most the student's share of the memory, beside the trainer's state and a sleeping server.
    parts = role.phases["teacher"]
    assert parts["server weights"] + parts["server cache and room"] == 0.5 * shared.gpu.memory
    assert parts["sleeping servers"] == 1.5 * GIB
    assert {"weights", "optimizer"} <= parts.keys()
    assert role.phases["update"]["sleeping servers"] == 2 * 1.5 * GIB
    assert not shared.seconds.overlap
    copied = 2 * 2 * 8_292_166_656 / 20e9
    assert shared.seconds.switch - apart.seconds.switch == pytest.approx(1 + copied)


def test_gpus_that_only_generate_are_planned_so() -> None:
    words = ("recipe=paper_agentic", "engine.rollout_gpus_per_node=2")
    words += ("engine.teacher_gpus_per_node=2", "engine.student_server.memory_share=0.85")
    waiting, ahead = (plan(*words, f"engine.ahead={on}") for on in (0, 1))
    layout = ahead.layout
    assert (layout.gpus, layout.student, layout.rollout, layout.teacher) == (8, 4, 2, 2)
    trainer, server, _ = ahead.memory
    assert [role.role for role in ahead.memory] == ["student", "rollout", "teacher"]
    assert trainer.phases.keys() == {"old log-probs", "update", "sync"}
    for parts in trainer.phases.values():
        assert not any("server" in name for name in parts)
    parts = server.phases["rollout"]
    assert parts["server weights"] + parts["server cache and room"] == pytest.approx(
        0.85 * ahead.gpu.memory
    )
    both = plan("recipe=paper_agentic")  # four train and generate, four teach
    assert ahead.seconds.update == pytest.approx(both.seconds.update)
    assert ahead.seconds.generate > both.seconds.generate
    first = max(ahead.seconds.generate, ahead.seconds.teacher)
    trained = ahead.seconds.old_logp + ahead.seconds.update
    assert ahead.seconds.total == pytest.approx(max(first, trained) + ahead.seconds.sync)
    assert waiting.seconds.total == pytest.approx(first + trained + waiting.seconds.sync)
    assert any("engine.ahead=1" in line for line in waiting.warnings)
    assert not ahead.warnings
    little = plan(*words[:3], "engine.ahead=1", "engine.student_server.memory_share=0.5")
    assert any("memory_share=0.85" in line for line in little.warnings)


def test_servers_that_generate_ahead_hold_their_memory_beside_the_update() -> None:
    waiting, ahead = (plan("recipe=paper_agentic", f"engine.ahead={on}") for on in (0, 1))
    whole = ahead.config.engine.student_server.memory_share * ahead.gpu.memory
    for name in ("rollout", "old log-probs", "update", "sync"):
        parts = ahead.memory[0].phases[name]
        assert parts["server weights"] + parts["server cache and room"] == pytest.approx(whole)
        assert "sleeping servers" not in parts
    before = waiting.memory[0].phases["update"]
    update = ahead.memory[0].phases["update"]
    assert sum(update.values()) == pytest.approx(sum(before.values()) + whole - 1.5 * GIB)
    assert ahead.seconds.switch == 0 < waiting.seconds.switch


def test_weights_are_synced_by_bandwidth() -> None:
    seconds = plan("recipe=paper_agentic").seconds
    assert 5 < seconds.sync < 8  # of the audit, for a 3B student
    assert seconds.total == pytest.approx(
        max(seconds.generate, seconds.teacher) + seconds.old_logp + seconds.update
        + seconds.sync + seconds.switch
    )  # fmt: skip


def test_padding_takes_time() -> None:
    packed, padded = (
        plan("recipe=paper_geometry_7b", f"engine.packed={on}") for on in ("true", "false")
    )
    assert packed.padding == 0
    assert padded.padding == pytest.approx(0.5, abs=0.05)
    assert padded.flops.update > 1.5 * packed.flops.update
    assert padded.flops.teacher == packed.flops.teacher  # servers pad nothing


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
