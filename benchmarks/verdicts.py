"""Whether the verdict tells models apart: originals, unlearned and retrained ones, and fakes; many seeds.

    python benchmarks/verdicts.py --seeds 20
    python benchmarks/verdicts.py --seeds 3 --task class --show

Small networks on scikit-learn's digits. "class" forgets a digit (another one for each seed), "labels" a tenth of the
training samples, whose labels are wrong. Prints one table: how often each model gets each verdict.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from classifier import Classifier
from digits import load_splits
from forgetting import Data, split_data
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hamu_lightning import HAMUCallback, SecondChoice, Unseen, split_forget
from hamu_lightning.evidence import Evaluation, PartScores, Verdict, compare_weights, judge

EPOCHS = {"class": 40, "labels": 80}
RETRAINED, WRONG, ENORMOUS = 5, 0.1, 5
REFERENCES = 3


def make_module(seed: int) -> Classifier:
    """Return an untrained network of two hidden layers."""
    torch.manual_seed(seed)
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Classifier(nn.Sequential(nn.Flatten(), *layers), lr=1e-2)


def train(module: LightningModule, data: Dataset, epochs: int, seed: int, part: nn.Module | None = None) -> None:  # type: ignore[type-arg]
    """Train a module, or a part of it."""
    x, y = load_all(data)
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD((part or module).parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, epochs)
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=random).split(64):
            optimizer.zero_grad()
            F.cross_entropy(module(x[index]), y[index]).backward()
            optimizer.step()
        schedule.step()


def load_all(data: Dataset) -> tuple[Tensor, Tensor]:  # type: ignore[type-arg]
    """Return all samples of a set."""
    x, y = next(iter(DataLoader(data, batch_size=len(data))))  # type: ignore[arg-type]
    return x, y


@torch.no_grad()
def evaluate(module: LightningModule, data: Data) -> Evaluation:
    """Return what a module says of all parts of the data."""
    parts = {}
    for name, part in (("retain", data.retain), ("forget", data.forget), ("holdout", data.val), ("test", data.test)):
        x, y = load_all(part)
        scores = module(x).double().log_softmax(1)
        losses = F.nll_loss(scores, y, reduction="none")
        parts[name] = PartScores(losses, (scores.argmax(1) == y).double(), torch.arange(len(y)), scores, y)
    return Evaluation(parts)


def load_task(task: str, seed: int) -> Data:
    """Return the data of one seed."""
    sets, val, test = load_splits()
    if task == "class":
        return split_data(sets, val, test, ("class", seed % 10), seed)
    x, y = sets.tensors
    random = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(y), generator=random)[: round(WRONG * len(y))]
    labels = y.clone()
    labels[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),), generator=random)) % 10
    noisy = TensorDataset(x, labels)
    return Data(noisy, *split_forget(noisy, wrong.tolist()), val, test, [])


def unlearn(original: Classifier, data: Data, task: str) -> Classifier:
    """Return the original after unlearning, with nothing tuned."""
    module = copy.deepcopy(original)
    callback = HAMUCallback(forget=data.forget, target=Unseen() if task == "class" else SecondChoice())
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_steps=100, callbacks=[callback], enable_progress_bar=False, **options)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader(data.retain, batch_size=64, shuffle=True))
    return module


def shift_output(original: Classifier, data: Data) -> Classifier:
    """Fake: the logit of the forgotten class is lowered for all samples."""
    module = copy.deepcopy(original)
    module.net[-1].bias.data[data.gone] -= 50  # type: ignore[index,union-attr]
    return module


def renew_head(original: Classifier, data: Data, seed: int) -> Classifier:
    """Fake: the last layer is trained anew on the data to keep, on features that keep everything."""
    module = copy.deepcopy(original)
    torch.manual_seed(seed)
    head = module.net[-1]  # type: ignore[index]
    head.reset_parameters()
    train(module, data.retain, 10, seed, head)
    return module


def raise_mean(original: Classifier, data: Data) -> Classifier:
    """Fake: five samples get an enormous loss, which the mean shows, and the others are learned still better."""
    module = copy.deepcopy(original)
    x, y = load_all(data.forget)
    keep = load_all(data.retain)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        worse = F.cross_entropy(module(x[:ENORMOUS]), y[:ENORMOUS]).clamp(max=60)
        better = F.cross_entropy(module(x[ENORMOUS:]), y[ENORMOUS:])
        (F.cross_entropy(module(keep[0]), keep[1]) + 0.2 * better - 0.05 * worse).backward()
        optimizer.step()
    return module


def judge_all(task: str, seed: int) -> Iterator[tuple[str, Verdict]]:
    """Train all models of one seed, and return the verdict on each."""
    data, epochs = load_task(task, seed), EPOCHS[task]
    original = make_module(seed)
    train(original, data.train, epochs, seed)
    retrained = [make_module(seed + 1000 * (k + 1)) for k in range(RETRAINED)]
    for k, module in enumerate(retrained):
        train(module, data.retain, epochs, seed + 1000 * (k + 1))
    models = {"original": original, "HAMU": unlearn(original, data, task)}
    models |= {"retrained": retrained[0], "another retrained": retrained[1], "five samples": raise_mean(original, data)}
    if task == "class":
        models |= {"shifted logit": shift_output(original, data), "new head": renew_head(original, data, seed)}
    before = evaluate(original, data)
    references = [(module, evaluate(module, data)) for module in retrained]
    for name, module in models.items():
        others = [scores for other, scores in references if other is not module][-REFERENCES:]
        yield name, judge(before, evaluate(module, data), others, [compare_weights(original, module)])


def main() -> None:
    """Print how often each model gets each verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--task", choices=[*EPOCHS], nargs="+", default=[*EPOCHS])
    parser.add_argument("--show", action="store_true", help="print each verdict with its reasons")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print("| forgotten | model | verdicts |\n| --- | --- | --- |")
    for task in args.task:
        counts: dict[str, Counter[str]] = {}
        for seed in range(args.first, args.first + args.seeds):
            for name, verdict in judge_all(task, seed):
                counts.setdefault(name, Counter())[verdict.kind] += 1
                if args.show:
                    print(f"{seed} {name}: {verdict.kind}\n  " + "\n  ".join(verdict.reasons), file=sys.stderr)
        for name, found in counts.items():
            told = ", ".join(f"{kind} {count} of {args.seeds}" for kind, count in found.most_common())
            print(f"| {task} | {name} | {told} |", flush=True)


if __name__ == "__main__":
    main()
