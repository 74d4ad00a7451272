"""pytorch-tabular: the Trainer of `pytorch_lightning`, built by a facade that reloads its best checkpoint."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import (
    AutoIntConfig,
    CategoryEmbeddingModelConfig,
    DANetConfig,
    FTTransformerConfig,
    GANDALFConfig,
    NodeConfig,
    TabTransformerConfig,
)
from sklearn.datasets import make_classification

from integration.checks import check_no_trace, check_self_cancellation

MODELS: dict[Any, dict[str, Any]] = {
    CategoryEmbeddingModelConfig: {"layers": "16", "use_batch_norm": True, "dropout": 0.1},
    FTTransformerConfig: {"num_attn_blocks": 1, "num_heads": 2, "input_embed_dim": 8},
    TabTransformerConfig: {"num_attn_blocks": 1, "num_heads": 2, "input_embed_dim": 8},
    AutoIntConfig: {"attn_embed_dim": 8, "num_attn_blocks": 1},
    GANDALFConfig: {"gflu_stages": 2},
    NodeConfig: {"num_layers": 1, "num_trees": 8, "depth": 3},
    DANetConfig: {"n_layers": 2, "abstlay_dim_1": 8, "abstlay_dim_2": 8, "k": 2},
}


def make_table() -> pd.DataFrame:
    x, y = make_classification(200, 6, random_state=0)
    table = pd.DataFrame(x, columns=[f"x{i}" for i in range(6)]).assign(y=y)
    return table.assign(kind=(table.x0 > 0).map({True: "a", False: "b"}))


def make_model(kind: Any, **trainer: Any) -> TabularModel:
    columns = {"continuous_cols": [f"x{i}" for i in range(6)], "categorical_cols": ["kind"]}
    options: dict[str, Any] = {"max_epochs": 1, "batch_size": 32, "accelerator": "cpu", "progress_bar": "none"}
    options |= {"checkpoints": None, "early_stopping": None, "load_best": False}
    return TabularModel(
        data_config=DataConfig(target=["y"], **columns),
        model_config=kind("classification", **MODELS[kind]),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(**{**options, **trainer}),
        verbose=False,
    )


def make_forget(kind: Any) -> Any:
    model, table = make_model(kind), make_table()
    return model.prepare_dataloader(table).prepare_inference_dataloader(table[:40], batch_size=16)


def run(kind: Any, callbacks: list[Any], **trainer: Any) -> Any:
    tabular = make_model(kind, **trainer)
    tabular.fit(make_table()[40:], callbacks=callbacks, seed=0)
    return tabular.model


@pytest.mark.parametrize("kind", MODELS)
def test_no_trace(kind: Any) -> None:
    check_no_trace(lambda callbacks: run(kind, callbacks), make_forget(kind))


@pytest.mark.parametrize("kind", MODELS)
def test_self_cancellation(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_self_cancellation(lambda callbacks: run(kind, callbacks), make_forget(kind), monkeypatch)
