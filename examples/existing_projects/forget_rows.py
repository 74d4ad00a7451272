"""pytorch-tabular: forget a hundred rows of a table.

    pip install hamu_lightning omegaconf einops requests rich scikit-learn pandas
    pip install --no-deps pytorch-tabular
    python forget_rows.py

pytorch-tabular 1.2 asks for an older torchmetrics than ours, but works with it: hence `--no-deps`. It uses the Trainer
of `pytorch_lightning` and takes callbacks in `train()`. Its `load_best` must be off: it would load the checkpoint with
the best validation loss after the unlearning, which may be one from before it. `exact=True`: the project's Adam would
otherwise rescale the rule's step.
"""

import pandas as pd
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from sklearn.datasets import make_classification

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import StepOptions
from hamu_lightning.rules import RelativeRadius


def show(when: str) -> None:
    """Print the loss on both parts."""
    losses = [tabular.evaluate(part, verbose=False)[0]["test_loss"] for part in (forget, retain)]
    print(f"\n{when}: loss on the rows to forget {losses[0]:.3f}, on the others {losses[1]:.3f}")


x, y = make_classification(1000, 8, n_informative=6, random_state=0)
table = pd.DataFrame(x, columns=[f"x{i}" for i in range(8)]).assign(y=y)
forget, retain = table[:100], table[100:]

tabular = TabularModel(
    data_config=DataConfig(target=["y"], continuous_cols=[*table.columns[:8]], normalize_continuous_features=False),
    model_config=CategoryEmbeddingModelConfig("classification"),
    optimizer_config=OptimizerConfig(),
    trainer_config=TrainerConfig(
        max_epochs=10, accelerator="cpu", early_stopping=None, checkpoints=None, load_best=False
    ),
    verbose=False,
)
tabular.fit(table)
show("before")

loader = tabular.datamodule.prepare_inference_dataloader(forget, batch_size=100)
callback = HAMUCallback(loader, HAMUQ(0.002, radius=RelativeRadius(1e-3)), steps=StepOptions(exact=True))
tabular.train(tabular.model, tabular.prepare_dataloader(retain), callbacks=[callback])
show("after")
