"""Answers of unseen samples against the formulas of docs/method.md#an-unseen-sample, in loops over samples."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives import AdaptersDisabled, BatchPass, Calibration, FrozenCopy, SecondAnswer, UnseenAnswer
from tests.objectives.models import CLASSES, Adapted, grads, make_batch, make_model, perturbed

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


def make_sets() -> tuple[Phi, Phi]:
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
    forget, held_out = make_sets()
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
    forget, held_out = make_sets()
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


@pytest.mark.parametrize("has_teacher", [False, True])
def test_the_second_choice_in_the_place_of_the_label(has_teacher: bool) -> None:
    original = make_model("classes")
    model, teacher = perturbed(original, 1.0), perturbed(original, 2.0)
    batch = make_batch("classes")
    objective = SecondAnswer(reference=FrozenCopy(original), teacher=FrozenCopy(teacher) if has_teacher else None)
    found = objective.samples(BatchPass(model, batch))
    ends = objective.end.samples(BatchPass(model, batch))
    rows = zip(model(batch[0]), original(batch[0]), teacher(batch[0]), batch[1].tolist(), strict=True)
    for i, (z, z0, z1, y) in enumerate(rows):
        p, p0 = softmax(list(z)), softmax(z0.tolist())
        s = without(softmax((z1 if has_teacher else z0).tolist()), {y})
        end = kl(s, dict(enumerate(p0)))
        assert float(ends[i]) == pytest.approx(end, abs=TOLERANCE)
        assert has_teacher or end == pytest.approx(-math.log(1 - p0[y]), abs=TOLERANCE)
        value = end - kl(s, dict(enumerate(p)))
        assert float(found[i].detach()) == pytest.approx(float(value.detach()), abs=TOLERANCE)
        for a, b in zip(grads(found[i], model), grads(value, model), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=TOLERANCE)


def test_a_model_with_its_adapters_switched_off_is_a_teacher() -> None:
    """The adapters have seen what is to be forgotten, the model below has not."""
    base = make_model("classes")
    adapted = Adapted(base).double().eval()
    adapted.adapter.data = torch.randn(CLASSES).double()
    batch, original = make_batch("classes"), FrozenCopy(copy.deepcopy(adapted))
    found = [
        SecondAnswer(reference=original, teacher=teacher).samples(BatchPass(adapted, batch))
        for teacher in (AdaptersDisabled(), FrozenCopy(copy.deepcopy(base)))
    ]
    assert torch.equal(*found) and adapted.is_on


class Says(nn.Module):
    """Returns its input, scaled: logits of any form."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def both(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    forget, held_out = make_sets()
    objective = UnseenAnswer(fitted(forget, held_out, SHARES["one goes"]), reference=FrozenCopy(Says(1.0)))
    one = BatchPass(Says(0.5), (logits, labels))
    return objective.samples(one), objective.end.samples(one)


def test_places_of_images_and_of_texts_are_samples_of_their_own() -> None:
    """Logits `[N, C, H, W]` and `[N, T, C]`: the mean over the places that have a label."""
    logits = torch.randn(3, 2, 4, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, CLASSES, (3, 2, 4), generator=torch.Generator().manual_seed(2))
    labels[0, 1] = labels[2] = -100
    image = both(logits.permute(0, 3, 1, 2), labels)
    text = both(logits.flatten(1, 2), labels.flatten(1))
    flat = both(logits.reshape(-1, CLASSES), labels.flatten().clamp(min=0))
    kept = labels.flatten(1) != -100
    for found, same, single in zip(image, text, flat, strict=True):
        expected = torch.where(kept, single.reshape(3, 8), 0.0).sum(1) / kept.sum(1).clamp(min=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(same, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
@pytest.mark.parametrize("share", [[0.9, 0.6], [0.9, 0.0]])
def test_one_logit_is_two_classes(shape: tuple[int, ...], dtype: torch.dtype, share: list[float]) -> None:
    z, labels = torch.randn(6, dtype=torch.float64) * 3, torch.tensor([0, 1, 1, 0, 1, 1])
    data = (z * (2.0 * labels - 1), labels)
    found = []
    for logits, said in (
        (z.reshape(shape), labels.to(dtype).reshape(shape)),
        (torch.stack((-z / 2, z / 2), 1), labels),
    ):
        calibration = Calibration()
        calibration.fit(data, (torch.linspace(-1, 1, 24).double(), torch.arange(24) % 2), torch.tensor(share))
        objective = UnseenAnswer(calibration, reference=FrozenCopy(Says(1.0)))
        found.append(objective.samples(BatchPass(Says(0.5), (logits, said))))
    torch.testing.assert_close(*found, rtol=0, atol=TOLERANCE)


def test_nothing_is_read_on_the_host() -> None:
    calibration = fitted(*make_sets(), SHARES["one goes"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, labels = nn.Linear(4, CLASSES), torch.ones(3, dtype=torch.int64)
        reference = FrozenCopy(nn.Linear(4, CLASSES))
        for objective in (UnseenAnswer(calibration, reference=reference), SecondAnswer(reference=reference)):
            assert objective(BatchPass(model, (torch.ones(3, 4), labels))).shape == ()


def test_an_empty_calibration_and_missing_data_are_errors() -> None:
    batch = BatchPass(make_model("classes"), make_batch("classes"))
    with pytest.raises(HAMUStateError, match="target=Unseen\\(holdout\\)\\) does it at the start"):
        UnseenAnswer().samples(batch)
    forget, held_out = (as_tensors(data) for data in make_sets())
    with pytest.raises(HAMUStateError, match="Expected held-out samples, .* Unseen\\(data\\)"):
        Calibration().fit(forget, None, torch.ones(CLASSES))
    with pytest.raises(HAMUStateError, match="Expected a class that is kept"):
        Calibration().fit(forget, held_out, torch.zeros(CLASSES))
    with pytest.raises(HAMUValueError, match="Expected `teacher` to be FrozenCopy"):
        UnseenAnswer(teacher=3)  # type: ignore[arg-type]


def test_the_state_is_that_of_the_calibration() -> None:
    calibration, other = fitted(*make_sets(), SHARES["one goes"]), Calibration()
    other.load_state_dict(calibration.state_dict())
    phi, labels = torch.randn(5).double(), torch.arange(5)
    assert torch.equal(calibration.find(phi, labels), other.find(phi, labels))
    other.load_state_dict({})
    with pytest.raises(HAMUStateError):
        other.find(phi, labels)
