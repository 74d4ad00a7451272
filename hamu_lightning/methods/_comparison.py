"""The result of a comparison: a table, files, a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.special import stdtrit

from hamu_lightning.methods._bench import Run
from hamu_lightning.methods._evaluation import GAPS, average_gap
from hamu_lightning.methods._storage import save_json
from hamu_lightning.report import plot_comparison

REFERENCES = ("retrained", "original")
_BUILT_IN = (*GAPS, "KL", "retain_loss", "forget_loss")


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison, and which value of each method's hyper-parameter was chosen.

    Args:
        runs: All runs, those of "original" and "retrained" among them.
        chosen: For each name the number of the trial that counts.
        tune_by: The criterion of the choice.
    """

    runs: Sequence[Run]
    chosen: Mapping[str, int]
    tune_by: str

    def best(self, name: str) -> list[Run]:
        """Return the runs of the chosen value, one for each seed."""
        return [run for run in self.runs if run.name == name and run.trial == self.chosen[name]]

    def gaps(self, name: str) -> list[float]:
        """Return the average gap to the retrained model of the same seed, for each seed; fractions."""
        retrained = {run.seed: run.numbers for run in self.best("retrained")}
        return [average_gap(run.numbers, retrained[run.seed]) for run in self.best(name)]

    def ranking(self) -> list[str]:
        """Return the names of the methods, the smallest mean gap first, without the two references."""
        gaps = {name: mean(self.gaps(name)) for name in self.chosen if name not in REFERENCES}
        return sorted(gaps, key=lambda name: (math.isnan(gaps[name]), gaps[name]))

    def table(self) -> str:
        """Return a table for people: mean and half width of the 95 % confidence interval over seeds.

        Student's t, two-sided; with one seed there is no interval. Gap, UA, RA, TA and MIA in percent, KL in nats, time
        in seconds, memory in MiB.
        """
        titles = [f"{'':<22}", f"{'value':>8}", *(f"{title:>10}" for title in ("gap", *GAPS, "KL"))]
        lines = [" ".join((*titles, f"{'time, s':>8}", f"{'MiB':>7}"))]
        lines += [self._line(name) for name in (*REFERENCES, *self.ranking())]
        extra = [title for title in self.best("retrained")[0].numbers if title not in _BUILT_IN]
        if extra:
            lines += ["", " ".join((f"{'':<22}", *(f"{title:>17.17}" for title in extra)))]
            lines += [self._extra_line(name, extra) for name in (*REFERENCES, *self.ranking())]
        return "\n".join(line.rstrip() for line in lines)

    def paths(self, seed: int | None = None) -> dict[str, list[tuple[int, float, float]]]:
        """Return for each method in the order of the ranking step, retain loss, forget loss of each measured point.

        Args:
            seed: Default: the first one.
        """
        seed = self.runs[0].seed if seed is None else seed
        return {name: run.path for name in self.ranking() for run in self.best(name) if run.seed == seed}

    def plot(self, seed: int | None = None) -> Any:
        """Draw the paths of one seed with `hamu_lightning.report.plot_comparison`; returns a matplotlib figure."""
        seed = self.runs[0].seed if seed is None else seed
        (origin,) = (run.numbers for run in self.best("original") if run.seed == seed)
        (end,) = (run.numbers for run in self.best("retrained") if run.seed == seed)

        def improvements(retain: float, forget: float) -> tuple[float, float]:
            return origin["retain_loss"] - retain, forget - origin["forget_loss"]

        paths = {name: [improvements(*losses) for _, *losses in path] for name, path in self.paths(seed).items()}
        return plot_comparison(paths, reference=improvements(end["retain_loss"], end["forget_loss"]))

    def to_json(self, path: str | Path) -> None:
        """Write everything: all runs, the chosen trials, the ranking, gaps. Numbers that are not finite become null."""
        gaps = {name: self.gaps(name) for name in self.chosen}
        runs = [asdict(run) for run in self.runs]
        content = {
            "tune_by": self.tune_by,
            "ranking": self.ranking(),
            "gaps": gaps,
            "chosen": self.chosen,
            "runs": runs,
        }
        save_json(Path(path), _without_nan(content))

    def to_csv(self, path: str | Path) -> None:
        """Write one line for each run: name, seed, trial, value, whether it was chosen, and all numbers."""
        numbers = list(self.runs[0].numbers)
        titles = ["name", "seed", "trial", "value", "chosen", "score", *numbers, "seconds", "memory"]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(titles)
            for run in self.runs:
                head = [run.name, run.seed, run.trial, run.value, run.trial == self.chosen[run.name], run.score]
                writer.writerow([*head, *(run.numbers[title] for title in numbers), run.seconds, run.memory])

    def _line(self, name: str) -> str:
        runs = self.best(name)
        value = "" if runs[0].value is None else f"{runs[0].value:.3g}"
        percent = [self.gaps(name), *([run.numbers[title] for run in runs] for title in GAPS)]
        cells = [_cell([100 * number for number in numbers], 1) for numbers in percent]
        cells.append(_cell([run.numbers["KL"] for run in runs], 2))
        seconds, memory = mean(run.seconds for run in runs), max(run.memory for run in runs)
        cost = (f"{_cell([seconds], 1):>8}", f"{_cell([memory], 0):>7}")
        return " ".join((f"{name:<22.22}", f"{value:>8}", *(f"{cell:>10}" for cell in cells), *cost))

    def _extra_line(self, name: str, titles: Iterable[str]) -> str:
        cells = (_cell([run.numbers[title] for run in self.best(name)], 4) for title in titles)
        return " ".join((f"{name:<22.22}", *(f"{cell:>17}" for cell in cells)))


def confidence(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % confidence interval (Student's t); NaN for one value."""
    if len(values) < 2:
        return mean(values), math.nan
    quantile = float(stdtrit(len(values) - 1, 0.975))
    return mean(values), quantile * stdev(values) / math.sqrt(len(values))


def _cell(values: Sequence[float], digits: int) -> str:
    """Mean and half width in at most 10 characters, the width of a column, up to a mean of 1000."""
    if not all(map(math.isfinite, values)):
        return "-"
    middle, half = confidence(values)
    if abs(middle) >= 1000:
        return f"{middle:.1e}"
    digits = min(digits, 1) if abs(middle) >= 10 or half >= 10 else digits
    if half >= 100 or (half >= 10 and abs(middle) >= 100):
        digits = 0
    spread = f"{half:.{digits}f}" if half < 1000 else f"{half:.0e}"
    return f"{middle:.{digits}f}" + ("" if math.isnan(half) else f" ±{spread}")


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
