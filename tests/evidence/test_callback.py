"""EvaluateUnlearning in fits: what it measures, logs and leaves."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUCallback, Holdout, Unseen, split_forget
from hamu_lightning.callbacks import HAMUMisconfigurationError
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.evidence import EvaluateUnlearning, evaluate
from hamu_lightning.rules import FineTune
from tests.callbacks.modules import MODULES, Base, StatefulLSTM, WithBatchNorm, build, fit, make_data, trained_on
from tests.callbacks.setups import RULE
from tests.distributed import run_ranks
from tests.evidence.test_evaluate import Noisy

TRAIN, HOLDOUT = make_data(96), make_data(60, seed=2)
KEEP, GO = split_forget(TRAIN, range(0, 40, 2))
PARTS: dict[str, Any] = {"retain": KEEP, "forget": GO, "holdout": HOLDOUT}


def make_loader() -> DataLoader[Any]:
    return DataLoader(KEEP, batch_size=16, shuffle=True)


def test_both_ends_are_those_of_evaluate() -> None:
    module = trained_on(TRAIN, 60)
    first = evaluate(module, PARTS)
    evaluation = EvaluateUnlearning(**PARTS, every_n_steps=4, max_batches=1)
    trainer, _ = fit(module, evaluation, loader=make_loader())  # 2 epochs of 5 steps
    last = evaluate(module, PARTS)
    assert evaluation.before is not None and evaluation.after is not None
    for found, expected in ((evaluation.before, first), (evaluation.after, last)):
        assert all(torch.equal(found.parts[name].losses, expected.parts[name].losses) for name in PARTS)
    assert [step for step, _ in evaluation.history] == [0, 4, 5, 8, 10, 10]
    numbers = {**last.numbers(), **last.since(first)}
    for name, estimate in numbers.items():
        if estimate.is_defined:
            assert float(trainer.callback_metrics[f"eval/{name}"]) == pytest.approx(estimate.value, abs=1e-6)
    assert "trained_attack" in evaluation.history[-1][1] and "trained_attack" not in evaluation.history[1][1]
    assert 0 <= evaluation.history[-1][1]["score"] <= 1


def test_table_of_samples(tmp_path: Path) -> None:
    evaluation = EvaluateUnlearning(**PARTS)
    fit(trained_on(TRAIN, 60), evaluation, loader=make_loader())
    table = evaluation.samples
    assert table is not None and len(table) == 76 + 20 + 60
    table.to_csv(tmp_path / "samples.csv")
    with (tmp_path / "samples.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [*rows[0]] == ["id", "part", "label", "loss_before", "loss_after", "rank", "recognised", "is_surer"]
    first, last = evaluation.before, evaluation.after
    assert first is not None and last is not None
    row = rows[76 + 3]
    after = float(last.parts["forget"].losses[3])
    comparable = last.comparable()
    assert comparable is not None
    below = [float(x) < after for x in comparable.losses]
    assert (row["id"], row["part"], row["label"]) == ("3", "forget", str(int(GO[3][1])))
    assert float(row["loss_after"]) == after and float(row["rank"]) == pytest.approx(sum(below) / len(below))
    assert row["is_surer"] == str(after < float(first.parts["forget"].losses[3]))
    assert math.isnan(float(rows[0]["rank"])) and rows[0]["part"] == "retain"


def test_a_hamu_callback_brings_the_data() -> None:
    module = trained_on(TRAIN, 60)
    held_out = DataLoader(HOLDOUT, batch_size=16)
    hamu = HAMUCallback(GO, target=Unseen(held_out))
    evaluation = EvaluateUnlearning(max_batches=2)
    with pytest.warns(UserWarning, match="ended before the target"):
        fit(module, evaluation, hamu, loader=make_loader(), max_epochs=1)
    expected = evaluate(module, PARTS)
    assert evaluation.after is not None and {*evaluation.after.parts} == {*PARTS}
    for name in PARTS:
        assert torch.allclose(evaluation.after.parts[name].losses, expected.parts[name].losses, atol=1e-6)
    table = hamu.forgotten_samples["forget"]
    assert evaluation.samples is not None
    mine = [row for row in evaluation.samples.rows() if row["part"] == "forget"]
    assert [row["loss_after"] for row in mine] == pytest.approx(table.loss_after.tolist(), abs=1e-5)


def test_several_requests_are_measured_together() -> None:
    parts = split_forget(GO, range(5))
    evaluation = EvaluateUnlearning(every_n_epochs=None)
    hamu = HAMUCallback({"a": parts[0], "b": parts[1]}, target={"a": Holdout(HOLDOUT), "b": Holdout(HOLDOUT)})
    with pytest.warns(UserWarning, match="ended before the target"):
        fit(trained_on(TRAIN, 60), hamu, evaluation, loader=make_loader(), max_epochs=1)
    assert evaluation.after is not None and len(evaluation.after.parts["forget"]) == len(GO)


def test_without_data_to_forget_it_is_refused() -> None:
    with pytest.raises(HAMUMisconfigurationError, match="Pass EvaluateUnlearning\\(forget="):
        fit(build(Base), EvaluateUnlearning(), loader=make_loader())
    with pytest.raises(HAMUValueError, match="max_batches"):
        EvaluateUnlearning(max_batches=0)
    with pytest.raises(HAMUValueError, match="references"):
        EvaluateUnlearning(references=[1])
    with pytest.raises(HAMUValueError, match="'forget'"):
        EvaluateUnlearning(forget="data")


@pytest.mark.parametrize("kind", [kind for kind in MODULES if kind is not StatefulLSTM])
def test_the_fit_stays_the_same(kind: type[Base]) -> None:
    # BatchNorm has most to lose between two micro-batches.
    settings: dict[str, Any] = {"accumulate_grad_batches": 2} if kind is WithBatchNorm else {}
    few = {name: Subset(data, range(10)) for name, data in PARTS.items()}
    runs = []
    for callbacks in ([], [EvaluateUnlearning(**few, every_n_steps=2, max_batches=1)]):
        module = build(kind)
        trainer, recorder = fit(module, *callbacks, **settings)
        values = [{n: x for n, x in each.items() if not n.startswith("eval/")} for each in recorder.values]
        runs.append((copy.deepcopy(module.state_dict()), values, trainer.global_step, torch.get_rng_state()))
    (state, values, step, random), (other, values_2, step_2, random_2) = runs
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    assert values == values_2 and step == step_2 and torch.equal(random, random_2)


@pytest.mark.parametrize("rule", [RULE, FineTune()])
def test_unlearning_stays_the_same(rule: Any) -> None:
    weights = []
    for callbacks in ([], [EvaluateUnlearning(holdout=HOLDOUT, every_n_steps=1)]):
        module = build(WithBatchNorm)
        fit(module, HAMUCallback(DataLoader(GO, batch_size=8, shuffle=True), rule), *callbacks, loader=make_loader())
        weights.append(module.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


class Keep(Callback):
    """Writes down what a ModelCheckpoint would see."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    @override
    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append(float(trainer.callback_metrics["eval/score"]))


class Validates(Base):
    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self(batch[0]).mean())

    def val_dataloader(self) -> Any:
        return DataLoader(HOLDOUT, batch_size=30)


@pytest.mark.parametrize("kind", [Base, Validates])
def test_the_best_trade_off_is_kept(kind: type[Base], tmp_path: Path) -> None:
    # Where it looks after validation, that is before the epoch ends.
    when = {"save_on_train_epoch_end": kind is Base}
    best = ModelCheckpoint(tmp_path, monitor="eval/score", mode="max", save_weights_only=True, **when)
    evaluation = EvaluateUnlearning(retain=KEEP, forget=GO, holdout=HOLDOUT)
    module = build(kind)
    fit(module, best, evaluation, loader=make_loader(), enable_checkpointing=True)
    scores = [numbers["score"] for step, numbers in evaluation.history if step in (5, 10)][:2]
    assert best.best_model_score is not None
    assert float(best.best_model_score) == pytest.approx(max(scores), abs=1e-6)
    at = torch.load(best.best_model_path, weights_only=True)["global_step"]
    assert at == (5 if scores[0] >= scores[1] else 10)


def test_averaged_weights_are_measured() -> None:
    module = trained_on(TRAIN, 60)
    evaluation = EvaluateUnlearning(**PARTS)
    fit(module, evaluation, WeightAveraging(), loader=make_loader())
    assert evaluation.after is not None
    assert torch.equal(evaluation.after.parts["forget"].losses, evaluate(module, PARTS).parts["forget"].losses)


class Fails(Base):
    """Raises in evaluation mode, from the second measurement on."""

    is_broken = False

    @override
    def forward(self, x: Any) -> Any:
        if not self.training and self.is_broken:
            raise ValueError("it is broken")
        return super().forward(x)


class Break(Callback):
    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.is_broken = True


def test_an_error_of_the_module_leaves_no_trace() -> None:
    module = build(Fails)
    evaluation = EvaluateUnlearning(**PARTS, every_n_steps=1)
    with pytest.raises(ValueError, match="it is broken"):
        fit(module, evaluation, Break(), loader=make_loader())
    assert module.training and all(part.training for part in module.modules())
    assert "log" not in vars(module) and evaluation.before is not None and evaluation.after is None
    assert module.trainer.callbacks and evaluation in module.trainer.callbacks


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"

    class Save(Checkpoint):  # which comes behind the evaluation
        @override
        def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(path)

    whole, rest = EvaluateUnlearning(**PARTS), EvaluateUnlearning(**PARTS)
    loader = DataLoader(KEEP, batch_size=16)
    module = trained_on(TRAIN, 60)
    fit(module, whole, Save(), loader=loader, enable_checkpointing=True)
    assert whole.samples is not None
    fit(build(Base), rest, Save(), loader=loader, enable_checkpointing=True, ckpt_path=path)
    assert rest.history == whole.history and rest.samples is not None
    assert torch.equal(rest.samples.loss_before, whole.samples.loss_before)
    assert torch.equal(rest.samples.loss_after, whole.samples.loss_after)
    assert "before" in torch.load(path, weights_only=True)["callbacks"]["EvaluateUnlearning"]
    assert "before" not in rest.state_dict()


def test_references_are_measured_beside() -> None:
    other = trained_on(make_data(96, seed=4), 60)
    given = EvaluateUnlearning(**PARTS, references=[other, evaluate(other, PARTS)], max_batches=1)
    module = trained_on(TRAIN, 60)
    trainer, _ = fit(module, given, loader=make_loader())
    after, theirs = evaluate(module, PARTS), evaluate(other, PARTS)
    expected = after.distances([theirs, theirs])
    for name in ("js", "kl", "agreement", "ks"):
        assert float(trainer.callback_metrics[f"eval/{name}"]) == pytest.approx(expected[name].value, abs=1e-6)
    ours, its = after.numbers(), theirs.numbers()
    gaps = [1 - abs(ours[name].value - its[name].value) for name in ("FA", "RA", "auc")]
    assert given.history[-1][1]["score"] == pytest.approx(math.prod(gaps))
    assert given.left_out == {"TA": "no such data was given"}


def test_loggers_get_the_numbers(tmp_path: Path) -> None:
    evaluation = EvaluateUnlearning(**PARTS)
    trainer, _ = fit(trained_on(TRAIN, 60), evaluation, loader=make_loader(), logger=CSVLogger(tmp_path))
    with Path(str(trainer.log_dir), "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["eval/RA"]]
    assert [int(row["step"]) for row in rows] == [0, 5, 10, 10]
    assert float(rows[-1]["eval/auc"]) == pytest.approx(evaluation.history[-1][1]["auc"])


def measure_on_ranks(rank: int, processes: int) -> Any:
    module = trained_on(TRAIN, 20, WithBatchNorm)
    sampler = DistributedSampler(KEEP, shuffle=False) if processes > 1 else None
    loader = DataLoader(KEEP, batch_size=8 // processes, sampler=sampler)
    strategy = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": processes} if processes > 1 else {}
    evaluation = EvaluateUnlearning(forget=GO, holdout=DataLoader(HOLDOUT, batch_size=7), every_n_steps=3)
    trainer, _ = fit(module, evaluation, loader=loader, **strategy)
    assert evaluation.after is not None
    again = evaluate(module, {"retain": KEEP, "forget": GO, "holdout": HOLDOUT})
    own = {name: x.value for name, x in again.numbers().items() if x.is_defined}
    return evaluation.history, len(evaluation.after.parts["retain"]), own


def test_processes_take_the_numbers_of_the_whole_set() -> None:
    (history, n, own), (other, n_other, _) = run_ranks(measure_on_ranks, 2, 2)
    assert history == other and n == n_other == len(KEEP)
    # The first process measured its module: that is what one process would have said of these weights.
    assert {name: history[-1][1][name] for name in own} == pytest.approx(own, abs=1e-6)
    (alone, _, _) = measure_on_ranks(0, 1)
    assert [step for step, _ in alone] == [step for step, _ in history]
    assert alone[0][1] == pytest.approx(history[0][1], abs=1e-9)


def test_held_out_samples_of_other_classes_give_no_score() -> None:
    gone = TensorDataset(GO[:][0], torch.full((20,), 2))  # type: ignore[misc]
    held_out = TensorDataset(HOLDOUT.tensors[0], torch.zeros(60, dtype=torch.long))
    evaluation = EvaluateUnlearning(retain=KEEP, forget=gone, holdout=held_out)
    trainer, _ = fit(build(Base), evaluation, loader=make_loader())
    assert math.isnan(float(trainer.callback_metrics["eval/score"])) and "score" not in evaluation.history[-1][1]
    assert evaluation.left_out == {"auc": "no held-out sample is of the forgotten classes"}


class Augments(Base):
    """Augments on the device, in training only, and writes to a logger of its own accord."""

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (3 * batch[0], batch[1]) if self.trainer.training else batch

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for logger in self.trainer.loggers:
            logger.log_metrics({"own": 1.0}, step=self.global_step)
        return super().training_step(batch, batch_idx)


def test_what_is_for_training_alone_is_left_out(tmp_path: Path) -> None:
    module, logger = build(Augments), CSVLogger(tmp_path)
    evaluation = EvaluateUnlearning(**PARTS, every_n_steps=1)
    fit(module, evaluation, loader=make_loader(), logger=logger)
    plain = build(Base)
    plain.load_state_dict(module.state_dict())
    expected = evaluate(plain, PARTS)
    assert evaluation.after is not None
    assert all(torch.equal(evaluation.after.parts[n].losses, expected.parts[n].losses) for n in PARTS)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        assert sum(bool(row["own"]) for row in csv.DictReader(file)) == 10  # one for each training step


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_it_measures_in_the_precision_of_the_fit(precision: Any) -> None:
    module = build(Base)
    evaluation = EvaluateUnlearning(**PARTS)
    fit(module, evaluation, loader=make_loader(), precision=precision)
    x, y = GO[:]  # type: ignore[misc]
    dtype = torch.float64 if precision == "64-true" else torch.float32
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        logits = module(x.to(dtype)).double()
    assert evaluation.after is not None
    losses = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    assert torch.allclose(evaluation.after.parts["forget"].losses, losses, atol=1e-12, rtol=0)
    assert all(p.dtype == dtype for p in module.parameters())


def test_different_transforms_are_told_in_a_fit() -> None:
    with pytest.warns(UserWarning, match="forget set and the holdout data go through different transforms"):
        fit(build(Base), EvaluateUnlearning(forget=Noisy(abs), holdout=Noisy(round)), loader=make_loader())
