"""Peak memory of training at real size, by PyTorch's tracker on fake tensors, against the plan.

    python benchmarks/plan_memory.py [--layers N]

Builds one rank of the student as verl's FSDP2 engine does (bfloat16 over float32 master weights,
layers wrapped one by one, gradient checkpointing, the chunked head) on fake CPU tensors, which have
shapes but no storage, and makes two updates under `torch.distributed._tools.MemTracker`. The
collectives are those of a fake process group. Attention is one operation that keeps what flash
attention keeps: q, k, v, the output and a float32 per head and token. Takes no GPU, about a minute
per line and less than 1 GB.

Not seen by this: CUDA contexts, NCCL's buffers, the allocator's fragmentation (`PROCESS_RESERVE`)
and servers; there is one stream, so that the next layer is not fetched while one computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reopold_agent.plan.compose import plan_run
from reopold_agent.plan.estimate import largest_pass, trainer_memory
from reopold_agent.plan.hardware import GIB
from reopold_agent.policies.architecture import (
    Architecture,
    decoder_parameters,
    tower_parameters,
)
from reopold_agent.policies.logprobs import token_logprobs

ATTENTION = "flash_as_planned"
LORA = "{r: 16, lora_alpha: 32, target_modules: all-linear}"


@dataclass(frozen=True)
class Update:
    """One micro-batch of an update, not its first.

    Attributes:
        student: shapes of the student.
        ranks: GPUs over which it is sharded.
        rows, width: shape of the token ids; packed rows are one.
        responses: tokens with a log-prob.
        pictures: tokens of each picture.
        dense_mask: whether attention reads a mask of rows x width x width.
        lora: rank of adapters on all linear layers of the decoder, or 0 for all weights.
        checkpointing: whether activations are recomputed.
        gradients: False for the pass that computes the old log-probs.
    """

    student: Architecture
    ranks: int
    rows: int
    width: int
    responses: int
    pictures: Sequence[int] = ()
    dense_mask: bool = False
    lora: int = 0
    checkpointing: bool = True
    gradients: bool = True


class _Tracker(MemTracker):  # type: ignore[no-untyped-call]
    """Tracks the whole peak only: peaks of all modules take a hundred times as long."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device] = now["Total"]
                self._peak_mem_snap[device] = dict(now)

    def _track_module_params_and_buffers(
        self, module: nn.Module, install_grad_hooks: bool = True
    ) -> tuple[int, int]:
        # Its hooks, which tell gradients from other tensors, refuse weights without gradients.
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


class _Attention(torch.autograd.Function):
    """Keeps what flash attention keeps, and returns tensors of the right shapes."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        kept = [q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32)]
        if mask is not None:
            kept.append(mask.to(q.dtype))  # a bias, which the kernel adds to the scores
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(each) for each in ctx.saved_tensors[:3]), None


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    if attention_mask is not None:  # PyTorch's kernels with a mask want all heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out: Tensor = _Attention.apply(q, k, v, attention_mask)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


class _Lora(nn.Module):
    """A linear layer with an adapter, as in peft."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        added: Tensor = self.base(states) + self.up(self.down(states)) * 2.0
        return added


def _adapt(layer: nn.Module, rank: int) -> None:
    for module in list(layer.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, _Lora(child, rank))


class _Head(nn.Module):
    """The output embedding, which returns log-probs only (`policies.logprobs`)."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        return token_logprobs(hidden_ND, self.weight, targets_N, with_entropy=True)[0]


class _Student(nn.Module):
    """A student's training pass over one micro-batch, without operations that depend on values."""

    def __init__(self, update: Update) -> None:
        super().__init__()
        self.update = update
        model = build(update.student)
        for part in (model.config, *(m.config for m in model.modules() if hasattr(m, "config"))):
            part._attn_implementation = ATTENTION
        if update.checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        self.decoder = model.model.language_model if update.student.vision else model.model
        self.vision = model.model.visual if update.student.vision else None
        self.head = _Head(model.lm_head.weight)
        if update.lora:
            self.requires_grad_(False)
            for layer in self.decoder.layers:
                _adapt(layer, update.lora)
        self.train()

    def forward(self) -> Tensor:
        rows, width = self.update.rows, self.update.width
        embeds = self.decoder.embed_tokens(torch.zeros(rows, width, dtype=torch.int64))
        if self.update.lora:
            embeds = embeds.detach().requires_grad_()  # as peft's enable_input_require_grads
        if self.vision is not None and self.update.pictures:
            seen = self._see(sum(self.update.pictures), len(self.update.pictures))
            mask = torch.zeros(rows, width, 1, dtype=torch.bool).expand_as(embeds)
            embeds = embeds.masked_scatter(mask, seen)
        bounds = None
        if self.update.dense_mask:
            bounds = torch.ones(rows, 1, width, width, dtype=torch.bool)
        positions = torch.zeros(3 if self.vision is not None else rows, rows, width).long()
        hidden = self.decoder(
            inputs_embeds=embeds,
            position_ids=positions if self.vision is not None else positions[0],
            attention_mask={"full_attention": bounds},
            use_cache=False,
        ).last_hidden_state
        chosen = torch.zeros(self.update.responses, dtype=torch.int64)
        logps: Tensor = self.head(hidden.reshape(rows * width, -1)[chosen], chosen)
        return logps.sum()

    def _see(self, tokens: int, count: int) -> Tensor:
        shape = self.update.student.vision
        assert shape is not None
        assert self.vision is not None
        patches = tokens * shape.merge**2
        places = {
            "window_index": torch.zeros(tokens, dtype=torch.int64),
            "cu_window_seqlens": torch.zeros(count + 1, dtype=torch.int32),
        }
        if shape.places:  # learned ones, of which four are mixed
            places = {
                "bilinear_indices": torch.zeros(4, patches, dtype=torch.int64),
                "bilinear_weights": torch.zeros(4, patches),
            }
        output = self.vision(
            torch.zeros(patches, shape.patch_values),
            torch.ones(count, 3, dtype=torch.int64),
            position_ids=torch.zeros(patches, 2, dtype=torch.int64),
            cu_seqlens=torch.zeros(count + 1, dtype=torch.int32),
            **places,
        )
        seen: Tensor = output.pooler_output
        return seen


def build(shape: Architecture, attention: str | None = None) -> Any:
    """Returns transformers' model with a checkpoint's shapes: Qwen2, Qwen2.5-VL or Qwen3-VL."""
    text, vision = shape.text, shape.vision
    entries: dict[str, Any] = {
        "hidden_size": text.hidden,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "intermediate_size": text.mlp,
        "vocab_size": text.vocab,
    }
    config: Any
    if vision is None:
        config = Qwen2Config(**entries, tie_word_embeddings=text.tied)
    else:
        tower = {
            "depth": vision.depth,
            "hidden_size": vision.width,
            "num_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "out_hidden_size": vision.out,
        }
        sections = [text.head_dim // 8, *[text.head_dim * 3 // 16] * 2]
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        entries["rope_parameters"] = rope
        kind: Any = Qwen2_5_VLConfig
        if text.head_norms:
            kind = Qwen3VLConfig
            entries["head_dim"] = text.head_dim
            features = list(range(vision.mergers - 1))
            tower |= {"deepstack_visual_indexes": features}  # type: ignore[dict-item]
        config = kind(text_config=entries, vision_config=tower, tie_word_embeddings=text.tied)
    config._attn_implementation = attention
    classes: dict[type, Any] = {
        Qwen2Config: Qwen2ForCausalLM,
        Qwen2_5_VLConfig: Qwen2_5_VLForConditionalGeneration,
        Qwen3VLConfig: Qwen3VLForConditionalGeneration,
    }
    return classes[type(config)](config)


@contextmanager
def one_of(ranks: int) -> Iterator[DeviceMesh]:
    """Makes this process one of ``ranks`` whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def _nonzero(values: Tensor, as_tuple: bool = False) -> Any:
    """Replaces `torch.nonzero`, whose shape depends on values: everything is nonzero."""
    index = torch.arange(values.shape[0])
    return (index, index) if as_tuple else index[:, None]


def measure(update: Update) -> dict[str, int]:
    """Returns the bytes at the peak of two updates, by `MemTracker`'s kinds and in all."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    with one_of(update.ranks) as mesh, FakeTensorMode(), patch("torch.nonzero", _nonzero):
        student = _Student(update)
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        wrapped = [*student.decoder.layers, *(student.vision.blocks if student.vision else [])]
        if not update.student.text.tied:
            wrapped += [student.decoder.embed_tokens, student.head]
        for module in [*wrapped, student]:
            fully_shard(module, mesh=mesh, mp_policy=precision)
        trained = [p for p in student.parameters() if p.requires_grad]
        # AdamW's two moments. Its own temporaries, of one parameter at a time, stay below the
        # peak of the backward pass, and through DTensors they would count as whole tensors.
        moments = [torch.empty(2, *p.to_local().shape) for p in trained]  # type: ignore[attr-defined]
        if update.gradients:  # as after the first micro-batch of a mini-batch
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        tracker = _Tracker()
        grads = [p.grad for p in trained if p.grad is not None]
        tracker.track_external(student, *moments, *grads)
        with tracker, torch.set_grad_enabled(update.gradients):
            logps = student()
            if update.gradients:
                logps.backward()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {str(getattr(kind, "value", kind)): int(size) for kind, size in peak.items()}


CASES = {
    f"{size}, {rows}, {what}": (*recipe, *words, *more)
    for size, recipe in (
        ("3B", ("recipe=paper_agentic",)),
        ("7B", ("recipe=paper_geometry_7b",)),
    )
    for rows, words in (("packed", ("engine.packed=true",)), ("padded", ("engine.packed=false",)))
    for what, more in (("all weights", ()), ("LoRA", (f"model.student.lora={LORA}",)))
}
HEADER = ("student", "micro-batch", "phase", "tracked, GiB", "plan, GiB", "plan / tracked")


@dataclass(frozen=True)
class Line:
    """A case's phase, and its bytes by the tracker and by the plan."""

    case: str
    update: Update
    phase: str
    tracked: float
    planned: float

    def cells(self) -> list[str]:
        """Returns the cells of the table, under `HEADER`."""
        return [
            self.case,
            f"{self.update.rows} x {self.update.width}",
            self.phase,
            f"{self.tracked / GIB:.1f}",
            f"{self.planned / GIB:.1f}",
            f"{self.planned / self.tracked:.2f}",
        ]


def compare(case: str, words: Sequence[str], phase: str, layers: int | None = None) -> Line:
    """Tracks the trainer's part of a phase of a plan.

    Args:
        case: its name.
        words: settings of the run.
        phase: ``update`` or ``old log-probs``.
        layers: fewer layers of decoder and vision tower; None for all.
    """
    plan = plan_run(words)
    student, updating = plan.student, phase == "update"
    if layers is not None:
        student = _with_layers(student, layers)
    trainer = trainer_memory(plan.config, plan.layout, student)
    largest = largest_pass(plan.config, plan.work, plan.layout, updating=updating)
    pictures = plan.work.picture_share * largest.tokens
    held = (trainer.updating if updating else trainer.scoring)(student, largest, pictures)
    spec = plan.config.model.student
    each = plan.work.prompt_pictures.tokens
    update = Update(
        student,
        plan.layout.student,
        1 if largest.packed else largest.rows,
        round(largest.tokens if largest.packed else largest.longest),
        round(largest.tokens * plan.work.response / plan.work.length),
        [round(each)] * round(pictures / each) if student.vision else [],
        dense_mask=not largest.packed,
        lora=int(spec.lora["r"]) if spec.lora else 0,
        checkpointing=spec.gradient_checkpointing,
        gradients=updating,
    )
    return Line(case, update, phase, measure(update)["Total"], sum(held.values()))


def _with_layers(model: Architecture, layers: int) -> Architecture:
    text = replace(model.text, layers=layers)
    text = replace(text, parameters=decoder_parameters(text))
    vision = model.vision and replace(model.vision, depth=layers)
    vision = vision and replace(vision, parameters=tower_parameters(vision))
    return replace(model, text=text, vision=vision)


def main() -> None:
    """Prints the table of docs/plan.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, help="of decoder and vision tower; default: all")
    options = parser.parse_args()
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for case, words in CASES.items():
        for phase in ("old log-probs", "update"):
            line = compare(case, words, phase, options.layers)
            print(f"| {' | '.join(line.cells())} |", flush=True)


if __name__ == "__main__":
    main()
