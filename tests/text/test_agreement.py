"""Objectives on a Llama, whole and with adapters: the losses, gradients and coefficients of a plain loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from hamu_lightning import HAMUQ
from hamu_lightning.gramian import compute_gramian
from hamu_lightning.objectives import (
    CEU,
    DELETE,
    DPO,
    NPO,
    RMU,
    UNDIAL,
    WGA,
    AdaptersDisabled,
    AltPO,
    BadTeacher,
    BatchPass,
    Calibration,
    CrossEntropy,
    EntropyWeighted,
    FrozenCopy,
    Objective,
    ReferenceKL,
    RMURetain,
    SatImp,
    SecondAnswer,
    SimNPO,
    TokenCap,
    UniformLabels,
    UnseenAnswer,
)
from hamu_lightning.rules import FixedRadius
from hamu_lightning.text import CausalLMModule
from tests.text.world import make_model

VOCABULARY = 64
# Float64: what is left is the rounding of sums in another order.
TOLERANCE = 1e-10
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
PREFIX = {"full": "model.model.layers.0", "lora": "model.base_model.model.model.layers.0"}
# One token: logits of the module and of the other model, and the label.
Token = tuple[Tensor, Tensor, int]


@cache
def make_modules(kind: str) -> tuple[CausalLMModule, CausalLMModule]:
    """A module, and the same with other weights."""
    module = CausalLMModule(make_model(VOCABULARY), lora=LORA if kind == "lora" else None).double().eval()
    found = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        one = copy.deepcopy(module)
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        found.append(one)
    return found[0], found[1]


def make_batch(seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(seed))
    attention, labels = torch.ones_like(ids), ids.clone()
    labels[:, :3] = -100
    ids[1, 5:] = attention[1, 5:] = 0
    labels[1, 5:] = -100
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def run(module: CausalLMModule, batch: dict[str, Tensor]) -> Any:
    """The model of transformers alone."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return module.model(**inputs, output_hidden_states=True)


def samples_of(module: CausalLMModule, other: CausalLMModule, batch: dict[str, Tensor]) -> list[list[Token]]:
    z, o = run(module, batch).logits, run(other, batch).logits.detach()
    rows = [[(n, t) for t in range(z.shape[1] - 1) if batch["labels"][n, t + 1] != -100] for n in range(len(z))]
    return [[(z[n, t], o[n, t], int(batch["labels"][n, t + 1])) for n, t in row] for row in rows]


def mean(values: list[Tensor]) -> Tensor:
    return sum(values, start=torch.zeros(())) / len(values)


def kl(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = log_softmax(p, -1), log_softmax(q, -1)
    return sum((log_p[c].exp() * (log_p[c] - log_q[c]) for c in range(len(p)) if log_p[c] > -1e9), torch.zeros(()))


def nll(z: Tensor, label: int) -> Tensor:
    return -log_softmax(z, -1)[label]


def without(z: Tensor, label: int) -> Tensor:
    return torch.where(torch.arange(len(z)) == label, -math.inf, z.detach())


def ratio(sample: list[Token]) -> Tensor:
    return sum((nll(o, y) - nll(z, y) for z, o, y in sample), torch.zeros(()))


def entropy(z: Tensor) -> Tensor:
    return 1 - kl(z.detach(), torch.zeros_like(z)) / math.log(len(z))


def sat_imp(z: Tensor, y: int) -> Tensor:
    p = (-nll(z, y)).exp()
    return 1 / 6 - p**2 / 2 + p**3 / 3


def by_tokens(function: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[list[Token]], Tensor]:
    return lambda sample: mean([function(*token) for token in sample])


Case = tuple[Callable[[Any], Objective], Callable[[list[Token]], Tensor]]
CASES: dict[str, Case] = {
    "cross-entropy": (lambda r: CrossEntropy(), by_tokens(lambda z, o, y: nll(z, y))),
    "KL": (lambda r: ReferenceKL(r), by_tokens(lambda z, o, y: kl(o, z))),
    "KL, reverse": (lambda r: ReferenceKL(r, direction="reverse"), by_tokens(lambda z, o, y: kl(z, o))),
    "bad teacher": (lambda r: BadTeacher(r._given), by_tokens(lambda z, o, y: -kl(o, z))),
    "UNDIAL": (
        lambda r: UNDIAL(3.0, reference=r),
        by_tokens(lambda z, o, y: -kl(torch.where(torch.arange(len(z)) == y, o - 3.0, o), z)),
    ),
    "DELETE": (lambda r: DELETE(reference=r), by_tokens(lambda z, o, y: -kl(without(o, y), z))),
    "CE-U": (lambda r: CEU(), by_tokens(lambda z, o, y: -kl(without(z, y), z))),
    "uniform": (lambda r: UniformLabels(), by_tokens(lambda z, o, y: -kl(torch.zeros_like(z), z))),
    "WGA": (lambda r: WGA(0.5), by_tokens(lambda z, o, y: 2 * (1 - (-nll(z, y) / 2).exp()))),
    "SatImp": (lambda r: SatImp(2.0, 1.0), by_tokens(lambda z, o, y: sat_imp(z, y))),
    "token cap": (lambda r: TokenCap(4.0), by_tokens(lambda z, o, y: nll(z, y).clamp(max=4.0))),
    "entropy": (lambda r: EntropyWeighted(9.0), by_tokens(lambda z, o, y: entropy(z) * nll(z, y))),
    "second answer": (
        lambda r: SecondAnswer(reference=r),
        by_tokens(lambda z, o, y: kl(without(o, y), o) - kl(without(o, y), z)),
    ),
    "NPO": (lambda r: NPO(0.7, reference=r), lambda s: 2 / 0.7 * logsigmoid(-0.7 * ratio(s))),
    "SimNPO": (lambda r: SimNPO(2.0), lambda s: logsigmoid(2 * mean([nll(z, y) for z, _, y in s]))),
}


def agree(value: Tensor, expected: Tensor, module: CausalLMModule) -> None:
    """The same number and gradients, and with the loss of other data the same coefficients."""
    assert value.item() == pytest.approx(expected.item(), rel=TOLERANCE, abs=TOLERANCE)
    weights = [p for p in module.parameters() if p.requires_grad]
    retained = torch.autograd.grad(run_loss(module, make_batch(5)), weights)
    found = []
    for number in (value, expected):
        grads = torch.autograd.grad(number, weights, allow_unused=True, retain_graph=True)
        grads = tuple(torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True))
        gramian = compute_gramian([*retained], [*grads])
        coefficients = HAMUQ(quota=1e-3, radius=FixedRadius(1e-2)).coefficients(gramian, lr=1e-2)
        found.append((grads, coefficients.retain_improvement, coefficients.forget_improvement))
    (ours, *step), (theirs, *other) = found
    assert any(bool(grad.any()) for grad in theirs)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=TOLERANCE)
    for one, two in zip(step, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-12)


def run_loss(module: CausalLMModule, batch: dict[str, Tensor]) -> Tensor:
    return module.model(**batch).loss


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_objectives_agree_with_a_plain_loop(name: str, kind: str) -> None:
    module, other = make_modules(kind)
    make, formula = CASES[name]
    value = make(FrozenCopy(other))(BatchPass(module, make_batch()))
    agree(value, mean([formula(sample) for sample in samples_of(module, other, make_batch())]), module)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(("make", "factor"), [(DPO, 1), (AltPO, 2)])
def test_preferences_agree_with_a_plain_loop(make: type[DPO], factor: int, kind: str) -> None:
    module, other = make_modules(kind)
    pair = make_batch(2), make_batch(1)
    value = make(lambda batch: pair[0], 0.7, reference=FrozenCopy(other))(BatchPass(module, pair[1]))
    wins, losses = (map(ratio, samples_of(module, other, batch)) for batch in pair)
    expected = [factor / 0.7 * logsigmoid(0.7 * (w - x)) for w, x in zip(wins, losses, strict=True)]
    agree(value, mean(expected), module)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_activations_agree_with_a_plain_loop(kind: str) -> None:
    module, other = make_modules(kind)
    batch = make_batch()
    h, kept = (run(m, batch).hidden_states[1] for m in (module, other))
    u = torch.rand(h.shape[-1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens = [[(n, t) for t in range(7) if batch["attention_mask"][n, t]] for n in range(3)]
    forget = [-mean([(h[i] - 2.0 * u / u.norm()).square().sum() for i in places]) for places in tokens]
    agree(RMU(PREFIX[kind], 2.0, seed=3)(BatchPass(module, batch)), mean(forget), module)
    retain = [mean([(h[i] - kept[i].detach()).square().sum() for i in places]) for places in tokens]
    found = RMURetain(PREFIX[kind], reference=FrozenCopy(other))(BatchPass(module, batch))
    agree(found, mean(retain), module)


def test_the_base_below_the_adapters_is_a_teacher() -> None:
    """It never saw what the adapters were trained on, and says what to answer besides the label."""
    module, _ = make_modules("lora")
    batch, aim, labels = make_batch(), -2.5, torch.zeros(20, dtype=torch.int64)
    calibration = Calibration()
    # All held-out samples are as sure as this: the aim of each, where it is not below it already.
    held_out = torch.full((20,), aim, dtype=torch.float64), labels
    calibration.fit((torch.linspace(-9, 9, 20).double(), labels), held_out, torch.ones(VOCABULARY))
    calibration._tables["stratum"][:] = calibration._tables["stratum"][0]  # labels of other tokens likewise
    original = copy.deepcopy(module)
    objective = UnseenAnswer(calibration, reference=FrozenCopy(original), teacher=AdaptersDisabled())
    moved = copy.deepcopy(module)
    for parameter in moved.parameters():
        parameter.data += 0.05 * parameter.requires_grad
    with original.model.disable_adapter():
        taught = run(original, batch).logits.detach()
    values = []
    for n, sample in enumerate(samples_of(moved, original, batch)):
        row = []
        for t, (z, o, y) in enumerate(sample, start=2):
            phi = -nll(o, y) - torch.log1p(-(-nll(o, y)).exp())
            sure = torch.sigmoid(torch.minimum(phi, torch.tensor(aim)))
            rest = torch.where(torch.arange(VOCABULARY) == y, 0.0, without(taught[n, t], y).softmax(-1))
            answer = torch.where(torch.arange(VOCABULARY) == y, sure, (1 - sure) * rest).log()
            row.append(kl(answer, o) - kl(answer, z))
        values.append(mean(row))
    agree(objective(BatchPass(moved, batch)), mean(values), moved)
    assert moved.model.active_adapters == ["default"]
