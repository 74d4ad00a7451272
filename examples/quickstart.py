"""Train a classifier, make it forget some of its training data, and compare it with one that never saw them.

    python examples/quickstart.py                          # forget the digit 3
    python examples/quickstart.py --forget random:0.1      # forget a tenth of the training samples

Prints one table, and writes two pictures and TensorBoard logs. The defaults were chosen on the validation split.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from digits import DigitsClassifier, load_splits
from evaluation import Row, evaluate, format_table, make_row
from forgetting import MIXTURE_CLASS, Data, parse_forget, parse_rho, split_data
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Dataset

from hamu_lightning import HAMUQ, HAMUU, HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.report import StepHistory, StepRecorder, plot_hardness, plot_tradeoff
from hamu_lightning.rules import RelativeRadius

EPOCHS, BATCH_SIZE = 12, 64
# The longest step, as a share of the length of each tensor of weights. HAMU-U uses all of it all the time.
RADIUS = {"hamu-q": RelativeRadius(1e-3), "hamu-u": RelativeRadius(2e-4)}
# Each small batch has to give the quota. In a large one the few samples that are forgotten first would give it alone.
FORGET_BATCH_SIZE = 8
# The levels that the forget loss is sent to. A class that is forgotten as a whole: so many times the loss of a guess
# among ten classes. Other samples: so many times the loss on validation samples.
CLASS_FACTOR, SAMPLE_FACTOR = 9, 3
MEASURE_EVERY = 3


class Result(NamedTuple):
    """What a run ends with."""

    rows: list[Row]
    gone: list[int]
    """The classes that were forgotten as a whole."""
    path: list[tuple[int, float, float]]
    history: StepHistory


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
    print(f"Training the {name} model on {len(dataset)} samples")  # type: ignore[arg-type]
    seed_everything(args.seed, verbose=False)
    module = DigitsClassifier()
    fit(module, dataset, args, name, max_epochs=EPOCHS)
    return module


class PathRecorder(Callback):
    """Measures the losses on all retain and all forget samples every few steps, and stops at the end level.

    Args:
        data: The data.
        end_level: Stop when the mean forget loss has come this far.
    """

    def __init__(self, data: Data, end_level: float) -> None:
        self._data, self._end_level = data, end_level
        self.path: list[tuple[int, float, float]] = []
        """Step, retain loss, forget loss."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the original."""
        self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Measure every few steps."""
        if trainer.global_step % MEASURE_EVERY == 0:
            trainer.should_stop = self._measure(trainer, pl_module) >= self._end_level

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the end."""
        if trainer.global_step != self.path[-1][0]:
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, module: LightningModule) -> float:
        retain, forget = evaluate(module, self._data.retain).loss, evaluate(module, self._data.forget).loss
        self.path.append((trainer.global_step, retain, forget))
        return forget


def choose_end_level(original: LightningModule, data: Data) -> float:
    """Return the mean loss that the forget set is sent to.

    A sample of a class that is forgotten as a whole should end at a multiple of the loss of a guess, any other one at
    a multiple of the loss that the original has on validation samples of its class. The quota is spread evenly over the
    steps and not every batch can give it inside the radius, so that random samples end below their level.
    """
    val = evaluate(original, data.val)
    guess = math.log(10)
    levels = [
        CLASS_FACTOR * guess if c in data.gone else SAMPLE_FACTOR * val.select(val.labels == c).loss for c in range(10)
    ]
    return torch.tensor(levels)[data.train.tensors[1][data.forget.indices]].mean().item()


def choose_rule(name: str, quota: float | None, rise: float, steps: int) -> HAMUQ:
    """Make the rule. Without a quota HAMU-Q spreads the rise over the steps, and HAMU-U lets retain not get worse."""
    if name == "hamu-u":
        return HAMUU(quota=quota or 0.0, radius=RADIUS[name])
    return HAMUQ(quota=max(rise, 0.0) / steps if quota is None else quota, radius=RADIUS[name])


def unlearn(
    original: DigitsClassifier, data: Data, args: argparse.Namespace
) -> tuple[DigitsClassifier, PathRecorder, StepRecorder]:
    """Make a copy of the original forget: the same module and a plain Trainer, with a callback."""
    end_level = choose_end_level(original, data)
    rise = end_level - evaluate(original, data.forget).loss
    rule = choose_rule(args.rule, args.quota, rise, args.steps)
    print(f"Unlearning {len(data.forget)} samples: {type(rule).__name__} with quota {rule.quota:.3g} per step")
    module = copy.deepcopy(original)
    hamu = HAMUCallback(
        data.forget, rule, passes=PassOptions(batch_size=FORGET_BATCH_SIZE), seed=args.seed, progress_bar=True
    )
    path, steps = PathRecorder(data, end_level), StepRecorder(hamu)
    fit(module, data.retain, args, "unlearned", max_epochs=-1, max_steps=args.steps, callbacks=[hamu, path, steps])
    return module, path, steps


def run(args: argparse.Namespace) -> Result:
    """Train, retrain without the forget set, unlearn, and evaluate all three."""
    data = load_data(args.forget, args.seed)
    original = train(data.train, args, "original")
    retrained = train(data.retain, args, "retrained")
    unlearned, path, steps = unlearn(original, data, args)
    models = {"original": original, "unlearned": unlearned, "retrained": retrained}
    rows = []
    for name, model in models.items():
        retain, forget, test = (evaluate(model, part) for part in (data.retain, data.forget, data.test))
        rows.append(make_row(name, retain, forget, test, data.gone))
    return Result(rows, data.gone, path.path, steps.history())


def draw(result: Result, out: Path) -> None:
    """Write the two pictures."""
    original, _, retrained = result.rows
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
    parser.add_argument("--rule", choices=("hamu-q", "hamu-u"), default="hamu-q")
    parser.add_argument("--quota", type=float, help="loss units per step; default: chosen with the validation split")
    parser.add_argument("--steps", type=int, default=50, help="the most steps of unlearning (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
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


def main() -> None:
    """Run, print the table, write the pictures."""
    start = time.perf_counter()
    args = parse_args()
    prepare()
    result = run(args)
    draw(result, args.out)
    print(f"\n{format_table(result.rows, result.gone)}\n")
    print("Accuracies in percent. Membership AUC: 0.5 when forget samples look unseen, 1 when they look trained on.")
    print(
        f"{time.perf_counter() - start:.0f} s. Written to {args.out}: tradeoff.png, hardness.png, logs (TensorBoard)."
    )


if __name__ == "__main__":
    main()
