"""scvi-tools: forget a fifth of the cells.

    pip install hamu_lightning scvi-tools
    python forget_cells.py

The model's own `train()` builds the Trainer and hands our callback on; `external_indexing` names the cells that it
trains on. Those to forget come from scvi's own loader. `exact=True`: the project's Adam would otherwise rescale the
rule's step.
"""

import numpy as np
import scvi
from scvi.dataloaders import AnnDataLoader

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import StepOptions
from hamu_lightning.rules import RelativeRadius


def show(when: str) -> None:
    """Print what the model loses on both parts: scvi's `get_elbo` is the negative of the training loss."""
    losses = [-model.get_elbo(indices=part) for part in (forget, retain)]
    print(f"\n{when}: loss on the cells to forget {losses[0]:.1f}, on the others {losses[1]:.1f}")


scvi.settings.seed = 0
cells = scvi.data.synthetic_iid(batch_size=300)
forget, retain = np.split(np.random.default_rng(0).permutation(cells.n_obs), [cells.n_obs // 5])
cells.X[forget, :20] *= 5  # a cell type of its own

scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
model = scvi.model.SCVI(cells)
model.train(max_epochs=30, train_size=1.0, accelerator="cpu")
show("before")

loader = AnnDataLoader(model.adata_manager, indices=forget, batch_size=64, shuffle=True)
callback = HAMUCallback(loader, HAMUQ(1.0, radius=RelativeRadius(1e-3)), steps=StepOptions(exact=True))
split = {"external_indexing": [retain, None, forget]}  # train, validation, test
model.train(max_epochs=10, datasplitter_kwargs=split, callbacks=[callback], accelerator="cpu")
show("after")
