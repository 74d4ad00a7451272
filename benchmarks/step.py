"""What a step costs, against what one would do without: gradient difference and training on twice the data.

python benchmarks/step.py                      # all shapes, in the Trainer and in a bare loop
python benchmarks/step.py --shapes mlp digits --rounds 9 --json out.json

Measured beside each other, in random order, on one thread:

- GD, gradient difference: two forward passes, one combined backward pass, plain SGD. All ratios are to this;
- concat GD: the same with one forward pass on both batches together;
- plain 2B: training on a batch of twice the size;
- quota, relative, optimal: `HAMUQ` with the paper's radius, with `RelativeRadius`, with the optimal allocation.

In the Trainer each is a short fit, of which the first steps are left out; in the bare loop a step. Thread CPU time says
what the step costs, wall time stands beside it. Ratios are medians over rounds, each of one round's own fits.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from shapes import SHAPES, Batch, Shape, make_batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader

from hamu_lightning import HAMUQ, HAMUCallback, HAMUOptimizer
from hamu_lightning.gramian import compute_gramian
from hamu_lightning.rules import RelativeRadius, Rule

RULES: dict[str, Rule] = {
    "quota": HAMUQ(1e-6),
    "relative": HAMUQ(1e-6, radius=RelativeRadius(1e-6)),
    "optimal": HAMUQ(1e-6, allocation="optimal"),
}
LR = 1e-5
# Steps of a fit that warm up: the guard looks at the module in the first three.
SKIPPED = 5

Times = dict[str, list[tuple[float, float]]]
"""For each variant the CPU and wall seconds of a step, a median for each round."""


def loss_of(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """The cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1].flatten())


def joint_loss(model: Callable[[Tensor], Tensor], retain: Batch, forget: Batch) -> Tensor:
    """The difference of both losses, from one forward pass."""
    kept, gone = model(torch.cat((retain[0], forget[0]))).chunk(2)
    return F.cross_entropy(kept, retain[1].flatten()) - F.cross_entropy(gone, forget[1].flatten())


class Module(LightningModule):
    """Trains a model on one batch, or on the difference of two."""

    def __init__(self, model: nn.Module, variant: str) -> None:
        super().__init__()
        self.model, self.variant = model, variant

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss, and log it."""
        if self.variant == "GD":
            loss = loss_of(self.model, batch["retain"]) - loss_of(self.model, batch["forget"])
        elif self.variant == "concat GD":
            loss = joint_loss(self.model, batch["retain"], batch["forget"])
        else:
            loss = loss_of(self.model, batch)
        self.log("train_loss", loss)
        return loss

    def on_train_epoch_start(self) -> None:
        """Let BatchNorm rest in all variants."""
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=LR)


class Clock(Callback):
    """Notes the time after each batch."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """Note it."""
        self.times.append((time.thread_time(), time.perf_counter()))

    def median(self) -> tuple[float, float]:
        """The CPU and wall seconds of a step, without the first ones."""
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(self.times[SKIPPED - 1 :])]
        cpu, wall = zip(*steps, strict=True)
        return statistics.median(cpu), statistics.median(wall)


def fit(shape: Shape, variant: str, logs: Path) -> tuple[float, float]:
    """Run a short fit; return what a step took."""
    retain, forget = shape.data(shape.steps + 2, 1), shape.data(shape.steps + 2, 2)
    loader: Any = DataLoader(retain, shape.batch, shuffle=True)
    other, callbacks = DataLoader(forget, shape.batch, shuffle=True), []
    if variant in RULES:
        callbacks = [HAMUCallback(other, RULES[variant])]
    elif variant == "plain 2B":
        loader = DataLoader(ConcatDataset((retain, forget)), 2 * shape.batch, shuffle=True)
    else:
        loader = CombinedLoader({"retain": loader, "forget": other}, "max_size_cycle")
    torch.manual_seed(0)
    clock = Clock()
    options: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(
        max_steps=shape.steps,
        accelerator="cpu",
        enable_progress_bar=False,
        default_root_dir=logs,
        callbacks=[*callbacks, clock],
        **options,
    )
    trainer.fit(Module(shape.make(), variant), loader)
    return clock.median()


def measure_fits(shape: Shape, variants: list[str], rounds: int, logs: Path) -> Times:
    """Interleave short fits of all variants in random order."""
    times: Times = {variant: [] for variant in variants}
    for _ in range(rounds):
        for variant in random.sample(variants, len(variants)):
            times[variant].append(fit(shape, variant, logs))
            gc.collect()
    return times


def make_steps(shape: Shape) -> dict[str, Callable[[], None]]:
    """For each variant one whole step in a bare loop, all on the same weights."""
    torch.manual_seed(0)
    model = shape.make()
    retain, forget = make_batches(shape)
    joint = torch.cat((retain[0], forget[0])), torch.cat((retain[1], forget[1]))
    sgd = torch.optim.SGD(model.parameters(), lr=LR)

    def plain(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            sgd.zero_grad()
            loss().backward()
            sgd.step()

        return step

    def unlearning(rule: Rule) -> Callable[[], None]:
        optimizer = HAMUOptimizer(torch.optim.SGD(model.parameters(), lr=LR), rule)

        def step() -> None:
            optimizer.zero_grad()
            with optimizer.retain():
                loss_of(model, retain).backward()
            with optimizer.forget():
                loss_of(model, forget).backward()
            optimizer.step()

        return step

    return {
        "GD": plain(lambda: loss_of(model, retain) - loss_of(model, forget)),
        "concat GD": plain(lambda: joint_loss(model, retain, forget)),
        "plain 2B": plain(lambda: loss_of(model, joint)),
        **{name: unlearning(rule) for name, rule in RULES.items()},
    }


def measure_steps(shape: Shape, variants: list[str], rounds: int) -> Times:
    """Interleave single steps of all variants in random order; a round is as many of each as a fit has."""
    steps = make_steps(shape)
    times: Times = {variant: [] for variant in variants}
    for count in range(rounds + 1):
        found: Times = {variant: [] for variant in variants}
        for _ in range(2 if count == 0 else shape.steps):
            for variant in random.sample(variants, len(variants)):
                cpu, wall = time.thread_time(), time.perf_counter()
                steps[variant]()
                found[variant].append((time.thread_time() - cpu, time.perf_counter() - wall))
        for variant, seconds in found.items() if count else ():  # the first round warms up
            cpu, wall = (statistics.median(column) for column in zip(*seconds, strict=True))
            times[variant].append((cpu, wall))
    return times


def measure_roofline(rounds: int) -> dict[str, float]:
    """GB/s of memory that is read and written: a copy and an `add_`, and what Gramian and update reach."""
    n = 2**24
    a, b, w = (torch.randn(n) for _ in range(3))
    parameters = [nn.Parameter(part) for part in w.chunk(16)]
    optimizer = HAMUOptimizer(torch.optim.SGD(parameters, lr=LR), HAMUQ(1e-9))

    def step() -> None:
        optimizer.zero_grad()
        # As new tensors: the optimizer takes no gradient twice.
        with optimizer.forget():
            for parameter, grad in zip(parameters, forget, strict=True):
                parameter.grad = grad.data
        for parameter, grad in zip(parameters, retain, strict=True):
            parameter.grad = grad.data
        optimizer.step()

    retain, forget = ([part.clone() for part in x.chunk(16)] for x in (a, b))
    cases: dict[str, tuple[int, Callable[[], object]]] = {
        "copy_": (2, lambda: w.copy_(a)),
        "add_": (3, lambda: w.add_(a, alpha=1e-9)),
        "Gramian": (2, lambda: compute_gramian(retain, forget)),
        "Gramian and update": (8, step),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad():
        for _ in range(4 * rounds):
            for name in random.sample([*cases], len(cases)):
                start = time.thread_time()
                cases[name][1]()
                seconds[name].append(time.thread_time() - start)
    return {name: passes * 4 * n / 1e9 / statistics.median(seconds[name]) for name, (passes, _) in cases.items()}


def summarise(times: Times) -> dict[str, dict[str, float]]:
    """For each variant medians in milliseconds, and the quartiles of its ratio to GD."""
    rows = {}
    for name, rounds in times.items():
        ratios = [own[0] / reference[0] for own, reference in zip(rounds, times["GD"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        cpu, wall = (1e3 * statistics.median(column) for column in zip(*rounds, strict=True))
        rows[name] = {"cpu_ms": cpu, "wall_ms": wall, "ratio": middle, "ratio_low": low, "ratio_high": high}
    return rows


def main() -> None:
    """Measure, print a Markdown table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES], choices=[*SHAPES])
    parser.add_argument("--variants", nargs="+", default=["concat GD", "plain 2B", *RULES])
    parser.add_argument("--where", nargs="+", default=["trainer", "bare"], choices=["trainer", "bare"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread, torch {torch.__version__}"
    roofline = measure_roofline(asked.rounds)
    print(f"{machine}\n\n{', '.join(f'{name} {speed:.1f} GB/s' for name, speed in roofline.items())}\n")
    print("| shape | where | variant | CPU ms | wall ms | ratio to GD (quartiles) |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    found: dict[str, Any] = {"machine": machine, "roofline_gb_per_s": roofline, "rounds": asked.rounds}
    variants = ["GD", *asked.variants]
    for name in asked.shapes:
        for where in asked.where:
            if where == "bare":
                times = measure_steps(SHAPES[name], variants, asked.rounds)
            else:
                times = measure_fits(SHAPES[name], variants, asked.rounds, Path())
            found[f"{name} {where}"] = rows = summarise(times)
            for variant, row in rows.items():
                print(
                    f"| {name} | {where} | {variant} | {row['cpu_ms']:.2f} | {row['wall_ms']:.2f} | {row['ratio']:.3f} "
                    f"({row['ratio_low']:.3f} to {row['ratio_high']:.3f}) |",
                    flush=True,
                )
            if asked.json is not None:
                asked.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
