"""Compare HAMU with other unlearning methods on a small set: same models, same batches, same tuning.

    python examples/compare.py --quick                    # three minutes: narrow network, one seed
    python examples/compare.py                            # forget the digit 3: three seeds
    python examples/compare.py --forget random:0.1        # forget a tenth of the training samples
    python examples/compare.py --rho 0.25 --seeds 5       # mostly samples of the digit 3
    python examples/compare.py --set mnist1d --forget random:0.1        # signals; needs pip install mnist1d
    python examples/compare.py --set synthetic --forget random:0.1      # made-up points in 20 classes

A method is what is differentiated times how the two gradients are combined, or a direct edit of the weights. Each has
one setting that is tuned, and is tried with the same number of values of it, with other seeds than are reported. Beside
them stand models that were retrained with still other seeds: nobody can be expected to come closer than these are to
each other. Prints the table in two parts, and writes JSON, CSV and a picture. A run that was interrupted goes on where
it stopped.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from digits import DigitsClassifier
from evaluation import evaluate
from forgetting import Data, parse_forget, parse_rho
from lightning.pytorch import Callback, LightningModule, Trainer
from problems import PROBLEMS, Source, load_problem
from quickstart import prepare
from torch.utils.data import Dataset, Subset

from hamu_lightning import HAMUQ, HAMUU, Chance, HAMUCallback, Holdout, Unseen, compare
from hamu_lightning.methods import SSD, Comparison, FisherForgetting, Method, Parts, Search, TrainingRun, relearn
from hamu_lightning.metrics.functional import match_classes
from hamu_lightning.objectives import (
    DELETE,
    NPO,
    BadTeacher,
    CrossEntropy,
    FrozenCopy,
    RandomLabels,
    ReferenceKL,
    WeightedSum,
)
from hamu_lightning.rules import (
    GRU,
    MGDA,
    FineTune,
    GradAscent,
    GradDiff,
    MUNBa,
    NGDiff,
    PCGrad,
    RelativeRadius,
    Rule,
)

# Of the network for the digits.
WIDTH = 16
# The learning rate that the model was trained with; the methods that tune another setting keep it.
LR = 0.1
# The longest gradient, of each stream for itself, where the rule has no trust region. Without it all of these methods
# either change nothing in a converged model or end in numbers that are none.
CLIP = 1.0
# HAMUCallback's own choice for targets.
RADIUS = RelativeRadius(1e-3)
CPU = {"accelerator": "cpu", "enable_progress_bar": False}

LEGEND = """\
JS: Jensen-Shannon divergence from the predictions of models retrained with other seeds, in percent of its maximum. The
row "another retrained" is what these have among themselves. Gap: mean distance from the retrained model in UA, RA, TA
(accuracies) and MIA (AUC), in percent. KS: distance of the distributions of forget losses. Surer: share of forgotten
samples whose label is likelier than before."""

Losses = Callable[[int], Mapping[str, Any]]
"""From the seed to the callback's `objective` and `retain_objective`: new ones for each fit."""


class Entry(NamedTuple):
    """A method, and what is tuned about it."""

    setting: str
    method: Method | Search


class LearningRate(Callback):
    """Sets the module's learning rate before it makes its optimizer.

    Args:
        lr: The learning rate.
    """

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set it."""
        pl_module.lr = self.lr  # type: ignore[assignment]


def module_loss(seed: int) -> Mapping[str, Any]:
    """Differentiate the module's own loss on both streams."""
    return {}


def npo(seed: int) -> Mapping[str, Any]:
    """NPO with the paper's beta."""
    return {"objective": NPO(0.1)}


def random_labels(seed: int) -> Mapping[str, Any]:
    """A wrong label for each forget sample."""
    return {"objective": RandomLabels(seed)}


def scrub(seed: int) -> Mapping[str, Any]:
    """SCRUB with both weights 1: away from the original on forget, towards it and the labels on retain."""
    reference = FrozenCopy()
    kept = WeightedSum((1.0, ReferenceKL(reference)), (1.0, CrossEntropy()))
    return {"objective": ReferenceKL(reference), "retain_objective": kept}


def bad_teacher(seed: int) -> Mapping[str, Any]:
    """A teacher that knows nothing on forget, the original on retain."""
    return {"objective": BadTeacher(seed=seed), "retain_objective": ReferenceKL()}


def delete(seed: int) -> Mapping[str, Any]:
    """The original's second choice."""
    return {"objective": DELETE()}


def step_with(steps: int, rule: Rule, losses: Losses = module_loss, lr: float = LR) -> TrainingRun:
    """Make a method of training steps.

    Args:
        steps: The number of steps.
        rule: How the gradients are combined.
        losses: What is differentiated.
        lr: The learning rate; HAMU's radius here does not depend on it.
    """

    def make(forget: Any, seed: int) -> Callback:
        return HAMUCallback(forget, rule, seed=seed, **losses(seed))

    clip = None if isinstance(rule, HAMUQ) else CLIP  # HAMU's steps end at its radius, and its quota needs the lengths
    return TrainingRun(make, {**fit_options(steps), "callbacks": LearningRate(lr), "gradient_clip_val": clip})


def fit_options(steps: int) -> dict[str, Any]:
    """Return what is the same for all methods among the arguments of the Trainer."""
    return {**CPU, "max_epochs": -1, "max_steps": steps}


def hold_out(data: Data) -> Dataset[Any]:
    """Return validation samples whose classes have the same shares as in the forget set."""
    labels, forgotten = data.val.tensors[1], data.train.tensors[1][data.forget.indices]
    return Subset(data.val, match_classes(labels, like=forgotten).tolist())


def aim_at_answers(steps: int, data: Data) -> TrainingRun:
    """HAMU-Q to what the model says about samples that it never saw. Nothing is tuned."""

    def make(forget: Any, seed: int) -> Callback:
        return HAMUCallback(forget, target=Unseen() if data.gone else Unseen(data.val), seed=seed)

    return TrainingRun(make, fit_options(steps))


def aim_at_loss(steps: int, data: Data) -> TrainingRun:
    """HAMU-Q to the loss of a guess for a class, to that on held-out samples for others. Nothing is tuned."""

    def make(forget: Any, seed: int) -> Callback:
        target = Chance(data.classes) if data.gone else Holdout(hold_out(data))
        return HAMUCallback(forget, target=target, seed=seed)

    return TrainingRun(make, fit_options(steps))


def aim_at(steps: int, data: Data, factor: float) -> TrainingRun:
    """HAMU-Q to a multiple of these levels. That on held-out samples is the original's."""
    held_out = hold_out(data)

    def measure(module: Any) -> float:
        return factor * (math.log(data.classes) if data.gone else evaluate(module, held_out).loss)

    def make(forget: Any, seed: int) -> Callback:
        return HAMUCallback(forget, target=measure, seed=seed)

    return TrainingRun(make, fit_options(steps))


def make_entries(data: Data, steps: int, lr: float = LR) -> dict[str, Entry]:
    """Return all methods by name, each with one setting to tune; those that tune another one keep the learning rate.

    Ranges span a factor of ten, and were chosen with one seed, by accuracies on retain, forget and validation set, so
    that the lower end changes little and the upper end is too much. A quota spans a hundred: a class has that much
    further to go than samples. So does Fisher's alpha: the noise grows with its fourth root. SSD selects nothing above
    9.9, and a target begins with HAMUCallback's own.
    """
    run = partial(step_with, steps)

    def tune_rate(rule: Rule, low: float, high: float) -> Entry:
        return Entry("learning rate", Search(lambda lr: run(rule, lr=lr), low, high))

    def tune_weight(low: float, high: float, losses: Losses = module_loss) -> Entry:
        return Entry("weight of the forget loss", Search(lambda w: run(GradDiff(w), losses, lr), low, high))

    def tune_quota(losses: Losses = module_loss) -> Entry:
        return Entry("quota", Search(lambda quota: run(HAMUQ(quota, radius=RADIUS), losses), 3e-3, 0.3))

    return {
        "HAMU-Q, Unseen": Entry("nothing", aim_at_answers(steps, data)),
        "HAMU-Q, target as is": Entry("nothing", aim_at_loss(steps, data)),
        "HAMU-Q, target": Entry("multiple of the target", Search(partial(aim_at, steps, data), 1, 9)),
        "HAMU-Q, quota": tune_quota(),
        "HAMU-U": Entry("radius", Search(lambda r: run(HAMUU(0.0, radius=RelativeRadius(r))), 1e-4, 1e-3)),
        "NPO + HAMU-Q": tune_quota(npo),
        "fine-tuning": tune_rate(FineTune(), 0.3, 3),
        "gradient ascent": tune_rate(GradAscent(), 3e-3, 0.03),
        "GradDiff": tune_weight(0.1, 1),
        "PCGrad": tune_rate(PCGrad(), 0.01, 0.1),
        "GRU": tune_rate(GRU(), 0.01, 0.1),
        "NGDiff": tune_rate(NGDiff(), 3e-3, 0.03),
        "MGDA": tune_rate(MGDA(), 0.1, 1),
        "MUNBa": tune_rate(MUNBa(), 3e-3, 0.03),
        "NPO + GradDiff": tune_weight(0.1, 1, npo),
        "DELETE": tune_weight(0.1, 1, delete),
        "random labels": tune_weight(0.1, 1, random_labels),
        "SCRUB, simultaneous": tune_weight(0.1, 1, scrub),
        "bad teacher": tune_weight(0.1, 1, bad_teacher),
        "SSD": Entry("alpha", Search(SSD, 1, 9)),
        "Fisher forgetting": Entry("alpha", Search(FisherForgetting, 1e-13, 1e-11)),
    }


def run(args: argparse.Namespace) -> tuple[Comparison, dict[str, Entry]]:
    """Run what has not been run, and read the rest."""
    problem, data = load_problem(args.set, args.forget, args.forget_seed)
    if args.set == "digits" and args.width != WIDTH:
        problem = replace(problem, make_module=partial(DigitsClassifier, width=args.width))
    entries = make_entries(data, args.steps, problem.lr)
    chosen = {name: entries[name] for name in args.methods or entries}
    found = compare(
        problem.make_module,
        Source(data, problem.batch_size),
        data.forget,
        {name: entry.method for name, entry in chosen.items()},
        out=args.out,
        options=problem.trainer_options,
        seeds=range(args.seeds),
        pool=args.pool,
        trials=args.trials,
        metrics={"relearn steps": partial(relearn_steps, cap=args.relearn)} if args.relearn else None,
        path_every=10,
    )
    return found, chosen


def relearn_steps(module: LightningModule, parts: Parts, cap: int) -> float:
    """Return how many steps on the forget set bring 95 % of it back; the cap where they do not."""
    return float(relearn(module, parts.forget, steps=cap, until=0.95).steps(original=1.0))


def format_settings(entries: Mapping[str, Entry], trials: int) -> str:
    """Say what the column "value" holds, one line for each setting."""
    names: dict[str, list[str]] = {}
    for name, (setting, _) in entries.items():
        names.setdefault(setting, []).append(name)
    lines = [f"  {setting}: {'; '.join(found)}" for setting, found in names.items()]
    return "\n".join(
        (f"value: the best of {trials}, by accuracies on retain, forget and validation set. It is", *lines)
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare unlearning methods on a small set.")
    parser.add_argument("--set", choices=PROBLEMS, default="digits")
    what = parser.add_mutually_exclusive_group()
    kinds = "class:3 (default) or random:0.1"
    what.add_argument("--forget", type=partial(parse_forget, classes=20), default=("class", 3.0), help=kinds)
    what.add_argument("--rho", dest="forget", type=parse_rho, help="share drawn at random, the rest of class 3")
    parser.add_argument("--quick", action="store_true", help="one seed, a narrow network")
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3; quick: 1)")
    parser.add_argument(
        "--forget-seed", type=int, default=0, help="draws the forget set, one for all seeds (default: 0)"
    )
    parser.add_argument("--trials", type=int, default=3, help="values of each method's setting (default: 3)")
    parser.add_argument("--pool", type=int, help="models retrained with other seeds (default: 4; quick: 2)")
    parser.add_argument("--steps", type=int, default=30, help="steps of each method that takes steps (default: 30)")
    parser.add_argument(
        "--relearn", type=int, default=0, metavar="CAP", help="count steps of relearning up to this many"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="some of the methods (default: all)")
    parser.add_argument("--out", type=Path, default=Path("compare_out"), help="where to write (default: compare_out)")
    args = parser.parse_args(argv)
    args.width = 8 if args.quick else WIDTH
    args.pool = (2 if args.quick else 4) if args.pool is None else args.pool
    args.seeds = args.seeds or (1 if args.quick else 3)
    return args


def show_progress() -> None:
    """Let through what `compare` says of each run, and nothing else of Lightning's hints."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.setLevel(logging.INFO)
    logger.addFilter(lambda record: ", trial " in record.getMessage())
    # Each row of the table shows how far a run came.
    warnings.filterwarnings("ignore", message=".*before the target")


def main() -> None:
    """Run, print the table, write the files."""
    wall, cpu = time.perf_counter(), time.process_time()
    args = parse_args()
    prepare()
    show_progress()
    found, entries = run(args)
    stem = args.out / "{}-{}-{:g}".format(args.set, *args.forget)
    found.to_json(f"{stem}.json")
    found.to_csv(f"{stem}.csv")
    found.plot().savefig(f"{stem}.png")
    print(f"\n{found.table()}\n\n{format_settings(entries, args.trials)}\n")
    print(LEGEND)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"{wall:.0f} s, {cpu:.0f} s of them computing. Written to {stem}: .json, .csv, .png.")


if __name__ == "__main__":
    main()
