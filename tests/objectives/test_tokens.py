"""Tokens: the published weights, those that matter, means over tokens, and several sequences in a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.objectives import (
    CEU,
    NPO,
    RMU,
    WGA,
    BatchPass,
    CoreTokens,
    CrossEntropy,
    FrozenCopy,
    LossCap,
    ModuleLoss,
    Objective,
    RandomLabels,
    ReferenceKL,
    SatImp,
    TokenMean,
)
from tests.objectives.models import VOCABULARY, grads, make_batch, make_model, perturbed
from tests.objectives.test_formulas import TOLERANCE, Place, log_p, mean, places_of

# Both sides are in float64 with numbers of order 1; the same sums in another order.
ROUNDING = 1e-12


def weighted(sample: list[Place], power: float, rest: float) -> Tensor:
    """The published SatImp loss of one sample, with its sign turned round; `rest=0` is the published WGA."""
    values = []
    for z, _, label in sample:
        loss = -log_p(z, label)
        p = torch.exp(-loss).detach()
        values.append(p**power * (1 - p) ** rest * loss)
    return mean(values)


@pytest.mark.parametrize(
    ("objective", "power", "rest"), [(WGA(0.7), 0.7, 0.0), (SatImp(), 5.0, 0.1), (SatImp(0.4, 1.3), 0.4, 1.3)]
)
def test_gradients_are_those_of_the_published_losses(objective: Objective, power: float, rest: float) -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    samples = places_of("tokens", model, model, batch)
    expected = grads(mean([weighted(sample, power, rest) for sample in samples]), model)
    for found, other in zip(grads(objective(BatchPass(model, batch)), model), expected, strict=True):
        torch.testing.assert_close(found, other, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("saturation", "importance"), [(5.0, 0.1), (5.0, 0.0), (1.0, 2.5), (3.3, 1.0)])
def test_the_value_is_the_integral_of_the_slope(saturation: float, importance: float) -> None:
    """Rising with the loss: a step that forgets is seen to do so."""
    logits = torch.linspace(-20, 12, 17, dtype=torch.float64)
    found = SatImp(saturation, importance).tokens(torch.stack([logits, 0 * logits], dim=1), torch.zeros(17).long())
    for value, p in zip(found.tolist(), logits.sigmoid().tolist(), strict=True):
        expected = quad(lambda q: q ** (saturation - 1) * (1 - q) ** importance, p, 1, epsabs=1e-12)[0]
        assert value == pytest.approx(expected, abs=1e-5 if saturation % 1 else 1e-9)  # no polynomial; scipy's own
    assert bool((found.diff() <= ROUNDING).all())


def test_what_is_learnt_by_heart_and_what_is_forgotten_stay_finite() -> None:
    logits = torch.tensor([[80.0, 0.0], [-80.0, 0.0], [30.0, 0.0]], requires_grad=True)
    for objective in (WGA(), SatImp(), SatImp(0.5, 0.5), CEU()):
        values = objective.tokens(logits, torch.zeros(3).long())
        (slope,) = torch.autograd.grad(values.sum(), logits)
        assert bool(values.isfinite().all()) and bool(slope.isfinite().all())
        assert bool((slope[1].abs() < ROUNDING).all())  # forgotten


def test_core_tokens_are_the_labels_that_count() -> None:
    model, batch = make_model("tokens"), make_batch("tokens")
    core = torch.zeros_like(batch["labels"])
    core[0, 3] = core[1, 2] = core[1, 5] = 1  # the last one is padding; sample 2 has none
    masked = {**batch, "labels": batch["labels"].clone()}
    masked["labels"][0, [2, 4, 5]] = masked["labels"][1, 3] = -100
    for make in (lambda o: WGA(outputs=o), lambda o: NPO(reference=FrozenCopy(perturbed(model)), outputs=o)):
        torch.manual_seed(0)
        found = make(CoreTokens()).samples(BatchPass(model, {**batch, "core_tokens": core}))
        torch.manual_seed(0)
        assert torch.equal(found, make(None).samples(BatchPass(model, masked)))
    plain = CrossEntropy()(BatchPass(model, {**batch, "core_tokens": core}))  # the model does not get them
    assert torch.equal(plain, CrossEntropy()(BatchPass(model, batch)))
    for wrong in (batch, {**batch, "core_tokens": core[:, :3]}, make_batch("classes")):
        with pytest.raises(HAMUValueError, match=r"Expected a batch with a mask 'core_tokens' .*mark_spans=True"):
            CrossEntropy(outputs=CoreTokens())(BatchPass(model, wrong))


def test_each_token_counts_alike() -> None:
    """Over micro-batches too: the gradient of the mean over all tokens."""
    model, batch = make_model("tokens"), make_batch("tokens")
    places = [place for sample in places_of("tokens", model, model, batch) for place in sample]
    expected = mean([-log_p(z, label) for z, _, label in places])
    found = TokenMean(CrossEntropy())(BatchPass(model, batch))
    assert found.item() == pytest.approx(expected.item(), abs=ROUNDING)
    parts = [{name: value[i] for name, value in batch.items()} for i in (slice(0, 1), slice(1, 4))]
    objective = TokenMean(CrossEntropy(), tokens_per_batch=len(places) / 2)
    summed = sum(objective(BatchPass(model, part)) for part in parts) / 2  # as Lightning accumulates
    for one, other in zip(grads(summed, model), grads(expected, model), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(one, other, atol=ROUNDING, rtol=0)
    for wrong in (ModuleLoss(), LossCap(ModuleLoss(), 1.0)):
        with pytest.raises(HAMUValueError, match="Expected an objective that looks at tokens"):
            TokenMean(wrong)


class Packed(torch.nn.Module):
    """Asks a model about each sequence of a row by itself, as attention that heeds the bounds does."""

    def __init__(self, model: torch.nn.Module, lengths: list[int]) -> None:
        super().__init__()
        self.model, self.lengths = model, lengths

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return torch.cat([self.model(part).logits for part in input_ids.split(self.lengths, dim=1)], dim=1)


LENGTHS = [3, 5, 2]
SIGNS = {
    "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
    "seq_idx": torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2])[None],
    "segment_ids": torch.tensor([1, 1, 1, 2, 2, 2, 2, 2, 3, 3])[None],
    "cu_seq_lens_q": torch.tensor([0, 3, 8, 10], dtype=torch.int32),
    "cu_seqlens": torch.tensor([0, 3, 8, 10, 10]),  # filled up to a length
}


def make_packed(sign: str) -> tuple[torch.nn.Module, list[Any], dict[str, Tensor]]:
    """A model, three sequences by themselves, and in one row."""
    model = make_model("tokens")
    ids = torch.randint(0, VOCABULARY, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    singles = [{"input_ids": part, "labels": part} for part in ids.split(LENGTHS, dim=1)]
    return model, singles, {"input_ids": ids, "labels": ids, sign: SIGNS[sign]}


@pytest.mark.parametrize("sign", SIGNS)
def test_each_sequence_of_a_row_is_a_sample(sign: str) -> None:
    model, singles, packed = make_packed(sign)
    other = perturbed(model)
    for make in (
        lambda wrap: CrossEntropy(),
        lambda wrap: WGA(),
        lambda wrap: NPO(reference=FrozenCopy(wrap(other))),
        lambda wrap: ReferenceKL(FrozenCopy(wrap(other))),
    ):
        expected = torch.cat([make(lambda m: m).samples(BatchPass(model, single)) for single in singles])
        found = make(lambda m: Packed(m, LENGTHS)).samples(BatchPass(Packed(model, LENGTHS), packed))
        torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)
        for one, two in zip(grads(found.mean(), model), grads(expected.mean(), model), strict=True):
            torch.testing.assert_close(one, two, atol=ROUNDING, rtol=0)


def test_positions_of_padded_rows_are_no_packing() -> None:
    """With padding on the left positions begin at 0 later, as tokenizers of transformers count them."""
    model, batch = make_model("tokens"), make_batch("tokens")
    left = {name: value.flip(1) for name, value in batch.items()}
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    objective = CrossEntropy(outputs=lambda m, b: (m(b["input_ids"]).logits, b["labels"]))
    found = objective.samples(BatchPass(model, {**left, "position_ids": positions}))
    assert torch.equal(found, objective.samples(BatchPass(model, left))) and len(found) == 4


@pytest.mark.parametrize("objective", [RandomLabels(), RMU("body", 1.0, outputs=lambda m, b: m(b["input_ids"]))])
def test_what_goes_by_rows_refuses_packed_ones(objective: Objective) -> None:
    model, _, packed = make_packed("position_ids")
    if isinstance(objective, RandomLabels):
        model = Packed(model, LENGTHS)
    with pytest.raises(HAMUValueError, match=r"each row of the batch to be one sequence for R.* PadCollator"):
        objective(BatchPass(model, packed))
