"""Originals that are trained once, forget sets of any mixture, and short unlearning runs: what the findings share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from digits import DigitsClassifier
from forgetting import choose_forget
from torch import Tensor
from torch.nn import functional as F

from hamu_lightning import HAMUOptimizer, compute_gramian
from hamu_lightning.optim import StepReport
from hamu_lightning.rules import Rule

TRAINING_BATCH, TRAINING_LR = 64, 0.1
# So many images go through a model at once where all are needed.
_CHUNK = 2048


@dataclass(frozen=True)
class Task:
    """Data and how its originals are trained.

    Args:
        name: For the names of files.
        images: `[N, C, H, W]`, the training images.
        labels: `[N]`.
        make_module: Makes an untrained module.
        epochs: For each stage of training that an original can be in: after how many epochs it ends.
        lrs: For each stage: the learning rate of unlearning.
    """

    name: str
    images: Tensor
    labels: Tensor
    make_module: Callable[[], DigitsClassifier]
    epochs: dict[str, int]
    lrs: dict[str, float]

    def loss(self, module: DigitsClassifier, index: Tensor) -> Tensor:
        """The mean cross-entropy of some samples."""
        return F.cross_entropy(module(self.images[index]), self.labels[index])

    @torch.no_grad()
    def mean_loss(self, module: DigitsClassifier, index: Tensor) -> float:
        """The same for any number of samples."""
        return sum(self.loss(module, part).item() * len(part) for part in index.split(_CHUNK)) / len(index)

    def gradient(self, module: DigitsClassifier, index: Tensor) -> list[Tensor]:
        """The gradient of the mean loss of any number of samples."""
        module.zero_grad()
        for part in index.split(_CHUNK):
            (self.loss(module, part) * (len(part) / len(index))).backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]


@dataclass(frozen=True)
class Case:
    """An original and what it is to forget.

    Args:
        task: The data.
        original: The model, in evaluation mode: BatchNorm stays as it is, as in the paper.
        retain: Positions of the samples to retain.
        forget: Positions of the samples to forget.
        seed: Draws the batches.
        lr: Learning rate of unlearning.
    """

    task: Task
    original: DigitsClassifier
    retain: Tensor
    forget: Tensor
    seed: int
    lr: float

    @cached_property
    def gramian(self) -> Tensor:
        """`[B, 2, 2]`, the Gramians of the gradients of all samples to retain and of all to forget, by tensor."""
        return compute_gramian(*(self.task.gradient(self.original, index) for index in (self.retain, self.forget)))

    @property
    def capacity(self) -> float:
        """`sum_b |g_r,b||g_f,b|`: the largest Q/lr that steps of the paper's radius can give the original."""
        return self.gramian.diagonal(dim1=1, dim2=2).prod(dim=1).sqrt().sum().item()

    def losses(self, module: DigitsClassifier) -> tuple[float, float]:
        """The mean losses on all samples to retain and on all to forget."""
        return self.task.mean_loss(module, self.retain), self.task.mean_loss(module, self.forget)


class Bench:
    """Makes the cases; each original is trained once per seed, and kept in a folder.

    Args:
        task: The data.
        seeds: The seeds: each trains its own originals and draws its own forget sets and batches.
        out: The folder.
        steps: Steps of a run.
        batch_size: Samples of a batch, of each of the two streams.
    """

    def __init__(self, task: Task, seeds: Sequence[int], out: Path, steps: int, batch_size: int) -> None:
        self.task, self.seeds, self.steps, self.batch_size = task, seeds, steps, batch_size
        self._out = out

    def case(self, seed: int, rho: float, stage: str = "early") -> Case:
        """Return an original and a forget set of as many samples as the class has.

        Args:
            seed: The seed.
            rho: This share is drawn from all samples at random, the rest from the class, see `choose_forget`.
            stage: How far the original was trained.
        """
        labels = self.task.labels
        forget = torch.tensor(choose_forget(labels.cpu(), "mixture", rho, seed), device=labels.device)
        is_retained = torch.ones_like(labels, dtype=torch.bool)
        is_retained[forget] = False
        retain = is_retained.nonzero().flatten()
        return Case(self.task, self._original(seed, stage), retain, forget, seed, self.task.lrs[stage])

    def cases(self, rho: float, stage: str = "early") -> list[Case]:
        """The same for each seed."""
        return [self.case(seed, rho, stage) for seed in self.seeds]

    def unlearn(self, case: Case, rule: Rule, **options: Any) -> Run:
        """Run with the bench's number of steps and batch size where `options` has no others."""
        return unlearn(case, rule, **({"steps": self.steps, "batch_size": self.batch_size} | options))

    def _original(self, seed: int, stage: str) -> DigitsClassifier:
        path = self._out / f"{self.task.name}-{stage}-{seed}.pt"
        if not path.exists():
            self._out.mkdir(parents=True, exist_ok=True)
            print(f"Training the {stage} original of seed {seed}", flush=True)
            torch.save(train(self.task, self.task.epochs[stage], seed).state_dict(), path)
        module = self.task.make_module().to(self.task.images.device)
        module.load_state_dict(torch.load(path, weights_only=True))
        return module.eval()


def train(task: Task, epochs: int, seed: int) -> DigitsClassifier:
    """Train with plain SGD, whose learning rate falls linearly to 0."""
    torch.manual_seed(seed)
    module = task.make_module().to(task.images.device)
    optimizer = torch.optim.SGD(module.parameters(), lr=TRAINING_LR)
    steps = epochs * (len(task.labels) // TRAINING_BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        order = torch.randperm(len(task.labels)).to(task.labels.device)
        for batch in order.split(TRAINING_BATCH)[: len(order) // TRAINING_BATCH]:
            optimizer.zero_grad()
            task.loss(module, batch).backward()
            optimizer.step()
            schedule.step()
    return module


@dataclass
class Run:
    """What happened in an unlearning run.

    Args:
        path: For each point that was measured: the step, and by how much the losses on all samples have improved since
            the original (retain has fallen, forget has risen), loss units.
        reports: What each step did, the one that was refused included.
        lengths: For each step: how far the weights moved, in units of the trust region.
        steps: How many steps were applied.
    """

    path: list[tuple[int, float, float]] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)
    steps: int = 0

    @property
    def retain_improvement(self) -> float:
        """At the end."""
        return self.path[-1][1]

    @property
    def forget_improvement(self) -> float:
        """At the end."""
        return self.path[-1][2]

    def mean(self, read: Callable[[StepReport], Tensor]) -> float:
        """The mean of a number over the steps."""
        return sum(float(read(report)) for report in self.reports) / len(self.reports)


def unlearn(
    case: Case,
    rule: Rule,
    *,
    steps: int,
    batch_size: int,
    lr: float | None = None,
    base: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    exact: bool = False,
    approve: Callable[[StepReport], bool] | None = None,
    measure_every: int | None = None,
) -> Run:
    """Unlearn with a copy of the original, until a step is refused or its numbers are not finite.

    Args:
        case: The original and its data.
        rule: How the two gradients are combined.
        steps: The most steps.
        batch_size: Samples of a batch; a set that is not larger is taken as a whole.
        lr: Learning rate; default: the case's.
        base: Makes the base optimizer.
        exact: As for `HAMUOptimizer`.
        approve: Asked before each step.
        measure_every: After how many steps the losses on all samples are measured; default: at the end.
    """
    module = copy.deepcopy(case.original)
    optimizer = _wrap(module, rule, partial(base, lr=case.lr if lr is None else lr), exact)
    optimizer.approve = approve
    retain, forget = (draw_batches(index, batch_size, case.seed) for index in (case.retain, case.forget))
    run, before = Run(), case.losses(module)
    run.path.append((0, 0.0, 0.0))
    while run.steps < steps and _take_step(case.task, module, optimizer, next(retain), next(forget), run):
        run.steps += 1
        if measure_every and run.steps % measure_every == 0:
            _measure(case, module, before, run)
    if run.path[-1][0] != run.steps:
        _measure(case, module, before, run)
    return run


def draw_batches(index: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Draw batches without end; each draws anew from all, so that every step sees the same distribution."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield index if size >= len(index) else index[torch.randperm(len(index), generator=generator)[:size]]


def _wrap(module: DigitsClassifier, rule: Rule, base: Callable[..., torch.optim.Optimizer], exact: bool) -> Any:
    with warnings.catch_warnings():
        # What a base other than plain SGD does to the quota is one of the findings.
        warnings.filterwarnings("ignore", message=".*(quota|radius).*")
        return HAMUOptimizer(base(module.parameters()), rule, module.named_parameters(), exact=exact, track_actual=True)


def _take_step(
    task: Task, module: DigitsClassifier, optimizer: HAMUOptimizer, retain: Tensor, forget: Tensor, run: Run
) -> bool:
    """Take one step and note it; return whether the weights moved."""
    weights = [p.detach().clone() for p in module.parameters()]
    optimizer.zero_grad()
    with optimizer.retain():
        task.loss(module, retain).backward()
    with optimizer.forget():
        task.loss(module, forget).backward()
    optimizer.step()
    report = optimizer.last_step
    assert report is not None
    run.reports.append(report)
    moved = sum(float((p.detach() - w).square().sum()) for p, w in zip(module.parameters(), weights, strict=True))
    radius = float(report.coefficients.radius.square().sum())
    run.lengths.append((moved / radius) ** 0.5 if radius else 0.0)
    return int(optimizer.applied_steps) > run.steps


def _measure(case: Case, module: DigitsClassifier, before: tuple[float, float], run: Run) -> None:
    retain, forget = case.losses(module)
    run.path.append((run.steps, before[0] - retain, forget - before[1]))
