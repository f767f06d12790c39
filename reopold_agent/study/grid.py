"""Definition of a study: settings times seeds, one training command each."""

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
        title: its name in tables and figures.
        overrides: of the training command; they take precedence over the study's ``base``.
        longer: factor on the study's number of steps.
        family: settings of one family form a line of a sensitivity figure.
        value: position on that line.
        probe: whether several answers per task are sampled from its models too (`Probe`).
    """

    label: str
    title: str
    overrides: tuple[str, ...]
    longer: float = 1.0
    family: str = ""
    value: float | None = None
    probe: bool = False


@dataclass(frozen=True)
class Probe:
    """Several samples per held-out task, for avg@k, pass@k and maj@k.

    Attributes:
        tasks: number of held-out tasks, from the first.
        samples: number per task.
        points: number of checkpoints of a run to probe, evenly over training; the last is its end.
        latency: numbers of parallel answers for which to measure seconds per question, on the
            first seed of each probed setting and on the teacher; empty for none.
        questions: number of questions for the latency.
    """

    tasks: int
    samples: int
    points: int = 1
    latency: tuple[int, ...] = ()
    questions: int = 16


@dataclass(frozen=True)
class Study:
    """A grid of training runs and its report.

    Attributes:
        name: value of ``name=``.
        title: title of its report.
        mirrors: the paper's figures and tables that it repeats at small scale.
        base: overrides of every training command.
        settings: the settings to compare.
        steps: steps of a run, unless its setting is ``longer``.
        report: name of the function that composes its report (`reopold_agent.study.pages`).
        seeds: number of seeds, from 0.
        seconds: duration of a run of ``steps`` on one core; only for the estimate in ``--help``.
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
        """Roughly estimates its wall-clock time."""
        runs = self.seeds * sum(setting.longer for setting in self.settings)
        return runs * self.seconds / 60 / cores

    def chosen(self, labels: Sequence[str]) -> tuple[Setting, ...]:
        """Returns the settings with these labels, in the study's order; all without labels.

        Raises:
            UnknownNameError: there is no such setting; lists the known ones and the closest match.
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
    overrides: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"{self.setting.label}/seed-{self.seed}"

    @property
    def log(self) -> Path:
        """File with the output of the command, beside the folder, which belongs to the trainer."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def probe(self) -> Path:
        """File with the result of the probe."""
        return self.folder / "probe.json"

    @property
    def probed(self) -> Probe | None:
        """The probe of this run, if it has one."""
        return self.study.probe if self.setting.probe else None


def merge_overrides(*groups: Iterable[str]) -> tuple[str, ...]:
    """Merges overrides of a training command; of two with the same key the later one stays.

    Groups (``env=``, ``model=``, ``objective=`` ...) come first, as they would otherwise seem to
    undo the overrides before them.

    Raises:
        ConfigError: an override is not ``key=value``.
    """
    merged: dict[str, str] = {}
    for word in (word for group in groups for word in group):
        key, equals, _ = word.partition("=")
        if not equals or not key.strip("+~"):
            raise ConfigError(f"'{word}' is not a training setting; write key=value")
        merged.pop(key.lstrip("+"), None)
        merged[key.lstrip("+")] = word
    return tuple(sorted(merged.values(), key=lambda word: "." in word.partition("=")[0]))


def expand(
    study: Study,
    out: Path,
    *,
    seeds: Sequence[int],
    only: Sequence[str] = (),
    steps: int | None = None,
    extra: Sequence[str] = (),
) -> list[Run]:
    """Lists the runs of a study, seed by seed, so that an interrupted study has whole comparisons.

    Args:
        study: the definition.
        out: the study's folder.
        seeds: training seeds.
        only: labels of settings; empty for all.
        steps: in place of the study's.
        extra: overrides of the study's base; the overrides of a setting take precedence
            (`without_effect`).

    Raises:
        UnknownNameError, ConfigError: a label or an override is wrong, sets the seed, or leaves out
            the held-out tasks.
    """
    settings = study.chosen(only)
    _check_extra(extra)
    return [
        Run(
            study,
            setting,
            seed,
            merge_overrides(
                study.base,
                _length(study, setting, steps or study.steps),
                extra,
                setting.overrides,
                (f"seed={seed}",),
            ),
            out / "runs" / setting.label / f"seed-{seed}",
        )
        for seed in seeds
        for setting in settings
    ]


def _check_extra(extra: Sequence[str]) -> None:
    for word in extra:
        key, _, value = word.lstrip("+").partition("=")
        if key == "evaluation.tasks" and value == "0":
            raise ConfigError(
                "evaluation.tasks=0: a study compares held-out success.\nLeave it out, or give a "
                "number of tasks."
            )
        if key == "seed":
            raise ConfigError("'seed' is set by the study.\nGive seeds=N before the --.")


def without_effect(extra: Sequence[str], settings: Sequence[Setting]) -> list[str]:
    """Returns a line for each override that settings of a study replace by their own."""
    lines = []
    for word in extra:
        key = word.lstrip("+").partition("=")[0]
        own = [
            each.label
            for each in settings
            if key in {one.lstrip("+").partition("=")[0] for one in each.overrides}
        ]
        if own:
            lines.append(
                f"'{word}' has no effect on {', '.join(own)}, which set '{key}' themselves"
            )
    return lines


def _length(study: Study, setting: Setting, steps: int) -> tuple[str, ...]:
    """Returns overrides for the number of steps and for the checkpoints that the probe needs."""
    total = max(1, round(steps * setting.longer))
    overrides: tuple[str, ...] = (f"steps={total}",)
    if setting.probe and study.probe is not None and study.probe.points > 1:
        every = max(1, total // study.probe.points)
        overrides += (f"checkpoint.every={every}", f"checkpoint.keep={study.probe.points + 1}")
    return overrides
