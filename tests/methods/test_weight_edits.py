"""SSD and Fisher forgetting against their formulas, written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.data import DataLoader

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.methods import SSD, FisherForgetting, Method, empirical_fisher, expected_fisher
from hamu_lightning.methods._fisher_forgetting import noise_deviations
from hamu_lightning.methods._ssd import dampening
from tests.methods.setups import Classifier, build, make_split, untouched, weights_of


@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize(("alpha", "lambda_"), [(1.0, 1.0), (0.5, 0.3), (0.0, 100.0)])
def test_ssd_dampens_what_is_selected(batchnorm: bool, alpha: float, lambda_: float) -> None:
    module, (source, forget) = build(batchnorm, torch.float64), make_split(dtype=torch.float64)
    with untouched(module):
        result = SSD(alpha, lambda_)(module, source, forget)
    everything = torch.utils.data.ConcatDataset([source.retain, forget])
    on_all, _ = empirical_fisher(module, DataLoader(everything, batch_size=80))
    on_forget, _ = empirical_fisher(module, DataLoader(forget, batch_size=20))
    dampened = 0
    for name, weight in module.named_parameters():
        expected = weight.detach().clone().flatten()
        for i, (d, f) in enumerate(zip(on_all[name].flatten(), on_forget[name].flatten(), strict=True)):
            if f > alpha * d:
                expected[i] *= min(lambda_ * d / f, 1.0)
                dampened += 1
        # float64: sums in another order
        torch.testing.assert_close(result.get_parameter(name).flatten(), expected, rtol=1e-8, atol=1e-14)
    assert dampened > 5


def test_ssd_selects_strictly_and_never_amplifies() -> None:
    on_all = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])
    on_forget = torch.tensor([2.0, 2.1, 0.0, 1.0, 0.0])
    found = dampening(on_all, on_forget, alpha=2.0, lambda_=1.5)
    assert found.tolist() == pytest.approx([1.0, 1.5 / 2.1, 1.0, 0.0, 1.0])
    assert dampening(on_all, on_forget, alpha=0.1, lambda_=9.0).max() == 1


def test_frozen_weights_are_neither_dampened_nor_noisy() -> None:
    source, forget = make_split()
    module = build()
    module.net[0].requires_grad_(False)
    for method in (SSD(0.0, 0.0), FisherForgetting(1.0)):
        result = method(module, source, forget)
        assert isinstance(method, Method) and isinstance(result, Classifier)
        assert torch.equal(result.net[0].weight, module.net[0].weight)
        assert not torch.equal(result.net[3].weight, module.net[3].weight)


def test_fisher_noise_follows_its_formula() -> None:
    module, (source, forget) = build(dtype=torch.float64), make_split(dtype=torch.float64)
    method = FisherForgetting(alpha=1e-6, damping=1e-2, seed=4)
    with untouched(module):
        result = method(module, source, forget)
    fisher = expected_fisher(module, DataLoader(source.retain, batch_size=60))
    mean = torch.cat([f.flatten() for f in fisher.values()]).mean()
    generator = torch.Generator().manual_seed(4)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        expected = weight + (1e-6 / (fisher[name] + 1e-2 * mean)).sqrt().sqrt() * noise
        # float64: sums in another order
        torch.testing.assert_close(result.get_parameter(name), expected, rtol=1e-8, atol=1e-14)


def test_noise_repeats_with_the_seed_and_is_none_without_size() -> None:
    source, forget = make_split()
    module = build(batchnorm=True)
    first, second = (weights_of(FisherForgetting(1e-6, seed=1)(module, source, forget)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, weights_of(FisherForgetting(1e-6, seed=2)(module, source, forget)))
    assert torch.equal(weights_of(module), weights_of(FisherForgetting(0.0)(module, source, forget)))


def test_a_weight_without_information_gets_bounded_noise() -> None:
    deviations = noise_deviations({"a": torch.tensor([0.0, 2.0])}, alpha=16.0, damping=1e-4)["a"]
    # (16 / 1e-4)^(1/4) = 20, ten times (16 / 1)^(1/4)
    assert deviations[0].item() == pytest.approx(20.0)
    # The scale of the loss, c: Fisher information times c^2, and alpha with it.
    scaled = noise_deviations({"a": torch.tensor([0.0, 2e-12])}, alpha=16e-12, damping=1e-4)["a"]
    assert scaled[0].item() == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SSD(alpha=-1.0), "Expected `alpha` to be at least 0, but got -1.0"),
        (lambda: SSD(lambda_=math.nan), "Expected `lambda_` to be at least 0, but got nan"),
        (lambda: FisherForgetting(-1.0), "Expected `alpha` to be at least 0"),
        (lambda: FisherForgetting(1.0, damping=0.0), "Expected `damping` to be positive"),
        (lambda: noise_deviations({"a": torch.zeros(2)}, 1.0, 1.0), "Expected a positive Fisher information"),
    ],
)
def test_settings_out_of_range(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(HAMUValueError, match=message):
        make()
