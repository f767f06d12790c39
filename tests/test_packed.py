"""Packed rows: the same numbers as padded ones, without padding."""

from __future__ import annotations

import pytest

from reopold_agent.config import EngineConfig
from reopold_agent.errors import ConfigError
from reopold_agent.policies import attention
from reopold_agent.policies.attention import packed_kernel


@pytest.mark.parametrize(
    ("packed", "asked", "device", "installed", "kernel"),
    [
        (None, "auto", "cpu", ["varlen", "sdpa"], None),
        (None, "sdpa", "cpu", ["sdpa"], None),
        (True, "auto", "cpu", ["flash_attention_2", "varlen", "sdpa"], "sdpa"),
        (None, "auto", "cuda", ["flash_attention_2", "varlen", "sdpa"], "flash_attention_2"),
        (None, "auto", "cuda", ["varlen", "sdpa"], "varlen"),
        (True, "auto", "cuda", ["sdpa"], "sdpa"),
        (None, "sdpa", "cuda", ["varlen", "sdpa"], "sdpa"),
        (None, "flash_attention_2", "cuda", ["flash_attention_2", "sdpa"], "flash_attention_2"),
        (False, "auto", "cuda", ["varlen", "sdpa"], None),
        (False, "sdpa", "cuda", ["sdpa"], None),
    ],
)
def test_where_rows_are_packed_and_by_which_kernel(
    monkeypatch: pytest.MonkeyPatch,
    packed: bool | None,
    asked: str,
    device: str,
    installed: list[str],
    kernel: str | None,
) -> None:
    monkeypatch.setattr(attention, "installed_kernels", lambda: installed)
    assert packed_kernel(EngineConfig(packed=packed, attention=asked), device) == kernel


@pytest.mark.parametrize("asked", ["flash_attention_2", "varlen"])
def test_a_kernel_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    with pytest.raises(ConfigError, match=r"computes on a CPU\.\nUse engine\.attention=auto"):
        packed_kernel(EngineConfig(attention=asked), "cpu")
    monkeypatch.setattr(attention, "installed_kernels", lambda: ["sdpa"])
    with pytest.raises(ConfigError, match=rf"{asked} needs .*not installed\.\nRun pip install"):
        packed_kernel(EngineConfig(attention=asked), "cuda")
    with pytest.raises(ConfigError, match=r"pads them\.\nLeave out engine\.packed"):
        EngineConfig(packed=False, attention=asked)
