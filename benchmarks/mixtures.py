"""Most of a class goes, and some of it stays: what `Unseen` reaches, and what was tried to come nearer.

    python benchmarks/mixtures.py mnist1d 0 1 2                    # docs/targets.md; set, seeds
    python benchmarks/mixtures.py digits 0 1 2 --steps 50 --ways "Unseen" "as if 2 were kept"

Three quarters of what is forgotten are of class 3 (rho = 0.25, examples/forgetting.py). Models are trained by a plain
loop with the settings of the set; the pool and the teachers have seeds of their own.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import torch
from classifier import Problem
from forgetting import MIXTURE_CLASS, Data
from lightning.pytorch import LightningModule, Trainer
from problems import PROBLEMS, load_problem
from quickstart import prepare
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hamu_lightning import HAMUCallback, Unseen
from hamu_lightning.metrics.functional import js_to_references

TITLES = ("JS", "JS of the class", "UA", "UA of the class", "RA", "worst RA", "TA")
POOL, TEACHERS = 4, 3000


def train(problem: Problem, data: TensorDataset, seed: int, epochs: int) -> LightningModule:
    """Train a model as the set's Trainer does."""
    torch.manual_seed(seed)
    module, (x, y) = problem.make_module(), data.tensors
    optimizer: Any = module.configure_optimizers()
    lr, clip = optimizer.param_groups[0]["lr"], problem.options.get("gradient_clip_val")
    for epoch in range(epochs):
        if "callbacks" in problem.options:  # the learning rate falls to 0
            optimizer.param_groups[0]["lr"] = lr * (1 - epoch / epochs)
        for chosen in torch.randperm(len(y)).split(problem.batch_size):
            if len(chosen) < problem.batch_size:
                break
            optimizer.zero_grad()
            F.cross_entropy(module(x[chosen]), y[chosen]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
    return module.eval()


class Tilted(nn.Module):
    """What a model says, with classes like its first choice made likelier (in the manner of TRW, arXiv 2506.20893).

    Args:
        module: The model; its last matrix of weights is that of the classes, and says how alike two are (cosine).
        strength: Nats for a cosine of 1.
    """

    def __init__(self, module: nn.Module, strength: float) -> None:
        super().__init__()
        self.module, self.strength = copy.deepcopy(module), strength
        heads = F.normalize([weight for weight in module.parameters() if weight.ndim == 2][-1].detach(), dim=1)
        self.register_buffer("alike", heads @ heads.T)

    def forward(self, x: Tensor) -> Tensor:
        """Map a batch to logits `[N, C]`."""
        said = self.module(x).log_softmax(-1)
        return said + self.strength * self.alike[said.argmax(-1)]


Way = Callable[[Problem, Data, LightningModule, int], Unseen]


def as_if(kept: int) -> Way:
    """Say that fewer samples of the class are kept than are: a stronger prior shift."""
    return lambda problem, data, original, seed: Unseen(data.val, counts={MIXTURE_CLASS: kept})


def teacher(epochs: float, counts: dict[int, int] | None = None) -> Way:
    """Let a model that saw the retain data alone, for a share of the epochs, say what to answer besides the label."""

    def way(problem: Problem, data: Data, original: LightningModule, seed: int) -> Unseen:
        made = train(problem, pick(data, data.retain.indices), TEACHERS + seed, round(epochs * problem.epochs))
        return Unseen(data.val, teacher=made, counts=counts)

    return way


WAYS: dict[str, Way] = {
    "Unseen": lambda problem, data, original, seed: Unseen(data.val),
    "as if 10 were kept": as_if(10),
    "as if 2 were kept": as_if(2),
    "tilt of 2 nats": lambda problem, data, original, seed: Unseen(data.val, teacher=Tilted(original, 2)),
    "teacher, half the epochs": teacher(0.5),
    "the same, as if 10 were kept": teacher(0.5, {MIXTURE_CLASS: 10}),
}


def pick(data: Data, indices: Any) -> TensorDataset:
    """Some of the training samples."""
    return TensorDataset(*data.train[list(indices)])


def unlearn(original: LightningModule, data: Data, target: Unseen, seed: int, steps: int) -> LightningModule:
    """Return a copy that has forgotten."""
    module = copy.deepcopy(original)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    hamu = HAMUCallback(data.forget, target=target, seed=seed)
    trainer = Trainer(accelerator="cpu", max_steps=steps, callbacks=[hamu], enable_model_summary=False, **options)
    trainer.fit(module.train(), DataLoader(pick(data, data.retain.indices), 64, shuffle=True, drop_last=True))
    return module.eval()


@torch.no_grad()
def measure(module: nn.Module, data: Data, pool: list[Tensor]) -> list[float]:
    """Return the numbers of a model in the order of TITLES, all in percent."""
    x, y = pick(data, data.forget.indices).tensors
    said, of_class = module(x).log_softmax(-1), y == MIXTURE_CLASS

    def accuracy(part: TensorDataset) -> float:
        return float((module(part.tensors[0]).argmax(-1) == part.tensors[1]).double().mean())

    wrong, ra = (said.argmax(-1) != y).double(), accuracy(pick(data, data.retain.indices))
    js = (float(js_to_references(said[part], [p[part] for p in pool])) for part in (slice(None), of_class))
    numbers = [*js, float(wrong.mean()), float(wrong[of_class].mean()), ra, ra, accuracy(data.test)]
    return [100 * number for number in numbers]


def format_row(name: str, rows: list[list[float]]) -> str:
    """Mean and standard deviation over models; of "worst RA" the least."""
    cells = [f"{mean(c):.1f} ± {stdev(c):.1f}" if len(c) > 1 else f"{c[0]:.1f}" for c in zip(*rows, strict=True)]
    worst = TITLES.index("worst RA")
    cells[worst] = f"{min(row[worst] for row in rows):.1f}"
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description="Most of a class goes, and some of it stays.")
    parser.add_argument("set", choices=PROBLEMS)
    parser.add_argument("seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    prepare()
    warnings.simplefilter("ignore")
    problem, data = load_problem(args.set, ("mixture", 0.25))
    retained = [train(problem, pick(data, data.retain.indices), 2000 + i, problem.epochs) for i in range(POOL)]
    with torch.no_grad():
        said = [module(data.train.tensors[0][data.forget.indices]).log_softmax(-1) for module in retained]
    floor = [measure(module, data, said[:i] + said[i + 1 :]) for i, module in enumerate(retained)]
    print("| model | " + " | ".join(TITLES) + " |\n| --- |" + " ---: |" * len(TITLES))
    print(format_row("another retrained", floor), flush=True)
    rows: dict[str, list[list[float]]] = {"original": [], **{name: [] for name in args.ways}}
    for seed in args.seeds:
        original = train(problem, data.train, seed, problem.epochs)
        rows["original"].append(measure(original, data, said))
        for name in args.ways:
            target = WAYS[name](problem, data, original, seed)
            rows[name].append(measure(unlearn(original, data, target, seed, args.steps), data, said))
            print(seed, format_row(name, rows[name][-1:]), file=sys.stderr, flush=True)
    print("\n".join(format_row(name, found) for name, found in rows.items()))


if __name__ == "__main__":
    main()
