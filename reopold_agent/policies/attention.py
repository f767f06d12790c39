"""Attention over packed rows: several rows one after the other in one sequence, without padding.

Padding costs memory and time: with lengths that are spread exponentially and few rows in a pass, a
third of both. `attend_by_rows` gives a model an attention function that keeps rows apart. It finds
them as transformers' own flash attention does: there is no mask, and the position ids restart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from reopold_agent.config import EngineConfig
from reopold_agent.errors import ConfigError, first_line


def packed_kernel(engine: EngineConfig, device: str) -> str | None:
    """Returns the attention kernel of a run's packed rows; None where it pads them.

    Args:
        engine: the settings ``packed`` and ``attention``.
        device: type of the device that computes, ``cpu`` or ``cuda``.

    Raises:
        ConfigError: the kernel that is asked for is not installed, or does not run there.
    """
    asked, on_gpu = engine.attention, device == "cuda"
    if asked in _GPU_KERNELS:
        package, advice = _GPU_KERNELS[asked]
        if not on_gpu:
            raise ConfigError(
                f"engine.attention={asked} needs an NVIDIA GPU, and this run computes on a CPU.\n"
                "Use engine.attention=auto, which takes sdpa there."
            )
        if asked not in installed_kernels():
            raise ConfigError(
                f"engine.attention={asked} needs {package}, which is not installed.\n"
                f"Run {advice}, or use engine.attention=auto, which takes what there is."
            )
    # A kernel that is asked for is one of packed rows.
    packed = on_gpu or asked != "auto" if engine.packed is None else engine.packed
    if not packed:
        return None
    if asked != "auto":
        return asked
    return installed_kernels()[0] if on_gpu else "sdpa"


def installed_kernels() -> list[str]:
    """Returns the kernels of packed rows that a GPU can use here, fastest first."""
    kernels = ["sdpa"]
    if torch.__version__ >= "2.11":  # 2.10's has neither scale nor window
        kernels.insert(0, "varlen")
    if find_spec("flash_attn") is not None:
        kernels.insert(0, "flash_attention_2")
    return kernels


def attend_by_rows(model: nn.Module, kernel: str) -> None:
    """Makes a loaded model attend within packed rows, and within the windows of its pictures.

    Padded batches and generation, which come with a mask, are computed as with ``sdpa``.

    Args:
        model: of Hugging Face.
        kernel: what `packed_kernel` returns.

    Raises:
        ConfigError: the kernel's package is installed and does not load.
    """
    name = IMPLEMENTATION + kernel
    AttentionInterface.register(name, partial(_attention, kernel=_load(kernel)))
    AttentionMaskInterface.register(name, _mask)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = name


def attends_by_rows(implementation: str) -> bool:
    """Returns whether a model with this attention implementation takes packed rows."""
    return implementation.startswith(IMPLEMENTATION)


def shares_prompts(implementation: str) -> bool:
    """Returns whether packed rows can go on from the prompt of an earlier row."""
    return implementation == f"{IMPLEMENTATION}sdpa"


IMPLEMENTATION = "reopold_flash_"
"""Begins the names of the attention implementations. Because of "flash" in it, Qwen's vision tower
hands over the bounds of all its windows at once, rather than one call per window."""

_GPU_KERNELS = {
    "flash_attention_2": ("flash-attn", "pip install flash-attn --no-build-isolation"),
    "varlen": ("PyTorch 2.11 or later", "pip install -U torch"),
}
"""What each kernel that needs a GPU needs besides, and how to get that."""

_Kernel = Callable[..., Tensor]
"""Takes queries, keys and values (tokens, heads, dim), the rows' bounds (int32), the longest row's
length, and ``scale``, ``causal``, ``window`` and ``dropout``; returns the form of the queries."""


def _load(kernel: str) -> _Kernel | None:
    """Returns a kernel; None for ``sdpa``, which is called row by row."""
    if kernel == "sdpa":
        return None
    try:
        return {"varlen": _varlen, "flash_attention_2": _flash_attention_2}[kernel]()
    except ImportError as error:
        others = ", ".join(each for each in installed_kernels() if each != kernel)
        raise ConfigError(
            f"engine.attention={kernel} does not load: {first_line(error)}\n"
            f"Install it for this PyTorch ({torch.__version__}), or take another: {others}."
        ) from error


def _flash_attention_2() -> _Kernel:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    def attend(
        query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, *,
        scale: float | None, causal: bool, window: int | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        out: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            bounds,
            bounds,
            longest,
            longest,
            dropout_p=dropout,
            softmax_scale=scale,
            causal=causal,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )
        return out

    return attend


def _varlen() -> _Kernel:
    from torch.nn.attention.varlen import varlen_attn

    groups = "enable_gqa" in signature(varlen_attn).parameters  # from 2.12 on

    def attend(
        query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, *,
        scale: float | None, causal: bool, window: int | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        if dropout:
            raise ConfigError(
                "engine.attention=varlen has no dropout, and the model's attention_dropout is "
                f"{dropout}.\nUse engine.attention=sdpa or flash_attention_2."
            )
        shared = query.shape[1] // key.shape[1]
        if shared > 1 and not groups:
            key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
        settings: dict[str, Any] = {"enable_gqa": shared > 1} if groups else {}
        left = -1 if window is None else window - 1
        return varlen_attn(  # type: ignore[return-value]
            query,
            key,
            value,
            bounds,
            bounds,
            longest,
            longest,
            scale=scale,
            window_size=(left, 0 if causal else -1),
            **settings,
        )

    return attend


def _runs_here(query: Tensor) -> bool:
    """Returns whether the GPU kernels take these queries."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Returns no mask for rows without padding, and else that of ``sdpa``."""
    if attention_mask is None:
        return None
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: _Kernel | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends within rows; has the arguments and results of transformers' attention functions.

    Rows are given by ``cu_seq_lens_q`` (the vision tower's windows), else by ``position_ids`` of a
    batch of one sequence, each row beginning where they do not go on. One that begins above 0 goes
    on from the last one that begins at 0, as far as that place.
    """
    begins: list[int] = []
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    if attention_mask is not None:
        if query.shape[2] == 1 and query.shape[1] > key.shape[1] and not dropout:
            return _decode(query, key, value, attention_mask, scaling), None
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, causal
        )
        return out, None
    if cu_seq_lens_q is not None:
        bounds, lengths = _bounds(cu_seq_lens_q)
    elif position_ids is not None and len(query) == 1:
        bounds, lengths, begins = _bounds_of_positions(position_ids)
    else:
        bounds, lengths = None, [query.shape[2]]
    device = query.device.type
    if torch.is_autocast_enabled(device):  # rotary embeddings made them float32
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if kernel is not None and bounds is not None and _runs_here(query):
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
        window = sliding_window if causal else None
        out = kernel(
            query, key, value, bounds, max(lengths),
            scale=scaling, causal=causal, window=window, dropout=dropout,
        )  # fmt: skip
        return out[None], None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length, begin, mask = key.shape[2], key.shape[2] - query.shape[2], None
        if causal and (begin or (sliding_window is not None and length > sliding_window)):
            places = torch.arange(length, device=query.device)
            back = places[begin:, None] - places
            mask = ((back >= 0) & (back < (sliding_window or length)))[None, None]
        out, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, causal)
        return out

    if len(lengths) == 1:
        return attend(query, key, value), None
    parts = [list(torch.split(each, lengths, dim=2)) for each in (query, key, value)]
    first = 0
    for row, begin in enumerate(begins):
        if not begin:
            first = row
            continue
        for part in parts[1:]:
            part[row] = torch.cat([part[first][:, :, :begin], part[row]], dim=2)
    # Rows of one length, such as the windows of pictures, are computed by one call.
    alike: dict[tuple[int, int], list[int]] = {}
    for row, length in enumerate(lengths):
        alike.setdefault((length, parts[1][row].shape[2]), []).append(row)
    found: list[Tensor] = [query] * len(lengths)
    for rows in alike.values():
        out = attend(*(torch.cat([part[row] for row in rows]) for part in parts))
        for row, each in zip(rows, torch.split(out, 1), strict=True):
            found[row] = each
    return torch.cat(found, dim=1), None


def _decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None
) -> Tensor:
    """Attends with one query per row, in the form of transformers' functions.

    Heads with the same keys are taken for queries of one head: `sdpa_attention_forward` would copy
    all cached keys and values for each head.
    """
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, width)
    out = nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask, scale=scaling
    )
    return out.reshape(rows, 1, heads, width)


# Every layer of a pass gives the same tensor: reading it from the GPU once is enough.
@lru_cache(maxsize=8)
def _bounds(bounds: Tensor) -> tuple[Tensor, list[int]]:
    """Returns the bounds as int32, and the lengths between them."""
    return bounds.to(torch.int32), bounds.diff().tolist()


@lru_cache(maxsize=8)
def _bounds_of_positions(position_ids: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Returns for a packed sequence the bounds as int32, and each row's length and first place."""
    breaks = torch.nonzero(position_ids[0].diff() != 1)[:, 0] + 1
    ends = breaks.new_tensor([0]), breaks, breaks.new_tensor([position_ids.shape[1]])
    bounds = torch.cat(ends)
    return bounds.to(torch.int32), bounds.diff().tolist(), position_ids[0, bounds[:-1]].tolist()
