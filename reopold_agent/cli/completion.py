"""Tab completion: ``reopold completion bash|zsh|fish`` prints a script for the shell.

The script calls ``reopold completion query`` with the line so far in ``COMP_LINE``. Settings of
commands that Hydra composes are completed by Hydra's own plugin.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable
from importlib import resources

from reopold_agent.cli.commands import COMMANDS
from reopold_agent.errors import ConfigError

_HYDRA_COMMANDS = ("train", "evaluate", "judge", "serve", "plan", "play", "doctor", "preflight")
_FLAGS = ("--help", "--cfg", "--multirun", "--resolve", "--package", "--config-dir")
_STUDY_ARGUMENTS = ("name=", "out=", "seeds=", "jobs=", "only=", "steps=", "report=only", "docs=")
_EXPORT_ARGUMENTS = ("dtype=bfloat16", "dtype=float16", "dtype=float32", "push=", "--help")
_OWN_ARGUMENTS = {
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
    "preflight": ("episodes=", "gpu=", "gpus=", "--json"),
}
"""Arguments of commands besides those of ``train``, which they take too."""

BASH = """\
_reopold() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\\n'
    local word="${line##* }" last="${COMP_WORDS[COMP_CWORD]}"
    # Bash splits words at = and :, so what stands before the last one must not be repeated.
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

Prints a script that completes commands, groups, their options, and settings. To install it:
  bash   echo 'eval "$(reopold completion bash)"' >> ~/.bashrc
  zsh    echo 'autoload -Uz compinit && compinit && eval "$(reopold completion zsh)"' >> ~/.zshrc
  fish   reopold completion fish > ~/.config/fish/completions/reopold.fish
"""


def candidates(line: str) -> list[str]:
    """Returns the possible completions, whole words, of a command line's last word.

    Args:
        line: command line up to the cursor; a space at its end begins a new word.
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
            return _hydra_candidates("train", given[given.index("--") + 1 :], word)
        return _starting((*_study_names(), *_STUDY_ARGUMENTS, "--"), word)
    if command == "export":
        return _starting(_EXPORT_ARGUMENTS, word) if word else []
    if command not in _HYDRA_COMMANDS:
        return _starting(("--help",), word) if word.startswith("-") else []
    if word.startswith("-"):
        own_flags = [each for each in _OWN_ARGUMENTS.get(command, ()) if each.startswith("-")]
        return _starting([*own_flags, "--help"] if command in _OWN_ARGUMENTS else _FLAGS, word)
    if command == "evaluate":
        return _evaluate_candidates(given, word)
    if command == "judge":
        return _judge_candidates(given, word)
    if command == "serve":
        return [*_starting(("model=",), word), *_hydra_candidates("serve", given, word)]
    own = _OWN_ARGUMENTS.get(command, ())
    keys = {each.partition("=")[0] for each in own}
    settings = [each for each in given if each.partition("=")[0] not in keys]
    return sorted({*_starting(own, word), *_hydra_candidates("train", settings, word)})


def _evaluate_candidates(given: list[str], word: str) -> list[str]:
    """Returns benchmarks, settings, environments, and the settings of those that are given."""
    from reopold_agent.evaluate.words import SECTIONS, TRAINING_ONLY

    chosen = [each for each in given if each.startswith(("env=", "data="))]
    others = [each for each in given if each not in chosen]
    found = [*_benchmark_candidates(word), *_hydra_candidates("evaluate", others, word)]
    if word.startswith("env=") or any(each.startswith("env=") for each in chosen):
        sections = tuple(f"{each}{end}" for each in SECTIONS for end in "=.")
        settings = _hydra_candidates("train", chosen, word)
        own = [each for each in settings if each.startswith(sections)]
        found += [each for each in own if not each.startswith(tuple(TRAINING_ONLY))]
    else:
        found += _starting(["env="], word)
    return sorted({*found} - {"benchmark."})  # a list of names, without settings of its own


def _judge_candidates(given: list[str], word: str) -> list[str]:
    if not given:
        return _starting(("check",), word)
    return _hydra_candidates("judge", [each for each in given if "=" in each], word)


def _hydra_candidates(config: str, given: list[str], word: str) -> list[str]:
    """Returns what Hydra suggests for a configuration, without groups of other commands."""
    from reopold_agent.cli.groups import groups_of

    name = word.partition("=")[0]
    if "=" in word and name == "model" and config != "train":
        return []  # a checkpoint: the shell completes file names
    output = io.StringIO()
    os.environ["COMP_LINE"] = " ".join(["reopold", *given, word])
    arguments, sys.argv = sys.argv, ["reopold", "-sc", "query=fish"]
    try:
        with contextlib.redirect_stdout(output):
            _print_hydra_candidates(config)
    finally:
        sys.argv = arguments
    own = groups_of(config)
    hidden = {f"{each}{end}" for each in _folders() if each not in own for end in ("=", "/", "")}
    hidden |= {
        "",
        "hydra",
        "default_batch=",
        "default_steps=",
        "batches.",
        "sizes.",
        "toy.",
    }  # internal settings
    found = set(output.getvalue().split("\n")) - hidden
    # Hydra suggests a group that has further groups below it without the = or /.
    return sorted(f"{each}=" if each in own else each for each in found)


def _print_hydra_candidates(config: str) -> None:
    import hydra

    from reopold_agent.cli.groups import prepare_groups

    prepare_groups([], config)
    hydra.main(version_base="1.3", config_path="pkg://reopold_agent.configs", config_name=config)(
        lambda _: None
    )()


def _folders() -> list[str]:
    configs = resources.files("reopold_agent") / "configs"
    return [each.name for each in configs.iterdir() if each.is_dir()]


def _benchmark_candidates(word: str) -> list[str]:
    import yaml

    text = (resources.files("reopold_agent") / "configs/benchmarks/all.yaml").read_text("utf-8")
    names = [f"benchmark={name}" for name in yaml.safe_load(text)]
    return _starting(["model=", *(names if "=" in word else ["benchmark="])], word)


def _study_names() -> list[str]:
    # Imported here because `study` is above `cli`, which imports a command only to run or query it.
    from reopold_agent.study.studies import STUDIES

    return [f"name={name}" for name in STUDIES]


def _starting(words: Iterable[str], word: str) -> list[str]:
    return [each for each in words if each.startswith(word)]


def main() -> int:
    """Runs ``reopold completion`` and returns the exit status."""
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
        from reopold_agent.cli.hydra import report_errors  # Hydra takes a second to import

        with report_errors():
            raise ConfigError(f"no completion for '{word}'. Known: {', '.join(SCRIPTS)}")
    return 0
