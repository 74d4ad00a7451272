"""A project's data around which UnlearnData is put: its loaders, its hooks, a fit."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hamu_lightning import HAMUCallback, UnlearnData, Unseen
from hamu_lightning.callbacks.passes import read_positions
from hamu_lightning.evidence import EvaluateUnlearning, evaluate, report
from hamu_lightning.rules import HAMUQ
from hamu_lightning.solvers import FeasibleDirection

DATA = TensorDataset(torch.arange(10))


class Clients(Dataset[Any]):
    """Three classes of points; each client has two samples."""

    def __init__(self, size: int, seed: int, letter: str = "c") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(size) % 3
        self.x = torch.randn(size, 4, generator=generator) + 2 * nn.functional.one_hot(self.targets, 4)
        self.client = [f"{letter}{i // 2}" for i in range(size)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.targets[index]


class Project(LightningDataModule):
    def __init__(self, size: int = 60) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.calls: list[str] = []
        self.num_classes = 3

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append("setup")
        self.train, self.val = Clients(self.hparams["size"], 0), Clients(30, 1, "v")
        assert self.trainer is not None

    def teardown(self, stage: str) -> None:
        self.calls.append("teardown")

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=16)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("on_after_batch_transfer")
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"seen": 7}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append(f"load {state}")


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.trainer.datamodule.num_classes == 3  # type: ignore[attr-defined]
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
pytestmark = [
    pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
]


def test_a_fit_from_a_file_of_ids_to_a_report(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("client\nc3\nc17\n")
    project, module = Project(), Net()
    data = UnlearnData(project, forget=tmp_path / "ids.csv", by="client")
    hamu, numbers = HAMUCallback(target=3.0), EvaluateUnlearning()
    trainer = Trainer(max_epochs=2, callbacks=[hamu, numbers], enable_checkpointing=False, **QUIET)
    trainer.fit(module, datamodule=data)
    assert hamu.forget_passes > 0
    assert project.calls[:2] == ["prepare_data", "setup"]
    assert project.calls[-1] == "teardown"
    assert "on_after_batch_transfer" in project.calls
    assert len(hamu.forgotten_samples["forget"].position) == 4
    trainer.save_checkpoint(tmp_path / "unlearned.ckpt")
    saved = torch.load(tmp_path / "unlearned.ckpt", weights_only=True)
    assert (saved["UnlearnData"], saved["datamodule_hyper_parameters"]) == ({"seen": 7}, {"size": 60})
    parts = evaluate(module, data.parts()).parts
    assert {name: len(part) for name, part in parts.items()} == {"retain": 56, "forget": 4, "holdout": 30}
    assert parts["forget"].losses.tolist() == pytest.approx(hamu.forgotten_samples["forget"].loss_after.tolist())
    page = report(hamu, tmp_path, evaluation=numbers, names=data.names).read_text()
    assert "Forget 4 samples, those of 2 ids" in page and "c17, sample 2</th>" in page


def test_the_evaluation_asks_once_for_held_out_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, original = [], UnlearnData.holdout_dataloader

    def ask(self: UnlearnData) -> Any:
        asked.append(original(self))
        return asked[-1]

    class Begins(EvaluateUnlearning):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = len(asked)
            super().on_train_start(trainer, pl_module)
            self.asked = len(asked) - before

    monkeypatch.setattr(UnlearnData, "holdout_dataloader", ask)
    data = UnlearnData(Project(), ["c3"], by="client", holdout=Clients(24, 2, "v"))
    callbacks = [HAMUCallback(rule=HAMUQ(1e-3)), numbers := Begins()]
    Trainer(max_epochs=1, callbacks=callbacks, enable_checkpointing=False, **QUIET).fit(Net(), data)
    assert numbers.asked == 1 and numbers.after is not None and len(numbers.after.parts["holdout"]) == 24


def test_several_requests_in_one_fit(tmp_path: Path) -> None:
    data = UnlearnData(Project(), {"a": ["c3"], "b": ["c17", "c4"]}, by="client")
    rule = FeasibleDirection(quota={"a": 1e-3, "b": 1e-3})
    hamu = HAMUCallback(rule=rule)
    Trainer(max_epochs=1, callbacks=[hamu], enable_checkpointing=False, **QUIET).fit(Net(), data)
    assert {name: len(part.dataset) for name, part in data.forget_dataloaders().items()} == {"a": 2, "b": 4}
    assert hamu.forget_passes == 2 * hamu.combined_steps > 0
    hamu = HAMUCallback(rule=HAMUQ(1e-3))
    Trainer(max_epochs=1, callbacks=[hamu], enable_checkpointing=False, **QUIET).fit(Net(), data)
    assert hamu.forget_passes == hamu.combined_steps > 0


def test_the_report_of_several_requests_calls_each_sample_by_its_own_id(tmp_path: Path) -> None:
    data = UnlearnData(Project(), {"a": ["c3"], "b": ["c17", "c4"]}, by="client")
    hamu = HAMUCallback(target={"a": 3.0, "b": 3.0})
    Trainer(max_epochs=1, callbacks=[hamu], enable_checkpointing=False, **QUIET).fit(Net(), data)
    page = report(hamu, tmp_path, names=data.names).read_text()
    assert "Forget 2 samples, those of 1 id (request <b>a</b>)" in page
    assert "Forget 4 samples, those of 2 ids (request <b>b</b>)" in page
    of_a, of_b = (
        {*re.findall(r"(c\d+), sample (\d)<", part)} for part in page[page.index("<h3>a: ") :].split("<h3>b: ", 1)
    )
    assert (of_a, of_b) == ({("c3", "0"), ("c3", "1")}, {("c4", "0"), ("c4", "1"), ("c17", "2"), ("c17", "3")})


def test_the_target_reads_the_held_out_part(tmp_path: Path) -> None:
    loader = DataLoader(Clients(60, 0), batch_size=16)
    data = UnlearnData(loader, ["c3"], by="client", holdout=Clients(24, 2, "v"))
    vars(data)["num_classes"] = 3
    hamu = HAMUCallback(target=Unseen())
    Trainer(max_epochs=1, callbacks=[hamu], enable_checkpointing=False, **QUIET).fit(Net(), data)
    assert hamu.summary is not None
    assert "against 16 held-out samples of the same classes" in hamu.summary


def test_the_state_of_the_project_is_loaded(tmp_path: Path) -> None:
    first = UnlearnData(Project(), ["c3"], by="client")
    trainer = Trainer(max_epochs=1, callbacks=[HAMUCallback(rule=HAMUQ(1e-3))], enable_checkpointing=False, **QUIET)
    trainer.fit(Net(), first)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    project = Project()
    trainer = Trainer(max_epochs=2, callbacks=[HAMUCallback(rule=HAMUQ(1e-3))], enable_checkpointing=False, **QUIET)
    trainer.fit(Net(), UnlearnData(project, ["c3"], by="client"), ckpt_path=tmp_path / "a.ckpt")
    assert "load {'seen': 7}" in project.calls


@pytest.mark.parametrize("needs_module", [False, True])
def test_ids_are_looked_up_as_soon_as_the_training_loader_can_be_made(needs_module: bool) -> None:
    class Asked(Project):
        def train_dataloader(self) -> Any:
            self.calls.append("train_dataloader")
            assert "module" in self.calls or not needs_module
            return super().train_dataloader()

    class SetUp(Net):
        def setup(self, stage: str) -> None:
            self.trainer.datamodule.calls.append("module")  # type: ignore[attr-defined]

    project = Asked()
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.fit(SetUp(), datamodule=UnlearnData(project, ["c3"], by="client"))
    found = [call for call in project.calls if call in ("train_dataloader", "module")]
    assert found == ["train_dataloader", "module", *(["train_dataloader"] if needs_module else [])]


def test_validation_data_that_hold_the_samples_are_said() -> None:
    class Same(Project):
        def val_dataloader(self) -> Any:
            return DataLoader(self.train, batch_size=16)

    data = UnlearnData(Same(), ["c3"], by="client")
    data.trainer = Trainer(**QUIET)
    with pytest.warns(UserWarning, match="share 2 samples of one Dataset: they get worse"):
        data.setup("fit")
        data.train_dataloader()


def test_validation_data_with_the_same_ids_are_said() -> None:
    class Alike(Project):
        def val_dataloader(self) -> Any:
            return DataLoader(Clients(30, 1), batch_size=16)

    data = UnlearnData(Alike(), ["c3", "c20"], by="client")  # the validation data go to c14
    data.trainer = Trainer(**QUIET)
    with pytest.warns(UserWarning, match="^2 samples of the validation data have ids that are to be forgotten") as said:
        data.setup("fit")
        data.train_dataloader()
    assert len(said) == 1


def test_what_is_forgotten_and_measured_has_no_augmentation() -> None:
    class Augmented(Clients):
        transform: Any = None

        def __getitem__(self, index: int) -> Any:
            return self.transform(self.x[index]), self.targets[index]

    train, val = Augmented(30, 0), Augmented(12, 1, "v")
    train.transform, val.transform = (lambda x: x + torch.rand(4)), (lambda x: x + 0)
    data = UnlearnData(DataLoader(train, batch_size=4), ["c3"], by="client", holdout=val)
    parts = data.parts()
    assert torch.equal(parts["forget"].dataset[0][0], train.x[6])
    assert torch.equal(parts["retain"].dataset[0][0], train.x[0])
    assert torch.equal(data.forget_dataloader().dataset[0][0], train.x[6])
    assert not torch.equal(data.train_dataloader().dataset[0][0], train.x[0])


def test_hooks_that_the_project_lacks_are_not_there() -> None:
    class Bare(LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(DATA)

    data = UnlearnData(Bare(), [1])
    assert data.holdout_dataloader() is None
    assert {*data.parts()} == {"retain", "forget"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = data.nothing


def test_copies_and_pickles() -> None:
    data = UnlearnData(Project(), ["c3"], by="client")
    for twin in (copy.deepcopy(data), pickle.loads(pickle.dumps(data))):
        twin.trainer = Trainer(**QUIET)
        twin.setup("fit")
        assert read_positions(twin.forget_dataloader()) == [0, 1]
        assert twin.datamodule is not data.datamodule
        assert twin.datamodule.calls == ["setup"]


def test_the_other_package() -> None:
    import pytorch_lightning as other

    class Theirs(other.LightningDataModule):
        seen = 0

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(*Clients(24, 0)[:]), batch_size=8)

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            self.seen += 1
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    class Module(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    data, hamu = UnlearnData(Theirs(), [1, 2]), HAMUCallback(rule=HAMUQ(1e-3))
    other.Trainer(max_epochs=1, callbacks=[hamu], enable_checkpointing=False, **QUIET).fit(Module(), datamodule=data)
    assert hamu.forget_passes == data.seen == 3
    assert isinstance(data, UnlearnData)
