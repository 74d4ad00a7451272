"""Each objective against its paper's formula, written out in loops over samples and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives import (
    CEU,
    DELETE,
    DPO,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    AltPO,
    BadTeacher,
    BatchPass,
    CrossEntropy,
    EntropyWeighted,
    FrozenCopy,
    IdkDPO,
    LossCap,
    Objective,
    RandomLabels,
    ReferenceKL,
    RMURetain,
    SatImp,
    SimNPO,
    TokenCap,
    UniformLabels,
    WeightedSum,
    _rows,
)
from hamu_lightning.objectives._preference import replace_answers
from tests.objectives.models import CLASSES, VOCABULARY, grads, make_batch, make_model, perturbed

# Both sides are in float64 with numbers of order 1 to 10; what is left is rounding, about 1e-14.
TOLERANCE = 1e-8
# One place of a sample: logits of the module, of the other model, the label.
Place = tuple[Tensor, Tensor, int]


def log_p(z: Tensor, label: int, temperature: float = 1.0) -> Tensor:
    total = sum(torch.exp(value / temperature) for value in z)
    return z[label] / temperature - torch.log(total)  # type: ignore[arg-type]


def kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for c in range(len(p)):
        a, b = log_p(p, c, temperature), log_p(q, c, temperature)
        total = total + torch.exp(a) * (a - b)
    return total


def mean(values: list[Tensor]) -> Tensor:
    return sum(values, start=torch.zeros((), dtype=torch.float64)) / max(len(values), 1)


def log_sigmoid(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x))


def ratio(sample: list[Place]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for z, other, label in sample:
        total = total + log_p(z, label) - log_p(other, label)
    return total


def undial(sample: list[Place], strength: float) -> Tensor:
    values = []
    for z, other, label in sample:
        adjusted = other.clone()
        adjusted[label] -= strength
        values.append(kl(adjusted, z))
    return -mean(values)


def delete(sample: list[Place]) -> Tensor:
    values = []
    for z, other, label in sample:
        rest = [c for c in range(len(z)) if c != label]
        total = sum(torch.exp(other[c]) for c in rest)
        shares = {c: torch.exp(other[c]) / total for c in rest}
        values.append(sum((shares[c] * (torch.log(shares[c]) - log_p(z, c)) for c in rest), start=torch.zeros(())))
    return -mean(values)


def cross_entropy(sample: list[Place]) -> Tensor:
    return mean([-log_p(z, label) for z, _, label in sample])


def sim_npo(sample: list[Place], beta: float, gamma: float) -> Tensor:
    reward = beta * mean([log_p(z, label) for z, _, label in sample])
    return 2 / beta * log_sigmoid(-reward - gamma)


def wga(sample: list[Place], alpha: float) -> Tensor:
    return mean([(1 - torch.exp(log_p(z, label)) ** alpha) / alpha for z, _, label in sample])


def sat_imp(sample: list[Place]) -> Tensor:
    """The integral of q (1 - q) from p to 1."""
    p = [torch.exp(log_p(z, label)) for z, _, label in sample]
    return mean([1 / 6 - x**2 / 2 + x**3 / 3 for x in p])


def capped(sample: list[Place], level: float) -> list[Tensor]:
    losses = [-log_p(z, label) for z, _, label in sample]
    return [loss if float(loss.detach()) < level else torch.full_like(loss, level) for loss in losses]


def entropy_weighted(sample: list[Place]) -> Tensor:
    distances = [kl(z.detach(), torch.zeros_like(z)) / math.log(len(z)) for z, _, _ in sample]
    return mean([(1 - d) * loss for d, loss in zip(distances, capped(sample, 1.5), strict=True)])


Case = tuple[Callable[[Any], Objective], Callable[[list[Place]], Tensor]]
CASES: dict[str, Case] = {
    "cross-entropy": (lambda r: CrossEntropy(), cross_entropy),
    "KL": (lambda r: ReferenceKL(r), lambda s: mean([kl(o, z) for z, o, _ in s])),
    "KL, temperature": (lambda r: ReferenceKL(r, temperature=2.5), lambda s: mean([kl(o, z, 2.5) for z, o, _ in s])),
    "KL, reverse": (lambda r: ReferenceKL(r, direction="reverse"), lambda s: mean([kl(z, o) for z, o, _ in s])),
    "NPO": (lambda r: NPO(0.7, reference=r), lambda s: 2 / 0.7 * log_sigmoid(-0.7 * ratio(s))),
    "SimNPO": (lambda r: SimNPO(2.5, 0.3), lambda s: sim_npo(s, 2.5, 0.3)),
    "UNDIAL": (lambda r: UNDIAL(3.0, reference=r), lambda s: undial(s, 3.0)),
    "DELETE": (lambda r: DELETE(reference=r), delete),
    "uniform": (
        lambda r: UniformLabels(),
        lambda s: -mean([kl(torch.zeros_like(z), z) for z, _, _ in s]),
    ),
    "bad teacher": (
        lambda r: BadTeacher(r._given, temperature=1.5),
        lambda s: -mean([kl(o, z, 1.5) for z, o, _ in s]),
    ),
    "CE-U": (lambda r: CEU(), lambda s: delete([(z, z.detach(), label) for z, _, label in s])),
    "WGA": (lambda r: WGA(1.7), lambda s: wga(s, 1.7)),
    "SatImp": (lambda r: SatImp(2.0, 1.0), sat_imp),
    "token cap": (lambda r: TokenCap(1.5), lambda s: mean(capped(s, 1.5))),
    "entropy": (lambda r: EntropyWeighted(1.5), entropy_weighted),
    "SCRUB, retain": (
        lambda r: WeightedSum((0.5, ReferenceKL(r)), (2.0, CrossEntropy())),
        lambda s: 0.5 * mean([kl(o, z) for z, o, _ in s]) + 2.0 * cross_entropy(s),
    ),
    "cap": (
        lambda r: LossCap(CrossEntropy(), 1.82),
        lambda s: (
            cross_entropy(s) if float(cross_entropy(s).detach()) < 1.82 else torch.tensor(1.82, dtype=torch.float64)
        ),
    ),
}
BOUNDED = {"NPO", "SimNPO", "UNDIAL", "DELETE", "CE-U", "uniform", "bad teacher"}


def places_of(kind: str, model: nn.Module, other: nn.Module, batch: Any) -> list[list[Place]]:
    """What is predicted where: a class per sample, or each labelled token but the first from the place before it."""
    if kind == "classes":
        z, o = model(batch[0]), other(batch[0]).detach()
        return [[(z[n], o[n], int(batch[1][n]))] for n in range(len(z))]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    z, o, labels = model(**inputs).logits, other(**inputs).logits.detach(), batch["labels"]
    return [
        [(z[n, t], o[n, t], int(labels[n, t + 1])) for t in range(z.shape[1] - 1) if labels[n, t + 1] != -100]
        for n in range(len(z))
    ]


def assert_equal(value: Tensor, expected: Tensor, model: nn.Module) -> None:
    assert value.item() == pytest.approx(expected.item(), abs=TOLERANCE)
    for one, other in zip(grads(value, model), grads(expected, model), strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("few", [_rows._FEW, 0], ids=["at once", "in pieces"])
@pytest.mark.parametrize("kind", ["classes", "tokens"])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_paper(name: str, kind: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "_FEW", few)
    monkeypatch.setattr(_rows, "_PIECES", 5)
    model, batch = make_model(kind), make_batch(kind)
    other = perturbed(model)
    make, formula = CASES[name]
    value = make(FrozenCopy(other))(BatchPass(model, batch))
    samples = [formula(sample) for sample in places_of(kind, model, other, batch)]
    assert_equal(value, mean(samples), model)
    assert any(bool(grad.abs().max() > 1e-3) for grad in grads(mean(samples) + 0 * value, model))
    if name in BOUNDED:
        assert max(sample.item() for sample in samples) <= 0


@pytest.mark.parametrize(("make", "factor"), [(DPO, 1), (AltPO, 2)])
@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_dpo_agrees_with_the_paper(kind: str, make: type[DPO], factor: int) -> None:
    model, batch = make_model(kind), make_batch(kind)
    other = perturbed(model)
    preferred: Any = (batch[0], (batch[1] + 1) % CLASSES) if kind == "classes" else {**batch}
    if kind == "tokens":
        labels = torch.where(batch["labels"] == -100, -100, (batch["input_ids"] + 1) % VOCABULARY)
        preferred |= {"input_ids": torch.where(labels == -100, batch["input_ids"], labels), "labels": labels}
    objective = make(lambda b: preferred, 0.7, reference=FrozenCopy(other))
    pairs = zip(places_of(kind, model, other, preferred), places_of(kind, model, other, batch), strict=True)
    samples = [factor / 0.7 * log_sigmoid(0.7 * ratio(win) - 0.7 * ratio(lose)) for win, lose in pairs]
    assert_equal(objective(BatchPass(model, batch)), mean(samples), model)
    assert max(sample.item() for sample in samples) <= 0


def test_dpo_finds_the_preferred_answers_in_the_batch() -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    reference = FrozenCopy(perturbed(model))
    preferred = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    found = DPO(reference=reference)(BatchPass(model, {**batch, "preferred": preferred}))
    assert torch.equal(found, DPO(lambda b: preferred, reference=reference)(BatchPass(model, batch)))
    with pytest.raises(HAMUValueError, match="Expected the forget batch to be a mapping with 'preferred'"):
        DPO()(BatchPass(model, batch))


def test_idk_dpo_is_dpo_with_other_answers() -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    del batch["input_ids"], batch["labels"]
    ids = torch.tensor([[1, 2, 3, 4], [1, 5, 6, 0]])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.tensor([[-100, -100, 3, 4], [-100, 5, 6, -100]]),
    }
    answers, key = [[6, 6, 6], [5, 4]], lambda b: torch.tensor([10, 11])
    objective = IdkDPO(answers, 0.7, key=key, seed=1, reference=FrozenCopy(perturbed(model)))
    drawn = [draw_slowly(2, 10, 1), draw_slowly(2, 11, 1)]
    questions = [[1, 2], [1]]
    rows = [question + answers[d] for question, d in zip(questions, drawn, strict=True)]
    expected = {name: torch.zeros(2, 7, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    expected["labels"] = torch.full((2, 7), -100)
    for n, (question, row) in enumerate(zip(questions, rows, strict=True)):
        expected["input_ids"][n, : len(row)] = torch.tensor(row)
        expected["attention_mask"][n, : len(row)] = 1
        expected["labels"][n, len(question) : len(row)] = torch.tensor(row[len(question) :])
    preferred, lost = objective.find_pair(batch)
    assert lost is batch
    for name, value in expected.items():
        assert torch.equal(preferred[name], value), name
    dpo = DPO(lambda b: expected, 0.7, reference=objective.reference)
    assert torch.equal(objective(BatchPass(model, batch)), dpo(BatchPass(model, batch)))


def test_idk_answers_with_padding_on_the_left() -> None:
    replaced = replace_answers(
        torch.tensor([[0, 1, 2, 3]]), torch.tensor([[0, 1, 1, 1]]), torch.tensor([[-100, -100, -100, 3]]),
        torch.tensor([[5, 6]]),
    )  # fmt: skip
    assert replaced["input_ids"].tolist() == [[0, 1, 2, 5, 6, 0]]
    assert replaced["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 0]]
    assert replaced["labels"].tolist() == [[-100, -100, -100, 5, 6, -100]]


MASK = 2**64 - 1


def mix_slowly(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def draw_slowly(bound: int, key: int, seed: int) -> int:
    offset = mix_slowly((seed + 1) * 0x9E3779B97F4A7C15 & MASK)
    return (mix_slowly(key ^ offset) >> 1) % bound


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_random_labels_are_wrong_ones(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    key = torch.tensor([5, 6, 7, 2**40])
    size = {"classes": CLASSES, "tokens": VOCABULARY}[kind]
    samples = []
    labels = batch[1].unsqueeze(1) if kind == "classes" else batch["labels"][:, 1:]
    logits = (
        model(batch[0]).unsqueeze(1) if kind == "classes" else model(batch["input_ids"], batch["attention_mask"]).logits
    )
    for n in range(4):
        values = []
        for t, label in enumerate(labels[n].tolist()):
            if label != -100:
                drawn = draw_slowly(size - 1, mix_slowly((int(key[n]) + t * 0x9E3779B97F4A7C15) & MASK), 9)
                others = [(label + 1 + i) % size for i in range(size - 1)]
                values.append(log_p(logits[n, t], others[drawn]))
        samples.append(mean(values))
    assert_equal(RandomLabels(9, key=lambda b: key)(BatchPass(model, batch)), mean(samples), model)


@pytest.mark.parametrize("kind", ["classes", "tokens"])
def test_rmu_agrees_with_the_paper(kind: str) -> None:
    model, batch = make_model(kind), make_batch(kind)
    other = perturbed(model)
    direction = torch.rand(6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    target = 3.0 * direction / direction.square().sum().sqrt()

    def activations(model: Any) -> list[list[Tensor]]:
        if kind == "classes":
            return [[h] for h in model.body(batch[0])]
        h = model.body((model.embedding(batch["input_ids"]) * batch["attention_mask"].unsqueeze(-1)).cumsum(1))
        return [[h[n, t] for t in range(6) if batch["attention_mask"][n, t]] for n in range(4)]

    forget = [-mean([(h - target).square().sum() for h in sample]) for sample in activations(model)]
    assert_equal(RMU("body", 3.0, seed=4)(BatchPass(model, batch)), mean(forget), model)
    pairs = zip(activations(model), activations(other), strict=True)
    retain = [
        mean([(h - k.detach()).square().sum() for h, k in zip(sample, kept, strict=True)]) for sample, kept in pairs
    ]
    assert_equal(RMURetain("body", reference=FrozenCopy(other))(BatchPass(model, batch)), mean(retain), model)
    assert not model.body._forward_hooks
