"""Steps verified one by one against steps verified together: what holds, and what it costs.

python benchmarks/verification.py                # 75 fits each, about 5 minutes of CPU
python benchmarks/verification.py --seeds 1      # a fifth of it

An MLP on the 8x8 digits, the learning rates, radii and sets of `benchmarks/targets.py`, at most 100 steps. Forward
passes are those of whole fits, measurements and their start included, divided by the steps of the Trainer.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from quickstart import Data, load_data
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hamu_lightning import HAMUQ, Chance, HAMUCallback, Holdout, VerifySteps
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.rules import LearningRateRadius, Radius, RelativeRadius, TargetQuota

SETS = {"class 3": ("class", 3.0), "10 % at random": ("random", 0.1), "rho = 0.25": ("mixture", 0.25)}
LR = 0.1
# By name the radius and the learning rate.
RULES: dict[str, tuple[Radius, float]] = {
    **{f"learning rate, {factor:g}x": (LearningRateRadius(), LR * factor) for factor in (0.1, 1, 10, 100)},
    "relative, 100x": (RelativeRadius(1e-3), LR * 100),
}

TITLES = [
    "rule, set, verified",
    "destroyed",
    "target reached",
    "forget loss / target",
    "worst retain, points",
    "promises kept",
    "undone",
    "steps",
    "passes per step",
    "CPU ms per step",
]


class Digits(LightningModule):
    """An MLP that counts how often it is run."""

    passes = 0

    def __init__(self) -> None:
        super().__init__()
        self.lr = LR
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        Digits.passes += 1
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The cross-entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@dataclass(frozen=True)
class Run:
    """What a fit came to."""

    ratio: float
    points: float
    is_reached: bool
    steps: int
    passes: float
    cpu: float
    verified: int
    kept: int
    dropped: int


def fit(module: Digits, data: Any, seed: int, **options: Any) -> int:
    """Fit, and return how many steps there were."""
    seed_everything(seed, verbose=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", **quiet, **options)
    trainer.fit(module, DataLoader(data, 64, shuffle=True, drop_last=True))
    return trainer.global_step


@torch.no_grad()
def measure(module: Digits, data: Any) -> tuple[float, float]:
    """Loss and accuracy on all samples."""
    x, y = next(iter(DataLoader(data, len(data))))
    logits = module.net(x)
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean())


def unlearn(original: Digits, data: Data, seed: int, rule: tuple[Radius, float], every: Any, guard: bool) -> Run:
    """Unlearn a copy."""
    module, (radius, lr) = copy.deepcopy(original), rule
    module.lr = lr
    target = Chance(10) if data.gone else Holdout(data.val)
    hamu = HAMUCallback(
        data.forget,
        HAMUQ(TargetQuota(target), radius=radius),
        passes=PassOptions(batch_size=64),
        seed=seed,
        verify=VerifySteps(every=every),
        guard=guard,
    )
    passes, start = Digits.passes, time.thread_time()
    steps = fit(module, data.retain, seed, max_epochs=-1, max_steps=100, callbacks=[hamu])
    cpu, passes = time.thread_time() - start, Digits.passes - passes
    (loss, accuracy), (forget, _) = measure(module, data.retain), measure(module, data.forget)
    points = 100 * (accuracy - measure(original, data.retain)[1])
    state = hamu.state_dict()
    end = float(state["optimizer"]["aims"]["forget"]["target"])
    counts = (state["verifier"][name] for name in ("verified", "kept", "dropped"))
    is_lost = not math.isfinite(loss + forget)
    reached = hamu.stop_reason is not None and hamu.stop_reason.startswith("target")
    return Run(forget / end, -100.0 if is_lost else points, reached, steps, passes / steps, cpu / steps, *counts)


def main() -> None:
    """Print a line for each rule, set and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rules", nargs="*", choices=RULES, default=list(RULES))
    parser.add_argument("--guard", action="store_true", help="with the guard over the retain data")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cases = []
    for seed in range(args.seeds):
        data = {name: load_data(kind, seed) for name, kind in SETS.items()}
        original = Digits()
        fit(original, data["class 3"].train, seed, max_epochs=60)
        cases.append((seed, original, data))
    print(f"| {' | '.join(TITLES)} |\n| --- |" + " ---: |" * (len(TITLES) - 1))
    every_run: dict[Any, list[Run]] = {1: [], "auto": []}
    for rule in args.rules:
        for name in SETS:
            for every, all_runs in every_run.items():
                runs = [unlearn(o, data[name], seed, RULES[rule], every, args.guard) for seed, o, data in cases]
                all_runs += runs
                print(f"| {rule}, {name}, {every} | {describe(runs)} |", flush=True)
    for every, all_runs in every_run.items():
        print(f"| all, {every} | {describe(all_runs)} |", flush=True)


def describe(runs: list[Run]) -> str:
    """The numbers of a line."""
    verified = max(sum(run.verified for run in runs), 1)
    kept, dropped = (100 * sum(column) / verified for column in zip(*((r.kept, r.dropped) for r in runs), strict=True))
    ratios = [f"{run.ratio:.2f}" for run in runs]
    cells = (
        sum(run.points < -10 for run in runs),
        f"{sum(run.is_reached for run in runs)} of {len(runs)}",
        " ".join(ratios) if len(runs) <= 5 else "",
        f"{min(run.points for run in runs):+.1f}",
        f"{kept:.0f} %",
        f"{dropped:.0f} %",
        f"{mean(run.steps for run in runs):.0f}",
        f"{mean(run.passes for run in runs):.2f}",
        f"{1e3 * mean(run.cpu for run in runs):.1f}",
    )
    return " | ".join(map(str, cells))


if __name__ == "__main__":
    main()
