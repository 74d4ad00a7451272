"""How strong the prior shift of `Unseen` should be: the answer itself under powers of the share that is kept.

python benchmarks/shares.py synthetic 0.25 --label 3        # docs/targets.md; set, rho, the class that mostly goes

Nothing is unlearned: what is measured is the answer, were it given exactly, beside retrained models.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import forgetting
import torch
from mixtures import pick, train
from problems import PROBLEMS, load_problem
from quickstart import prepare
from teachers import answer, second_choice
from torch import Tensor

from hamu_lightning.metrics.functional import js_to_references, log_odds
from hamu_lightning.objectives import Calibration

POOL, ORIGINAL, POWERS = 4, 7, (1, 2, 3, 4)


def format_row(title: str, said: Tensor, pool: list[Tensor], labels: Tensor, label: int) -> str:
    """JS of the forget set, and of its samples of the class the share of wrong ones and the mean log-odds."""
    of_class, js = labels == label, float(js_to_references(said, pool))
    said, labels = said[of_class], labels[of_class]
    wrong, odds = (said.argmax(-1) != labels).double().mean(), log_odds(said, labels).clamp(-12, 12).mean()
    return f"| {title} | {100 * js:.1f} | {100 * float(wrong):.1f} | {float(odds):.2f} |"


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description="How strong the prior shift should be.")
    parser.add_argument("set", choices=PROBLEMS)
    parser.add_argument("rho", type=float)
    parser.add_argument("--label", type=int, default=3)
    parser.add_argument("--forget-seed", type=int, default=0)
    args = parser.parse_args()
    prepare()
    forgetting.MIXTURE_CLASS = args.label
    problem, data = load_problem(args.set, ("mixture", args.rho), args.forget_seed)
    retain, (x, y) = pick(data, data.retain.indices), pick(data, data.forget.indices).tensors
    share = torch.bincount(retain.tensors[1]) / torch.bincount(data.train.tensors[1])
    pool = [train(problem, retain, 2000 + i, problem.epochs) for i in range(POOL)]
    original = train(problem, data.train, ORIGINAL, problem.epochs)
    x_val, y_val = data.val.tensors
    with torch.no_grad():
        theirs = [module(x).log_softmax(-1) for module in pool]
        ours, held_out = (original(part).log_softmax(-1) for part in (x, x_val))
    print("| | JS | UA of the class | its log-odds |\n| --- | ---: | ---: | ---: |")
    for i, said in enumerate(theirs):
        print(format_row("another retrained", said, theirs[:i] + theirs[i + 1 :], y, args.label))
    print(format_row("original", ours, theirs, y, args.label))
    for power in POWERS:
        calibration, seen = Calibration(), log_odds(ours, y)
        calibration.fit((seen, y), (log_odds(held_out, y_val), y_val), share**power)
        given = answer(calibration.find(seen, y), second_choice(ours, y), y)
        print(format_row(f"share^{power}", given, theirs, y, args.label))


if __name__ == "__main__":
    main()
