"""Tab completion: ``reopold completion bash|zsh|fish`` prints what a shell has to read.

The script asks ``reopold completion query`` with the line so far in ``COMP_LINE``; commands that
Hydra composes are completed by Hydra's own plugin, with the plugins' options.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from importlib import resources

from reopold_agent.cli import COMMANDS
from reopold_agent.errors import ConfigError

_HYDRA = ("train", "evaluate", "serve", "plan", "play", "doctor")
_FLAGS = ("--help", "--cfg", "--multirun", "--resolve", "--package", "--config-dir")
_STUDY = ("name=", "out=", "seeds=", "jobs=", "only=", "steps=", "report=only", "docs=")
_OWN = {
    "plan": (
        *("gpus=", "gpu=", "mfu=", "bandwidth=", "overhead=", "prompt=", "pictures=", "response="),
        *("observation=", "schedule=shared", "schedule=pools", "measured=", "--json", "--paper"),
    ),
    "play": (
        *("split=train", "split=eval", "index=", "folder=", "record=", "keep=right", "keep=all"),
        *(f"pictures={how}" for how in ("auto", "kitty", "iterm", "sixel", "blocks", "path")),
        "tokenizer=",
    ),
    "doctor": ("judge=", "online=true", "seconds=", "--json"),
}
"""Words of commands that take those of train too."""

BASH = """\
_reopold() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n'
    local word="${line##* }" last="${COMP_WORDS[COMP_CWORD]}"
    # Bash takes = and : for ends of words: what lies before the last one is not to be repeated.
    case "$last" in =|:) last="" ;; esac
    local before="${word%"$last"}" found
    found=($(COMP_LINE="$line" reopold completion query 2>/dev/null))
    COMPREPLY=("${found[@]#"$before"}")
    case "${found[*]}" in
        *=|*.|*/) compopt -o nospace 2>/dev/null ;;
    esac
}
complete -o default -F _reopold reopold
"""

ZSH = """\
#compdef reopold
_reopold() {
    local -a found open
    found=("${(@f)$(COMP_LINE="${LBUFFER}" reopold completion query 2>/dev/null)}")
    found=(${found:#})
    open=(${(M)found:#*[=./]})
    found=(${found:#*[=./]})
    (( $#open )) && compadd -S '' -a open
    (( $#found )) && compadd -a found
    (( $#open + $#found )) || _files
}
compdef _reopold reopold
"""

FISH = """\
function __reopold
    COMP_LINE=(commandline -cp) reopold completion query 2>/dev/null
end
complete -c reopold -a '(__reopold)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
REMOVAL = {
    "bash": "complete -r reopold; unset -f _reopold\n",
    "zsh": "compdef -d reopold; unfunction _reopold\n",
    "fish": "complete -e -c reopold; functions -e __reopold\n",
}

USAGE = """\
Usage: reopold completion bash|zsh|fish

Prints a script that completes commands, groups, their options, and settings. To have it always:
  bash   echo 'eval "$(reopold completion bash)"' >> ~/.bashrc
  zsh    echo 'autoload -Uz compinit && compinit && eval "$(reopold completion zsh)"' >> ~/.zshrc
  fish   reopold completion fish > ~/.config/fish/completions/reopold.fish
"""


def candidates(line: str) -> list[str]:
    """What the last word of a command line may become; whole words.

    Args:
        line: up to the cursor; a space at its end begins a new word.
    """
    words = line.split()[1:]
    word = "" if not words or line.endswith(" ") else words.pop()
    if not words:
        return _starting(COMMANDS, word)
    command, *given = words
    if command == "completion":
        return _starting(SCRIPTS, word) if not given else []
    if command == "study":
        if "--" in given:
            return _by_hydra("train", given[given.index("--") + 1 :], word)
        return _starting((*_studies(), *_STUDY, "--"), word)
    if command not in _HYDRA:
        return _starting(("--help",), word) if word.startswith("-") else []
    if word.startswith("-"):
        own_flags = [each for each in _OWN.get(command, ()) if each.startswith("-")]
        return _starting([*own_flags, "--help"] if command in _OWN else _FLAGS, word)
    if command == "evaluate":
        return [*_of_evaluate(word), *_by_hydra("evaluate", given, word)]
    if command == "serve":
        return [*_starting(("model=",), word), *_by_hydra("serve", given, word)]
    own = _OWN.get(command, ())
    keys = {each.partition("=")[0] for each in own}
    known = [each for each in given if each.partition("=")[0] not in keys]
    return sorted({*_starting(own, word), *_by_hydra("train", known, word)})


def _by_hydra(config: str, given: list[str], word: str) -> list[str]:
    """What Hydra's completion says for a configuration, without groups of other commands."""
    from reopold_agent.hydra_groups import groups_of

    name = word.partition("=")[0]
    if "=" in word and name == "model" and config != "train":
        return []  # a checkpoint: files
    said = io.StringIO()
    os.environ["COMP_LINE"] = " ".join(["reopold", *given, word])
    arguments, sys.argv = sys.argv, ["reopold", "-sc", "query=fish"]
    try:
        with contextlib.redirect_stdout(said):
            _main_of(config)
    finally:
        sys.argv = arguments
    own = groups_of(config)
    foreign = {f"{each}{end}" for each in _folders() if each not in own for end in ("=", "/", "")}
    foreign |= {"", "hydra", "default_batch=", "default_steps=", "batches."}  # not to be typed
    found = set(said.getvalue().split("\n")) - foreign
    # Of a group that has further groups below it, Hydra says neither = nor /.
    return sorted(f"{each}=" if each in own else each for each in found)


def _main_of(config: str) -> None:
    import hydra

    from reopold_agent.hydra_groups import prepare_groups

    prepare_groups([], config)
    hydra.main(version_base="1.3", config_path="pkg://reopold_agent.configs", config_name=config)(
        lambda _: None
    )()


def _folders() -> list[str]:
    configs = resources.files("reopold_agent") / "configs"
    return [each.name for each in configs.iterdir() if each.is_dir()]


def _of_evaluate(word: str) -> list[str]:
    import yaml

    text = (resources.files("reopold_agent") / "configs/benchmarks/all.yaml").read_text("utf-8")
    names = [f"benchmark={name}" for name in yaml.safe_load(text)]
    return _starting(["model=", *(names if word.startswith("benchmark=") else [])], word)


def _studies() -> list[str]:
    from reopold_agent.study.studies import STUDIES

    return [f"name={name}" for name in STUDIES]


def _starting(words: Iterable[str], word: str) -> list[str]:
    return [each for each in words if each.startswith(word)]


def main() -> int:
    """Command line."""
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    what, _, shell = word.partition("=")
    if what == "query":
        print("\n".join(candidates(os.environ.get("COMP_LINE", ""))))
    elif word in SCRIPTS or (what == "install" and shell in SCRIPTS):
        print(SCRIPTS[shell or word], end="")
    elif what == "uninstall" and shell in REMOVAL:
        print(REMOVAL[shell], end="")
    elif word in ("-h", "--help"):
        print(USAGE, end="")
    else:
        from reopold_agent.command import errors_for_people

        with errors_for_people():
            raise ConfigError(f"no completion for '{word}'. Known: {', '.join(SCRIPTS)}")
    return 0
