"""What the module logs in its forget passes, as `forget/<name>`: reduced as the module asked for."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import MaxMetric, MeanMetric, MetricCollection, MinMetric, SumMetric
from typing_extensions import override

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.rules import FineTune
from tests.callbacks.modules import Base, build, fit, make_data
from tests.distributed import run_ranks

FORGET = make_data(40, seed=9)
LOADER = {"loader": DataLoader(make_data(48), batch_size=16)}  # three batches of 16, as the forget set has: 16, 16, 8


class Metrics(Base):
    """Metrics that are called, updated, and in a collection."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.sum = MaxMetric(), SumMetric()
        self.both = MetricCollection([MinMetric(), MeanMetric()])

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        self.most(x)
        self.log("most", self.most, on_step=True, on_epoch=True)
        self.sum.update(x.detach())
        self.log("sum", self.sum, on_step=False, on_epoch=True)
        self.both(x)
        self.log_dict(self.both, on_step=False, on_epoch=True)
        self.log("rows", float(len(x)), reduce_fx="sum", on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class Epochs(Callback):
    """What a monitor finds at each epoch end."""

    def __init__(self) -> None:
        self.ends: list[dict[str, float]] = []

    @override
    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        values = trainer.fit_loop.epoch_loop._results.metrics(on_step=False)["callback"]
        self.ends.append({name: float(value) for name, value in values.items()})


def test_metrics_are_reduced_as_metrics() -> None:
    """Over each epoch anew; the means of their values per batch would be others."""
    epochs = Epochs()
    fit(build(Metrics), HAMUCallback(list(DataLoader(FORGET, 16)), FineTune()), epochs, **LOADER)
    x = FORGET.tensors[0]
    expected = {"most_epoch": x.max(), "MinMetric": x.min(), "MeanMetric": x.mean(), "sum": x.sum()}
    assert len(epochs.ends) == 2
    for end in epochs.ends:
        for name, value in expected.items():
            assert end[f"forget/{name}"] == pytest.approx(float(value), rel=1e-5), name


def test_the_modules_own_metrics_see_the_retain_stream_alone() -> None:
    plain, ours = Epochs(), Epochs()
    fit(build(Metrics), plain, **LOADER)
    module = build(Metrics)
    options = PassOptions(batchnorm="retain")
    fit(module, HAMUCallback(list(DataLoader(FORGET, 16)), FineTune(), passes=options), ours, **LOADER)
    assert "forward" not in vars(module.most)
    for before, after in zip(plain.ends, ours.ends, strict=True):
        assert before == {name: after[name] for name in before}


def test_epochs_are_whole_where_some_steps_have_no_forget_pass() -> None:
    """Each step is logged, and the names of the forget pass are withdrawn from those that have none."""
    epochs = Epochs()
    callback = HAMUCallback(list(DataLoader(FORGET, 16)), FineTune(), passes=PassOptions(every_n_steps=2))
    fit(build(Metrics), callback, epochs, **LOADER, max_epochs=1, log_every_n_steps=1)
    assert callback.forget_passes == 2
    assert epochs.ends[0]["forget/rows"] == 32
    assert epochs.ends[0]["forget/most_epoch"] == float(FORGET.tensors[0][:32].max())


class Deaf(Metrics):
    """A metric that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.most.generator = (x for x in ())  # type: ignore[assignment]


def test_of_a_metric_that_cannot_be_copied_the_mean_is_logged() -> None:
    epochs = Epochs()
    fit(build(Deaf), HAMUCallback(list(DataLoader(FORGET, 16)), FineTune()), epochs, **LOADER, max_epochs=1)
    x = FORGET.tensors[0]
    means = sum(len(part) * float(part.max()) for part in x.split(16)) / len(x)
    assert epochs.ends[0]["forget/most_epoch"] == pytest.approx(means)


def fit_on_a_rank(rank: int) -> float:
    epochs = Epochs()
    callback = HAMUCallback(DataLoader(make_data(1, seed=9), batch_size=4), FineTune())
    fit(build(Metrics), callback, epochs, strategy="ddp", devices=2, max_epochs=1, loader=DataLoader(make_data(16), 4))
    return epochs.ends[0]["forget/most_epoch"]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_ranks_without_samples_take_part() -> None:
    assert run_ranks(fit_on_a_rank) == [float(make_data(1, seed=9).tensors[0].max())] * 2
