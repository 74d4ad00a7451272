"""What a teacher could be worth: how near to retrained models the answer of `Unseen` is, were it given exactly.

    python benchmarks/teachers.py synthetic 15 30 --seeds 0 1 2      # docs/targets.md; set, epochs of the teachers
    python benchmarks/teachers.py mnist1d 10 25 --seeds 0 1 2

A tenth of the samples at random is to be forgotten. Nothing is unlearned: what is measured is the end. Teachers are
trained on the retain data as the set's models are, for fewer epochs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from lightning.pytorch import LightningModule
from mixtures import pick, train
from problems import PROBLEMS, load_problem
from quickstart import prepare
from torch import Tensor
from torch.nn.functional import logsigmoid

from hamu_lightning.metrics.functional import js_to_references, log_odds
from hamu_lightning.objectives import Calibration

POOL, TEACHERS, MANY = range(2000, 2004), 5000, 4


def second_choice(said: Tensor, labels: Tensor) -> Tensor:
    """What log-probabilities `[N, C]` say besides the label, `-inf` there."""
    return said.scatter(1, labels[:, None], -torch.inf).log_softmax(-1)


def answer(aim: Tensor, besides: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities with the log-odds `aim` of the label, and `besides` elsewhere."""
    return (logsigmoid(-aim)[:, None] + besides).scatter(1, labels[:, None], logsigmoid(aim)[:, None])


def rank_with(aim: Tensor, seen: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """Deal the aims of a class out again: in the order of what the model and its teacher make of the samples."""
    score = sum((odds - odds.mean()) / odds.std() for odds in (seen, taught))
    dealt = aim.clone()
    for label in labels.unique():
        of_class = (labels == label).nonzero().flatten()
        dealt[of_class[score[of_class].argsort()]] = aim[of_class].sort().values
    return dealt


class Answers:
    """The answers for one set, and how far they are from a pool of retrained models."""

    def __init__(self, name: str) -> None:
        self._problem, self._data = load_problem(name, ("random", 0.1), 1)
        data, labels = self._data, self._data.train.tensors[1]
        self._retain = pick(data, data.retain.indices)
        self._x, self._y = pick(data, data.forget.indices).tensors
        kept, total = torch.bincount(labels[data.retain.indices]), torch.bincount(labels)
        self._share = kept / total
        self._pool = [self._say([self._train(seed)], self._x) for seed in POOL]

    def of(self, seed: int, epochs: list[int]) -> dict[str, float]:
        """JS for one original and its teachers, in percent."""
        x, y, (x_val, y_val) = self._x, self._y, self._data.val.tensors
        original = self._train(seed, is_whole=True)
        said, held_out = self._say([original], x), self._say([original], x_val)
        calibration, seen = Calibration(), log_odds(said, y)
        calibration.fit((seen, y), (log_odds(held_out, y_val), y_val), self._share)
        aim = calibration.find(seen, y)
        found = {
            "retrained, same seed": self._say([self._train(seed)], x),
            "original": said,
            "own second choice": answer(aim, second_choice(said, y), y),
        }
        for n in epochs:
            teachers = [self._train(TEACHERS + 10 * seed + i, epochs=n) for i in range(MANY)]
            for some in (teachers[:1], teachers):
                taught, title = self._say(some, x), f"{len(some)} of {n} epochs"
                besides = second_choice(taught, y)
                found[title] = answer(aim, besides, y)
                found[f"{title}, ranks too"] = answer(rank_with(aim, seen, log_odds(taught, y), y), besides, y)
                found[f"{title}, alone"] = taught
        return {title: 100 * float(js_to_references(said, self._pool)) for title, said in found.items()}

    def _train(self, seed: int, is_whole: bool = False, epochs: int | None = None) -> LightningModule:
        data = self._data.train if is_whole else self._retain
        return train(self._problem, data, seed, epochs or self._problem.epochs)

    @torch.no_grad()
    def _say(self, modules: list[LightningModule], x: Tensor) -> Tensor:
        """The log of the mean of the models' predictions, `[N, C]`."""
        return torch.stack([module(x).log_softmax(-1) for module in modules]).logsumexp(0).log_softmax(-1)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description="What a teacher could be worth.")
    parser.add_argument("set", choices=PROBLEMS)
    parser.add_argument("epochs", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    prepare()
    answers = Answers(args.set)
    rows = [answers.of(seed, args.epochs) for seed in args.seeds]
    print("| | JS, by seed | mean |\n| --- | ---: | ---: |")
    for title in rows[0]:
        numbers = [row[title] for row in rows]
        print(f"| {title} | {' '.join(f'{x:.1f}' for x in numbers)} | {mean(numbers):.1f} |")


if __name__ == "__main__":
    main()
