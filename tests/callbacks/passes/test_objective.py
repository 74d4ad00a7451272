"""Objectives in the place of the module's own loss, in a fit."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, logsigmoid
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, HAMUOptimizer
from hamu_lightning.callbacks import ByObjective, PassOptions, StopReason
from hamu_lightning.callbacks.passes import wrap_step
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives import (
    NPO,
    CachedLogits,
    CrossEntropy,
    LossCap,
    ModuleLoss,
    Objective,
    RandomLabels,
    ReferenceKL,
    UniformLabels,
    WeightedSum,
)
from hamu_lightning.rules import FineTune, FixedRadius, RelativeRadius, TargetQuota
from tests.callbacks.modules import Base, EditsItsBatch, WithAverage, WithBatchNorm, WithDropout, build, fit, make_data
from tests.callbacks.passes.test_invariants import GradientsAreEqual, SameRandomState
from tests.callbacks.test_distributed import to_tensor, train
from tests.distributed import run_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:The number of training batches", "ignore:Be aware that when using `ckpt_path`"
)
RULE = HAMUQ(0.02, radius=FixedRadius(0.05))


def scrub() -> Objective:
    return WeightedSum((0.5, ReferenceKL()), (2.0, CrossEntropy()))


def forget_loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(make_data(40, seed=9), batch_size=16, **settings)


def assert_same_weights(one: Base, other: Base) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("kind", [Base, WithBatchNorm, WithDropout])
def test_the_modules_own_loss_changes_nothing(kind: type[Base]) -> None:
    plain, given = build(kind), build(kind)
    _, expected = fit(plain, HAMUCallback(forget_loader(), RULE))
    _, found = fit(given, HAMUCallback(forget_loader(), RULE, objective=ModuleLoss(), retain_objective=ModuleLoss()))
    assert_same_weights(plain, given)
    assert found.values == expected.values
    step = object()
    assert wrap_step(step, None, None) is step is wrap_step(step, ModuleLoss(), None)  # type: ignore[arg-type, comparison-overlap]


def test_a_loop_in_plain_pytorch_does_the_same() -> None:
    """The gradients of both objectives reach the weights: two epochs against losses that are written out here."""
    module, data = build(Base), make_data()
    twin = build(Base)
    callback = HAMUCallback(forget_loader(), RULE, objective=NPO(0.7), retain_objective=scrub())
    fit(module, callback, loader=DataLoader(data, batch_size=16), precision="64-true")

    twin, reference = twin.double(), copy.deepcopy(twin).double()
    optimizer = HAMUOptimizer(torch.optim.SGD(twin.parameters(), lr=0.05), RULE)
    forget = [batch for _ in range(6) for batch in forget_loader()][:12]
    for (x, y), (u, v) in zip([*DataLoader(data, batch_size=16)] * 2, forget, strict=True):
        optimizer.zero_grad()
        with optimizer.forget():
            rows = torch.arange(len(v))
            log_p = twin(u.double()).log_softmax(1)[rows, v]
            log_ref = reference(u.double()).log_softmax(1)[rows, v].detach()
            (2 / 0.7 * logsigmoid(-0.7 * (log_p - log_ref))).mean().backward()
        with optimizer.retain():
            logits, known = twin(x.double()), reference(x.double()).log_softmax(1).detach()
            kl = kl_div(logits.log_softmax(1), known, reduction="batchmean", log_target=True)
            (0.5 * kl + 2.0 * cross_entropy(logits, y)).backward()
        optimizer.step()
    assert callback.combined_steps == 12
    for weight, expected in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, atol=1e-8, rtol=0)  # float64; 12 steps of rounding


@pytest.mark.parametrize("kind", [Base, WithBatchNorm, WithDropout, EditsItsBatch, WithAverage])
def test_the_forget_objective_leaves_no_trace(kind: type[Base]) -> None:
    """I1, with reference, random targets and a step of the module's inside the objective."""
    plain, paired = build(kind), build(kind)
    _, expected = fit(plain, accumulate_grad_batches=4)
    objective = WeightedSum((1.0, NPO()), (1.0, RandomLabels()), (1.0, ModuleLoss()))
    callback = HAMUCallback(
        forget_loader(shuffle=True), FineTune(), passes=PassOptions(batchnorm="retain"), objective=objective
    )
    _, found = fit(paired, callback, accumulate_grad_batches=4)
    assert_same_weights(plain, paired)
    assert found.values == expected.values
    assert paired.__dict__.keys() == plain.__dict__.keys()


@pytest.mark.parametrize("kind", [Base, WithBatchNorm, WithDropout])
def test_gradients_cancel_on_the_same_batch(kind: type[Base], monkeypatch: pytest.MonkeyPatch) -> None:
    """I2, with the same objective on both streams."""
    monkeypatch.setattr("hamu_lightning.callbacks._group.RandomStream", SameRandomState)
    check, same = GradientsAreEqual(), list(DataLoader(make_data(), batch_size=16))
    callback = HAMUCallback(same, FineTune(), objective=scrub(), retain_objective=scrub())
    fit(build(kind), callback, check, loader=DataLoader(make_data(), batch_size=16))
    assert check.steps == callback.combined_steps > 0


class Counts(WithDropout):
    """Counts its training steps, and looks at the mode and the precision that it runs in."""

    steps = 0

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return super().training_step(batch, batch_idx)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"objective": NPO()}, 12),  # the module counts the retain stream alone: the forget pass leaves no trace
        ({"retain_objective": scrub()}, 0),
        ({"objective": NPO(), "retain_objective": WeightedSum((1.0, ReferenceKL()), (1.0, ModuleLoss()))}, 12),
    ],
)
def test_the_modules_step_runs_where_its_loss_is_asked_for(settings: dict[str, Any], steps: int) -> None:
    module = build(Counts)
    trainer, _ = fit(module, HAMUCallback(forget_loader(), RULE, **settings))
    assert module.steps == steps
    assert "training_step" not in vars(module)
    assert ("train_loss" in trainer.callback_metrics) == (steps > 0)
    assert ("forget/train_loss" in trainer.callback_metrics) == ("objective" not in settings)
    assert {"forget/loss", "retain/loss", "hamu/kappa"} <= trainer.callback_metrics.keys()
    if "objective" in settings:
        assert trainer.callback_metrics["forget/loss"] <= 0


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_objectives_run_in_the_precision_and_mode_of_the_step(precision: str, dtype: torch.dtype) -> None:
    seen: list[tuple[torch.dtype, bool, bool]] = []

    def outputs(module: Any, batch: Any) -> Any:
        logits = module(batch[0])
        seen.append((logits.dtype, module.training, module.net[1].training))
        return logits, batch[1]

    module = build(WithBatchNorm)
    callback = HAMUCallback(forget_loader(), RULE, objective=NPO(outputs=outputs), retain_objective=ReferenceKL())
    fit(module, callback, precision=precision)
    # The module itself is in training mode with its BatchNorm frozen, the reference in evaluation mode.
    assert seen == [(dtype, True, False), (dtype, False, False)] * 12
    assert all(weight.dtype == torch.float32 for weight in module.parameters())


def resume_objectives() -> dict[str, Objective]:
    return {
        "objective": WeightedSum((1.0, NPO()), (0.3, RandomLabels(seed=2))),
        "retain_objective": scrub(),
    }


class SavesEach(Callback):
    """Saves a checkpoint at the end of each epoch, as ModelCheckpoint does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch + 1}.ckpt")


def resume(kind: type[Base], folder: Path, checkpoint: Path | None = None, epochs: int = 3) -> Base:
    module = build(kind)
    callback = HAMUCallback(forget_loader(shuffle=True), RULE, **resume_objectives())  # type: ignore[arg-type]
    loader = DataLoader(make_data(), batch_size=16)
    trainer, _ = fit(module, callback, SavesEach(folder), max_epochs=epochs, ckpt_path=checkpoint, loader=loader)
    trainer.save_checkpoint(folder / "after.ckpt")
    return module


@pytest.mark.parametrize("kind", [Base, WithBatchNorm])
def test_a_resumed_run_is_the_whole_run(kind: type[Base], tmp_path: Path) -> None:
    whole = resume(kind, tmp_path)
    saved = torch.load(tmp_path / "1.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == whole.state_dict().keys()
    kept = saved["callbacks"]["HAMUCallback"]["objectives"]["forget"]["0"]["reference"]["weights"]
    torch.testing.assert_close(kept, dict(build(kind).state_dict()), atol=0, rtol=0)
    assert_same_weights(resume(kind, tmp_path, tmp_path / "1.ckpt"), whole)


def test_a_fit_that_has_ended_keeps_no_reference(tmp_path: Path) -> None:
    """Neither its last checkpoint, nor one that is saved afterwards; what would need it says so."""
    resume(Base, tmp_path)
    for name in ("3.ckpt", "after.ckpt"):
        state = torch.load(tmp_path / name, weights_only=True)["callbacks"]["HAMUCallback"]["objectives"]
        released = {"0": {"reference": {"released": True}}}
        assert state == {"forget": released, "retain": released}
        with pytest.raises(HAMUStateError, match="goes on with a fit that had ended, and such a one keeps none"):
            resume(Base, tmp_path, tmp_path / name, epochs=4)


def test_stored_logits_do_as_well_as_a_second_model(tmp_path: Path) -> None:
    live, stored, retain = build(Base), build(Base), DataLoader(make_data(), batch_size=16)
    fit(live, HAMUCallback(forget_loader(), RULE, objective=NPO(), retain_objective=scrub()), loader=retain)
    cache = CachedLogits(tmp_path).fill(stored, forget_loader()).fill(stored, retain)
    kept = WeightedSum((0.5, ReferenceKL(cache)), (2.0, CrossEntropy()))
    callback = HAMUCallback(forget_loader(), RULE, objective=NPO(reference=cache), retain_objective=kept)
    fit(stored, callback, loader=retain)
    assert_same_weights(live, stored)
    assert callback.state_dict()["objectives"] == {"forget": {}, "retain": {}}


def test_a_new_callback_takes_a_new_reference(tmp_path: Path) -> None:
    """And the same objective, used for another module, forgets the first one."""
    objective = NPO()
    for seed in (1, 2):
        module = build(Base, seed=seed)
        before = copy.deepcopy(module.state_dict())
        callback = HAMUCallback(forget_loader(), RULE, objective=objective)
        clone = copy.deepcopy(callback)
        saver = SavesEach(tmp_path)
        fit(module, callback, saver, max_epochs=2)
        saved = torch.load(tmp_path / "1.ckpt", weights_only=True)["callbacks"]["HAMUCallback"]["objectives"]["forget"]
        found = saved["reference"]["weights"]
        assert all(torch.equal(found[name], value) for name, value in before.items())
        assert clone.settings.objective.state_dict() == {} or seed == 2  # type: ignore[union-attr]
        assert objective.state_dict() == {"reference": {"released": True}}


def test_steps_are_verified_in_the_objectives_units() -> None:
    class Look(Callback):
        outcomes: list[Any] = []

        @override
        def on_train_batch_end(self, *_: Any) -> None:
            assert callback._fit is not None and callback._fit.parts.verifier is not None
            self.outcomes.append(callback._fit.parts.verifier.outcome)

    callback = HAMUCallback(
        forget_loader(), HAMUQ(0.01, radius=FixedRadius(0.01)), objective=NPO(), retain_objective=scrub(), verify=True
    )
    fit(build(Base), callback, Look())
    first = Look.outcomes[0]
    retain, forget = first.groups["retain"], first.groups["forget"]
    # At the reference NPO is -2 / beta log 2, whatever the batch.
    assert forget.loss == pytest.approx(-20 * math.log(2), rel=1e-6)  # float32
    assert all(outcome.is_kept(0.5) for outcome in Look.outcomes)
    # Over so short a step the measured change is the promised one, up to second order and float32.
    assert forget.measured == pytest.approx(forget.promised, rel=0.1)
    assert retain.measured == pytest.approx(retain.promised, rel=0.1, abs=1e-4)


def test_preflight_measures_the_objectives() -> None:
    def run(preflight: bool) -> tuple[Base, HAMUCallback]:
        module = build(WithBatchNorm)
        objectives = {"objective": NPO(), "retain_objective": scrub()}
        callback = HAMUCallback(forget_loader(), RULE, preflight=preflight, **objectives)  # type: ignore[arg-type]
        fit(module, callback)
        return module, callback

    module, callback = run(True)
    assert callback.preflight_report is not None
    assert callback.preflight_report.estimates["forget_loss"].mean == pytest.approx(-20 * math.log(2), rel=1e-6)
    assert_same_weights(module, run(False)[0])


def test_a_target_is_reached_by_an_objective_that_can() -> None:
    module = build(Base)
    fit(module, max_epochs=20)
    rule = HAMUQ(TargetQuota(1.3), radius=RelativeRadius(1e-2))
    callback = HAMUCallback(forget_loader(), rule, objective=LossCap(CrossEntropy(), 3.0))
    fit(module, callback, max_epochs=30)
    assert callback.stop_reason == StopReason.TARGET_REACHED


def test_none_from_the_module_is_an_error_inside_a_sum() -> None:
    class ReturnsNone(Base):
        @override
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None

    objective = WeightedSum((1.0, ModuleLoss()), (1.0, CrossEntropy()))
    with pytest.raises(
        HAMUStateError, match="Expected the module's `training_step` to return a loss for this objective"
    ):
        fit(build(ReturnsNone), HAMUCallback(forget_loader(), RULE, objective=objective))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "npo"}, "Expected `objective` to be one of hamu_lightning.objectives, .* but got 'npo'"),
        ({"retain_objective": 1.0}, "Expected `retain_objective` to be one of hamu_lightning.objectives"),
        ({"retain_objective": NPO()}, "Expected `retain_objective` to be something to lower .* but got NPO"),
        ({"retain_objective": WeightedSum((1.0, UniformLabels()))}, "but got WeightedSum"),
        ({"retain_objective": LossCap(NPO(), 1.0)}, "but got LossCap"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        HAMUCallback(forget_loader(), RULE, **settings)


def test_a_target_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="Expected an objective of at least 0 with a target .* NPO"):
        fit(build(Base), HAMUCallback(forget_loader(), target=ByObjective(1.0), objective=NPO()))


OBJECTIVES = {"objective": NPO(0.7), "retain_objective": scrub()}


def run_rank(rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return train(2, callback=OBJECTIVES)


def test_two_processes_are_one_on_the_joint_batch() -> None:
    """The hooks of DDP fire: 20 steps in float64, where only the order of sums differs."""
    first, second = run_ranks(run_rank, 2, timeout=300)
    assert first["weights"] == second["weights"]
    expected = train(1, callback=OBJECTIVES)
    torch.testing.assert_close(to_tensor(first["weights"]), to_tensor(expected["weights"]), rtol=0, atol=1e-9)
    assert first["steps"] == expected["steps"] == 20
