"""Made-up answers of models about two classes of samples, one of which may be forgotten."""

from __future__ import annotations

import torch
from torch import Tensor

from hamu_lightning.evidence import AttackRow, Evaluation, PartScores
from hamu_lightning.metrics.functional import Estimate

CLASSES = 4
SIZES = {"retain": 90, "forget": 40, "holdout": 80, "test": 80}
LABELS = {"retain": (0, 1, 2), "forget": (3,), "holdout": (0, 1, 2, 3), "test": (0, 1, 2, 3)}
INSIDE = AttackRow("probe", Estimate(0.8, (0.7, 0.9)), Estimate(0.8, (0.7, 0.9)), "accuracy of a probe")


def labels_of(name: str) -> Tensor:
    choices = torch.tensor(LABELS[name])
    return choices[torch.arange(SIZES[name]) % len(choices)]


def answer(logits: dict[str, Tensor]) -> Evaluation:
    parts = {}
    for name, values in logits.items():
        y = labels_of(name)
        log_probs = values.double().log_softmax(1)
        losses = -log_probs.gather(1, y[:, None])[:, 0]
        parts[name] = PartScores(losses, (log_probs.argmax(1) == y).double(), torch.arange(len(y)), log_probs, y)
    return Evaluation(parts)


def make_logits(seed: int, sure: float = 8.0) -> dict[str, Tensor]:
    """Of a model that knows all classes."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name, n in SIZES.items():
        values = torch.randn(n, CLASSES, generator=random, dtype=torch.float64)
        found[name] = values.scatter_add(1, labels_of(name)[:, None], torch.full((n, 1), sure, dtype=torch.float64))
    return found


def without_class(seed: int) -> dict[str, Tensor]:
    """Of a model that never saw class 3: its output is low for all samples, whatever they are."""
    logits = make_logits(seed)
    random = torch.Generator().manual_seed(seed + 1000)
    for name, values in logits.items():
        is_gone = labels_of(name) == 3
        values[is_gone] = 3 * torch.randn(int(is_gone.sum()), CLASSES, generator=random, dtype=torch.float64)
        values[:, 3] = -10 + torch.randn(len(values), generator=random, dtype=torch.float64)
    return logits


def make_retrained(number: int = 3) -> list[Evaluation]:
    return [answer(without_class(100 + seed)) for seed in range(number)]
