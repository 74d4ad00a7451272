"""Answers of unseen samples against the formulas of docs/method.md#an-unseen-sample, in loops over samples."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hamu_lightning.objectives import BatchPass, Calibration, FrozenCopy, UnseenAnswer
from tests.objectives.models import CLASSES, grads, make_batch, make_model, perturbed

# Both sides are in float64 with numbers of order 1 to 10; what is left is rounding, about 1e-14.
TOLERANCE = 1e-8


def softmax(z: list[Any]) -> list[Any]:
    total = sum(math.exp(x) if isinstance(x, float) else torch.exp(x) for x in z)
    return [(math.exp(x) if isinstance(x, float) else torch.exp(x)) / total for x in z]


def log(x: Any) -> Any:
    return torch.log(x) if isinstance(x, Tensor) else math.log(x)


def kl(p: dict[int, Any], q: dict[int, Any]) -> Any:
    return sum(p[c] * (log(p[c]) - log(q[c])) for c in p if p[c] > 0)


def without(p: list[Any], classes: set[int]) -> dict[int, Any]:
    """Of a distribution what is left without some classes, renormalised."""
    left = {c: x for c, x in enumerate(p) if c not in classes}
    total = sum(left.values())
    return {c: x / total for c, x in left.items()}


def odds(p: Any) -> Any:
    return log(p / (1 - p))


def quantile(values: list[tuple[float, float]], u: float) -> float:
    """Of values with weights: straight between the middles of their shares, level outside."""
    values = sorted(values)
    total, height, points = sum(w for _, w in values), 0.0, []
    for x, w in values:
        points.append(((height + w / 2) / total, x))
        height += w
    if u <= points[0][0]:
        return points[0][1]
    for (a, x), (b, y) in zip(points, points[1:], strict=False):
        if u <= b:
            return x + (y - x) * (u - a) / (b - a)
    return points[-1][1]


Phi = list[tuple[float, int]]


def find_aim(phi: float, label: int, forget: Phi, held_out: Phi, share: list[float]) -> float:
    """phi_t of a sample of a class that stays, from the log-odds and labels of both sets."""
    n_held = [sum(1 for _, y in held_out if y == c) for c in range(len(share))]
    n_forget = [sum(1 for _, y in forget if y == c) for c in range(len(share))]
    together = {c for c in range(len(share)) if share[c] > 0 and n_forget[c] and n_held[c] < 10}
    group = together if label in together else {label}
    own = sorted(x for x, y in forget if y in group)
    rank = sum(x < phi for x in own) + (sum(x == phi for x in own) - 1) / 2
    chosen = [(x, n_forget[y] / n_held[y]) for x, y in held_out if y in group]
    chosen = chosen or [(x, 1.0) for x, _ in held_out]
    return min(phi, quantile(chosen, (rank + 0.5) / len(own)) + math.log(share[label]))


def sample_answer(p: list[Any], p0: list[float], label: int, aim: float, s: dict[int, float]) -> tuple[Any, float]:
    sure = 1 / (1 + math.exp(-aim))
    q = {label: sure, **{c: (1 - sure) * x for c, x in s.items()}}
    end = kl(q, dict(enumerate(p0)))
    return end - kl(q, dict(enumerate(p))), end


def class_answer(p: list[Any], p0: list[float], goes: set[int], s: dict[int, float]) -> tuple[Any, float]:
    phi, phi0 = odds(sum(p[c] for c in goes)), odds(sum(p0[c] for c in goes))
    floor = -3 * math.log(len(p0))
    least = odds(min(s.values())) if len(s) > 1 else floor
    aim = min(phi0, max(floor, least))
    raised = -phi if phi.detach() > aim else -aim
    others = kl(s, without(p0, goes))
    return raised - kl(s, without(p, goes)) + phi0 + others, phi0 - aim + others


def make_sets(share: list[float]) -> tuple[Phi, Phi]:
    """Log-odds and labels: class 1 with many held-out samples, 2 and 4 with few, 0 without any; some ties."""
    generator = torch.Generator().manual_seed(5)
    counts = ([6, 8, 5, 3, 7], [0, 14, 4, 12, 9])
    sets = []
    for numbers, shift in zip(counts, (2.0, 0.5), strict=True):
        labels = [c for c, n in enumerate(numbers) for _ in range(n)]
        values = (torch.randn(len(labels), generator=generator, dtype=torch.float64) * 2 + shift).tolist()
        values[8] = values[7]
        sets.append(list(zip(values, labels, strict=True)))
    return sets[0], sets[1]


def fitted(forget: Phi, held_out: Phi, share: list[float]) -> Calibration:
    calibration = Calibration()
    calibration.fit(as_tensors(forget), as_tensors(held_out), torch.tensor(share, dtype=torch.float64))
    return calibration


def as_tensors(data: Phi) -> tuple[Tensor, Tensor]:
    values, labels = zip(*data, strict=True)
    return torch.tensor(values, dtype=torch.float64), torch.tensor(labels)


SHARES = {
    "all stay": [0.5, 0.9, 0.75, 0.6, 0.8],
    "one goes": [0.5, 0.9, 0.0, 0.6, 0.8],
    "one is left": [0.0, 0.9, 0.0, 0.0, 0.0],
}


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
def test_ranks_are_matched_in_each_class(share: list[float]) -> None:
    forget, held_out = make_sets(share)
    calibration = fitted(forget, held_out, share)
    known = [(x, y) for x, y in forget if share[y] > 0]
    expected = torch.tensor([find_aim(x, y, forget, held_out, share) for x, y in known], dtype=torch.float64)
    phi, labels = as_tensors(known)
    found = calibration.find(phi, labels)
    assert torch.allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert bool((found <= phi).all())
    # Rounding of the model's output changes nothing but rounding.
    assert torch.allclose(calibration.find(phi + 1e-12, labels), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("has_teacher", [False, True])
def test_answers_are_those_of_the_formulas(share: list[float], has_teacher: bool) -> None:
    original = make_model("classes")
    model, teacher = perturbed(original, 1.0), perturbed(original, 2.0)
    x, labels = make_batch("classes")
    forget, held_out = make_sets(share)
    calibration = fitted(forget, held_out, share)
    objective = UnseenAnswer(
        calibration, reference=FrozenCopy(original), teacher=FrozenCopy(teacher) if has_teacher else None
    )
    goes = {c for c, kept in enumerate(share) if kept == 0}
    values, ends = [], []
    for z, z0, z1, label in zip(model(x), original(x), teacher(x), labels.tolist(), strict=True):
        p, p0, said = softmax(list(z)), softmax(z0.tolist()), softmax((z1 if has_teacher else z0).tolist())
        if label in goes:
            value, end = class_answer(p, p0, goes, without(said, goes))
        else:
            hidden = {label, *goes}
            s = without(said, hidden if len(hidden) < CLASSES else {label})
            # Between two forget samples the way is straight: these samples are not among them.
            aim = float(calibration.find(torch.tensor(odds(p0[label])).double(), torch.tensor(label)))
            value, end = sample_answer(p, p0, label, aim, s)
        values.append(value)
        ends.append(end)
    found = objective.samples(BatchPass(model, (x, labels)))
    assert torch.allclose(found, torch.stack([torch.as_tensor(v) for v in values]), rtol=0, atol=TOLERANCE)
    expected = torch.tensor(ends, dtype=torch.float64)
    assert torch.allclose(objective.end.samples(BatchPass(model, (x, labels))), expected, rtol=0, atol=TOLERANCE)
    assert bool((expected >= 0).all()) and bool((found <= expected + TOLERANCE).all())
    total = sum(values, start=torch.zeros((), dtype=torch.float64)) / len(values)
    for a, b in zip(grads(found.mean(), model), grads(total, model), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=TOLERANCE)
    start = objective.samples(BatchPass(copy.deepcopy(original), (x, labels)))
    assert torch.equal(start, torch.zeros_like(start))
