"""What a study is: settings times seeds, each of them one training command."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reopold_agent.errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class Setting:
    """One row of a study's table.

    Attributes:
        label: name of its folder, and of the setting in ``only=`` and ``numbers.json``.
        title: how tables and figures call it.
        words: of the training command; they win over the study's ``base``.
        longer: it trains this many times the study's steps.
        family: settings of one family form a line of a sensitivity figure ...
        value: ... at this place.
        probe: whether its models are played several times per task as well (`Probe`).
    """

    label: str
    title: str
    words: tuple[str, ...]
    longer: float = 1.0
    family: str = ""
    value: float | None = None
    probe: bool = False


@dataclass(frozen=True)
class Probe:
    """Several samples per held-out task, for avg@k, pass@k and maj@k.

    Attributes:
        tasks: the first so many held-out tasks.
        samples: per task.
        points: states of a run that are probed, evenly over training; the last is its end.
        latency: numbers of answers in parallel whose seconds per question are measured, on the
            first seed of each probed setting and on the teacher; empty for none.
        questions: on so many questions.
    """

    tasks: int
    samples: int
    points: int = 1
    latency: tuple[int, ...] = ()
    questions: int = 16


@dataclass(frozen=True)
class Study:
    """A grid of training runs and what it shows.

    Attributes:
        name: in ``name=``.
        title: of its report.
        mirrors: the paper's figures and tables that it repeats in small.
        base: words of every training command.
        settings: what is compared.
        steps: of a run, unless its setting is ``longer``.
        report: name of the function that writes its report (`reopold_agent.study.report`).
        seeds: numbers of seeds, from 0.
        seconds: of a run of ``steps`` on one core; for the estimate in ``--help`` only.
        probe: how the settings with ``probe`` are probed, and, once per study, the student before
            training and the teacher.
    """

    name: str
    title: str
    mirrors: str
    base: tuple[str, ...]
    settings: tuple[Setting, ...]
    steps: int
    report: str
    seeds: int = 5
    seconds: float = 40.0
    probe: Probe | None = None

    def __post_init__(self) -> None:
        labels = [setting.label for setting in self.settings]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ConfigError(f"study {self.name}: two settings are called {', '.join(twice)}")

    def minutes(self, cores: int) -> float:
        """A rough estimate of its wall-clock time."""
        runs = self.seeds * sum(setting.longer for setting in self.settings)
        return runs * self.seconds / 60 / cores

    def chosen(self, labels: Sequence[str]) -> tuple[Setting, ...]:
        """The settings of these names, in the study's order; all if there are none.

        Raises:
            UnknownNameError: no such setting; lists what exists and the closest match.
        """
        known = [setting.label for setting in self.settings]
        for label in labels:
            if label not in known:
                raise UnknownNameError(f"setting of the study {self.name}", label, known)
        return tuple(s for s in self.settings if not labels or s.label in labels)


@dataclass(frozen=True)
class Run:
    """One training command of a study and its folder."""

    study: Study = field(repr=False)
    setting: Setting
    seed: int
    words: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.setting.label}/seed-{self.seed}"

    @property
    def log(self) -> Path:
        """What the command printed. Beside the folder, which belongs to the trainer."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def probe(self) -> Path:
        """What the probe of this run found."""
        return self.folder / "probe.json"

    @property
    def probed(self) -> Probe | None:
        """How this run is probed, if it is."""
        return self.study.probe if self.setting.probe else None


def merge_words(*groups: Iterable[str]) -> tuple[str, ...]:
    """Words of a training command: of two that set the same key the later one stays.

    Groups (``env=``, ``model=``, ``objective=`` ...) come first, as their values would otherwise
    look as if they could undo what was set before.

    Raises:
        ConfigError: a word is no ``key=value``.
    """
    words: dict[str, str] = {}
    for word in (word for group in groups for word in group):
        key, equals, _ = word.partition("=")
        if not equals or not key.strip("+~"):
            raise ConfigError(f"'{word}' is no training setting; write key=value")
        words.pop(key.lstrip("+"), None)
        words[key.lstrip("+")] = word
    return tuple(sorted(words.values(), key=lambda word: "." in word.partition("=")[0]))


def expand(
    study: Study,
    out: Path,
    *,
    seeds: Sequence[int],
    only: Sequence[str] = (),
    steps: int | None = None,
    extra: Sequence[str] = (),
) -> list[Run]:
    """The runs of a study, seed by seed, so that an interrupted study has whole comparisons.

    Args:
        study: the definition.
        out: the study's folder.
        seeds: training seeds.
        only: names of settings; all if there are none.
        steps: instead of the study's.
        extra: training words that change the study's base; a setting's own words win.

    Raises:
        UnknownNameError, ConfigError: a name or a word is wrong.
    """
    settings = study.chosen(only)
    return [
        Run(
            study,
            setting,
            seed,
            merge_words(
                study.base,
                _length(study, setting, steps or study.steps),
                extra,
                setting.words,
                (f"seed={seed}",),
            ),
            out / "runs" / setting.label / f"seed-{seed}",
        )
        for seed in seeds
        for setting in settings
    ]


def _length(study: Study, setting: Setting, steps: int) -> tuple[str, ...]:
    """Words for the number of steps and for the checkpoints that the probe needs."""
    total = max(1, round(steps * setting.longer))
    words: tuple[str, ...] = (f"steps={total}",)
    if setting.probe and study.probe is not None and study.probe.points > 1:
        every = max(1, total // study.probe.points)
        words += (f"checkpoint.every={every}", f"checkpoint.keep={study.probe.points + 1}")
    return words
