"""scvi-tools: a Trainer of its own, training plans around the module, KL warm-up by step, epoch metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scvi
from scvi.dataloaders import AnnDataLoader
from scvi.train import LowLevelPyroTrainingPlan

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import HAMUMisconfigurationError
from hamu_lightning.rules import FineTune
from integration.checks import check_no_trace, check_self_cancellation


class LowLevelLDA(scvi.model.AmortizedLDA):
    """A Pyro model under the plan that leaves the step to Lightning."""

    _training_plan_cls = LowLevelPyroTrainingPlan


MODELS: dict[Any, dict[str, Any]] = {
    scvi.model.SCVI: {"batch_key": "batch"},
    scvi.model.LinearSCVI: {"batch_key": "batch"},
    scvi.model.CondSCVI: {"labels_key": "labels"},
    scvi.model.SCANVI: {"batch_key": "batch", "labels_key": "labels", "unlabeled_category": "label_0"},
    scvi.model.PEAKVI: {"batch_key": "batch"},
    scvi.model.AUTOZI: {"batch_key": "batch"},
    LowLevelLDA: {},
}


def make_model(kind: Any, **columns: Any) -> Any:
    scvi.settings.seed = 0
    cells = scvi.data.synthetic_iid(batch_size=100, n_genes=30)
    kind.setup_anndata(cells, **columns)
    return kind(cells)


def make_forget(kind: Any, **columns: Any) -> AnnDataLoader:
    return AnnDataLoader(make_model(kind, **columns).adata_manager, indices=np.arange(40), batch_size=16, shuffle=True)


def run(kind: Any, callbacks: list[Any], **columns: Any) -> Any:
    model = make_model(kind, **columns)
    quiet = {"enable_progress_bar": False, "accelerator": "cpu", "early_stopping": False}
    model.train(max_epochs=2, batch_size=64, train_size=1.0, callbacks=callbacks, **quiet)
    return model.module


@pytest.mark.parametrize("kind", MODELS)
def test_no_trace(kind: Any) -> None:
    columns = MODELS[kind]
    check_no_trace(lambda callbacks: run(kind, callbacks, **columns), make_forget(kind, **columns))


@pytest.mark.parametrize("kind", MODELS)
def test_self_cancellation(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = MODELS[kind]
    forget = make_forget(kind, **columns)
    check_self_cancellation(lambda callbacks: run(kind, callbacks, **columns), forget, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        (scvi.model.TOTALVI, {"batch_key": "batch", "protein_expression_obsm_key": "protein_expression"}),
        (scvi.model.AmortizedLDA, {}),
    ],
)
def test_adversarial_and_pyro_plans_are_refused(kind: Any, columns: dict[str, str]) -> None:
    """They step by themselves: `automatic_optimization = False`."""
    callback = HAMUCallback(make_forget(kind, **columns), FineTune())
    with pytest.raises(HAMUMisconfigurationError, match="Expected automatic optimization"):
        run(kind, [callback], **columns)
