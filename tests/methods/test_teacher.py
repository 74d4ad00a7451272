"""A teacher that has seen the retain data alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from hamu_lightning.errors import HAMUValueError
from hamu_lightning.methods import Retrain, fit_teacher
from tests.methods.setups import OPTIONS, Classifier, Source, build, make_samples, untouched, weights_of


@pytest.mark.parametrize("make", [lambda d: d, lambda d: DataLoader(d, batch_size=16, shuffle=True), Source])
def test_it_is_a_short_training_on_the_retain_data(make: Any) -> None:
    data = make_samples(60)
    with untouched(build()):
        teacher = fit_teacher(Classifier, make(data), OPTIONS, seed=7, batch_size=16)
    assert torch.equal(weights_of(teacher), weights_of(Retrain(Classifier, OPTIONS, seed=7)(None, Source(data))))
    assert not teacher.training and not any(weight.requires_grad for weight in teacher.parameters())


def test_what_is_no_data_is_refused() -> None:
    with pytest.raises(HAMUValueError, match="Expected `retain` to be a DataLoader, a Dataset or a datamodule"):
        fit_teacher(Classifier, 3)
