"""The guard over the retain data: what is out of bounds, the way back, the smaller region, the end in words."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, RetainGuard, VerifySteps
from hamu_lightning.callbacks import RetainAbove, StepOptions, StopReason
from hamu_lightning.callbacks.goals import Approach
from hamu_lightning.callbacks.goals._retain_guard import Reading
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.rules import FixedRadius, TargetQuota
from tests.callbacks.goals.test_way_back import train as train_and_save
from tests.callbacks.modules import Base, build, fit, make_data
from tests.callbacks.test_checkpoints import assert_same, end_of
from tests.callbacks.test_model_parallel import Sharded
from tests.distributed import run_ranks

pytestmark = pytest.mark.filterwarnings(
    "ignore:The base optimizer", "ignore:The fit has ended before the target", "ignore:The dirpath has changed"
)
FORGET, RETAIN = make_data(40, seed=9), make_data(96)
HARMFUL = HAMUQ(0.3, radius=FixedRadius(0.3))
GENTLE = HAMUQ(1e-3, radius=FixedRadius(1e-3))
# Of the loss alone, and often: what these small runs are about.
GUARD = RetainGuard(accuracy=1.0, factor=1.0, rise=0.05, every=2, max_returns=3)


def loss_on(module: Base, data: Any = RETAIN) -> float:
    x, y = data.tensors
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module(x), y))


class Spy(Callback):
    """Looks at the weights, the retain loss and the region after each step."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.losses: list[float] = []
        self.regions: list[float] = []

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_batch_end(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])
        self.losses.append(loss_on(pl_module))
        self.regions.append(trainer.optimizers[0].region)


def run(rule: Any = HARMFUL, guard: Any = GUARD, optimizer: str = "sgd", **options: Any) -> tuple[Base, Any, Spy]:
    settings = {name: options.pop(name) for name in ("verify", "stop_on", "steps") if name in options}
    module, spy = build(Base, optimizer), Spy()
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20, shuffle=True), rule, guard=guard, **settings)
    fit(module, hamu, spy, **{"max_epochs": -1, "max_steps": 12, **options})
    return module, hamu, spy


def watch_of(hamu: HAMUCallback) -> dict[str, Any]:
    found: dict[str, Any] = hamu.state_dict()["guard"]
    return found


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (Reading(0.12, 0.96), None),
        (Reading(0.1501, 0.96), "the retain loss rose from 0.1 to 0.1501 (allowed: 0.15)"),
        (Reading(math.nan, 0.96), "the retain loss rose from 0.1 to nan (allowed: 0.15)"),
        (Reading(0.1, 0.86), "the retain accuracy fell from 96.0 % to 86.0 % (allowed: 93.0 %)"),
        (Reading(0.1, 0.9301), None),  # on 100 samples: one point, and 2 sqrt(0.01 / 100) = 2 points
        (Reading(0.1, 0.92), "the retain accuracy fell from 96.0 % to 92.0 % (allowed: 93.0 %)"),
        (Reading(0.1, math.nan), None),
    ],
)
def test_what_is_out_of_bounds(now: Reading, words: str | None) -> None:
    assert RetainGuard().explain("retain", Reading(0.1, 0.96, 100), now) == words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accuracy": 1.5}, "Expected `accuracy` to be between 0 and 1"),
        ({"factor": 0.5}, "Expected `factor` to be at least 1"),
        ({"rise": -1.0}, "Expected `rise`"),
        ({"samples": 0}, "Expected `samples` to be at least 1"),
        ({"every": 0}, "Expected `every` to be at least 1"),
        ({"shrink": 1.0}, "Expected `shrink` to be between"),
        ({"max_returns": 0}, "Expected `max_returns` to be at least 1"),
        ({"holdout": 3}, "Expected `holdout` to be True or False"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        RetainGuard(**arguments)
    with pytest.raises(HAMUValueError, match=r"Expected `guard` to be RetainGuard"):
        HAMUCallback(FORGET, HARMFUL, guard="yes")  # type: ignore[arg-type]


def test_a_target_is_guarded_unless_told_not_to() -> None:
    assert HAMUCallback(FORGET, target=1.0).settings.guard == RetainGuard()
    assert HAMUCallback(FORGET, target=1.0, guard=False).settings.guard is None
    assert HAMUCallback(FORGET, HARMFUL).settings.guard is None
    assert HAMUCallback(FORGET, HARMFUL, guard=True).settings.guard == RetainGuard()


def test_without_it_the_run_does_harm() -> None:
    module, _, spy = run(guard=False)
    assert loss_on(module) > spy.losses[0] + 0.5


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "momentum"])
@pytest.mark.parametrize("verify", [False, VerifySteps(tolerance=0.0)])
def test_it_goes_back_on_with_a_smaller_region_and_ends(optimizer: str, verify: Any) -> None:
    guard = RetainGuard(accuracy=1.0, factor=1.0, rise=0.02, every=2, max_returns=3)
    module, hamu, spy = run(guard=guard, optimizer=optimizer, verify=verify, max_steps=40)
    assert loss_on(module) <= spy.losses[0] + 0.02 + 1e-6  # float32
    state = watch_of(hamu)
    assert (state["returns"], state["limit"]) == (3, 0.125)
    assert hamu.stop_reason is StopReason.RETAIN_GUARD and hamu.stop_message is not None
    assert "the retain loss rose from" in hamu.stop_message and "went back 3 times" in hamu.stop_message
    assert "went back 3 times, the trust region is at most 0.125 times the rule's" in (hamu.summary or "")
    # Where it ends is a place where it has looked, bit by bit.
    assert any(
        all(torch.equal(a, b) for a, b in zip(weights, module.parameters(), strict=True)) for weights in spy.weights
    )
    assert max(spy.regions) == 1.0 and spy.regions[-1] <= 0.125 * 2


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_in_the_smaller_region_are_shorter(optimizer: str) -> None:
    """Also where no step is verified: with another base than plain SGD its step is shortened."""
    lengths = []
    for limit in (1.0, 0.5):

        class Limits(Callback):
            @override
            def on_train_batch_start(self, trainer: Any, *_: Any, limit: float = limit) -> None:
                trainer.optimizers[0].region_limit = limit

        module = build(Base, optimizer)
        before = [p.detach().clone() for p in module.parameters()]
        rule = HAMUQ(1e-9, radius=FixedRadius(0.01))
        fit(module, Limits(), HAMUCallback(DataLoader(FORGET, batch_size=40), rule), max_steps=1)
        moved = [(p.detach() - b).norm() for p, b in zip(module.parameters(), before, strict=True)]
        lengths.append(float(torch.stack(moved).norm()))
    assert lengths[1] == pytest.approx(lengths[0] / 2, rel=1e-4)  # float32


def test_it_does_not_fire_and_leaves_no_trace_where_nothing_is_lost() -> None:
    (plain, *_), (module, hamu, _) = run(GENTLE, guard=False), run(GENTLE, guard=RetainGuard(every=2))
    assert watch_of(hamu)["returns"] == 0
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    assert "went back" not in (hamu.summary or "")


def test_a_target_that_has_cost_too_much_is_not_reached() -> None:
    """The third look is at the step that has reached it: the weights go back, and the fit does not end as reached."""
    rule = HAMUQ(TargetQuota(2.5, steps=4), radius=FixedRadius(2.0))
    reached = run(rule, guard=False)[1]
    assert reached.stop_reason is StopReason.TARGET_REACHED
    module, hamu, spy = run(rule, guard=RetainGuard(accuracy=1.0, factor=1.0, rise=0.05, every=100, max_returns=1))
    assert hamu.stop_reason is StopReason.RETAIN_GUARD
    assert all(torch.equal(a, b) for a, b in zip(spy.weights[0], module.parameters(), strict=True))


def test_the_forget_level_goes_back_with_the_weights() -> None:
    rule = HAMUQ(TargetQuota(4.0, steps=3), radius=FixedRadius(0.4))
    with pytest.warns(UserWarning, match="ended before the target") as caught:
        module, hamu, _ = run(rule, guard=GUARD, max_steps=3)
    assert watch_of(hamu)["returns"] > 0
    assert any(f"forget loss {loss_on(module, FORGET):.4g} for a target" in str(w.message) for w in caught)


def test_a_loss_that_is_not_finite_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = HAMUQ(TargetQuota(1e9, steps=3), radius=FixedRadius(1e30))
    module, hamu, spy = run(rule, guard=GUARD, max_steps=8)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert hamu.stop_reason is StopReason.RETAIN_GUARD
    assert loss_on(module) <= spy.losses[0] + 0.05


def test_ceilings_look_at_the_steps_after_the_return() -> None:
    """And go back to none of those before it."""
    module, hamu, spy = run(stop_on=[RetainAbove(spy_loss := 1.3, patience=2)], max_steps=12)
    assert hamu.stop_reason is not None
    assert loss_on(module) <= max(spy_loss, spy.losses[0] + 0.05) + 1e-6


def test_what_the_last_step_leaves_is_within_bounds_also_for_those_who_save_it(tmp_path: Path) -> None:
    module = build(Base)
    saving = ModelCheckpoint(tmp_path, "last", every_n_train_steps=5)
    hamu = HAMUCallback(DataLoader(FORGET, batch_size=20), HARMFUL, guard=RetainGuard(1.0, 1.0, 0.05, every=100))
    start = loss_on(module)
    fit(module, saving, hamu, max_epochs=-1, max_steps=5, enable_checkpointing=True)
    assert loss_on(module) == start
    saved = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)
    torch.testing.assert_close(saved["state_dict"], module.state_dict(), rtol=0, atol=0)
    assert not saved["callbacks"]["HAMUCallback"]["guard"]["kept"]
    assert hamu.stop_reason is None and "went back once" in (hamu.summary or "")


CASES: dict[str, dict[str, Any]] = {
    "sgd": {"arguments": {"rule": HARMFUL, "guard": GUARD}},
    "adamw, target": {
        "optimizer": "adamw",
        "arguments": {"rule": HAMUQ(TargetQuota(4.0), radius=FixedRadius(0.3)), "verify": True, "guard": GUARD},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_resumed_after_each_step(name: str, tmp_path: Path) -> None:
    trainer, hamu = train_and_save(tmp_path, CASES[name])
    whole = end_of(trainer, hamu)
    assert watch_of(hamu)["returns"] > 0
    checkpoints = {int(path.stem.split("=")[1]): path for path in tmp_path.glob("*.ckpt")}
    for step in range(1, whole["step"]):
        resumed = end_of(*train_and_save(tmp_path / str(step), CASES[name], checkpoints[step]))
        assert_same({**whole, "step": 14}, {**resumed, "step": 14 + resumed["step"] - whole["step"]})


def test_a_fit_that_goes_on_after_its_end_has_the_same_start(tmp_path: Path) -> None:
    """The bounds stay those of the whole run; how often it went back does not count on."""
    module, hamu, _ = run(max_steps=40)
    assert hamu.stop_reason is StopReason.RETAIN_GUARD
    state = copy.deepcopy(hamu.state_dict())
    again = HAMUCallback(DataLoader(FORGET, batch_size=20, shuffle=True), GENTLE, guard=GUARD)
    again.load_state_dict(state)
    fit(module, again, max_steps=2)
    assert watch_of(again)["start"] == watch_of(hamu)["start"]
    assert (watch_of(again)["returns"], watch_of(again)["limit"]) == (0, 1.0)


def guard_on_ranks(rank: int) -> list[Any]:
    """With the weights on each process, and with a part of them on each."""
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    warnings.simplefilter("ignore")
    found = []
    for kind, strategy in (
        (Base, DDPStrategy(process_group_backend="gloo")),
        (Sharded, ModelParallelStrategy(process_group_backend="gloo")),
    ):
        module = build(kind, "adamw")
        hamu = HAMUCallback(
            DataLoader(FORGET, batch_size=20), HARMFUL, guard=GUARD, verify=True, steps=StepOptions(exact=True)
        )
        fit(module, hamu, max_epochs=-1, max_steps=8, strategy=strategy, devices=2)
        state = watch_of(hamu)
        weights = [
            float(getattr(p, "full_tensor", lambda p=p: p)().detach().double().sum()) for p in module.parameters()
        ]
        found.append((weights, {name: state[name] for name in state if name != "kept"}))
    return found


def test_processes_decide_alike() -> None:
    first, second = run_ranks(guard_on_ranks, 2)
    assert first == second
    for weights, state in first:
        assert state["returns"] > 0
        assert all(map(math.isfinite, weights))


def test_where_the_approach_takes_the_last_step_back_it_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it has just looked, before that."""

    def land(self: Approach, *_: Any) -> None:
        with torch.no_grad():
            for parameter in self._optimizer.param_groups[0]["params"]:
                parameter.mul_(0.9)

    monkeypatch.setattr(Approach, "_land", land)
    guard = RetainGuard(accuracy=1.0, factor=100.0, every=1)
    module, hamu, _ = run(HAMUQ(TargetQuota(1.4, steps=4), radius=FixedRadius(0.5)), guard=guard)
    assert hamu.stop_reason is StopReason.TARGET_REACHED
    assert watch_of(hamu)["now"]["retain"][0] == pytest.approx(loss_on(module), rel=1e-5)  # float32
