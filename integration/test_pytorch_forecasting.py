"""pytorch-forecasting: `lightning.pytorch`, batches of dicts and tuples, metrics as losses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from lightning.pytorch import Trainer, seed_everything
from pytorch_forecasting import (
    DecoderMLP,
    DeepAR,
    NBeats,
    NHiTS,
    RecurrentNetwork,
    TemporalFusionTransformer,
    TiDEModel,
    TimeSeriesDataSet,
)
from pytorch_forecasting.data.examples import generate_ar_data
from pytorch_forecasting.metrics import MAE, MultivariateNormalDistributionLoss

from integration.checks import check_no_trace, check_self_cancellation

MODELS: dict[Any, dict[str, Any]] = {
    NBeats: {"widths": [16, 16]},
    NHiTS: {"hidden_size": 16},
    TemporalFusionTransformer: {"hidden_size": 8, "dropout": 0.2},
    DeepAR: {"hidden_size": 8, "rnn_layers": 1},
    RecurrentNetwork: {"hidden_size": 8},
    DecoderMLP: {"hidden_size": 8},
    TiDEModel: {"hidden_size": 8},
}


def make_data(kind: Any, first: int, last: int) -> TimeSeriesDataSet:
    data = generate_ar_data(n_series=6, timesteps=40, seed=0)
    covariates = [] if kind is NBeats else ["time_idx"]
    everything = TimeSeriesDataSet(
        data,
        time_idx="time_idx",
        target="value",
        group_ids=["series"],
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=covariates,
        max_encoder_length=12,
        max_prediction_length=4,
    )
    return TimeSeriesDataSet.from_dataset(everything, data[data.series.between(first, last)])


def run(
    kind: Any,
    callbacks: list[Any],
    *,
    clipping: float | None = None,
    loss: Any = None,
    batches: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    seed_everything(0, verbose=False)
    retain = make_data(kind, 2, 5)
    if kind is TiDEModel:  # its default is one object for all models of the process, which copies its state to the next
        loss = MAE()
    options = {"optimizer": "adamw", "learning_rate": 1e-2, "log_interval": -1, **MODELS[kind]}
    options |= {} if loss is None else {"loss": loss}
    model = kind.from_dataset(retain, **options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=5, accelerator="cpu", gradient_clip_val=clipping, callbacks=callbacks, **quiet)
    trainer.fit(model, retain.to_dataloader(batch_size=16, **batches))
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_no_trace(kind: Any) -> None:
    forget = make_data(kind, 0, 1).to_dataloader(batch_size=16)
    check_no_trace(lambda callbacks: run(kind, callbacks, clipping=0.1), forget)


def test_no_trace_with_batches_of_all_series() -> None:
    """A multivariate loss over the series of one time; the forget batches hold another number of them."""

    def run_all(callbacks: list[Any]) -> Any:
        loss = MultivariateNormalDistributionLoss(rank=2)
        return run(DeepAR, callbacks, loss=loss, batches={"batch_sampler": "synchronized"})

    check_no_trace(run_all, make_data(DeepAR, 0, 1).to_dataloader(batch_size=16, batch_sampler="synchronized"))


@pytest.mark.parametrize("kind", MODELS)
def test_self_cancellation(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forget = make_data(kind, 0, 1).to_dataloader(batch_size=16)
    check_self_cancellation(lambda callbacks: run(kind, callbacks), forget, monkeypatch)
