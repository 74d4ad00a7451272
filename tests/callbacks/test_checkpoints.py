"""Checkpoints: interrupted in the middle of an epoch and resumed, a run ends where the whole one ends, bit by bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, default_collate
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import PassOptions, StepOptions
from hamu_lightning.rules import FixedRadius, TargetQuota
from tests.callbacks.modules import Base, build, fit, make_data
from tests.callbacks.test_model_parallel import Sharded
from tests.distributed import run_ranks

RULE = HAMUQ(0.02, radius=FixedRadius(0.05))
DATA = make_data(96)


def make_forget() -> DataLoader[Any]:
    return DataLoader(make_data(40, seed=9), batch_size=8, shuffle=True)


class ResumableLoader:
    """Shuffled by epoch, each process its part; knows where it is, as Lightning asks of a resumable loader."""

    def __init__(self, data: TensorDataset, batch_size: int) -> None:
        self.data, self.batch_size = data, batch_size
        self.epoch, self.taken = 0, 0
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def __len__(self) -> int:
        return len(self.data) // self.batch_size // self.processes

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.epoch))
        batches = order[self.rank :: self.processes].split(self.batch_size)
        for indices in batches[self.taken :]:
            self.taken += 1
            yield self.data[indices]
        self.epoch, self.taken = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.taken = state["epoch"], state["taken"]


class WarmsUp(Base):
    """With a schedule that changes the learning rate at each step."""

    @override
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    folder: Path, *, kind: type[Base] = Base, optimizer: str = "sgd", resume: bool = False, **settings: Any
) -> tuple[Any, HAMUCallback]:
    """Train 14 steps of 6 (or, accumulated, of 2) an epoch, saving after 8; or resume from there."""
    module = build(kind, optimizer, seed=99 if resume else 5)
    rule, arguments = settings.pop("rule", RULE), settings.pop("arguments", {})
    hamu = HAMUCallback(make_forget(), rule, **arguments)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=8, save_top_k=-1)
    trainer = L.Trainer(
        **{"max_steps": 14, "accelerator": "cpu", "devices": 1, **settings},
        callbacks=[hamu, saving],
        logger=False,
        enable_checkpointing=True,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    checkpoint = next(folder.glob("*step=8.ckpt")) if resume else None
    trainer.fit(module, ResumableLoader(DATA, 8), ckpt_path=checkpoint, weights_only=True)
    return trainer, hamu


def end_of(trainer: Any, hamu: HAMUCallback) -> dict[str, Any]:
    """All that a run leaves: weights, the optimizer's state, the callback's."""
    return {
        "weights": [_local(p) for p in trainer.lightning_module.parameters()],
        "optimizer": [
            [(name, _local(value)) for name, value in state.items()]
            for state in trainer.optimizers[0].state_dict()["state"].values()
        ],
        "callback": hamu.state_dict(),
        "step": trainer.global_step,
    }


def _local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "_local_tensor", tensor).detach()


def assert_same(whole: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert whole["step"] == 14
    (leaves, structure), (others, other_structure) = tree_flatten(whole), tree_flatten(resumed)
    assert structure == other_structure
    for a, b in zip(leaves, others, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


CASES: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"optimizer": "momentum"},
    "adamw": {"optimizer": "adamw"},
    "exact steps": {"optimizer": "adamw", "arguments": {"steps": StepOptions(exact=True)}},
    "accumulation": {"accumulate_grad_batches": 3},
    "schedule": {"kind": WarmsUp},
    "every third step": {"arguments": {"passes": PassOptions(every_n_steps=3)}},
    "target": {"rule": HAMUQ(TargetQuota(9.0), radius=FixedRadius(0.05)), "arguments": {"verify": True}},
    "stopping": {"arguments": {"stop_on": ["collateral_damage"]}},
}


@pytest.mark.filterwarnings("ignore:The base optimizer", "ignore:The fit has ended before the target")
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("name", CASES)
def test_resumed_in_the_middle_of_an_epoch(name: str, tmp_path: Path) -> None:
    whole = end_of(*train(tmp_path, **CASES[name]))
    assert_same(whole, end_of(*train(tmp_path, resume=True, **CASES[name])))


DDP = {"strategy": partial(DDPStrategy, process_group_backend="gloo"), "devices": 2}
FSDP = {"strategy": partial(ModelParallelStrategy, 2, 1, process_group_backend="gloo"), "devices": 2, "kind": Sharded}
RANK_CASES: dict[str, dict[str, Any]] = {
    "ddp": DDP,
    "ddp, accumulation, adamw": {**DDP, "accumulate_grad_batches": 3, "optimizer": "adamw"},
    "fsdp, sgd": FSDP,
    "fsdp, adamw": {**FSDP, "optimizer": "adamw"},
}


def resume_on_ranks(rank: int, folder: str) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    warnings.simplefilter("ignore")
    ends = {}
    for name, case in RANK_CASES.items():
        ends[name] = tuple(
            end_of(*train(Path(folder) / name, resume=resume, **{**case, "strategy": case["strategy"]()}))
            for resume in (False, True)
        )
    return ends


@pytest.fixture(scope="module")
def rank_results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(resume_on_ranks, 2, str(tmp_path_factory.mktemp("ranks")), timeout=300)


@pytest.mark.parametrize("name", RANK_CASES)
def test_resumed_on_two_processes(rank_results: list[Any], name: str) -> None:
    for whole, resumed in (ends[name] for ends in rank_results):
        # A checkpoint has the first process's share of the means that are logged next.
        assert whole["callback"].pop("journal") and resumed["callback"].pop("journal")
        assert_same(whole, resumed)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:The base optimizer")
def test_plain_checkpoints_load_both_ways(tmp_path: Path) -> None:
    """The original model's run goes on with the callback, and the unlearned model's without it."""
    keys = []
    for epochs, callbacks in ((1, []), (2, [HAMUCallback(make_forget(), RULE)]), (3, [])):
        module = build(Base, "momentum")
        trainer, _ = fit(
            module, *callbacks, max_epochs=epochs, ckpt_path=tmp_path / f"{epochs - 1}.ckpt" if keys else None
        )
        assert trainer.current_epoch == epochs
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        saved = torch.load(tmp_path / f"{epochs}.ckpt", weights_only=True)
        keys.append([*saved["state_dict"], *saved["optimizer_states"][0]["state"][0]])
    assert keys[0] == keys[1] == keys[2]


@pytest.mark.parametrize("sampler", [None, "seeded by epoch"])
def test_resumed_with_a_plain_loader(sampler: str | None, tmp_path: Path) -> None:
    """Lightning restores neither order nor position of a plain loader; the forget stream goes on all the same."""
    seen: list[list[int]] = []

    def collate(indices: list[int]) -> Any:
        seen.append(indices)
        return default_collate([DATA[i] for i in indices])

    def run(epochs: int, checkpoint: Path | None = None) -> Any:
        forget = DataLoader(range(40), batch_size=8, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
        seeded = DistributedSampler(DATA, 1, 0) if sampler else None
        loader = DataLoader(DATA, batch_size=8, shuffle=sampler is None, sampler=seeded)
        module = build(Base)
        trainer, _ = fit(module, HAMUCallback(forget, RULE), loader=loader, max_epochs=epochs, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module

    whole = run(3)
    expected = list(seen)
    seen.clear()
    run(1)
    first = len(seen)
    resumed = run(3, tmp_path / "1.ckpt")
    again = seen[first : len(seen) - len(expected) + first]  # the batches of the pass that was under way
    assert seen[:first] + seen[first + len(again) :] == expected
    if sampler:
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
