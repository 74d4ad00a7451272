"""How fast a model learns again what it was made to forget."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from hamu_lightning.checks import (
    check_count,
    check_number,
    check_optional,
    check_positive,
    check_seed,
    check_type,
    describe,
)
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.loaders import in_order, load_like
from hamu_lightning.methods._evaluation import evaluate
from hamu_lightning.methods._fisher import on_device
from hamu_lightning.methods._protocol import Forget
from hamu_lightning.metrics.functional import Estimate, relearn_steps
from hamu_lightning.randomness import RandomStream

_MOMENTUM = 0.9


@dataclass(frozen=True)
class Relearning:
    """What `relearn` measured, in evaluation mode, after 0, 1, 2, ... steps.

    Args:
        accuracies: Shares of samples that are classified right.
        losses: Mean cross-entropies, nats.

    Example:
        >>> print(Relearning((0.1, 0.5, 1.0), (2.3, 0.9, 0.1)).steps(original=1.0))
        2
    """

    accuracies: tuple[float, ...]
    losses: tuple[float, ...]

    def steps(self, original: float, alpha: float = 0.05) -> Estimate:
        """Return the first step with an accuracy of `(1 - alpha) original`; "at least" the last if there is none.

        Args:
            original: Accuracy of the model before unlearning, a fraction.
            alpha: How much of it may be missing.
        """
        return relearn_steps(self.accuracies, original, alpha=alpha)


def relearn(
    module: LightningModule,
    forget: Forget,
    *,
    steps: int = 100,
    lr: float = 0.01,
    batch_size: int = 64,
    share: float = 1.0,
    watch: Forget | None = None,
    until: float | None = None,
    seed: int = 0,
) -> Relearning:
    """Teach a copy of a classifier the forgotten data, and watch how fast it comes back.

    Golatkar et al. 2020, arXiv 1911.04933; with a part of the data, so that knowing them again cannot come from being
    taught: arXiv 2506.00688. A number of steps says something beside that of the *retrained* model with the same
    settings: data that are easy are learned at once by a model that never saw them.

    1. A copy of the module is put into training mode; the module itself, its gradients and all random numbers outside
       are left as they are.
    2. A share of the forget samples is drawn. They are shuffled anew in each pass.
    3. Each step takes a batch: cross-entropy, SGD with momentum 0.9 on all weights that require a gradient. Neither
       the module's own optimizer nor its `training_step` is used, so that all models are taught alike.
    4. Before the first step and after each one, accuracy and loss are measured in evaluation mode.

    Args:
        module: A classifier of `x` into logits `[N, K]`.
        forget: The forgotten samples `(x, y)`: a Dataset, or a DataLoader over one.
        steps: The cap.
        lr: Learning rate.
        batch_size: Of a step. More than there are samples: all of them.
        share: Which share of the samples is taught, above 0 and at most 1; at least one sample.
        watch: The data that accuracy and loss are measured on. Default: all forget samples.
        until: An accuracy at which to end before the cap, a fraction. None: go to the cap.
        seed: Of the draw, of the order of the samples and of dropout. The same for all models that are compared.

    Returns:
        The curves.

    Raises:
        HAMUValueError: If a setting is out of range, there is nothing to learn, or no weight that may be changed.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> samples = TensorDataset(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
        >>> relearn(Line(), samples, steps=50, lr=1.0).accuracies[-1]
        1.0
    """
    until = check_optional(check_number, "until", until, least=0, most=1)
    share = check_number("share", share, above=0, most=1, wanted="above 0 and at most 1", cure="1 teaches all.")
    course = _Course.plan(module, forget, steps, lr, batch_size, seed)
    watched = in_order(forget if watch is None else watch, like=forget)
    accuracies, losses = [], []
    with RandomStream(course.seed).active():
        for _ in course.run(share):
            samples = evaluate(course.student, watched)
            accuracies.append(samples.accuracy)
            losses.append(samples.loss)
            if until is not None and accuracies[-1] >= until:
                break
    return Relearning(tuple(accuracies), tuple(losses))


def teach(
    module: LightningModule, data: Forget, *, steps: int = 100, lr: float = 0.01, batch_size: int = 64, seed: int = 0
) -> LightningModule:
    """Teach a copy of a classifier some data, as `relearn` does, and return the copy.

    Args:
        module: A classifier of `x` into logits `[N, K]`.
        data: The samples `(x, y)`: a Dataset, or a DataLoader over one.
        steps: How many.
        lr: Learning rate.
        batch_size: Of a step.
        seed: Of the order of the samples and of dropout.

    Returns:
        The copy, in evaluation mode.

    Raises:
        HAMUValueError: As for `relearn`.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 2)
        ...     def forward(self, x):
        ...         return self.layer(x)
        >>> samples = TensorDataset(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
        >>> teach(Line(), samples, steps=50, lr=1.0)(torch.tensor([[-2.0], [3.0]])).argmax(1)
        tensor([0, 1])
    """
    course = _Course.plan(module, data, steps, lr, batch_size, seed)
    with RandomStream(course.seed).active():
        for _ in course.run():
            pass
    return course.student.eval()


@dataclass(frozen=True)
class _Course:
    """What is taught to whom, checked."""

    student: LightningModule
    dataset: Dataset[Any]
    like: Forget
    steps: int
    lr: float
    batch_size: int
    seed: int

    @classmethod
    def plan(cls, module: LightningModule, data: Forget, steps: int, lr: float, batch_size: int, seed: int) -> _Course:
        """Check the arguments, and make the student: a copy in training mode.

        Raises:
            HAMUValueError: If a setting is out of range, there is nothing to learn, or no weight that may be changed.
        """
        check_type("module", module, LightningModule, "a LightningModule")
        steps, batch_size = check_count("steps", steps), check_count("batch_size", batch_size)
        settings = (steps, check_positive("lr", lr), batch_size, check_seed(seed))
        dataset, student = _as_dataset(data), copy.deepcopy(module).train()
        if not any(weight.requires_grad for weight in student.parameters()):
            raise HAMUValueError(
                "Expected `module` to have weights that require a gradient, but got none. Unfreeze some."
            )
        return cls(student, dataset, data, *settings)

    def run(self, share: float = 1.0) -> Iterator[None]:
        """Take all steps; stop before the first one and after each."""
        weights = [weight for weight in self.student.parameters() if weight.requires_grad]
        optimizer = torch.optim.SGD(weights, self.lr, momentum=_MOMENTUM)
        batches = _endless(_draw(self.dataset, share), self.like, self.batch_size)
        yield
        for x, y in on_device(self.student, islice(batches, self.steps)):
            with torch.enable_grad():
                optimizer.zero_grad()
                F.cross_entropy(self.student(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            yield


def _as_dataset(forget: Forget) -> Dataset[Any]:
    dataset = forget.dataset if isinstance(forget, DataLoader) else forget
    if not isinstance(dataset, Dataset) or isinstance(dataset, IterableDataset) or len(dataset) == 0:  # type: ignore[arg-type]
        raise HAMUValueError(
            f"Expected `forget` to be a Dataset with samples, or a DataLoader over one, but got {describe(forget)}."
        )
    return dataset


def _draw(dataset: Dataset[Any], share: float) -> Dataset[Any]:
    """A random part of the samples; without a draw where all are taken."""
    total: int = len(dataset)  # type: ignore[arg-type]
    count = max(1, round(share * total))
    return dataset if count == total else Subset(dataset, torch.randperm(total)[:count].tolist())


def _endless(dataset: Dataset[Any], like: Forget, batch_size: int) -> Iterator[Any]:
    loader: Iterable[Any] = load_like(dataset, like, batch_size=batch_size, shuffle=True)
    while True:
        yield from loader
