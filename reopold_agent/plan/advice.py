"""Advice: what does not fit or is wasted, and what to change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reopold_agent.config import TrainConfig
from reopold_agent.plan.hardware import GIB, Gpu, Rates
from reopold_agent.plan.memory import GpuMemory
from reopold_agent.plan.timing import Layout, StepSeconds


def warnings_for(
    config: TrainConfig,
    layout: Layout,
    memory: Sequence[GpuMemory],
    seconds: StepSeconds,
    gpu: Gpu,
    room: Mapping[str, float],
    padding: float,
    rates: Rates,
) -> tuple[str, ...]:
    """Returns sentences of advice, the most serious first; empty if everything fits.

    Args:
        config: the run's configuration.
        layout: division of the GPUs.
        memory: memory of each role.
        seconds: time of a step.
        gpu: the GPU.
        room: of a student's server ``cache`` bytes, sequences that it ``holds``, that are
            ``wanted`` and that the rollout workers ``allowed``; for ``teacher`` the longest
            sequences that a teacher's server holds. Empty without servers.
        padding: share of the update's computed tokens that is padding.
        rates: rates of the GPU.
    """
    found = [*_does_not_fit(config, layout, memory, gpu), *_servers(config, layout, room)]
    rows = config.batch.mini_batch * config.batch.samples
    if layout.schedule != "local" and rows % layout.student:
        found.append(
            f"a mini-batch has {rows} episodes, which {layout.student} GPUs cannot divide evenly: "
            "verl refuses this. Change batch.mini_batch, batch.samples or the division of the GPUs."
        )
    if seconds.overlap and layout.teacher:
        busy = seconds.teacher / seconds.total
        if seconds.teacher > 1.2 * seconds.generate:
            found.append(
                f"the rollout waits for the teacher ({seconds.teacher:.0f} s against "
                f"{seconds.generate:.0f} s): give it more GPUs (engine.teacher_gpus_per_node)."
            )
        elif busy < 0.3:
            found.append(
                f"the teacher's {layout.teacher} GPUs work {busy:.0%} of the time: "
                "engine.teacher_gpus_per_node can be smaller where batch.mini_batch x "
                "batch.samples divides by the rest."
            )
    if layout.rollout:
        found += _rollout_apart(config, seconds)
    generates = config.policy.student["name"]
    fitted = not rates.iteration.source.startswith("measured")
    if layout.schedule == "local" and generates == "transformers" and fitted:
        found.append(
            "generation without vLLM on a GPU (policy.student is transformers) takes several times "
            "the seconds shown, which are vLLM's: policy=vllm where its memory fits too, or "
            "measured=RUN after a few steps."
        )
    if padding > 0.1:
        found.append(
            f"{padding:.0%} of the tokens that the update computes are padding: engine.packed=true "
            "computes none."
        )
    return tuple(found)


def _rollout_apart(config: TrainConfig, seconds: StepSeconds) -> list[str]:
    """Returns advice on GPUs that only generate."""
    found = []
    if not config.engine.ahead:
        found.append(
            "the GPUs that generate and those that train wait for each other: engine.ahead=1."
        )
    share = config.engine.student_server.memory_share
    if share < 0.8:
        found.append(
            f"the student's servers have GPUs of their own, but {share:.0%} of their memory: "
            "engine.student_server.memory_share=0.85."
        )
    trained = seconds.old_logp + seconds.update
    for slow, fast, which in (
        (seconds.generate, trained, "training waits for the rollout"),
        (trained, seconds.generate, "the rollout waits for training"),
    ):
        if config.engine.ahead and slow > 1.5 * fast:
            found.append(
                f"{which} ({slow:.0f} s against {fast:.0f} s): change engine.rollout_gpus_per_node."
            )
    return found


def _does_not_fit(
    config: TrainConfig, layout: Layout, memory: Sequence[GpuMemory], gpu: Gpu
) -> list[str]:
    found = []
    for role in memory:
        for phase, parts in role.phases.items():
            needed = sum(parts.values())
            if needed <= gpu.memory:
                continue
            largest = max(parts, key=lambda name: parts[name])
            found.append(
                f"does not fit: {role.role}, {phase}: {needed / GIB:.1f} GiB of "
                f"{gpu.memory / GIB:.1f}; most is {largest} ({parts[largest] / GIB:.1f} GiB). "
                + _remedy(config, layout, role, phase, largest)
            )
    return found


def _remedy(config: TrainConfig, layout: Layout, role: GpuMemory, phase: str, largest: str) -> str:
    local = config.engine.name == "local"
    if phase in ("score", "teacher"):
        more = _more_gpus(config, layout, "teacher")
        return f"{more} or lower engine.teacher_server.memory_share."
    if phase == "sync":
        return "Set engine.offload=true, or use more GPUs for the student."
    if phase == "rollout":
        if role.role == "rollout":
            return "Lower engine.student_server.memory_share."
        if local:
            return "Lower rollout.concurrency, or use engine=verl over several GPUs."
        return "Lower engine.student_server.memory_share, or set engine.offload=true."
    if largest in ("activations", "head"):
        tokens = "pass" if phase == "old log-probs" else "micro_batch"
        words = [f"engine.max_tokens_per_{tokens}", "rollout.max_response_tokens"]
        if phase == "update" and not config.model.student.gradient_checkpointing:
            words.insert(0, "model.student.gradient_checkpointing=true, or lower")
        return f"Lower {' or '.join(words)}."
    ways = ["engine=verl over several GPUs"]
    if not local:
        ways = [f"more GPUs than these {role.gpus} for the student (engine.gpus_per_node, nodes)"]
    if config.model.student.lora is None:
        ways.append(
            "LoRA ('model.student.lora={r: 16, lora_alpha: 32, target_modules: all-linear}')"
        )
    if local and "teacher" in role.phases[phase]:
        ways.append("a teacher on another machine (policy=server)")
    return f"Use {', or '.join(ways)}."


def _more_gpus(config: TrainConfig, layout: Layout, role: str) -> str:
    """Returns the beginning of a sentence that gives a server more GPUs, of those that it has."""
    if role in layout.wider:
        return f"Raise engine.{role}_server.tensor_parallel"
    gpus = (layout.teacher if role == "teacher" else layout.generating) // config.engine.nodes
    return f"Give the {role} more GPUs than these {gpus},"


def _servers(config: TrainConfig, layout: Layout, room: Mapping[str, float]) -> list[str]:
    if not room:
        return []
    found = []
    if room.get("teacher", 1) < 1:
        found.append(
            "a teacher's server cannot start: its share of the memory holds not one sequence of "
            "full length beside the weights. "
            f"{_more_gpus(config, layout, 'teacher')} or raise engine.teacher_server.memory_share."
        )
    if room["cache"] <= 0 or room["holds"] < 1:
        return [
            *found,
            "a student's server cannot start: its share of the memory holds not one sequence "
            f"beside the weights. {_more_gpus(config, layout, 'student')} or raise "
            "engine.student_server.memory_share.",
        ]
    if room["holds"] < min(room["wanted"], config.engine.student_server.max_sequences):
        found.append(
            f"a student's server holds {room['holds']:.0f} sequences of mean length at once and "
            f"gets {room['wanted']:.0f}: they run in waves. engine.student_server.memory_share, "
            "tensor_parallel or more GPUs make room."
        )
    if room["allowed"] < min(room["wanted"], layout.student_server.slots + 1):
        found.append(
            f"rollout.concurrency={config.rollout.concurrency} x engine.rollout_workers="
            f"{config.engine.rollout_workers} lets a server have {room['allowed']:.0f} episodes "
            f"at once of its {room['wanted']:.0f}: raise either."
        )
    return found
