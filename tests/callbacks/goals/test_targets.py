"""Targets: measured without a trace, reached, and the run ends there."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from typing_extensions import override

from hamu_lightning import HAMUQ, Chance, HAMUCallback, Holdout, VerifySteps
from hamu_lightning.callbacks import StopReason
from hamu_lightning.callbacks.goals._targets import Target, count_classes
from hamu_lightning.callbacks.passes import ForgetPass
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.rules import FixedRadius, RelativeRadius, TargetQuota
from tests.callbacks.modules import Base, WithBatchNorm, WithDropout, build, fit, make_data, trained_on
from tests.distributed import run_ranks

FORGET, HELD_OUT = make_data(40, seed=9), make_data(30, seed=4)
RADIUS = RelativeRadius(0.02)


def loss_on(module: Base, data: Any) -> float:
    x, y = next(iter(DataLoader(data, batch_size=1000)))
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module(x), y))


def trained(kind: type[Base] = Base) -> Base:
    """With a loss on the data to forget well below that on held-out data."""
    return trained_on(FORGET, 60, kind)


def reach(module: Base, target: Any, preflight: bool = False, **options: Any) -> HAMUCallback:
    loader, rule = DataLoader(FORGET, batch_size=20, shuffle=True), HAMUQ(TargetQuota(target), radius=RADIUS)
    hamu = HAMUCallback(loader, rule, preflight=preflight)
    fit(module, hamu, **{"max_epochs": 20, **options})
    return hamu


@pytest.mark.parametrize(
    ("target", "level"),
    [
        (0.8, 0.8),
        (Chance(), math.log(3)),
        (Chance(2), math.log(2)),
        (lambda module: torch.tensor([0.7]), 0.7),
        (Holdout(HELD_OUT, every=5), None),
    ],
)
def test_the_run_ends_at_the_target(target: Any, level: float | None) -> None:
    module = trained()
    assert loss_on(module, FORGET) < 0.3
    hamu = reach(module, target)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert hamu.stop_message is not None and hamu.stop_message.startswith("forget loss")
    aim = loss_on(module, HELD_OUT) if level is None else level
    assert loss_on(module, FORGET) == pytest.approx(aim, rel=0.15)


def test_target_is_an_argument_of_its_own() -> None:
    hamu = HAMUCallback(FORGET, target=Chance())
    assert hamu.settings.rule == HAMUQ(TargetQuota(Chance()), radius=RelativeRadius(2e-3), blocks="global")
    with pytest.raises(HAMUValueError, match="Expected `target` or `rule`, but got both"):
        HAMUCallback(FORGET, HAMUQ(0.1), target=1.0)


@pytest.mark.parametrize("kind", [WithBatchNorm, WithDropout])
def test_measuring_leaves_no_trace(kind: type[Base]) -> None:
    """With the target known and with the target measured, at the same value, the run is the same."""

    def run(target: Any) -> tuple[list[Tensor], Any]:
        module = trained(kind)
        hamu = HAMUCallback(DataLoader(FORGET, 20, shuffle=True), HAMUQ(TargetQuota(target), radius=FixedRadius(0.01)))
        _, recorder = fit(module, hamu)
        return [*module.parameters(), *module.buffers()], recorder.values

    class Constant(Holdout):
        @override
        def measure(self, module: Any, mean_loss: Any, batch: Any) -> Any:
            super().measure(module, mean_loss, batch)
            module(batch[0])
            return 50.0

    with pytest.warns(UserWarning, match="The fit has ended before the target"):
        (expected, values), (measured, others) = run(50.0), run(Constant(HELD_OUT, every=1))
    assert all(torch.equal(a, b) for a, b in zip(expected, measured, strict=True))
    assert values == others


def test_held_out_loss_is_the_mean_over_samples() -> None:
    """In batches of unequal size, for a list of batches that the module edits, and again as the model changes."""
    module, seen = trained(), []

    class Spy(Holdout):
        @override
        def measure(self, module: Any, mean_loss: Any, batch: Any) -> Any:
            seen.append((float(super().measure(module, mean_loss, batch)), loss_on(module, HELD_OUT)))
            return 50.0

    batches = [*DataLoader(HELD_OUT, batch_size=7)]
    with pytest.warns(UserWarning, match="The fit has ended before the target"):
        reach(module, Spy(batches, every=3), max_epochs=2)
    assert len(seen) == 4 and len({level for level, _ in seen}) == 4
    for level, expected in seen:
        assert level == pytest.approx(expected, rel=1e-6)  # float32


@pytest.mark.parametrize(
    ("output", "classes"),
    [
        (torch.zeros(5, 7), 7),
        (torch.zeros(5, 4, 9, 9), 4),
        (torch.zeros(5, 1), 2),
        (type("Output", (), {"logits": torch.zeros(2, 6, 50)})(), 50),
    ],
)
def test_classes_are_counted_in_the_output(output: Any, classes: int) -> None:
    module = nn.Module()
    module.forward = lambda *_, **__: output
    for batch in ((torch.zeros(5), None), torch.zeros(5), {"x": torch.zeros(5)}):
        assert count_classes(module, batch) == classes


@pytest.mark.parametrize("output", [torch.zeros(5), torch.zeros(5, 3, dtype=torch.long), "logits"])
def test_classes_that_cannot_be_counted(output: Any) -> None:
    module = nn.Module()
    module.forward = lambda *_: output
    with pytest.raises(HAMUStateError, match="Pass Chance\\(num_classes=...\\)"):
        count_classes(module, (torch.zeros(5), None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HAMUCallback(FORGET, target="low"), "Expected `target` to be a finite loss, Holdout"),
        (lambda: HAMUCallback(FORGET, target=math.inf), "Expected `target` to be a finite loss"),
        (lambda: Holdout([]), "Expected held-out data .* but the list is empty"),
        (lambda: Holdout(HELD_OUT, every=0), "Expected `every` to be at least 1"),
        (lambda: Chance(1), "Expected `num_classes` to be at least 2"),
    ],
)
def test_what_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda module: math.nan, "to be a finite number before the first step, but got nan"),
        (lambda module: torch.zeros(2), "to be one number, but got"),
        (Holdout(iter(())), "but it has no batch"),
    ],
)
def test_a_level_must_be_a_number(target: Any, message: str) -> None:
    with pytest.raises(HAMUStateError, match=message):
        reach(trained(), target)


def test_a_model_that_is_lost_ends_the_fit() -> None:
    levels = iter([50.0, math.nan])

    class Breaks(Holdout):
        @override
        def measure(self, module: Any, mean_loss: Any, batch: Any) -> Any:
            return next(levels)

    hamu = reach(trained(), Breaks(HELD_OUT, every=3))
    assert hamu.stop_reason is StopReason.NOT_FINITE and hamu.combined_steps == 3
    assert "for a target of nan" in (hamu.stop_message or "")


def test_a_fit_without_an_end_is_refused() -> None:
    with pytest.raises(Exception, match="neither `max_steps` nor `max_epochs`"):
        reach(trained(), 0.5, max_epochs=-1)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (TargetQuota(0.9, steps=100), "in 100 combined steps, but the fit has only 12"),
        (TargetQuota(0.001), "before the first step, and the target only 0.001: there is nothing to forget"),
        (TargetQuota(Holdout(Subset(FORGET, range(35, 40)))), "share 5 samples of one Dataset"),
    ],
)
def test_warnings_name_numbers(target: TargetQuota, message: str) -> None:
    hamu = HAMUCallback(FORGET, HAMUQ(target, radius=RADIUS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(trained(), hamu)
    assert any(message in str(warning.message) for warning in caught)


def test_held_out_data_that_is_trained_on_is_noticed() -> None:
    data = make_data()
    hamu = HAMUCallback(FORGET, target=Holdout(Subset(data, range(90, 96))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(trained(), hamu, loader=DataLoader(data, batch_size=16), max_steps=1)
    message = "the training data share 6 samples of one Dataset: the target is lower"
    assert any(message in str(warning.message) for warning in caught)


def test_preflight_knows_the_target() -> None:
    hamu = reach(trained(), Chance(), preflight=True)
    report = hamu.preflight_report
    assert report is not None and report.target == pytest.approx(math.log(3))
    estimates = {name: estimate.mean for name, estimate in report.estimates.items()}
    steps = (report.target - estimates["forget_loss"]) / estimates["forget_improvement"]
    assert estimates["steps_to_target"] == pytest.approx(steps, rel=0.05)  # a mean of ratios, a ratio of means


def reach_on_ranks(rank: int) -> tuple[float, StopReason | None, int]:
    from lightning.pytorch.strategies import DDPStrategy

    warnings.simplefilter("ignore")
    module = trained()
    strategy = DDPStrategy(process_group_backend="gloo")
    hamu = reach(module, Holdout(HELD_OUT), strategy=strategy, devices=2, use_distributed_sampler=True)
    return float(sum(p.detach().double().sum() for p in module.parameters())), hamu.stop_reason, hamu.combined_steps


def test_processes_end_together() -> None:
    first, second = run_ranks(reach_on_ranks, 2)
    assert first == second
    assert first[1] is StopReason.TARGET_REACHED


class Moves(Target):
    """Follows the model, which has moved since it was measured."""

    every, calls = 50, 0

    @override
    def measure(self, *_: Any) -> float:
        self.calls += 1
        return 0.5 if self.calls == 1 else 0.9


def test_a_target_that_follows_the_model_is_measured_again_before_it_is_believed() -> None:
    module = trained()
    hamu = reach(module, Moves())
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert loss_on(module, FORGET) >= 0.95 * 0.9 and "for a target of 0.9" in (hamu.stop_message or "")


def test_the_model_that_is_kept_is_the_one_that_was_measured() -> None:
    """No step is applied once the target is reached."""
    module = trained()
    hamu = reach(module, 0.8)
    assert hamu.stop_message is not None
    assert f"forget loss {loss_on(module, FORGET):.3g}"[:-1] in hamu.stop_message


@pytest.mark.parametrize(
    ("verify", "levels", "kept", "region"),
    [
        (True, [0.5, 0.8, 1.3, 0.97], None, 0.5),  # too far: taken back, and on with half the region
        (False, [0.5, 0.8, 1.3], 1, None),  # the start of the last step was nearer
        (False, [0.5, 0.8, 1.1], None, None),  # its end was nearer
        (False, [0.5, 0.93, 1.09], None, None),  # nearer, but short of the target
        (True, [0.5, 0.93, 1.09], None, None),
    ],
)
def test_landing(
    verify: bool, levels: list[float], kept: int | None, region: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The levels that are measured before each step are given; the target is 1."""
    given, weights = iter(levels), []

    def measure(self: Any, *_: Any) -> Tensor:
        weights.append([p.detach().clone() for p in module.parameters()])
        return torch.tensor(next(given), dtype=torch.float64)

    module = build(Base)
    monkeypatch.setattr(ForgetPass, "measure", measure)
    monkeypatch.setattr("hamu_lightning.callbacks.goals._forget_level.MEASURE_EVERY", 1)
    rule = HAMUQ(TargetQuota(1.0), radius=FixedRadius(1e-3))
    settings = VerifySteps(tolerance=0.0, grow=1.0) if verify else False
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=40), rule, verify=settings)
    fit(module, hamu)
    assert hamu.stop_reason is (StopReason.TARGET_REACHED if kept is None else StopReason.LANDED_SHORT)
    expected = weights[-1 if kept is None else kept]
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), expected, strict=True))
    assert ("short of it" in (hamu.stop_message or "")) is (kept is not None)
    if region is not None:
        assert hamu.state_dict()["verifier"]["region"] == region
        # Taken back before the pass of the step that came too far: the next measurement is one step from there.
        step = sum(float((a - b).square().sum()) for a, b in zip(weights[3], weights[1], strict=True)) ** 0.5
        assert step == pytest.approx(2 * 0.5e-3, rel=0.05)  # four tensors, at half the radius
