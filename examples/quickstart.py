"""Train a classifier, make it forget some of its training data, and compare it with models that never saw them.

    python examples/quickstart.py                          # forget the digit 3
    python examples/quickstart.py --forget random:0.1      # forget a tenth of the training samples

Prints one table, and writes two pictures and TensorBoard logs. Nothing is tuned.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from digits import DigitsClassifier, load_splits
from evaluation import Row, evaluate, format_table, make_row
from forgetting import MIXTURE_CLASS, Data, parse_forget, parse_rho, split_data
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Dataset

from hamu_lightning import HAMUCallback, Unseen
from hamu_lightning.evidence import attack, audit, judge, report
from hamu_lightning.evidence import evaluate as evaluate_parts
from hamu_lightning.report import StepHistory, StepRecorder, plot_hardness, plot_tradeoff

EPOCHS, BATCH_SIZE = 12, 64
MEASURE_EVERY = 5
# So many models are retrained, with other seeds: a single pair of them is a rough measure of how far two are apart.
RETRAINED, SEEDS_APART = 4, 1000
WIDTH = 80
# What tries to get the knowledge back: the quick ones.
ATTACKS = ("probe", "logit_shift", "neighbours", "round_4bit")


class Result(NamedTuple):
    """What a run ends with."""

    rows: list[Row]
    """The original, the unlearned model, and the retrained ones."""
    gone: list[int]
    """The classes that were forgotten as a whole."""
    path: list[tuple[int, float, float]]
    history: StepHistory
    summary: str
    """What the callback says at the end."""
    verdict: str
    """What the report says on top."""

    @property
    def retrained(self) -> list[Row]:
        """The models that never saw the forgotten samples."""
        return self.rows[2:]

    @property
    def floor(self) -> float:
        """The mean gap among these, in points."""
        return 100 * mean(row.gap(self.retrained) for row in self.retrained)


def load_data(forget: tuple[str, float], seed: int) -> Data:
    """Load the digits, and split the training set into what to retain and what to forget."""
    return split_data(*load_splits(), forget, seed)


def fit(module: LightningModule, dataset: Dataset[Any], args: argparse.Namespace, name: str, **options: Any) -> None:
    """Fit a module with a plain Trainer. It computes on the CPU: for images this small nothing is faster."""
    seed_everything(args.seed, verbose=False)
    trainer = Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(args.out, name="logs", version=name),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        **options,
    )
    trainer.fit(module, DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, drop_last=True))


def train(dataset: Dataset[Any], args: argparse.Namespace, name: str) -> DigitsClassifier:
    """Train a classifier from scratch."""
    print(f"Training the {name} model on {len(dataset)} samples", flush=True)  # type: ignore[arg-type]
    seed_everything(args.seed, verbose=False)
    module = DigitsClassifier()
    fit(module, dataset, args, name, max_epochs=EPOCHS)
    return module


def train_all(data: Data, args: argparse.Namespace) -> Iterator[DigitsClassifier]:
    """Train the original, then the models without the forget set, some at once; yield each when it is there."""
    seeds = [args.seed + SEEDS_APART * number for number in range(RETRAINED)]
    jobs = [
        (data.train, args, "original"),
        *((data.retain, argparse.Namespace(**{**vars(args), "seed": s}), f"retrained-{s}") for s in seeds),
    ]
    if args.workers == 1:
        yield from (train(*job) for job in jobs)
        return
    with ProcessPoolExecutor(args.workers, get_context("spawn"), initializer=prepare) as pool:
        yield from pool.map(train, *zip(*jobs, strict=True))


class PathRecorder(Callback):
    """Measures the losses on all retain and all forget samples every few steps.

    Args:
        data: The data.
    """

    def __init__(self, data: Data) -> None:
        self._data = data
        self.path: list[tuple[int, float, float]] = []
        """Step, retain loss, forget loss: cross-entropies."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the original."""
        self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Measure every few steps."""
        if trainer.global_step % MEASURE_EVERY == 0:
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end."""
        if trainer.global_step != self.path[-1][0]:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        retain, forget = (evaluate(module, part).loss for part in (self._data.retain, self._data.forget))
        self.path.append((trainer.global_step, retain, forget))


def unlearn(
    original: DigitsClassifier, data: Data, args: argparse.Namespace
) -> tuple[DigitsClassifier, HAMUCallback, PathRecorder, StepRecorder]:
    """Make a copy of the original forget: the same module and a plain Trainer, with a callback."""
    print(f"Unlearning {len(data.forget)} samples", flush=True)
    module = copy.deepcopy(original)
    hamu = HAMUCallback(data.forget, target=Unseen(data.val), seed=args.seed, progress_bar=True)
    path, steps = PathRecorder(data), StepRecorder(hamu)
    fit(module, data.retain, args, "unlearned", max_epochs=-1, max_steps=args.steps, callbacks=[hamu, path, steps])
    return module, hamu, path, steps


def run(args: argparse.Namespace) -> Result:
    """Train, retrain without the forget set, unlearn, and evaluate all models."""
    data = load_data(args.forget, args.seed)
    models = train_all(data, args)
    original = next(models)
    unlearned, hamu, path, steps = unlearn(original, data, args)  # while the others are trained
    retrained = [*models]
    names = ("original", "unlearned", "retrained", *["another retrained"] * (RETRAINED - 1))
    rows = []
    for name, model in zip(names, (original, unlearned, *retrained), strict=True):
        retain, forget, test = (evaluate(model, part) for part in (data.retain, data.forget, data.test))
        rows.append(make_row(name, retain, forget, test, data.gone))
    verdict = write_report((original, unlearned, *retrained), data, hamu, args)
    return Result(rows, data.gone, path.path, steps.history(), hamu.summary, verdict)


def write_report(models: Sequence[DigitsClassifier], data: Data, hamu: HAMUCallback, args: argparse.Namespace) -> str:
    """Write what is handed over, and return its verdict: all models on all parts of the data, and what attacks find."""
    print("Writing the report", flush=True)
    parts = {"retain": data.retain, "forget": data.forget, "holdout": data.val, "test": data.test}
    original, unlearned, *retrained = models
    before, after, *references = (evaluate_parts(model, parts) for model in models)
    found = attack(unlearned, parts, control=retrained, attacks=ATTACKS)
    report(
        hamu,
        args.out,
        before=before,
        after=after,
        references=references,
        attacks=found,
        audit=audit(unlearned, callback=hamu),
        weights_before=original,
        weights_after=unlearned,
        logs=args.out / "logs" / "unlearned",
    )
    return judge(before, after, references, found).text


def draw(result: Result, out: Path) -> None:
    """Write the two pictures."""
    original, _, retrained, *_ = result.rows
    steps, retain, forget = torch.tensor(result.path, dtype=torch.float64).unbind(dim=1)
    tradeoff = plot_tradeoff(
        retain[0] - retain,
        forget - forget[0],
        steps,
        reference=(original.retain.loss - retrained.retain.loss, retrained.forget.loss - original.forget.loss),
    )
    tradeoff.savefig(out / "tradeoff.png")
    h = result.history
    plot_hardness(h.kappa, h.kappa_1, h.kappa_2, h.norms, h.labels, h.steps).savefig(out / "hardness.png")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make a digit classifier forget some of its training data.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--forget", type=parse_forget, default=("class", 3.0), help="class:3 (default) or random:0.1")
    mixture = f"forget as many samples as class {MIXTURE_CLASS} has: this share at random, the rest of that class"
    what.add_argument("--rho", dest="forget", type=parse_rho, help=mixture)
    parser.add_argument("--steps", type=int, default=50, help="the most steps of unlearning (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    cores = min(2, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=cores, help=f"processes that train models (default: {cores})")
    parser.add_argument("--out", type=Path, default=Path("quickstart_out"), help="where to write pictures and logs")
    return parser.parse_args(argv)


def prepare() -> None:
    """Silence Lightning's hints, and use one thread: enough here, and then the numbers do not depend on the cores."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*(does not have many workers|have no `val_dataloader`|treespec, Leaf).*"
    )
    torch.set_num_threads(1)


def explain(result: Result) -> str:
    """Say what the columns mean, and what the table shows."""
    columns = (
        "Gap: mean distance from the retrained models in retain, forgotten and test accuracy and in the membership AUC "
        "(0.5: forgotten samples look unseen), in points. JS: Jensen-Shannon divergence from their predictions on the "
        "forgotten samples, in percent of its maximum."
    )
    original, unlearned = (100 * row.gap(result.retrained) for row in result.rows[:2])
    floor = result.floor
    shown = (
        f"{RETRAINED} models that never saw the samples are {floor:.1f} points from each other in the mean: that is "
        f"the floor, and nobody can be expected to come nearer. The unlearned model's gap is {unlearned:.1f}."
    )
    if original <= 2 * floor:
        shown += f" The original's is {original:.1f}: samples like these are hardly remembered, and cannot show much."
    return f"{textwrap.fill(columns, WIDTH)}\n\n{textwrap.fill(shown, WIDTH)}"


def main() -> None:
    """Run, print the table, write the pictures."""
    wall = time.perf_counter()
    args = parse_args()
    prepare()
    result = run(args)
    draw(result, args.out)
    print(f"\n{result.summary}\n")
    print(f"{format_table(result.rows[:4], result.retrained, result.gone)}\n\n{explain(result)}\n")
    print(f"{textwrap.fill(f'The report says: {result.verdict}', WIDTH)}\n")
    files = "report.html, tradeoff.png, hardness.png, logs (TensorBoard)"
    print(f"{time.perf_counter() - wall:.0f} s. In {args.out}: {files}.")


if __name__ == "__main__":
    main()
