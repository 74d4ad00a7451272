"""What single samples show where a target brings its own answer, and how its value is called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, SecondChoice, Unseen
from hamu_lightning.callbacks import StopReason
from hamu_lightning.objectives import Calibration, UnseenAnswer
from hamu_lightning.rules import RelativeRadius, TargetQuota
from tests.callbacks.goals.test_unseen import HELD_OUT, OTHERS, RETAIN, SAMPLES, WHOLE, trained, unlearn
from tests.callbacks.modules import Base, build, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches",
    "ignore:The fit has ended before the target",
    "ignore:The target should be reached in 8 combined steps",
    "ignore:Be aware that when using `ckpt_path`",
)


@torch.no_grad()
def losses(module: nn.Module, data: Any) -> Tensor:
    x, y = next(iter(DataLoader(data, batch_size=len(data))))
    return nn.functional.cross_entropy(module.eval()(x), y, reduction="none").double()


def share_of_pairs(forget: Tensor, held_out: Tensor) -> float:
    difference = held_out[None] - forget[:, None]
    return float(((difference > 0) + (difference == 0) / 2).double().mean())


def test_samples_are_compared_by_the_own_loss_of_the_module() -> None:
    before, module = losses(trained(), SAMPLES), trained()
    hamu = unlearn(module, SAMPLES, Unseen(HELD_OUT))
    after = losses(module, SAMPLES)
    table, summary = hamu.forgotten_samples["forget"], hamu.summary or ""
    torch.testing.assert_close(table.loss_before, before, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(table.loss_after, after, rtol=1e-4, atol=1e-6)
    assert f"forget loss {before.mean():.4g} -> {after.mean():.4g}.\n  retain loss" in summary
    found = re.search(r"AUC against 90 held-out samples ([\d.]+)", summary)
    assert found is not None
    assert float(found[1]) == pytest.approx(share_of_pairs(after, losses(module, HELD_OUT)), abs=6e-4)  # three digits


def test_its_value_is_not_called_a_loss() -> None:
    hamu = unlearn(trained(), SAMPLES, Unseen(HELD_OUT))
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert re.match(r"progress to the answer \(nats\) [\d.]+ for a target of [\d.]+", hamu.stop_message or "")
    assert "Promised in sum: forget objective +" in (hamu.summary or "")
    with pytest.warns(UserWarning, match=r"ended before the target: progress to the answer \(nats\) 0\.\d+ for"):
        unlearn(trained(), SAMPLES, Unseen(HELD_OUT), max_steps=1)


def run(ckpt: Path | None = None, *callbacks: Any) -> HAMUCallback:
    """With held-out data that the target finds itself."""
    module: Any = trained()
    module.validation_step = lambda batch, batch_idx: None
    hamu = HAMUCallback(SAMPLES, HAMUQ(TargetQuota(Unseen(), steps=8), radius=RelativeRadius(1e-3)))
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": bool(callbacks), "max_epochs": 4, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[hamu, *callbacks], **options)
    trainer.fit(module, DataLoader(RETAIN, batch_size=96), DataLoader(HELD_OUT, batch_size=40), ckpt_path=ckpt)
    return hamu


def test_held_out_data_that_the_target_finds_are_compared_with_and_found_again(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, resumed = run(None, saving), run(tmp_path / "epoch=1.ckpt")
    tables = [hamu.forgotten_samples["forget"] for hamu in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*(t.columns().values() for t in tables), strict=True))
    assert bool(tables[0].rank.isfinite().all())


def test_whole_classes_are_compared_with_nothing() -> None:
    hamu = unlearn(trained(), WHOLE, Unseen(), OTHERS)
    table = hamu.forgotten_samples["forget"]
    assert bool(table.rank.isnan().all()) and table.recognised < 0.1
    assert "AUC" not in (hamu.summary or "")


class Smoothed(Base):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self(batch[0]), batch[1], label_smoothing=0.2)


@pytest.mark.parametrize("target", [lambda: Unseen(HELD_OUT), SecondChoice])
def test_where_the_loss_of_the_module_is_another_one_the_labels_are_looked_at(target: Any) -> None:
    """The value of the objective orders nothing: it says nothing of held-out samples, and begins at 0 for all."""
    module, before = trained(Smoothed), losses(trained(Smoothed), SAMPLES)
    hamu = HAMUCallback(SAMPLES, HAMUQ(TargetQuota(target()), radius=RelativeRadius(1e-3)))
    fit(module, hamu, loader=DataLoader(RETAIN, batch_size=32), max_steps=2)
    torch.testing.assert_close(hamu.forgotten_samples["forget"].loss_before, before, rtol=1e-4, atol=1e-6)
    assert "forget loss" not in (hamu.summary or "") and "forget objective 0" in (hamu.summary or "")


class Watched(Base):
    """Dropout in a part, a recurrent layer, and a part that recomputes; what is in training mode in each pass."""

    @override
    def make_net(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(10, 16), nn.Dropout(0.5), nn.BatchNorm1d(16), nn.GRU(16, 16), First())
        net[4].gradient_checkpointing = True
        self.seen: dict[bool, list[bool]] = {}
        return net

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen[True] = [part.training for part in self.net]
        return super().training_step(batch, batch_idx)


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)

    @override
    def forward(self, outputs: Any) -> Tensor:
        head: Tensor = self.head(outputs[0])
        if head.requires_grad:
            head.register_hook(lambda gradient: MODES.append((self.head.training, self.training)))
        return head


MODES: list[tuple[bool, bool]] = []


def test_an_answer_is_raised_without_dropout() -> None:
    """Its backward pass included; the retain pass is the module's own."""
    MODES.clear()
    module = build(Watched)
    modes: list[list[bool]] = []

    class Answer(UnseenAnswer):
        @override
        def samples(self, batch: Any) -> Tensor:
            modes.append([part.training for part in batch.module.net])
            return super().samples(batch)

    calibration = Calibration()
    x, y = torch.linspace(-2, 2, 90).double(), torch.arange(90) % 3
    calibration.fit((x + 1, y), (x, y), torch.tensor([0.5, 0.9, 0.0]))
    answer = Answer(calibration)
    answer.load_state_dict = lambda state: None  # type: ignore[method-assign]  # a fit begins with an empty state
    hamu = HAMUCallback(DataLoader(SAMPLES, batch_size=8), HAMUQ(1e-3), objective=answer)
    fit(module, hamu, max_steps=2, loader=DataLoader(RETAIN, batch_size=16))
    assert hamu.combined_steps == 2 and len(modes) == 2
    # Linear, Dropout; BatchNorm is frozen by its own option; GRU and what recomputes its activations train on.
    assert modes == [[False, False, False, True, True]] * 2
    assert MODES == [(False, True), (True, True)] * 2  # forget, retain
    assert all(part.training for part in module.modules())
