"""Serve three deletion requests at once, and protect two groups that look like what is forgotten.

    python examples/many_requests.py

A ResNet-20 on 8x8 digits forgets two classes and some samples at random, each to a target of its own. The retain stream
holds six of the other classes. The two that are left are easily taken for the forgotten ones; they are protected: their
loss must not rise. Runs with and without protection, prints one table, and writes the picture of which request makes
which protection expensive.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from digits import DigitsClassifier, load_splits
from evaluation import evaluate
from quickstart import fit, prepare, train
from torch.utils.data import Subset, TensorDataset

from hamu_lightning import Chance, HAMUCallback, Holdout
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.report import StepRecorder, plot_costs
from hamu_lightning.rules import RelativeRadius, TargetQuota
from hamu_lightning.solvers import FeasibleDirection

DIGITS = 3, 7
REQUESTS = ("digit 3", "digit 7", "40 at random")
# Digits that are easily taken for the forgotten ones: 8 and 9 for 3, 9 and 1 for 7.
PROTECTED = {"digit 8": 8, "digit 9": 9}
RADIUS = RelativeRadius(1e-3)
# A protected group is protected on its batches: they hold all of it here.
BATCH_SIZE = 128


class Data(NamedTuple):
    """The training set without what is forgotten or protected, and these two by name.

    The held-out samples are of the classes that the samples at random come from: with the forgotten digits among them,
    their loss would rise as the digits are forgotten, and the target of the samples with it.
    """

    train: TensorDataset
    held_out: Subset[Any]
    retain: Subset[Any]
    forget: Mapping[str, Subset[Any]]
    protect: Mapping[str, Subset[Any]]
    test: TensorDataset


def load_data(seed: int) -> Data:
    """Split the digits into the groups. The samples at random come from the classes that are in no group."""
    train, val, test = load_splits()
    labels = train.tensors[1]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    positions = {f"digit {c}": (labels == c).nonzero().flatten() for c in (*DIGITS, *PROTECTED.values())}
    others = order[~torch.isin(order, torch.cat([*positions.values()]))]
    positions["40 at random"] = others[:40]
    groups = {name: Subset(train, index.tolist()) for name, index in positions.items()}
    is_held_out = torch.isin(val.tensors[1], torch.tensor([*DIGITS, *PROTECTED.values()]), invert=True)
    return Data(
        train,
        Subset(val, is_held_out.nonzero().flatten().tolist()),
        Subset(train, others[40:].tolist()),
        {name: groups[name] for name in REQUESTS},
        {name: groups[name] for name in PROTECTED},
        test,
    )


def choose_quota(held_out: Subset[Any]) -> dict[str, TargetQuota]:
    """Where each request should end, and in how many steps: a class at the loss of a guess, samples as if unseen."""
    targets = Chance(10), Chance(10), Holdout(held_out)
    return {
        name: TargetQuota(target, steps) for name, target, steps in zip(REQUESTS, targets, (30, 40, 50), strict=True)
    }


def unlearn(
    original: DigitsClassifier, data: Data, args: argparse.Namespace, protects: bool
) -> tuple[DigitsClassifier, HAMUCallback]:
    """Serve all requests with a copy of the original."""
    module = copy.deepcopy(original)
    rule = FeasibleDirection(
        choose_quota(data.held_out), dict.fromkeys(PROTECTED, 0.0) if protects else {}, radius=RADIUS
    )
    protect = data.protect if protects else {}
    hamu = HAMUCallback(
        data.forget, rule, protect=protect, passes=PassOptions(batch_size=BATCH_SIZE), seed=args.seed, verify=True
    )
    name = "protected" if protects else "unprotected"
    fit(module, data.retain, args, name, max_epochs=-1, max_steps=args.steps, callbacks=[hamu, StepRecorder(hamu)])
    return module, hamu


def measure(module: DigitsClassifier, data: Data) -> dict[str, float]:
    """Accuracy in percent: on the training samples of each group, and on the test samples of the protected classes."""
    parts = {"retain": data.retain, **data.forget, **data.protect}
    found = {name: 100 * evaluate(module, part).accuracy for name, part in parts.items()}
    test = evaluate(module, data.test)
    for name, digit in PROTECTED.items():
        found[f"{name}, test"] = 100 * test.select(test.labels == digit).accuracy
    return found


def format_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """One line for each group, one column for each model."""
    title = "accuracy, %"
    width = max(map(len, (title, *(name for row in rows.values() for name in row))))
    lines = [f"{title:<{width}}" + "".join(f"  {name:>11}" for name in rows)]
    for name in next(iter(rows.values())):
        lines.append(f"{name:<{width}}" + "".join(f"  {row[name]:>11.1f}" for row in rows.values()))
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve several deletion requests, and protect groups.")
    parser.add_argument("--steps", type=int, default=100, help="the most steps of unlearning (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("many_requests_out"), help="where to write picture and logs")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> tuple[dict[str, dict[str, float]], torch.Tensor, str]:
    """Train, unlearn with and without protection; return the accuracies, the costs and the callback's own summary."""
    data = load_data(args.seed)
    original = train(data.train, args, "original")
    rows = {"original": measure(original, data)}
    for name, protects in (("unprotected", False), ("protected", True)):
        print(f"Serving {len(REQUESTS)} requests, {len(PROTECTED) if protects else 'no'} groups protected", flush=True)
        module, hamu = unlearn(original, data, args, protects)
        rows[name] = measure(module, data)
    return rows, hamu.mean_costs, hamu.summary


def main() -> None:
    """Run, print the table, write the picture."""
    start = time.perf_counter()
    args = parse_args()
    prepare()
    rows, costs, summary = run(args)
    print(f"\n{summary}\n\n{format_table(rows)}\n")
    plot_costs(costs, [*PROTECTED], [*REQUESTS]).savefig(args.out / "costs.png")
    print(f"{time.perf_counter() - start:.0f} s. Written to {args.out}: costs.png, logs (TensorBoard).")


if __name__ == "__main__":
    main()
