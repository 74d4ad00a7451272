"""Several groups: what is logged, what is told at the end, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Subset, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback, preflight
from hamu_lightning.callbacks import HAMUMisconfigurationError, PassOptions, StepOptions, StopReason
from hamu_lightning.callbacks._prices import Prices
from hamu_lightning.errors import HAMUError
from hamu_lightning.solvers import FeasibleDirection
from tests.callbacks.many import DATA, RADIUS, RULE, flat, loader, make_callback
from tests.callbacks.modules import Base, build, fit


def test_what_is_logged_and_shown(tmp_path: Path) -> None:
    """Scalars of each group, the table at the end, the picture in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    hamu = make_callback(progress_bar=True)
    trainer, _ = fit(build(Base), hamu, logger=logger, log_every_n_steps=1)
    names = {n for n in trainer.callback_metrics if n.startswith(("hamu/", "a/", "b/", "rare/", "retain/"))}
    assert {"a/loss", "b/loss", "rare/loss", "retain/loss", "a/train_loss_step"} <= names
    assert {"hamu/quota/a", "hamu/improvement/rare", "hamu/multiplier/b", "hamu/margin", "hamu/kappa"} <= names
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["hamu/costs"]
    assert len(events.Images("hamu/costs")) >= 2  # each epoch, the last one as well


def test_the_table_at_the_end() -> None:
    hamu = make_callback()

    class Reads(Callback):
        @override
        def on_train_end(self, *_: Any) -> None:
            assert hamu._fit is not None
            self.table = hamu._fit.account.summary()

    reads = Reads()
    fit(build(Base), hamu, reads)
    lines = reads.table.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("group ")) + 1
    assert [line.split()[:2] for line in lines[first : first + 4]] == [
        ["retain", "retained"],
        ["rare", "protected"],
        ["a", "forgotten"],
        ["b", "forgotten"],
    ]
    assert max(map(len, lines[1:])) <= 120


def test_it_stops_where_the_constraints_cannot_hold_together() -> None:
    """What is to be forgotten and what is protected are the same samples, which nobody could see."""
    twin = TensorDataset(*(tensor.clone() for tensor in DATA["a"].tensors))  # the same samples, not seen to be
    rule = FeasibleDirection({"a": 0.01, "b": 0.001}, {"twin": 0.0}, radius=RADIUS)
    hamu = HAMUCallback(
        {"a": loader("a", 40), "b": loader("b")},
        rule,
        protect={"twin": DataLoader(twin, batch_size=40)},
        stop_on=("infeasible",),
    )
    module = build(Base)
    before = flat(module)
    fit(module, hamu)
    assert hamu.stop_reason is StopReason.INFEASIBLE
    assert hamu.stop_message is not None and hamu.stop_message.endswith(("In the way: twin.", "In the way: a."))
    assert torch.equal(before, flat(module))


def test_mean_prices_leave_out_what_is_not_known() -> None:
    prices, gramian = Prices(), torch.eye(4, dtype=torch.float64)[None]
    steps = [
        RULE.coefficients(gramian, lr=0.1),
        FeasibleDirection({"a": 9.0, "b": 9.0}, {"rare": 0.0}).coefficients(gramian, lr=0.1),
    ]
    for step in steps:
        prices.add(step)
    assert prices.mean("a") == pytest.approx(float(steps[0].multipliers["a"]))
    other = Prices()
    other.load_state_dict(prices.state_dict())
    assert torch.equal(other.costs(["rare"], ["a", "b"]), prices.costs(["rare"], ["a", "b"]))


TWO = FeasibleDirection({"a": 0.01, "b": 0.01})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HAMUCallback({"a": loader("a")}, TWO), r"there is none for \['b'\]"),
        (lambda: HAMUCallback({"a": loader("a"), "x": loader("b")}, TWO), r"knows nothing of \['x'\]"),
        (
            lambda: HAMUCallback(loader("a"), TWO, protect={"rare": loader("rare")}),
            "Expected `forget` to name its groups",
        ),
        (lambda: HAMUCallback({"a": loader("a")}, HAMUQ(0.1)), "Several loaders become one by CombinedLoader"),
        (lambda: make_callback(passes=PassOptions(groups_per_step=0)), "Expected `groups_per_step` to be at least 1"),
        (lambda: FeasibleDirection({"a": 0.1}, {"rare": -1.0}), "not negative"),
        (lambda: FeasibleDirection({"a": 0.1}, solver="nonesuch"), "nonesuch"),
        (lambda: make_callback().add_request("a", loader("a"), 0.1), "Expected a new name for the request"),
        (lambda: make_callback().add_request("c", loader("c")), "Expected either `quota` or `target`"),
        (lambda: HAMUCallback(loader("a"), HAMUQ(0.1)).add_request("c", loader("c"), 0.1), "Expected named requests"),
    ],
)
def test_what_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(HAMUError, match=message):
        make()


def test_what_is_refused_at_the_start() -> None:
    shared = HAMUCallback({"a": loader("a"), "b": loader("b")}, RULE, protect={"rare": Subset(DATA["a"], range(5))})
    module = build(Base)
    before = flat(module)
    with pytest.raises(HAMUMisconfigurationError, match="'a' and 'rare' to have no sample in common, but they share 5"):
        fit(module, shared)
    with pytest.raises(HAMUMisconfigurationError, match="Expected a rule with one group to forget for the preflight"):
        fit(module, make_callback(preflight=True))
    with pytest.raises(HAMUMisconfigurationError, match="Expected a rule with one group"):
        preflight(module, loader("a"), loader("b"), RULE)
    assert torch.equal(before, flat(module))


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"verify": True}, {}, "Expected no verified steps with `sketch`"),
        ({}, {"gradient_clip_val": 0.1}, "Expected no gradient clipping with `sketch`"),
        ({}, {"precision": "16-mixed"}, "Expected no loss scaler"),
        ({"passes": PassOptions(groups_per_step=1)}, {}, "without `track_actual`, `reuse_groups` and `mask`"),
    ],
)
def test_what_does_not_go_with_sketches(options: Any, settings: Any, message: str) -> None:
    with pytest.raises(HAMUMisconfigurationError, match=message):
        fit(build(Base), make_callback(steps=StepOptions(sketch=64), **options), **settings)
