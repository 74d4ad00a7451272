"""Each attack finds the fake that it is made for, and accuses no retrained model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence import AttackRow
from hamu_lightning.evidence.attacks import ATTACKS, attack, is_telling, round_weights
from hamu_lightning.methods import relearn, teach
from tests.evidence.models import (
    GONE,
    Digits,
    Redirected,
    controls,
    headless,
    load_parts,
    masked,
    nudged,
    original,
    retrained,
)
from tests.methods.setups import untouched

SEEDS = range(2)


def rows_of(module: LightningModule, seed: int, name: str, **options: Any) -> dict[str, AttackRow]:
    found = attack(module, load_parts(), control=controls(seed), attacks=[name], samples=300, **options)
    return {row.name: row for row in found}


@pytest.mark.parametrize(("seed", "whole_class"), [(0, True), (1, True), (0, False)])
def test_a_retrained_model_is_not_accused(seed: int, whole_class: bool) -> None:
    options: dict[str, Any] = {"control": controls(seed, whole_class), "samples": 300}
    rows = attack(retrained(50 + seed, whole_class), load_parts(whole_class), **options)
    assert [row.name for row in rows if is_telling(row)] == []
    told = {row.name for row in rows if row.value.is_defined}
    expected = {"relearn", "relearn_retain", "quantize_int8", "round_4bit", "probe", "quantize_int8_auc"}
    assert told >= expected | ({"logit_shift", "neighbours"} if whole_class else set())
    assert all(row.note.endswith(".") and row.value.n for row in rows if row.value.is_defined)


FAKES: dict[str, Callable[[int], LightningModule]] = {
    "logit_shift": masked,
    "quantize_int8": partial(nudged, bits=8, group=None),
    "round_4bit": partial(nudged, bits=4, group=32),
    "relearn": partial(nudged, bits=4, group=32),
    "relearn_retain": original,
    "neighbours": lambda seed: Redirected(original(seed)),
}


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_fake_is_found(name: str, seed: int) -> None:
    row = rows_of(FAKES[name](seed), seed, name)[name]
    assert is_telling(row), f"{row.value} against {row.control}"


@pytest.mark.parametrize("seed", SEEDS)
def test_a_probe_finds_more_in_old_features_than_in_those_of_any_retrained_model(seed: int) -> None:
    options: dict[str, Any] = {"attacks": ["probe"], "samples": 300}
    fake, *others = (attack(m, load_parts(), **options)[0].value for m in (headless(seed), *controls(seed)))
    assert fake.value > max(other.value for other in others)
    assert fake.value > 0.9


def test_eight_bits_keep_what_four_bits_take_back() -> None:
    rows = rows_of(nudged(0, 4, 32), 0, "quantize_int8")
    assert abs(rows["quantize_int8"].value.value) < 0.1 and is_telling(rows["quantize_int8"]) is False
    back = rows_of(nudged(0, 4, 32), 0, "round_4bit")
    assert back["round_4bit"].value.value > 0.8 and back["round_4bit_loss"].value.value < -5


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (4, 5)])
def test_rounding_is_that_of_loops(bits: int, group: int | None) -> None:
    module = original(0)
    rounded, largest = round_weights(module, bits, group), 2 ** (bits - 1) - 1
    for before, after in zip(module.parameters(), rounded.parameters(), strict=True):
        if before.ndim == 1:
            assert torch.equal(before, after)
            continue
        for row, found in zip(before.detach(), after.detach(), strict=True):
            size = group or len(row)
            for start in range(0, len(row), size):
                piece = row[start : start + size].tolist()
                scale = max(map(abs, piece)) / largest
                expected = [scale * round(w / scale) for w in piece]
                # One rounding of float32 in each product.
                assert found[start : start + size].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
                assert len({round(w / scale) for w in found[start : start + size].tolist()}) <= 2 * largest + 1


def test_what_is_relearned_is_what_relearn_says() -> None:
    module, parts = original(0), load_parts()
    curve = relearn(module, parts["retain"], steps=4, batch_size=32, seed=3, watch=parts["forget"])
    taught = teach(module, parts["retain"], steps=4, batch_size=32, seed=3)
    assert not taught.training
    with torch.no_grad():
        x, y = parts["forget"].tensors
        assert float((taught(x).argmax(1) == y).double().mean()) == curve.accuracies[-1]


def test_the_shift_is_that_of_a_search() -> None:
    module, parts = masked(0), load_parts()
    value = attack(module, parts, attacks=["logit_shift"])[0].value
    best = 0.0
    with torch.no_grad():
        mine, theirs = (module(parts[name].tensors[0]).double() for name in ("forget", "retain"))
        for shift in torch.linspace(-50, 50, 4001).tolist():
            b = shift * nn.functional.one_hot(torch.tensor(GONE), 10)
            if ((theirs + b).argmax(1) == GONE).double().mean() <= 0.01:
                best = max(best, float(((mine + b).argmax(1) == GONE).double().mean()))
    assert value.value == pytest.approx(best, abs=0.02)  # the grid has a step


def test_models_and_random_numbers_are_left_alone() -> None:
    module, control = original(0).train(), retrained(0)
    module.zero_grad()
    control.zero_grad()
    hooks = [len(m._forward_pre_hooks) for m in module.modules()]
    with untouched(module), untouched(control):
        one = attack(module, load_parts(), control=control, samples=200)
    again = attack(module, load_parts(), control=control, samples=200)
    assert [(r.name, r.value, r.control) for r in one if r.value.is_defined] == [
        (r.name, r.value, r.control) for r in again if r.value.is_defined
    ]
    assert hooks == [len(m._forward_pre_hooks) for m in module.modules()]


class Regression(Digits):
    """Says a number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


def squared_errors(forward: Callable[..., Tensor], batch: Any) -> Tensor:
    x, y = batch
    return (forward(x) - y).square()


def test_what_makes_no_sense_is_nan_with_the_reason() -> None:
    parts, module = load_parts(), Regression()
    rows = {row.name: row for row in attack(module, parts)}
    assert set(rows) == set(ATTACKS)
    assert all("no classifier" in (row.value.reason or "") for row in rows.values())
    rows = {row.name: row for row in attack(module, parts, losses=squared_errors)}
    assert rows["quantize_int8_loss"].value.is_defined and "quantize_int8" not in rows
    assert "cross-entropy" in (rows["relearn"].value.reason or "")
    assert all(math.isnan(rows[n].value.value) for n in ("relearn", "probe", "logit_shift", "neighbours"))


@pytest.mark.parametrize(
    ("left_out", "name", "row", "reason"),
    [
        ("retain", "relearn", "relearn", "no retain data was given"),
        ("holdout", "probe", "probe", "a probe cannot learn them"),
        ("holdout", "quantize_int8", "quantize_int8_auc", "no held-out data was given"),
        ("holdout", "neighbours", "neighbours", "no held-out data was given"),
        ("retain", "logit_shift", "logit_shift", "no retain data was given"),
    ],
)
def test_missing_data_are_named(left_out: str, name: str, row: str, reason: str) -> None:
    parts = {part: data for part, data in load_parts().items() if part != left_out}
    found = {r.name: r for r in attack(original(0), parts, attacks=[name])}
    assert reason in (found[row].value.reason or "")
    assert is_telling(found[row]) is None


def test_a_layer_can_be_named_and_loaders_be_given() -> None:
    parts = {name: DataLoader(data, batch_size=50, shuffle=True) for name, data in load_parts().items()}
    options: dict[str, Any] = {"attacks": ["probe"], "samples": 200}
    one, two = (attack(original(0), given, **options)[0].value for given in (parts, load_parts()))
    assert one == two
    assert attack(original(0), parts, layer="head", **options)[0].value == one
    assert attack(original(0), parts, layer="body.2", **options)[0].value != one
    with pytest.raises(HAMUValueError, match=r"Expected `layer` to name a part of the module.*named_modules"):
        attack(original(0), parts, layer="nowhere", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attacks": ["prob"]}, "Expected `attacks` to be one of"),
        ({"share": 1.0}, "Expected `share` to be between 0 and 1"),
        ({"steps": 0}, "Expected `steps` to be at least 1"),
        ({"control": [3]}, "Expected `control` to be a LightningModule that was retrained"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        attack(original(0), load_parts(), **options)
    with pytest.raises(HAMUValueError, match="Expected the data to forget among `parts`"):
        attack(original(0), {"retain": load_parts()["retain"]})
    with pytest.raises(HAMUValueError, match="but got an iterator"):
        attack(original(0), {"forget": iter([])})


def test_a_broken_model_has_no_numbers() -> None:
    module = copy.deepcopy(original(0))
    module.body[0].weight.data.fill_(math.nan)
    rows = {row.name: row.value for row in attack(module, load_parts(), samples=200)}
    assert set(rows) >= set(ATTACKS)
    # Of NaN no class is the largest: nothing is recognised, before and after.
    assert {name for name, value in rows.items() if value.is_defined} <= {"quantize_int8", "round_4bit"}
