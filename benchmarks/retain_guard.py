"""What `RetainGuard` holds on data that a model does not fit as a whole: MNIST-1D, a convolutional network.

pip install mnist1d && python benchmarks/retain_guard.py 3 4 5 6 7       # docs/targets.md; seeds
"""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import lightning
import numpy as np
import torch
from mnist1d.data import get_dataset_args, make_dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from hamu_lightning import Chance, HAMUCallback, Holdout

# The original is trained until it fits so much of its training data; the forget set is a class, or so many samples.
FITTED, CLASS, SAMPLES = 0.96, 5, 400


class Classifier(lightning.LightningModule):
    """40 numbers into ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Unflatten(1, (1, 40)), nn.Conv1d(1, 25, 5, 2, 1), nn.ReLU(), nn.Conv1d(25, 25, 3, 2, 1), nn.ReLU()),
            *(nn.Conv1d(25, 25, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(125, 10)),
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def load() -> tuple[TensorDataset, TensorDataset]:
    """4000 training and 1000 test samples."""
    data = make_dataset(get_dataset_args())
    parts = [torch.tensor(np.asarray(data[name])) for name in ("x", "y", "x_test", "y_test")]
    x, y, x_test, y_test = parts
    return TensorDataset(x.float(), y.long()), TensorDataset(x_test.float(), y_test.long())


@torch.no_grad()
def evaluate(module: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Mean loss, and accuracy in percent."""
    x, y = data.tensors
    logits = module(x)
    return float(cross_entropy(logits, y)), 100 * float((logits.argmax(1) == y).double().mean())


def train(data: TensorDataset, seed: int) -> Classifier:
    """The original."""
    torch.manual_seed(seed)
    module, generator, (x, y) = Classifier(), torch.Generator().manual_seed(seed), data.tensors
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    while evaluate(module, data)[1] <= 100 * FITTED:
        for indices in torch.randperm(len(y), generator=generator).split(100):
            optimizer.zero_grad()
            cross_entropy(module(x[indices]), y[indices]).backward()
            optimizer.step()
    return module


def split(train_set: TensorDataset, test_set: TensorDataset, kind: str, seed: int) -> tuple[TensorDataset, ...]:
    """What to retain, what to forget, and held-out samples."""
    generator, (x, y), (x_test, y_test) = torch.Generator().manual_seed(100 + seed), train_set.tensors, test_set.tensors
    drawn = torch.randperm(len(y), generator=generator)[:SAMPLES]
    gone = y == CLASS if kind == "class" else torch.zeros_like(y, dtype=torch.bool).index_fill_(0, drawn, True)
    held = torch.randperm(len(y_test), generator=generator)[: len(y_test) // 2]
    return (
        TensorDataset(x[~gone], y[~gone]),
        TensorDataset(x[gone], y[gone]),
        TensorDataset(x_test[held], y_test[held]),
    )


def unlearn(original: Classifier, parts: tuple[TensorDataset, ...], kind: str, seed: int, guard: bool) -> str:
    """Unlearn, and return a line of the table."""
    retain, forget, held_out = parts
    module = copy.deepcopy(original)
    hamu = HAMUCallback(forget, target=Chance(10) if kind == "class" else Holdout(held_out), seed=seed, guard=guard)
    lightning.seed_everything(seed, verbose=False)
    trainer = lightning.Trainer(
        max_steps=100,
        accelerator="cpu",
        devices=1,
        callbacks=[hamu],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(retain, 64, shuffle=True))
    (loss, accuracy), (new_loss, new_accuracy) = (evaluate(m, retain) for m in (original, module))
    forgotten = " -> ".join(f"{evaluate(m, forget)[0]:.3f}" for m in (original, module))
    returns = hamu.state_dict()["guard"].get("returns", "")
    ended = "" if hamu.stop_reason is None else hamu.stop_reason.value
    return (
        f"| {kind}, seed {seed}, {'guarded' if guard else 'not guarded'} | {accuracy:.1f} -> {new_accuracy:.1f} "
        f"| {loss:.3f} -> {new_loss:.3f} | {forgotten} | {returns} | {hamu.combined_steps} | {ended} |"
    )


def main(seeds: list[int]) -> None:
    """Print a table in Markdown."""
    warnings.simplefilter("ignore")
    train_set, test_set = load()
    print("| run | retain accuracy | retain loss | forget loss | returns | steps | ended |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for seed in seeds:
        original = train(train_set, seed)
        for kind in ("random", "class"):
            parts = split(train_set, test_set, kind, seed)
            for guard in (False, True):
                print(unlearn(original, parts, kind, seed, guard), flush=True)


if __name__ == "__main__":
    main([int(seed) for seed in sys.argv[1:]] or [0])
