# %% [markdown]
# # The digits in five minutes
#
# A small network learns scikit-learn's 8x8 digits, forgets the digit 3, and is put beside a network that never saw a 3.
# `make tutorials` runs this page as a program; it needs `pip install 'hamu_lightning[examples]'`.

# %%
import copy

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from hamu_lightning import HAMUCallback, Unseen, split_forget
from hamu_lightning.evidence import evaluate

seed_everything(0, verbose=False)

# %% [markdown]
# ## A project without unlearning
#
# An ordinary module, with AdamW, and ordinary data.


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
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


images, labels = load_digits(return_X_y=True)
digits = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
train, test = random_split(digits, [0.8, 0.2])
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(dataset):
    module = Digits()
    Trainer(max_epochs=15, accelerator="cpu", **quiet).fit(module, DataLoader(dataset, batch_size=64, shuffle=True))
    return module


original = fit(train)

# %% [markdown]
# ## Forget the digit 3
#
# `split_forget` takes a mask with one entry for each sample. For a whole class the target is `Unseen()`: where a 3 was,
# the network names what it would have said second. AdamW rests, and the step itself is applied; a line at the start
# says so.

# %%
is_three = torch.tensor([int(y) == 3 for _, y in train])
retain, forget = split_forget(train, is_three)

unlearned = copy.deepcopy(original)
callback = HAMUCallback(forget=forget, target=Unseen())
trainer = Trainer(max_steps=100, accelerator="cpu", callbacks=[callback], **quiet)
trainer.fit(unlearned, DataLoader(retain, batch_size=64, shuffle=True))
print(callback.summary)

# %% [markdown]
# ## Look at it
#
# RA, FA and TA are the accuracies on retain, forget and test data (the latter without the forgotten class), in [0, 1].
# A network that never saw a 3 is what it is to be compared with.

# %%
retrained = fit(retain)
parts = {"retain": retain, "forget": forget, "test": test}
for name, module in {"original": original, "unlearned": unlearned, "retrained": retrained}.items():
    numbers = evaluate(module, parts).numbers()
    print(f"{name:10}", *(f"{key} {numbers[key].value:.3f}" for key in ("RA", "FA", "TA")))

# %% [markdown]
# The answers are those of a network that never saw a 3. Whether its *weights* still hold something is another question:
# `attack` asks it ([evidence](../evidence.md#attacks-after-the-fact)). From a list of ids to a report:
# [deletion requests](../deletion_requests.md).
