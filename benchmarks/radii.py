"""Which radius a target should have by default: a ResNet and a transformer, fractions, batch sizes, seeds.

python benchmarks/radii.py              # docs/targets.md; about a quarter of an hour on one core
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from digits import DigitsClassifier
from evaluation import evaluate
from quickstart import fit, load_data, parse_args, prepare, train
from targets import SETS, each, print_table

from hamu_lightning import HAMUQ, Chance, HAMUCallback, Holdout
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.rules import RelativeRadius, TargetQuota


class DigitsTransformer(DigitsClassifier):
    """Reads the eight rows of an image as a sequence; trained with Adam, unlearned with plain SGD."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.embedding = nn.Linear(8, 64)
        self.position = nn.Parameter(torch.randn(8, 64) * 0.02)
        self.net = nn.Sequential(
            nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Flatten(), nn.Linear(512, 10)
        )
        self.learns = True

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[N, 1, 8, 8]` to logits `[N, 10]`."""
        logits: Tensor = self.net(self.embedding(images[:, 0]) + self.position)
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam for training, plain SGD for unlearning."""
        return torch.optim.Adam(self.parameters(), lr=1e-3) if self.learns else super().configure_optimizers()


def train_transformer(data: Any, args: argparse.Namespace) -> DigitsTransformer:
    """Train a transformer from scratch."""
    torch.manual_seed(args.seed)
    module = DigitsTransformer()
    fit(module, data.train, args, "transformer", max_epochs=40)
    module.learns = False
    return module


def run(
    original: Any, data: Any, args: argparse.Namespace, fraction: float, batch_size: int, verifies: bool
) -> tuple[float, ...]:
    """Unlearn a copy; return the forget loss in units of the target, retain points lost, steps."""
    module = copy.deepcopy(original)
    rule = HAMUQ(TargetQuota(Chance(10) if data.gone else Holdout(data.val)), radius=RelativeRadius(fraction))
    hamu = HAMUCallback(data.forget, rule, passes=PassOptions(batch_size=batch_size), seed=args.seed, verify=verifies)
    fit(module, data.retain, args, "unlearned", max_epochs=-1, max_steps=args.steps, callbacks=[hamu])
    target = float(hamu.state_dict()["optimizer"]["aims"]["forget"]["target"])
    before, after = (evaluate(m, data.retain).accuracy for m in (original, module))
    return evaluate(module, data.forget).loss / target, 100 * (after - before), hamu.combined_steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The radius of docs/targets.md.")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    prepare()
    lines = []
    with tempfile.TemporaryDirectory() as out:
        cases: dict[str, list[Any]] = {}
        for seed in range(options.seeds):
            args = parse_args(["--seed", str(seed), "--out", out, "--steps", "100"])
            data = {name: load_data(kind, seed) for name, kind in SETS.items() if name != "rho = 0.25"}
            first = data["class 3"]
            models = {"ResNet-20": train(first.train, args, "original"), "transformer": train_transformer(first, args)}
            for model, original in models.items():
                for name, some in data.items():
                    cases.setdefault(f"{model}, {name}", []).append((original, some, args))
        for name, some in cases.items():
            for fraction in (3e-4, 1e-3, 3e-3, 1e-2):
                for batch_size in (16, 64):
                    cells = []
                    for verifies in (False, True):
                        runs = [run(*case, fraction, batch_size, verifies) for case in some]
                        cells += [
                            each(runs, lambda r: r[0], 2),
                            f"{min(r[1] for r in runs):+.1f}",
                            each(runs, lambda r: r[2], 0),
                        ]
                    lines.append([f"{name}, {fraction:g}, {batch_size}", *cells])
                    print(lines[-1], file=sys.stderr, flush=True)
    verified = ["forget loss / target, verified", "worst retain, points", "steps"]
    print_table(
        ["model, set, fraction, batch size", "forget loss / target", "worst retain, points", "steps", *verified], lines
    )


if __name__ == "__main__":
    main()
