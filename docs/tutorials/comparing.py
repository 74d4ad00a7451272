# %% [markdown]
# # Comparing methods
#
# Which method, for your data? `compare` trains what is needed (originals, models that were retrained without the data,
# a pool of further ones), runs each method from the same models on the same batches, tunes those that have a setting on
# other seeds than it reports, and prints one table. `make tutorials` runs this page as a program; it needs
# `pip install 'hamu_lightning[examples]'`, and takes a minute.

# %%
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from hamu_lightning import HAMUCallback, Unseen, split_forget
from hamu_lightning.methods import SSD, Search, TrainingRun, compare
from hamu_lightning.objectives import NPO
from hamu_lightning.rules import GradDiff

# %% [markdown]
# ## Model and data
#
# A function that makes a fresh module, a DataModule with loaders for the data to keep, for validation and for test, and
# the data to forget: here the digit 3.


# %%
class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
train, val, test = random_split(digits, [0.7, 0.1, 0.2], torch.Generator().manual_seed(0))
retain, forget = split_forget(train, torch.tensor([int(y) == 3 for _, y in train]))


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(retain, batch_size=64, shuffle=True)

    def val_dataloader(self):
        return DataLoader(val, batch_size=256)

    def test_dataloader(self):
        return DataLoader(test, batch_size=256)


# %% [markdown]
# ## Methods
#
# A method is anything that takes a module and the data and returns a module. `TrainingRun` is a fit with a callback: a
# rule, an objective, or a target. `Search` marks the one setting that is tuned, over a range.

# %%
quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
steps = {"max_steps": 30, **quiet}
methods = {
    "HAMU, Unseen": TrainingRun(lambda data, seed: HAMUCallback(data, target=Unseen(), seed=seed), steps),
    "NPO + GradDiff": Search(
        lambda w: TrainingRun(lambda data, seed: HAMUCallback(data, GradDiff(w), objective=NPO(0.1), seed=seed), steps),
        0.1,
        1.0,
    ),
    "SSD": Search(SSD, 1.0, 9.0),
}

# %% [markdown]
# ## The table
#
# Finished runs are kept in `out`: a second call reads them, and one that was interrupted goes on.

# %%
found = compare(
    Digits,
    Data(),
    forget,
    methods,
    out="comparison",
    options={"max_epochs": 15, **quiet},
    seeds=(0, 1),
    pool=3,
    trials=3,
)
print(found.table())

# %% [markdown]
# Read it from the row "another retrained": nobody can be expected to come closer to the retrained models than these are
# to each other. Methods are ordered by JS where the original is clearly further off than that row is; where it is not,
# the table says so, and the set cannot tell methods apart. Two seeds are enough to see how it works, and too few to
# choose by: [HAMU beside other methods](../comparison.md) has five, and says what every column is.
