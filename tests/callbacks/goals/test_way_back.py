"""The way back: weights that are kept, with the optimizer's state, in a process and in a checkpoint; and failures."""

from __future__ import annotations

import copy
import warnings
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, VerifySteps
from hamu_lightning.callbacks import ForgetAbove, PassOptions, RetainAbove
from hamu_lightning.callbacks.goals._kept_weights import KeptWeights
from hamu_lightning.optim import HAMUOptimizer, Snapshot
from hamu_lightning.rules import FixedRadius, RelativeQuota, TargetQuota
from tests.callbacks.modules import OPTIMIZERS, Base, build, fit, make_data
from tests.callbacks.test_checkpoints import ResumableLoader, assert_same, end_of, make_forget

pytestmark = pytest.mark.filterwarnings("ignore:The base optimizer", "ignore:The dirpath has changed")
FORGET = make_data(40, seed=9)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("is_saved", [False, True])
def test_the_state_goes_back_with_the_weights(optimizer: str, is_saved: bool, tmp_path: Path) -> None:
    """All but the numbers of schedulers; by a checkpoint too."""
    module = build(Base)
    rule = HAMUQ(0.01, radius=FixedRadius(0.1))
    hamu = HAMUOptimizer(OPTIMIZERS[optimizer](module.parameters()), rule)

    def step(seed: int) -> None:
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        hamu.base.step()

    step(0)
    before, kept = copy.deepcopy((module.state_dict(), hamu.state_dict())), KeptWeights(hamu)
    kept.keep()
    if is_saved:
        torch.save(kept.state_dict(), tmp_path / "kept")
        kept.release()
        assert not kept.state_dict()
    step(1)
    hamu.param_groups[0]["lr"] = 0.5
    if is_saved:
        kept.load_state_dict(torch.load(tmp_path / "kept", weights_only=True))
    kept.restore()
    assert hamu.param_groups[0]["lr"] == 0.5
    hamu.param_groups[0]["lr"] = before[1]["param_groups"][0]["lr"]
    torch.testing.assert_close((module.state_dict(), hamu.state_dict()), before, rtol=0, atol=0)


def test_frozen_weights_are_not_copied() -> None:
    """Neither by a checkpoint, nor by one of an earlier version, which held them."""
    module = build(Base)
    frozen, *trained = module.parameters()
    frozen.requires_grad_(False)
    hamu = HAMUOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), HAMUQ(0.01, radius=FixedRadius(0.1)))
    kept = KeptWeights(hamu)
    kept.keep()
    state = kept.state_dict()
    assert [w.shape for w in state["weights"]] == [p.shape for p in trained]
    before = copy.deepcopy(module.state_dict())
    earlier = {**state, "weights": [frozen + 1, *state["weights"]], "state": [{}, *state["state"]]}
    for saved in (state, earlier):
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1.0)
        kept.load_state_dict(saved)
        kept.restore()
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_one_copy_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old copy goes before the new one is made."""
    module = build(Base)
    hamu = HAMUOptimizer(torch.optim.SGD(module.parameters(), lr=0.1), HAMUQ(0.01, radius=FixedRadius(0.1)))
    kept = KeptWeights(hamu)
    kept.keep()
    held = weakref.ref(kept._kept.weights[0])  # type: ignore[union-attr]
    made = Snapshot.__init__

    def make(snapshot: Any, *args: Any) -> None:
        assert held() is None
        made(snapshot, *args)

    monkeypatch.setattr(Snapshot, "__init__", make)
    kept.keep()


def train(folder: Path, case: dict[str, Any], checkpoint: Path | None = None) -> tuple[Any, HAMUCallback]:
    module = build(Base, case.get("optimizer", "sgd"), seed=99 if checkpoint else 5)
    hamu = HAMUCallback(make_forget(), **case["arguments"])
    trainer = L.Trainer(
        max_steps=12,
        accelerator="cpu",
        devices=1,
        callbacks=[hamu, ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ResumableLoader(make_data(64), 8), ckpt_path=checkpoint, weights_only=True)
    return trainer, hamu


CASES: dict[str, dict[str, Any]] = {
    "ceiling of the retain loss": {
        "arguments": {
            "rule": HAMUQ(0.3, radius=FixedRadius(0.3)),
            "stop_on": [RetainAbove(1.35, patience=3)],
        }
    },
    "ceiling, momentum": {
        "optimizer": "momentum",
        "arguments": {"rule": HAMUQ(0.3, radius=FixedRadius(0.3)), "stop_on": [ForgetAbove(1.5, patience=1)]},
    },
    "landing": {"arguments": {"rule": HAMUQ(TargetQuota(1.9, steps=6), radius=FixedRadius(2.0)), "verify": True}},
    "landing, momentum": {
        "optimizer": "momentum",
        "arguments": {"rule": HAMUQ(TargetQuota(1.9, steps=6), radius=FixedRadius(0.4)), "verify": True},
    },
    "every second step": {
        "arguments": {
            "rule": HAMUQ(TargetQuota(9.0), radius=FixedRadius(0.05)),
            "passes": PassOptions(every_n_steps=2),
        }
    },
}


@pytest.mark.filterwarnings("ignore:The fit has ended before the target")
@pytest.mark.parametrize("name", CASES)
def test_resumed_after_each_step(name: str, tmp_path: Path) -> None:
    trainer, hamu = train(tmp_path, CASES[name])
    whole = end_of(trainer, hamu)
    if "second" not in name:
        assert hamu.stop_reason is not None
    checkpoints = {int(path.stem.split("=")[1]): path for path in tmp_path.glob("*.ckpt")}
    for step in range(1, whole["step"]):
        resumed = end_of(*train(tmp_path / str(step), CASES[name], checkpoints[step]))
        assert_same({**whole, "step": 14}, {**resumed, "step": 14 + resumed["step"] - whole["step"]})


def test_where_there_is_no_way_back_none_is_told_of() -> None:
    module = build(Base)
    before = [p.detach().clone() for p in module.parameters()]
    hamu = HAMUCallback(
        DataLoader(FORGET, batch_size=40), HAMUQ(0.1, radius=FixedRadius(0.1)), stop_on=[RetainAbove(0.01, patience=1)]
    )
    fit(module, hamu, max_steps=2)
    assert hamu.stop_message is not None and "the model stays as it is" in hamu.stop_message
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


PLACES = ["forget pass", "retain pass", "backward", "rule", "snapshot", "base", "replay", "judge", "ledger"]


class Faulty(Base):
    place, calls = "", 0

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        # In the third step: the forget pass, the retain pass, two replays of each (retain first).
        Faulty.calls += 1  # not on the module, which is put back after each pass
        if Faulty.calls == {"forget pass": 9, "retain pass": 10, "replay": 12}.get(self.place):
            raise KeyboardInterrupt
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("place", PLACES)
def test_a_failure_in_any_place_of_a_step_leaves_what_was_judged_last(
    place: str, optimizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights and the optimizer's state; what is saved after the exception holds them too."""
    states: list[Any] = []

    class Looks(L.Callback):
        @override
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            states.append(copy.deepcopy((pl_module.state_dict(), trainer.optimizers[0].state_dict())))

        @override
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "after.ckpt")

    def fail_third(function: Any, number: int = 3) -> Any:
        calls = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            result = function(*args, **kwargs)  # having done its work: half a step is the worst
            if calls == number:
                raise KeyboardInterrupt
            return result

        return run

    module = build(Faulty, optimizer)
    module.place, Faulty.calls = place, 0
    where: dict[str, tuple[str, int]] = {
        "backward": ("lightning.pytorch.LightningModule.backward", 6),
        "rule": ("hamu_lightning.rules.HAMUQ.coefficients", 3),
        "snapshot": ("hamu_lightning.optim._trial.Snapshot.__init__", 3),
        "base": (f"torch.optim.{'SGD' if optimizer == 'sgd' else 'AdamW'}.step", 3),
        "judge": ("hamu_lightning.callbacks.goals._promises.Outcome.is_kept", 3),
        "ledger": ("hamu_lightning.callbacks.goals._ledger.Ledger.write", 3),
    }
    hamu = HAMUCallback(
        DataLoader(FORGET, batch_size=20),
        HAMUQ(RelativeQuota(0.3), radius=FixedRadius(0.01)),
        verify=VerifySteps(tolerance=0.0, ledger=tmp_path / "ledger.csv"),
    )
    if place in where:
        path, number = where[place]
        owner, name = path.rsplit(".", 1)
        package, kind = owner.rsplit(".", 1)
        target = getattr(__import__(package, fromlist=[kind]), kind)
        monkeypatch.setattr(target, name, fail_third(getattr(target, name), number))
    with pytest.raises((KeyboardInterrupt, SystemExit)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(module, hamu, Looks(), max_epochs=1)
    assert len(states) == 2
    torch.testing.assert_close(module.state_dict(), states[1][0], rtol=0, atol=0)
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    torch.testing.assert_close(saved["state_dict"], states[1][0], rtol=0, atol=0)
    torch.testing.assert_close(saved["optimizer_states"][0], states[1][1], rtol=0, atol=0)
    assert hamu.combined_steps == 2
