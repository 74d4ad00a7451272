"""The small sets: always the same, split without overlap, with models that fit them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

# Set, shape of an input, number of classes.
SETS = [
    ("digits", (1, 8, 8), 10),
    ("mnist1d", (1, 40), 10),
    ("mnist1d-transformer", (1, 40), 10),
    ("synthetic", (32,), 20),
]


def load(name: str, forget: tuple[str, float] = ("random", 0.1)) -> Any:
    from problems import load_problem

    if "mnist1d" in name:
        pytest.importorskip("mnist1d")
    return load_problem(name, forget)


@pytest.mark.parametrize(("name", "shape", "classes"), SETS)
def test_sets_are_disjoint_and_their_models_take_them(name: str, shape: tuple[int, ...], classes: int) -> None:
    problem, data = load(name)
    parts = [part.tensors[0] for part in (problem.train, problem.val, problem.test)]
    assert all(part.shape[1:] == shape and part.dtype == torch.float32 for part in parts)
    everything = torch.cat(parts).flatten(1)
    assert len(everything.unique(dim=0)) == len(everything)
    assert data.classes == classes and data.gone == []
    assert all(part.tensors[1].unique().numel() == classes for part in (problem.train, problem.val, problem.test))
    assert len(data.forget) == round(0.1 * len(problem.train)) == len(problem.train) - len(data.retain)
    assert problem.make_module()(parts[0][:3]).shape == (3, classes)


def test_signals_are_always_the_same_and_other_random_numbers_go_on() -> None:
    from signals import load_signals

    first = load("mnist1d")[0].train.tensors
    states = random.getstate(), np.random.get_state()[1].tolist()
    second = load_signals.__wrapped__()
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(first, second, strict=True))
    assert states == (random.getstate(), np.random.get_state()[1].tolist())


def test_a_class_goes_as_a_whole_and_a_mixture_does_not() -> None:
    _, data = load("synthetic", ("class", 15.0))
    labels = data.train.tensors[1]
    assert data.gone == [15] and len(data.forget) == int((labels == 15).sum())
    _, data = load("synthetic", ("mixture", 0.25))
    of_class = labels[data.forget.indices] == 3
    assert data.gone == [] and 0.74 <= float(of_class.double().mean()) < 0.85


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from signals import load_signals

    monkeypatch.setitem(sys.modules, "mnist1d", None)
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"Expected the package `mnist1d`.* pip install mnist1d"):
        load_signals.__wrapped__()


def test_the_learning_rate_falls_where_a_model_is_trained_and_nowhere_else() -> None:
    from classifier import Annealing, Classifier
    from lightning.pytorch import Callback, Trainer
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = Classifier(nn.Linear(2, 2), lr=0.4)
    loader = DataLoader(TensorDataset(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)), batch_size=2)
    options: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False,
    }  # fmt: skip
    Trainer(max_epochs=2, callbacks=[Annealing(), Watch()], **options).fit(module, loader)
    assert rates == [0.4, 0.4, 0.2, 0.2]
    assert module.configure_optimizers().param_groups[0]["lr"] == 0.4
