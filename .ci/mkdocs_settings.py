"""Tables of settings for the site, from the dataclasses that check them and their docstrings.

The default shown is that of ``python -m reopold_agent.train env=pixel_reasoner``, composed, and
beside it that of the dataclass where the two differ: what a group or a recipe leaves unset.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from typing import Any, get_args, get_type_hints

import yaml
from griffe import Docstring, DocstringSectionAttributes, Parser
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra

from reopold_agent.cli.hydra import plain_values

_DEMO = "env=pixel_reasoner"


def tables(places: list[str]) -> str:
    """Markdown for dataclasses given as ``module:Class`` or, with their key, ``module:Class:key``.

    A key is the section of the composed training configuration that the class checks, ``.`` all of
    it; a class without one has the defaults of its own only.

    Raises:
        ValueError: a setting is explained nowhere, neither by itself nor in the class's text.
    """
    return "\n\n".join(_table(*place.split(":")) for place in places)


@functools.lru_cache
def _composed() -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_module("reopold_agent.configs", version_base="1.3"):
        return plain_values(compose("train", [_DEMO]))


def _table(module: str, name: str, key: str | None = None) -> str:
    kind = getattr(importlib.import_module(module), name)
    text_of_class = kind.__doc__ or ""
    hints = get_type_hints(kind)
    explained = _explained(kind)
    run = _at(key) if key else None
    lines = [f"### `{(key or name).strip('.') or name}`", "", _prose(text_of_class), ""]
    columns = ["setting", "what", "type", "default", *(["in the default run"] if run else [])]
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for field in dataclasses.fields(kind):
        words = explained.get(field.name) or _of_section(hints[field.name])
        for other, text in explained.items():
            words = words or (f"see `{other}`" if f"`{field.name}`" in text else "")
        if not words and f"`{field.name}`" in _prose(text_of_class):
            words = "as above"
        if not words:
            raise ValueError(f"{name}.{field.name} is explained in no docstring")
        cells = [f"`{field.name}`", words, _type(hints[field.name]), _default(field)]
        if run:
            cells.append(_value(run[field.name]) if field.name in run else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _of_section(hint: Any) -> str:
    """A section's own first sentence, for settings that are sections."""
    sections = [each for each in (hint, *get_args(hint)) if dataclasses.is_dataclass(each)]
    return _prose(sections[0].__doc__ or "").split(". ")[0].split("\n")[0] if sections else ""


def _at(key: str) -> dict[str, Any]:
    values: Any = _composed()
    for part in filter(None, key.split(".")):
        values = values[part]
    return dict(values)


def _explained(kind: type) -> dict[str, str]:
    """Returns the description of each setting from the docstrings of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        for section in Docstring(base.__doc__ or "").parse(Parser.google):
            if isinstance(section, DocstringSectionAttributes):
                for each in section.value:
                    for one in each.name.split(","):
                        found[one.strip()] = " ".join(each.description.split())
        # Entries after the section, which Google's style does not know.
        for line in re.finditer(r"^ {4,8}([\w, ]+): (.+(?:\n {12,}.+)*)", base.__doc__ or "", re.M):
            for one in line[1].split(","):
                if one.strip() in {f.name for f in dataclasses.fields(base)}:
                    found.setdefault(one.strip(), " ".join(line[2].split()))
    return {name: text.replace("``", "`").replace("|", "\\|") for name, text in found.items()}


def _prose(text: str) -> str:
    """The docstring up to its list of settings."""
    kept = re.split(r"\n\s*(?:Attributes|Args|Raises):\n", text)[0]
    paragraphs = [" ".join(part.split()) for part in kept.split("\n\n")]
    return "\n\n".join(paragraphs).replace("``", "`")


def _type(hint: Any) -> str:
    if any(dataclasses.is_dataclass(each) for each in (hint, *get_args(hint))):
        return "section"
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return f"`{re.sub(r'typing[.]', '', name).replace('|', 'or')}`"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _value(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _value(field.default_factory())
    return "required"


def _value(value: Any) -> str:
    if dataclasses.is_dataclass(value) or (isinstance(value, dict) and len(str(value)) > 40):
        return "see below"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return f"`{text.removesuffix('...').strip()}`"
