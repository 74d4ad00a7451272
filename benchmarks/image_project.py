"""A deletion request in an ordinary image project: augmentation, dropout, BatchNorm, AdamW; how far from retraining?

    python benchmarks/image_project.py 0 1 2 3 4 --like holdout --steps 100

An overfit network on noisy digits is asked to forget 10 % of its training images at random. Both sides of the
membership test are measured without augmentation, against test images of the same classes.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from digits import load_splits
from lightning.pytorch import LightningModule, Trainer, seed_everything
from quickstart import prepare
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from hamu_lightning import HAMUCallback, Unseen, split_forget
from hamu_lightning.metrics.functional import accuracy, cross_entropies, match_classes, membership_auc, share_surer

EPOCHS, BATCH_SIZE, TRAINED, NOISE = 40, 32, 1000, 0.5


class Images(Dataset[Any]):
    """Images with noise of their own, and a transform.

    Args:
        images: `[N, 1, 8, 8]`.
        labels: `[N]`.
        augments: Whether an image is moved by a pixel and gets new noise at each reading.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, augments: bool) -> None:
        self.images, self.labels = images, labels
        self.transform = augment if augments else None

    def __len__(self) -> int:
        """How many images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image and its label."""
        image = self.images[index]
        return image if self.transform is None else self.transform(image), self.labels[index]


def augment(image: Tensor) -> Tensor:
    """Move an image by a pixel at most, and add a little noise."""
    shift = [int(x) for x in torch.randint(-1, 2, (2,))]
    return image.roll(shift, dims=(1, 2)) + 0.1 * torch.randn(image.shape)


class Classifier(LightningModule):
    """A small convolutional network, trained with AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten()),
            *(nn.Dropout(0.2), nn.Linear(1024, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[N, 1, 8, 8]` to logits `[N, 10]`."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW with its usual settings."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=1e-2)


def fit(module: LightningModule, data: Any, seed: int, **options: Any) -> LightningModule:
    """Fit a module with a plain Trainer."""
    seed_everything(seed, verbose=False)
    options |= {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", enable_progress_bar=False, **options)
    trainer.fit(module, DataLoader(data, batch_size=BATCH_SIZE, shuffle=True, drop_last=True))
    return module


def evaluate(module: LightningModule, data: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """Logits and labels of all images, in evaluation mode."""
    images, labels = next(iter(DataLoader(data, batch_size=len(data))))  # type: ignore[arg-type]
    module.eval()
    with torch.no_grad():
        logits = module(images)
    module.train()
    return logits, labels


def run(seed: int, steps: int, like: str) -> dict[str, dict[str, float]]:
    """Train, retrain, forget; return the numbers of the models."""
    train, val, test = load_splits()
    random = torch.Generator().manual_seed(seed)

    def with_noise(part: Any, *, augments: bool) -> Images:
        images, labels = next(iter(DataLoader(part, batch_size=len(part))))
        return Images(images + NOISE * torch.randn(images.shape, generator=random), labels, augments=augments)

    augmented = with_noise(Subset(train, range(TRAINED)), augments=True)
    plain = Images(augmented.images, augmented.labels, augments=False)
    chosen = torch.randperm(TRAINED, generator=random)[: TRAINED // 10].tolist()
    retain, forget = split_forget(augmented, chosen)
    val, test = (with_noise(part, augments=False) for part in (val, test))
    seed_everything(seed, verbose=False)
    untrained = Classifier()
    original = fit(copy.deepcopy(untrained), augmented, seed, max_epochs=EPOCHS)
    models = {"original": original}
    hamu = HAMUCallback(forget, target=Unseen(val, transform_like=like), seed=seed)
    models["unlearned"] = fit(copy.deepcopy(original), retain, seed, max_epochs=-1, max_steps=steps, callbacks=[hamu])
    for number in range(1, 5):
        seed_everything(seed + 1000 * number, verbose=False)
        models[f"retrained {number}"] = fit(Classifier(), retain, seed + 1000 * number, max_epochs=EPOCHS)
    print(f"seed {seed}: {hamu.summary}\n", flush=True)
    kept = [i for i in range(TRAINED) if i not in set(chosen)]
    parts, found = (Subset(plain, chosen), Subset(plain, kept), test), {}
    before = cross_entropies(*evaluate(original, parts[0]))
    for name, model in models.items():
        forgotten, retained, others = (evaluate(model, part) for part in parts)
        losses, same = cross_entropies(*forgotten), match_classes(others[1], like=forgotten[1])
        found[name] = {
            "auc": float(membership_auc(losses, cross_entropies(*others)[same])),
            "surer": float(share_surer(losses, before)),
            "UA": 1 - float(accuracy(*forgotten)),
            "RA": float(accuracy(*retained)),
            "TA": float(accuracy(*others)),
        }
    return found


def main() -> None:
    """Print a line for each seed and model, and the means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--like", choices=("holdout", "forget"), default="holdout", help="`transform_like` of Unseen")
    args = parser.parse_args()
    prepare()
    warnings.filterwarnings("ignore", message=".*")
    differences, columns = [], ("auc", "surer", "UA", "RA", "TA")
    print(f"{'seed':>4} {'model':<14}" + "".join(f"{name:>8}" for name in columns))
    for seed in args.seeds:
        found = run(seed, args.steps, args.like)
        retrained = [numbers["auc"] for name, numbers in found.items() if name.startswith("retrained")]
        for name, numbers in found.items():
            print(f"{seed:>4} {name:<14}" + "".join(f"{numbers[column]:8.3f}" for column in columns), flush=True)
        differences.append(found["unlearned"]["auc"] - mean(retrained))
        spread = f"{mean(retrained):.3f} ± {stdev(retrained):.3f}"
        print(f"     AUC of four retrained {spread}; unlearned less their mean {differences[-1]:+.3f}", flush=True)
    print(f"Mean difference {mean(differences):+.3f}, largest {max(map(abs, differences)):.3f}")


if __name__ == "__main__":
    main()
