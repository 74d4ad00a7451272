# %% [markdown]
# # A deletion request in an image project
#
# A project as many are: a DataModule, augmentation, dropout, AdamW, a checkpoint. Then eight customers ask that their
# pictures be forgotten, and somebody wants a page about it. `make tutorials` runs this page as a program; it needs
# `pip install 'hamu_lightning[examples,report]'`, writes into the present folder, and takes a minute.

# %%
import csv

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

seed_everything(0, verbose=False)

# %% [markdown]
# ## The project
#
# The pictures are scikit-learn's digits, each the property of a customer. Nothing here knows of unlearning.


# %%
def shift(picture):
    """Augmentation: one pixel in any direction."""
    return picture.roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (1, 2))


class Pictures(Dataset):
    def __init__(self, customers, transform=None):
        images, labels = load_digits(return_X_y=True)
        owner = torch.arange(len(labels)) % 150
        kept = torch.isin(owner, torch.tensor(customers))
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[kept] / 16
        self.labels, self.transform = torch.tensor(labels)[kept], transform
        self.customer_id = [f"c-{number}" for number in owner[kept].tolist()]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        picture = self.images[i]
        return (picture if self.transform is None else self.transform(picture)), self.labels[i]


class PictureData(LightningDataModule):
    def setup(self, stage=None):
        self.train_set = Pictures(range(40), shift)
        self.val_set = Pictures(range(40, 110))

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=64, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, batch_size=256)


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(64, 10),
        )

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def train(data):
    model = Classifier()
    trainer = Trainer(max_epochs=40, enable_checkpointing=False, **quiet)
    trainer.fit(model, datamodule=data)
    return trainer, model


trainer, _ = train(PictureData())
trainer.save_checkpoint("best.ckpt")

# %% [markdown]
# ## The request
#
# It comes as a file of ids.

# %%
with open("forget_ids.csv", "w", newline="") as file:
    writer = csv.writer(file)
    writer.writerows([["customer_id"], *([f"c-{number}"] for number in range(3, 40, 5))])

# %% [markdown]
# ## Unlearn
#
# `UnlearnData` goes around the DataModule: it finds the pictures of these customers, trains on the others, and brings
# both to the callback. `Unseen()` aims at what the model says of the validation pictures, which it never saw. The
# pictures to forget are read without augmentation, as the validation pictures are.

# %%
from hamu_lightning import EvaluateUnlearning, HAMUCallback, UnlearnData, Unseen

model = Classifier.load_from_checkpoint("best.ckpt")
data = UnlearnData(PictureData(), forget="forget_ids.csv", by="customer_id")
hamu, numbers = HAMUCallback(target=Unseen()), EvaluateUnlearning()
unlearning = Trainer(max_steps=100, callbacks=[hamu, numbers], enable_checkpointing=False, **quiet)
unlearning.fit(model, datamodule=data)
unlearning.save_checkpoint("unlearned.ckpt", weights_only=True)
print(hamu.summary)

# %% [markdown]
# ## Look at it, beside models that never saw these customers
#
# The same `data` train such models, without the callback. One is better than none, three are better than one. `attack`
# tries to get the pictures back out of all of them: what comes out of a model that never saw them is no leak.

# %%
from hamu_lightning.evidence import attack, evaluate, report

retrained = [train(data)[1] for _ in range(3)]
parts = data.parts()
original = Classifier.load_from_checkpoint("best.ckpt")
page = report(
    hamu,
    "out",
    names=data.names,
    before=evaluate(original, parts),
    after=evaluate(model, parts),
    references=[evaluate(other, parts) for other in retrained],
    attacks=attack(model, parts, control=retrained),
    weights_before=original,
    weights_after=model,
)
print(f"written: {page}")

# %% [markdown]
# The page begins with a verdict in two sentences. "Cannot be told" is an honest one where the original itself is no
# further from retrained models than these are from each other: then there was little to forget.
#
# What else holds the pictures (earlier checkpoints, logs, copies), and to whom the page goes:
# [deletion requests](../deletion_requests.md). Other ids, several requests, the same from the command line:
# [add it to your project](../add_to_your_project.md).
