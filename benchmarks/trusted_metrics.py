"""Which metrics can be trusted: do they tell models that know from models that never did, and do they stay?

    python benchmarks/trusted_metrics.py synthetic random:0.1 --models 20
    python benchmarks/trusted_metrics.py mnist1d class:5 --models 20
    python benchmarks/trusted_metrics.py digits class:3 --models 20

After OpenUnlearning (arXiv 2506.12618). Two kinds of models are trained with different seeds, with the forget set and
without it.

- *faithfulness*: the AUC with which a metric's value tells the two kinds apart; 1 is perfect, 0.5 nothing.
- *4 bits*: the AUC with which it still does once the weights are rounded to 4 bits in groups of 32, with the value of
  models that are not rounded as the scale: the share of (rounded with, not rounded without) pairs in the right order.
- *relearned*: the same AUC after 10 steps of relearning from a tenth of the forget set, both kinds alike. A metric that
  no longer tells them apart could be made to say anything by a little training.
- *shift*: the share of pairs (with, without) in the right order where 3 nats are taken from the logit of each sample's
  own label in the models that hold the knowledge: what only looks at the label is fooled.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from classifier import Annealing, Classifier, Problem
from digits import load_splits
from forgetting import Data, parse_forget, split_data
from lightning.pytorch import LightningModule, Trainer, seed_everything
from problems import load_problem
from quickstart import prepare
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from hamu_lightning.evidence import Evaluation, PartScores, evaluate
from hamu_lightning.evidence.attacks import round_weights
from hamu_lightning.methods import teach
from hamu_lightning.metrics.functional import auc, cross_entropies

REFERENCES, SHIFT = 4, 3.0
# Larger where the forget set is remembered, or smaller.
SIGNS = {"FA": 1, "forget_loss": -1, "auc": 1, "tpr_at_1": 1, "trained_attack": 1}
SIGNS |= {"js": 1, "kl": 1, "agreement": -1, "activation": 1, "log_odds": 1, "ks": 1}


def load(name: str, forget: tuple[str, float]) -> tuple[Problem, Data]:
    """Return a set and what is forgotten of it; of the digits with a network that is trained in seconds."""
    if name != "digits":
        return load_problem(name, forget)
    problem = Problem(make_mlp, *load_splits(), epochs=40, options={"callbacks": Annealing()})
    return problem, split_data(problem.train, problem.val, problem.test, forget, 0)


def make_mlp() -> Classifier:
    """Make a network of two hidden layers."""
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Classifier(nn.Sequential(nn.Flatten(), *layers), lr=0.5)


def train(problem: Problem, data: Dataset[object], seed: int, path: Path) -> LightningModule:
    """Train a model, or read it."""
    seed_everything(seed, verbose=False)
    module = problem.make_module()
    if path.exists():
        module.load_state_dict(torch.load(path, weights_only=True))
        return module
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", max_epochs=problem.epochs, enable_model_summary=False, **quiet, **problem.options
    )
    trainer.fit(module, DataLoader(data, batch_size=problem.batch_size, shuffle=True, drop_last=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), path)
    return module


def ask(module: LightningModule, data: Data) -> Evaluation:
    """What a model says of the forget, the held-out and the retain set."""
    return evaluate(module, {"retain": data.retain, "forget": data.forget, "holdout": data.test})


def shifted(found: Evaluation, nats: float) -> Evaluation:
    """The same where so much is taken from the logit of each forgotten sample's label."""
    part = found.parts["forget"]
    assert part.log_probs is not None and part.labels is not None
    logits = part.log_probs.scatter_add(1, part.labels[:, None], torch.full((len(part), 1), -nats).double())
    right = (logits.argmax(1) == part.labels).double()
    scores = PartScores(cross_entropies(logits, part.labels), right, part.ids, logits.log_softmax(1), part.labels)
    return Evaluation({**found.parts, "forget": scores})


def numbers(evaluation: Evaluation, pool: list[Evaluation]) -> dict[str, float]:
    """Each metric, larger where the forget set is remembered."""
    found = {**evaluation.numbers(), **evaluation.distances(pool)}
    return {name: sign * found[name].value for name, sign in SIGNS.items() if name in found}


def tell_apart(holds: list[dict[str, float]], never: list[dict[str, float]]) -> dict[str, float]:
    """For each metric the AUC with which it tells two kinds of models apart; NaN where it has no value."""
    return {n: float(auc([x[n] for x in holds], [x[n] for x in never], interval=None)) for n in holds[0]}


def relearned(module: LightningModule, data: Data) -> LightningModule:
    """A copy that has seen a tenth of the forget set for 10 steps."""
    return teach(module, Subset(data.forget, range(len(data.forget) // 10)), steps=10)


def run(name: str, forget: tuple[str, float], models: int, out: Path) -> dict[str, dict[str, float]]:
    """Train or read the models, and return the columns of the table."""
    problem, data = load(name, forget)
    folder = out / f"{name}-{forget[0]}-{forget[1]:g}"

    def make(kind: str, part: Dataset[object], seeds: range) -> list[LightningModule]:
        made = []
        for seed in seeds:
            made.append(train(problem, part, seed, folder / f"{kind}-{seed}.pt"))
            print(f"{kind} {seed}", file=sys.stderr, flush=True)
        return made

    pool = [ask(m, data) for m in make("without", data.retain, range(1000, 1000 + REFERENCES))]
    holds, never = make("with", data.train, range(models)), make("without", data.retain, range(models))

    def measure(kind: list[LightningModule]) -> list[dict[str, float]]:
        return [numbers(ask(module, data), pool) for module in kind]

    def changed(
        how: Callable[[LightningModule], LightningModule], kind: list[LightningModule]
    ) -> list[dict[str, float]]:
        return measure([how(copy.deepcopy(module)) for module in kind])

    plain = measure(never)
    return {
        "faithfulness": tell_apart(measure(holds), plain),
        "4 bits": tell_apart(changed(lambda m: round_weights(m, 4, 32), holds), plain),
        "relearned": tell_apart(*(changed(lambda m: relearned(m, data), kind) for kind in (holds, never))),
        "shift": tell_apart([numbers(shifted(ask(m, data), SHIFT), pool) for m in holds], plain),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set")
    parser.add_argument("forget", type=lambda text: parse_forget(text, 20))
    parser.add_argument("--models", type=int, default=20, help="of each kind (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("trusted_metrics_out"), help="where models are kept")
    args = parser.parse_args()
    prepare()
    columns = run(args.set, args.forget, args.models, args.out)
    print(f"{args.set}, {args.forget[0]}:{args.forget[1]:g}, {args.models} models of each kind")
    print_table(columns)


def print_table(columns: dict[str, dict[str, float]]) -> None:
    """Print a line for each metric, the most faithful first."""
    print(f"{'':<28}" + "".join(f"{title:>14}" for title in columns))
    for metric in sorted(columns["faithfulness"], key=lambda m: -columns["faithfulness"][m]):
        print(f"{metric:<28}" + "".join(f"{column.get(metric, math.nan):>14.3f}" for column in columns.values()))


if __name__ == "__main__":
    main()
