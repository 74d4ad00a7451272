"""The result of a comparison: numbers by name, a table, files, a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from hamu_lightning.methods._evaluation import GAPS
from hamu_lightning.methods._floor import ANOTHER
from hamu_lightning.methods._pool import DISTANCES
from hamu_lightning.methods._problem import Run
from hamu_lightning.methods._storage import save_json
from hamu_lightning.methods._table import PERCENT, Column, confidence, format_block, is_clearly_below
from hamu_lightning.metrics.functional import average_gap, klom, u_lira
from hamu_lightning.report import plot_comparison

REFERENCES = ("retrained", ANOTHER, "original")
# So many unlearned and so many retrained models make a histogram, or a shadow model's distribution.
MANY = 16
Order: TypeAlias = Literal["JS", "KLOM", "gap"]

_BUILT_IN = (*GAPS, *DISTANCES, "KL", "retain_loss", "forget_loss")
_NOTES: dict[Order, str] = {
    "JS": "Ordered by JS: another retrained model is clearly nearer to the pool than the original is.",
    "KLOM": "Ordered by KLOM: JS does not tell the original from another retrained model.",
    "gap": "Ordered by the gap: no pool of retrained models tells the original from another retrained model.",
}


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison, and which value of each method's hyper-parameter was chosen.

    Args:
        runs: All runs, those of "original" and "retrained" among them.
        chosen: For each name the number of the trial that counts.
        tune_by: The criterion of the choice.
        seeds: The seeds that are reported; None for all. Values may have been chosen with others.
    """

    runs: Sequence[Run]
    chosen: Mapping[str, int]
    tune_by: str
    seeds: Sequence[int] | None = None

    def best(self, name: str) -> list[Run]:
        """Return the runs of the chosen value, one for each seed that is reported; of "another retrained" all."""
        if name == ANOTHER:
            return [run for run in self.runs if run.name == ANOTHER]
        runs = [run for run in self.runs if run.name == name and run.trial == self.chosen[name]]
        return [run for run in runs if self.seeds is None or run.seed in self.seeds]

    def gaps(self, name: str) -> list[float]:
        """Return the average gap to the retrained model of the same seed, for each seed; fractions.

        Of "another retrained" for each model the mean gap to the others of the pool.
        """
        if name == ANOTHER:
            pool = [run.numbers for run in self.best(ANOTHER)]
            return [mean(float(average_gap(ours, theirs)) for theirs in pool if theirs is not ours) for ours in pool]
        retrained = {run.seed: run.numbers for run in self.best("retrained")}
        return [float(average_gap(run.numbers, retrained[run.seed])) for run in self.best(name)]

    @property
    def ordered_by(self) -> Order:
        """By what the methods are ranked.

        - "JS" where another retrained model is clearly nearer to the pool than the original is (the 95 % interval of
          the difference of the two means is above 0: Student's t, equal variances): there is something to forget, and
          the divergence sees it.
        - "KLOM" where not, if at least 16 seeds and 16 retrained models are there.
        - "gap" else. With a pool that says little: two retrained models then differ by as much as the original.
        """
        floor, original = (
            [run.numbers.get("JS", math.nan) for run in self.best(name)] for name in (ANOTHER, "original")
        )
        if is_clearly_below(floor, original):
            return "JS"
        return "KLOM" if math.isfinite(self.klom("retrained")) else "gap"

    def ranking(self) -> list[str]:
        """Return the names of the methods, the best first, without the references."""
        order = self.ordered_by
        means = {name: self.mean(name, order) for name in self.chosen if name not in REFERENCES}
        return sorted(means, key=lambda name: (math.isnan(means[name]), means[name]))

    def mean(self, name: str, title: str) -> float:
        """Return the mean over the seeds of one of `Run.numbers`, "gap" or "KLOM"; NaN where it is missing."""
        if title == "KLOM":
            return self.klom(name)
        return mean(self.values(name, title))

    def values(self, name: str, title: str) -> list[float]:
        """Return one of `Run.numbers`, or "gap", for each seed; NaN where it is missing."""
        if title == "gap":
            return self.gaps(name)
        return [run.numbers.get(title, math.nan) for run in self.best(name)]

    def difference(self, first: str, second: str, title: str = "JS") -> tuple[float, float]:
        """Return the mean over the seeds of first minus second, and half of its 95 % interval (Student's t, paired).

        Args:
            first: A method.
            second: Another one.
            title: One of `Run.numbers`, or "gap".
        """
        pairs = zip(self.values(first, title), self.values(second, title), strict=True)
        return confidence([ours - theirs for ours, theirs in pairs])

    def klom(self, name: str) -> float:
        """Return the mean KLOM of the models of all seeds against the pool, nats; NaN below 16 models of a kind."""
        pair = self._many_log_odds(name)
        return float(klom(*pair).mean) if pair else math.nan

    def u_lira(self, name: str) -> float:
        """Return the accuracy of U-LiRA on the models of all seeds; 0.5 is chance; NaN below 16 models of a kind."""
        pair = self._many_log_odds(name)
        return float(u_lira(*pair).accuracy) if pair else math.nan

    def table(self) -> str:
        """Return a table for people: mean and half width of the 95 % confidence interval over seeds.

        Student's t, two-sided; with one seed there is no interval. In "another retrained" the models of the pool take
        the place of the seeds. JS (on the forget set, and on the test samples of its classes), gap, UA, RA, TA, MIA,
        KS, agreement, surer, the RA of the worst seed and U-LiRA in percent, log-odds, KL and KLOM in nats, time in
        seconds, memory in MiB.
        """
        names = [name for name in REFERENCES if name in self.chosen] + self.ranking()
        labels = {name: f"{name:<22.22}" for name in names}
        valued = {name: f"{label} {self._value(name):>8}" for name, label in labels.items()}
        blocks = [format_block(f"{'':<22} {'value':>8}", valued, self._columns())]
        blocks.append([_NOTES[self.ordered_by]])
        blocks.append(format_block(f"{'':<22}", labels, self._distance_columns()))
        if extra := [title for title in self.best("original")[0].numbers if title not in _BUILT_IN]:
            more = [Column(title, self._reader(title), 1, 4, 17) for title in extra]
            blocks.append(format_block(f"{'':<22}", labels, more))
        return "\n\n".join("\n".join(block) for block in blocks)

    def paths(self, seed: int | None = None) -> dict[str, list[tuple[int, float, float]]]:
        """Return for each method in the order of the ranking step, retain loss, forget loss of each measured point.

        Args:
            seed: Default: the first one.
        """
        seed = self.best("original")[0].seed if seed is None else seed
        return {name: run.path for name in self.ranking() for run in self.best(name) if run.seed == seed}

    def plot(self, seed: int | None = None) -> Any:
        """Draw the paths of one seed with `hamu_lightning.report.plot_comparison`; returns a matplotlib figure."""
        seed = self.best("original")[0].seed if seed is None else seed
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
            "seeds": self.seeds,
            "ordered_by": self.ordered_by,
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
                is_chosen = run.trial == self.chosen[run.name]
                head = [run.name, run.seed, run.trial, run.value, is_chosen, run.score]
                writer.writerow([*head, *(run.numbers[title] for title in numbers), run.seconds, run.memory])

    def _value(self, name: str) -> str:
        value = self.best(name)[0].value
        return "" if value is None else f"{value:.3g}"

    def _columns(self) -> list[Column]:
        return [
            Column("JS", self._reader("JS")),
            Column("gap", self.gaps),
            *(Column(title, self._reader(title)) for title in GAPS),
            Column("time, s", lambda name: [mean(run.seconds for run in self.best(name))], 1, 1, 8),
            Column("MiB", lambda name: [max(run.memory for run in self.best(name))], 1, 0, 7),
        ]

    def _distance_columns(self) -> list[Column]:
        return [
            Column("JS test", self._reader("JS_test")),
            Column("KS", self._reader("KS")),
            Column("agree", self._reader("agreement")),
            Column("log-odds", self._reader("log_odds"), 1, 2),
            Column("KL", self._reader("KL"), 1, 2),
            Column("surer", self._reader("surer")),
            Column("worst RA", lambda name: [min(self.values(name, "RA"))], PERCENT, 1, 8),
            Column("KLOM", lambda name: [self.klom(name)], 1, 2, 6),
            Column("U-LiRA", lambda name: [self.u_lira(name)], PERCENT, 1, 6),
        ]

    def _reader(self, title: str) -> Callable[[str], list[float]]:
        return lambda name: self.values(name, title)

    def _many_log_odds(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Those of the models and of the pool, `[M, N]` each; None where there are few."""
        runs = self.best("retrained" if name == ANOTHER else name)
        pool = [run.log_odds for run in self.runs if run.name == ANOTHER]
        if min(len(runs), len(pool)) < MANY:
            return None
        return torch.tensor([run.log_odds for run in runs]), torch.tensor(pool)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
