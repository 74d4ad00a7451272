"""A target that is reached can be believed: by the mean, and by single samples."""

from __future__ import annotations

import copy
import csv
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, Holdout
from hamu_lightning.callbacks import HAMUMisconfigurationError, StopReason
from hamu_lightning.objectives import evaluating
from hamu_lightning.rules import RelativeRadius, TargetQuota
from tests.callbacks.goals.test_targets import FORGET, HELD_OUT, trained
from tests.callbacks.modules import Base, build, fit, make_data


class Points(Dataset[Any]):
    """Blurred clusters of 20 numbers."""

    def __init__(self, seed: int, transform: Any = None) -> None:
        random = torch.Generator().manual_seed(seed)
        centers = 0.45 * torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
        self.y = torch.randint(4, (400,), generator=random)
        self.x, self.transform = centers[self.y] + torch.randn(400, 20, generator=random), transform

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return (self.x[index] if self.transform is None else self.transform(self.x[index])), self.y[index]


def jitter(x: Tensor) -> Tensor:
    return x + torch.randn_like(x)


class Remembers(Base):
    """Dropout, and more weights than samples."""

    @override
    def make_net(self) -> nn.Module:
        layers = [nn.Linear(20, 128), nn.ReLU(), nn.Dropout(0.5)]
        return nn.Sequential(*layers, nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 4))


@cache
def remembering() -> Remembers:
    """Trained with augmentation: the losses of augmented samples under dropout are above those of held-out ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, data = Remembers(), Points(1, jitter)
        optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
        for _ in range(150):
            for rows in torch.randperm(400).split(64):
                optimizer.zero_grad()
                cross_entropy(module(jitter(data.x[rows])), data.y[rows]).backward()
                optimizer.step()
    return module


def request(seed: int) -> tuple[Subset[Any], DataLoader[Any]]:
    """50 samples to forget, and the rest."""
    data, order = Points(1, jitter), torch.randperm(400, generator=torch.Generator().manual_seed(seed)).tolist()
    return Subset(data, order[:50]), DataLoader(Subset(data, order[50:]), batch_size=64, shuffle=True)


@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_model_that_remembers_is_not_done_after_no_step(seed: int) -> None:
    """With augmentation and dropout on one side, such requests ended at once, with the target reached."""
    forget, retain = request(seed)
    hamu = HAMUCallback(forget, target=Holdout(Points(2), transform_like="forget"))
    fit(copy.deepcopy(remembering()), hamu, loader=retain, max_epochs=-1, max_steps=4)
    assert hamu.stop_reason is None and hamu.combined_steps == 4


@pytest.mark.filterwarnings("ignore:The fit has ended before the target", "ignore:The forget loss is")
def test_different_transforms_are_said_at_the_start_and_in_the_summary() -> None:
    forget, retain = request(0)
    hamu = HAMUCallback(forget, target=Holdout(Points(2)))
    with pytest.warns(UserWarning, match='go through different transforms. .*transform_like="holdout"'):
        fit(copy.deepcopy(remembering()), hamu, loader=retain, max_epochs=-1, max_steps=1)
    assert "different transforms" in (hamu.summary or "")


@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
def test_a_forget_set_goes_through_the_transforms_of_the_held_out_data() -> None:
    """In the passes, in levels and in the table: without its augmentation, and the data that is given stays."""
    (forget, retain), seen = request(0), []

    class Looks(Remembers):
        @override
        def forward(self, x: Any) -> Any:
            seen.append(x.detach().clone())
            return super().forward(x)

    module = Looks()
    module.load_state_dict(remembering().state_dict())
    hamu = HAMUCallback(forget, target=Holdout(Points(2), transform_like="holdout"))
    fit(module, hamu, loader=retain, max_epochs=-1, max_steps=2)
    assert hamu.combined_steps == 2 and "different transforms" not in (hamu.summary or "")
    plain = Points(1).x[forget.indices]
    whole = [x.sort(0).values for x in seen if len(x) == 50]
    # The forget pass, levels and losses of samples; nothing of the forget set comes with noise.
    assert len(whole) > 4 and all(torch.equal(x, plain.sort(0).values) for x in whole)
    assert forget.dataset.transform is jitter


def test_batches_of_the_training_loader_cannot_go_through_other_transforms() -> None:
    forget, retain = request(0)
    both = CombinedLoader({"retain": retain, "forget": DataLoader(forget, batch_size=50)}, "max_size_cycle")
    hamu = HAMUCallback(target=Holdout(Points(2), transform_like="holdout"))
    with pytest.raises(HAMUMisconfigurationError, match="the training loader brings its batches"):
        fit(copy.deepcopy(remembering()), hamu, loader=both, max_epochs=-1, max_steps=1)


class Shown(Base):
    """Its inputs are the logits, scaled: the losses of samples are as the test wants them."""

    @override
    def make_net(self) -> nn.Module:
        net = nn.Linear(3, 3, bias=False)
        nn.init.eye_(net.weight)
        return net


def with_losses(losses: list[float]) -> TensorDataset:
    """Three classes, the label 0, and these cross-entropies."""
    p = torch.tensor(losses, dtype=torch.float64).neg().exp()
    x = torch.stack([p.log(), *2 * [((1 - p) / 2).clamp(min=1e-30).log()]], dim=1).float()
    return TensorDataset(x, torch.zeros(len(losses), dtype=torch.long))


FEW_CARRY_ALL = with_losses([20.0, 20.0, 20.0, *[0.01 + 0.001 * i for i in range(37)]])
ORDINARY, OTHERS = (with_losses([0.3 + 0.02 * i for i in range(40)]) for _ in range(2))


def test_a_mean_that_a_few_samples_carry_is_not_reached() -> None:
    module = Shown()
    hamu = HAMUCallback(DataLoader(FEW_CARRY_ALL, batch_size=40), target=Holdout(DataLoader(ORDINARY, batch_size=40)))
    with (
        pytest.warns(UserWarning, match="The mean loss has reached its target, but forgotten samples still have lower"),
        pytest.warns(UserWarning, match="the mean has nothing to rise, but single samples are remembered"),
    ):
        fit(module, hamu, loader=DataLoader(OTHERS, batch_size=20), max_epochs=-1, max_steps=3)
    assert hamu.stop_reason is None
    assert "not forgotten one by one" in (hamu.summary or "")


@pytest.mark.filterwarnings("ignore:The fit has ended before the target", "ignore:The forget loss is")
def test_held_out_samples_of_other_classes_are_not_compared() -> None:
    """They are harder or easier for reasons of their own: here each has a lower loss than any forgotten sample."""
    low = with_losses([0.001] * 30)
    ordinary = with_losses([0.3 + 0.02 * i for i in range(40)])
    mixed = ConcatDataset([ordinary, TensorDataset(low.tensors[0].roll(1, dims=1), torch.ones(30, dtype=torch.long))])
    hamu = HAMUCallback(DataLoader(ORDINARY, batch_size=40), target=Holdout(DataLoader(mixed, batch_size=70)))
    fit(Shown(), hamu, loader=DataLoader(OTHERS, batch_size=20), max_epochs=-1, max_steps=1)
    assert "AUC against 40 held-out samples of the same classes 0.5 (" in (hamu.summary or "")
    assert float(hamu.forgotten_samples["forget"].rank.mean()) == pytest.approx(0.5)


def test_nothing_to_forget_is_said_with_intervals() -> None:
    hamu = HAMUCallback(DataLoader(ORDINARY, batch_size=40), target=Holdout(DataLoader(ORDINARY, batch_size=40)))
    with (
        pytest.warns(UserWarning, match=r"AUC 0.5 \(0.\d+ to 0.\d+\): there is nothing to forget"),
        pytest.warns(UserWarning, match="share 40 samples"),
    ):
        fit(Shown(), hamu, loader=DataLoader(OTHERS, batch_size=20))
    assert hamu.stop_reason is StopReason.TARGET_REACHED and hamu.combined_steps == 0


def losses_of(module: Base, data: TensorDataset) -> Tensor:
    x, y = data.tensors
    with torch.no_grad(), evaluating(module):
        return cross_entropy(module(x), y, reduction="none").double()


def reach(forget: Any, target: Any = None, **options: Any) -> tuple[HAMUCallback, Base, Any]:
    module = trained()
    hamu = HAMUCallback(forget, target=Holdout(HELD_OUT) if target is None else target)
    trainer, _ = fit(module, hamu, **{"max_epochs": 20, **options})
    return hamu, module, trainer


@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
def test_the_table_has_each_sample(tmp_path: Path) -> None:
    rows = [9, 3, 30, 12]
    hamu, module, trainer = reach(DataLoader(FORGET, batch_size=3, sampler=SubsetRandomSampler(rows)))
    table = hamu.forgotten_samples["forget"]
    assert table.position.tolist() == rows
    same = torch.isin(HELD_OUT.tensors[1], FORGET.tensors[1][rows])
    after, held_out = losses_of(module, FORGET)[rows], losses_of(module, HELD_OUT)[same]
    assert table.loss_before.tolist() == pytest.approx(losses_of(trained(), FORGET)[rows].tolist(), rel=1e-4)  # float32
    assert table.loss_after.tolist() == pytest.approx(after.tolist(), rel=1e-4)
    assert table.rank.tolist() == [float((held_out < loss).double().mean()) for loss in after]
    assert table.is_surer.tolist() == (table.loss_after < table.loss_before).tolist()
    right = module(FORGET.tensors[0][rows]).argmax(1) == FORGET.tensors[1][rows]
    assert table.is_recognised.tolist() == right.double().tolist()
    table.to_csv(tmp_path / "samples.csv")
    with (tmp_path / "samples.csv").open(encoding="utf-8") as file:
        lines = [*csv.DictReader(file)]
    assert [int(line["position"]) for line in lines] == rows and len(lines) == len(table) == 4
    assert float(lines[2]["loss_after"]) == table.rows()[2]["loss_after"]
    # The same numbers in words, and for loggers.
    share = f"Of 4 forgotten samples {100 * table.surer:.0f} % are surer than before"
    assert share in (hamu.summary or "") and f"AUC against {len(held_out)} held-out samples of the" in (
        hamu.summary or ""
    )
    assert float(trainer.callback_metrics["hamu/surer"]) == pytest.approx(table.surer)
    assert {"hamu/recognised", "hamu/auc", "hamu/auc_lower", "hamu/auc_upper"} <= trainer.callback_metrics.keys()


@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
def test_the_summary_has_the_losses_of_the_whole_set() -> None:
    hamu, module, _ = reach(DataLoader(FORGET, batch_size=20, shuffle=True), target=0.8)
    before, after = (float(losses_of(m, FORGET).mean()) for m in (trained(), module))
    assert f"forget loss {before:.4g} -> {after:.4g}.\n  retain loss" in (hamu.summary or "")
    assert "on training batches" in (hamu.summary or "") and "AUC" not in (hamu.summary or "")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from zip(*FORGET.tensors, strict=True)


@pytest.mark.parametrize("forget", [[*DataLoader(FORGET, batch_size=7)], DataLoader(Stream(), batch_size=7)])
@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
def test_lists_have_an_order_and_streams_have_none(forget: Any) -> None:
    hamu, module, _ = reach(forget, max_steps=3)
    if isinstance(forget, list):
        table = hamu.forgotten_samples["forget"]
        assert table.position.tolist() == [*range(40)]
        assert table.loss_after.tolist() == pytest.approx(losses_of(module, FORGET).tolist(), rel=1e-4)  # float32
    else:
        assert not hamu.forgotten_samples
        assert "no order that is known" in (hamu.summary or "") or "AUC" in (hamu.summary or "")


class Smoothed(Base):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return cross_entropy(self(batch[0]), batch[1], label_smoothing=0.1)


@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
@pytest.mark.parametrize("most", [1000, 10])
def test_few_samples_are_read_one_by_one_where_the_output_does_not_say(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hamu_lightning.callbacks.goals._reading._MOST_SINGLES", most)
    module = Smoothed()
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20), target=9.0)
    fit(module, hamu, max_steps=1)
    if most < 40:
        assert "losses of single samples cannot be told" in (hamu.summary or "")
        return
    x, y = FORGET.tensors
    with torch.no_grad():
        expected = cross_entropy(module(x), y, label_smoothing=0.1, reduction="none")
    table = hamu.forgotten_samples["forget"]
    assert table.loss_after.tolist() == pytest.approx(expected.tolist(), rel=1e-4)  # float32
    assert table.is_recognised.isnan().all() and "still recognised" not in (hamu.summary or "")


def test_a_large_set_is_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hamu_lightning.callbacks.goals._reading._MOST_SAMPLES", 8)
    with pytest.warns(UserWarning, match="ended before the target"):
        hamu, *_ = reach(DataLoader(FORGET, batch_size=20), target=50.0, max_steps=1)
    assert hamu.forgotten_samples["forget"].position.tolist() == [0, 5, 10, 15, 20, 25, 30, 35]
    assert "Of 8 forgotten samples, a part of them," in (hamu.summary or "")


def test_a_held_out_loss_that_runs_away_is_said() -> None:
    """The held-out data are what is forgotten."""
    held_out = TensorDataset(*(t.clone() for t in FORGET.tensors))
    with (
        pytest.warns(UserWarning, match="The loss of the held-out data runs away: from .* times .* since the start"),
        pytest.warns(UserWarning, match="nothing to forget|ended before"),
    ):
        module = trained()

        class Ahead(Holdout):
            @override
            def measure(self, module: Any, mean_loss: Any, batch: Any) -> Any:
                level = super().measure(module, mean_loss, batch)
                levels.append(float(level))
                return level + 2

        levels: list[float] = []
        rule = HAMUQ(TargetQuota(Ahead(held_out, every=2)), radius=RelativeRadius(0.05))
        hamu = HAMUCallback(DataLoader(FORGET, batch_size=40), rule)
        fit(module, hamu, loader=DataLoader(make_data(20, seed=3), batch_size=20), max_epochs=-1, max_steps=12)
    assert "runs away" in (hamu.summary or "") and not math.isnan(levels[-1])


@pytest.mark.filterwarnings("ignore:The fit has ended before the target", "ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_fit_compares_with_the_start_of_the_run(tmp_path: Path) -> None:
    def make() -> HAMUCallback:
        return HAMUCallback(DataLoader(FORGET, batch_size=20), target=Holdout(HELD_OUT))

    whole, resumed = make(), make()
    options: dict[str, Any] = {"loader": DataLoader(make_data(32), batch_size=32), "max_epochs": 4}
    saves = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(trained(), whole, saves, enable_checkpointing=True, **options)
    fit(build(Base), resumed, ckpt_path=tmp_path / "epoch=1.ckpt", **options)
    columns, others = (hamu.forgotten_samples["forget"].columns() for hamu in (whole, resumed))
    assert all(torch.equal(columns[name], others[name]) for name in columns)
    # Of a fit that has ended, nothing of what the model knew of single samples stays behind.
    assert not resumed.state_dict()["groups"]["forget"]["approach"]["evidence"]
