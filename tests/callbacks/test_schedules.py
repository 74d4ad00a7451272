"""Base optimizers, and schedulers on the base and on the wrapper: learning rates are those of a plain fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, HAMUOptimizer
from hamu_lightning.callbacks import PassOptions, StepOptions
from hamu_lightning.rules import FineTune, FixedRadius, LearningRateRadius, Rule
from tests.callbacks.modules import OPTIMIZERS, Base, build, fit, make_data
from tests.callbacks.test_clipping import gradients
from tests.callbacks.test_precision import Explodes

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The base optimizer [A-Za-z]+ has"),
]
RULE = HAMUQ(1e-4, radius=LearningRateRadius())


def from_zero(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: min(1.0, step / 4))


# For each the scheduler, and how Lightning is to use it.
SCHEDULES: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "step": (lambda o: ExponentialLR(o, 0.8), {"interval": "step"}),
    "every 2nd step": (lambda o: CosineAnnealingLR(o, 20), {"interval": "step", "frequency": 2}),
    "epoch": (lambda o: StepLR(o, 1, gamma=0.1), {"interval": "epoch"}),
    "one cycle": (lambda o: OneCycleLR(o, 0.1, total_steps=25), {"interval": "step"}),
    "linear": (lambda o: LinearLR(o, 1e-3, total_iters=4), {"interval": "step"}),
    "from zero": (from_zero, {"interval": "step"}),
    "plateau": (lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.5), {"monitor": "train_loss_epoch"}),
    "plateau per step": (
        lambda o: ReduceLROnPlateau(o, patience=0, threshold=0.1),
        {"monitor": "train_loss_step", "interval": "step"},
    ),
}


class Scheduled(Base):
    """Logs what its scheduler does. With a rule it wraps its optimizer itself, and schedules the wrapper."""

    schedule = "step"
    rule: Rule | None = None

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        group = self.optimizers().param_groups[0]  # type: ignore[union-attr]
        self.log("lr", group["lr"])
        self.log("momentum", group["betas"][0] if "betas" in group else group["momentum"])
        return super().training_step(batch, batch_idx)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if self.rule is not None:
            optimizer = HAMUOptimizer(optimizer, self.rule)
        make, options = SCHEDULES[self.schedule]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), **options}}


class Steps(Callback):
    """Writes down what each combined step saw."""

    def __init__(self, hamu: HAMUCallback) -> None:
        self.hamu, self.seen = hamu, []  # type: ignore[var-annotated]

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        step = self.hamu.last_step
        if step is not None and all(step is not other for other in self.seen):
            self.seen.append(step)


def run(module: Scheduled, rule: Rule | None, schedule: str, **settings: Any) -> tuple[list[dict[str, float]], Steps]:
    """A fit with the callback, or a plain one."""
    wraps, module.schedule = settings.pop("wraps", False), schedule
    module.rule = rule if wraps else None
    callback = HAMUCallback(DataLoader(make_data(40, 9), batch_size=16), rule)
    steps = Steps(callback)
    callbacks = [] if rule is None else [callback, steps]
    _, recorder = fit(module, *callbacks, **settings)
    return recorder.values, steps


@cache
def run_plain(optimizer: str, schedule: str, **settings: Any) -> tuple[list[dict[str, float]], Scheduled]:
    """The fit without the callback, which is the same for several tests, and what it gave."""
    module = build(Scheduled, optimizer)
    values, _ = run(module, None, schedule, **settings)
    return values, module


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [*(("momentum", name) for name in SCHEDULES), ("adamw", "one cycle"), ("adamw", "plateau")],
)
@pytest.mark.parametrize(
    ("wraps", "settings"),
    [(False, {}), (True, {}), (False, {"accumulate_grad_batches": 3}), (True, {"precision": "16-mixed"})],
    ids=repr,
)
def test_i1_no_trace(schedule: str, optimizer: str, wraps: bool, settings: dict[str, Any]) -> None:
    """Learning rates, momentum and the loss of each batch are those of the plain fit, and so are the weights."""
    epochs = 3 if "plateau" in schedule else 2  # of which the last one begins with another learning rate
    expected, plain = run_plain(optimizer, schedule, max_epochs=epochs, **settings)
    paired = build(Scheduled, optimizer)
    values, _ = run(paired, FineTune(), schedule, wraps=wraps, max_epochs=epochs, **settings)
    assert values == expected
    # It did change something.
    assert len({value["lr"] for value in values}) > 1
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), paired.parameters(), strict=True))


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if "plateau" not in name])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("wraps", [False, True])
def test_the_radius_follows_the_schedule(schedule: str, optimizer: str, wraps: bool) -> None:
    """Also where the first steps are left out, at learning rate 0; schedulers do not warn of that (an error here)."""
    expected, _ = run_plain(optimizer, schedule)
    values, steps = run(build(Scheduled, optimizer), RULE, schedule, wraps=wraps)
    rates = [value["lr"] for value in values]
    assert rates == [value["lr"] for value in expected]
    is_zero = schedule == "from zero"
    assert (steps.hamu.combined_steps, steps.hamu.left_out_steps) == (12 - is_zero, is_zero)
    for rate, step in zip(rates[is_zero:], steps.seen, strict=True):
        norms = step.gramian[:, 0, 0].sqrt()
        torch.testing.assert_close(step.coefficients.radius, rate * norms, rtol=1e-6, atol=0)  # logged in float32


def test_every_second_step_from_zero_raises_no_false_alarm() -> None:
    """The first step is left out, and the second, a plain one, moves the weights before any combined step has."""
    module = build(Scheduled)
    module.schedule = "from zero"
    callback = HAMUCallback(DataLoader(make_data(40, 9), batch_size=16), RULE, passes=PassOptions(every_n_steps=2))
    fit(module, callback)
    assert (callback.combined_steps, callback.left_out_steps) == (5, 1)


def test_an_overflow_of_the_first_forget_gradient_is_no_skipped_step_to_schedulers() -> None:
    class Both(Explodes, Scheduled):
        pass

    module = build(Both, "adamw")
    module.bad = {8: (0,)}
    callback = HAMUCallback(DataLoader(make_data(40, 9), batch_size=8), RULE)
    fit(module, callback, precision="16-mixed")
    assert (callback.combined_steps, callback.left_out_steps) == (11, 1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_exact_steps_move_the_weights_by_d(optimizer: str) -> None:
    """With each base; the last of three steps, when there is a past to carry on."""
    forget, module = make_data(40, 9), build(Base, optimizer)
    before: list[Tensor] = []
    grads: list[list[Tensor]] = []

    class Look(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            before[:] = [p.detach().clone() for p in module.parameters()]
            grads[:] = [gradients(module, data) for data in (make_data(96), forget)]

    callback = HAMUCallback(
        DataLoader(forget, batch_size=40), HAMUQ(0.01, radius=FixedRadius(0.02)), steps=StepOptions(exact=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor is there anything to say about the base
        warnings.filterwarnings("ignore", "`isinstance|The 'train_dataloader'|The number of training|The retain loss")
        fit(module, callback, Look(), loader=DataLoader(make_data(96), batch_size=96), max_epochs=3)
    assert callback.last_step is not None
    values = callback.last_step.coefficients.values
    for old, new, c, r, f in zip(before, module.parameters(), values, *grads, strict=True):
        moved, asked = new.detach().double() - old.double(), c[0] * r.double() + c[1] * f.double()
        torch.testing.assert_close(moved, asked, rtol=1e-4, atol=1e-6)  # rounding of float32 weights and gradients


@pytest.mark.filterwarnings("default:The base optimizer")
@pytest.mark.parametrize("optimizer", ["momentum", "adamw, fused"])
def test_the_base_is_warned_about_once_in_each_fit(optimizer: str) -> None:
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            run(build(Scheduled, optimizer), RULE, "one cycle")
        (words,) = [str(w.message) for w in caught if "The base optimizer" in str(w.message)]
        assert "`exact=True`" in words and "`track_actual=True`" in words


def test_one_cycle_gives_plain_sgd_momentum() -> None:
    """It is then no plain SGD any more, and is warned about."""
    with pytest.warns(UserWarning, match=r"SGD has momentum=0\.95"):
        run(build(Scheduled, "sgd"), RULE, "one cycle")
