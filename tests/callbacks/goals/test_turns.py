"""Rules that take turns in a fit: SCRUB's alternation against a loop in plain PyTorch."""

from __future__ import annotations

import copy
import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.data import DataLoader
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUCallback
from hamu_lightning.callbacks import PassOptions, StepOptions
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.objectives import CrossEntropy, ReferenceKL, WeightedSum
from hamu_lightning.rules import Alternate, FineTune, FixedRadius, GradAscent, GradDiff, Rule, Schedule
from hamu_lightning.solvers import FeasibleDirection
from tests.callbacks.modules import Base, build, fit, make_data
from tests.callbacks.test_checkpoints import assert_same, end_of
from tests.callbacks.test_checkpoints import train as train_and_save
from tests.callbacks.test_distributed import to_tensor, train
from tests.callbacks.test_mask import OwnOptimizer, assert_rest, weights_of
from tests.distributed import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The base optimizer"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
ASCENT, DESCENT = str(GradAscent()), str(FineTune())


def forget_loader() -> DataLoader[Any]:
    return DataLoader(make_data(40, seed=9), batch_size=16)  # 3 batches


def retain_loader() -> DataLoader[Any]:
    return DataLoader(make_data(), batch_size=16)  # 6 batches


def scrub_by_hand(module: Base, epochs: int, is_max: Any, accumulation: int = 1) -> list[Tensor]:
    """Ascent on the divergence of the forget data, or descent on divergence plus cross-entropy of the retain data."""
    reference, parameters = copy.deepcopy(module), list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    forget: list[Any] = []
    for epoch in range(epochs):
        batches = [*retain_loader()]
        for step, start in enumerate(range(0, len(batches), accumulation)):
            optimizer.zero_grad()
            for x, y in batches[start : start + accumulation]:
                if is_max(epoch, step):
                    forget = forget or [*forget_loader()]
                    u = forget.pop(0)[0].double()
                    loss = -divergence(module(u), reference(u))
                else:
                    logits = module(x.double())
                    loss = 0.5 * divergence(logits, reference(x.double())) + 2.0 * cross_entropy(logits, y)
                (loss / accumulation).backward()
            optimizer.step()
    return parameters


def divergence(logits: Tensor, known: Tensor) -> Tensor:
    return kl_div(logits.log_softmax(1), known.detach().log_softmax(1), reduction="batchmean", log_target=True)


@pytest.mark.parametrize(
    ("schedule", "steps"), [(Alternate(2, 3), (6, 24)), (Alternate(2), (12, 18)), (Alternate(1, 2), (2, 28))], ids=repr
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_scrub_is_a_loop_in_plain_pytorch(schedule: Alternate, steps: tuple[int, int], accumulation: int) -> None:
    module = build(Base).double()
    with torch.no_grad():
        twin = copy.deepcopy(module)
    hamu = HAMUCallback(
        forget_loader(),
        schedule=schedule,
        objective=ReferenceKL(),
        retain_objective=WeightedSum((0.5, ReferenceKL()), (2.0, CrossEntropy())),
    )
    fit(module, hamu, loader=retain_loader(), max_epochs=5, precision="64-true", accumulate_grad_batches=accumulation)
    expected = scrub_by_hand(twin, 5, lambda *at: schedule.rule_at(*at) is schedule.forget, accumulation)
    for weight, other in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-12)  # float64; 30 steps of rounding
    if accumulation == 1:
        assert tuple(hamu.turns.values()) == steps
        assert hamu.forget_passes == hamu.combined_steps == steps[0]
        assert hamu.left_out_steps == 0


def logged_lines(folder: Path) -> list[dict[str, str]]:
    return [*csv.DictReader((folder / "metrics.csv").read_text().splitlines())]


def test_what_is_logged(tmp_path: Path) -> None:
    """Which rule made the step, and the losses of the passes that there were."""
    logger = CSVLogger(tmp_path, name="", version="")
    hamu = HAMUCallback(forget_loader(), schedule=Alternate(2, 2))
    fit(build(Base), hamu, loader=retain_loader(), max_epochs=3, logger=logger, log_every_n_steps=1)
    rows = [row for row in logged_lines(Path(logger.log_dir)) if row.get("hamu/turn")]
    assert "".join(str(int(float(row["hamu/turn"]))) for row in rows) == "001111" * 2 + "111111"
    for row in rows:
        is_max = float(row["hamu/turn"]) == 0
        assert all(bool(row[name]) == is_max for name in ("forget/loss", "hamu/forget_improvement", "hamu/kappa"))
        assert row["retain/loss"] not in ("", "nan")
    assert hamu.turns == {ASCENT: 4, DESCENT: 14}
    assert hamu.summary is not None
    assert f"Steps by turns: 4 of {ASCENT}, 14 of {DESCENT}." in hamu.summary


def test_the_losses_are_means_since_the_last_logging_step(tmp_path: Path) -> None:
    """A min-step that is logged tells the forget loss of the max-steps before it."""
    logger = CSVLogger(tmp_path, name="", version="")
    hamu = HAMUCallback(forget_loader(), schedule=Alternate(1, 2))
    fit(build(Base), hamu, loader=retain_loader(), max_epochs=1, logger=logger, log_every_n_steps=3)
    rows = [row for row in logged_lines(Path(logger.log_dir)) if row.get("hamu/turn")]
    assert [bool(row["forget/loss"]) for row in rows] == [True, False]


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"optimizer": "momentum"},
    "adamw": {"optimizer": "adamw"},
    "whole epochs": {"schedule": Alternate(2)},
    "accumulation": {"accumulate_grad_batches": 3, "schedule": Alternate(4, 1)},
    "rules for both": {"schedule": Alternate(2, 4, forget=HAMUQ(0.02, radius=FixedRadius(0.05)), retain=GradDiff(0.1))},
    "only the repair is left": {"schedule": Alternate(1, 2)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_in_the_middle_of_an_epoch(name: str, tmp_path: Path) -> None:
    """Step 8 of 14, with epochs of 12 batches, is in the middle of the first or of a later epoch."""
    settings = dict(SETTINGS[name])
    settings |= {"rule": None, "arguments": {"schedule": settings.pop("schedule", Alternate(2, 10))}}
    trainer, hamu = train_and_save(tmp_path, **settings)
    whole = end_of(trainer, hamu)
    assert sum(hamu.turns.values()) == 14
    assert_same(whole, end_of(*train_and_save(tmp_path, resume=True, **settings)))


def test_epochs_count_from_where_unlearning_began(tmp_path: Path) -> None:
    """Not from where training did, in a run that goes on from its checkpoint."""
    trainer, _ = fit(build(Base), loader=retain_loader(), max_epochs=3)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    hamu = HAMUCallback(forget_loader(), schedule=Alternate(1, 2))
    fit(build(Base), hamu, loader=retain_loader(), max_epochs=5, ckpt_path=tmp_path / "trained.ckpt")
    assert hamu.turns == {ASCENT: 2, DESCENT: 10}
    fit(build(Base), hamu, loader=retain_loader(), max_epochs=2)  # a new run, from its first epoch on
    assert hamu.turns == {ASCENT: 4, DESCENT: 20}


def test_a_second_fit_begins_again() -> None:
    hamu = HAMUCallback(forget_loader(), schedule=Alternate(1, 2))
    for number in (1, 2):
        fit(build(Base), hamu, loader=retain_loader(), max_epochs=1)
        assert hamu.turns == {ASCENT: 2 * number, DESCENT: 4 * number}


@pytest.mark.parametrize("settings", [{"precision": "16-mixed"}, {"gradient_clip_val": 0.1}], ids=str)
def test_precision_and_clipping(settings: dict[str, Any]) -> None:
    hamu = HAMUCallback(forget_loader(), schedule=Alternate(1, 3))
    fit(build(Base, "adamw"), hamu, loader=retain_loader(), **settings)
    assert hamu.turns == {ASCENT: 3, DESCENT: 9}
    assert hamu.combined_steps == 3


def test_with_a_mask_and_verified_steps() -> None:
    module = build(Base, "momentum")
    before = weights_of(module)
    mask = {name: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5 for name, p in before.items()}
    schedule = Alternate(2, 2, forget=HAMUQ(0.01, radius=FixedRadius(0.05)))
    hamu = HAMUCallback(forget_loader(), schedule=schedule, steps=StepOptions(mask=mask), verify=True)
    fit(module, hamu, loader=retain_loader())
    assert tuple(hamu.turns.values()) == (4, 8)
    assert_rest(module, before, mask)
    assert hamu.summary is not None
    assert "4 verified steps" in hamu.summary


class Watch(Callback):
    """Notes the quota and the number of blocks of each step, and the settings that a stop belongs to."""

    def __init__(self, hamu: HAMUCallback) -> None:
        self.hamu, self.steps = hamu, []  # type: ignore[var-annotated]
        self.settings: set[str] = set()

    def on_train_batch_end(self, *_: Any) -> None:
        report = self.hamu.last_step
        assert report is not None
        self.steps.append((float(report.coefficients.total_quota), len(report.labels)))
        self.settings.add(self.hamu.state_dict()["stopped_under"])


def test_each_step_is_made_by_the_rule_on_turn() -> None:
    rules = HAMUQ(0.02, radius=FixedRadius(0.05)), GradDiff(0.1)
    hamu = HAMUCallback(forget_loader(), schedule=Alternate(1, 2, *rules))
    watch = Watch(hamu)
    fit(build(Base), hamu, watch, loader=retain_loader(), max_epochs=1)
    assert watch.steps == [(pytest.approx(0.02), 4)] * 2 + [(0.0, 1)] * 4
    assert hamu.combined_steps == 6


def test_a_stop_belongs_to_the_schedule() -> None:
    """A resumed run stays stopped, whichever rule was on turn."""
    hamu = HAMUCallback(forget_loader(), schedule=Alternate(1, 2))
    watch = Watch(hamu)
    fit(build(Base), hamu, watch, loader=retain_loader(), max_epochs=1)
    assert len(watch.settings) == 1


class Validates(Base):
    """Monitors a number that is best at the start."""

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("age", float(self.global_step))

    @override
    def val_dataloader(self) -> Any:
        return retain_loader()


def test_a_best_checkpoint_from_before_the_end_is_warned_about(tmp_path: Path) -> None:
    """Although the last steps were plain ones."""
    saving = ModelCheckpoint(tmp_path, monitor="age")
    hamu = HAMUCallback(forget_loader(), schedule=Alternate(1, 2))
    with pytest.warns(UserWarning, match="The best checkpoint by 'age' is from before the end of this fit"):
        fit(build(Validates), hamu, saving, loader=retain_loader(), enable_checkpointing=True)


class Strange(Schedule):
    """Asks for a rule that it does not list."""

    rules: tuple[Rule, ...] = (GradAscent(),)  # type: ignore[assignment]

    def rule_at(self, epoch: int, step: int) -> Rule:
        return self.rules[0] if step == 0 else GradDiff(0.5)


def test_refusals() -> None:
    schedule = Alternate(1)
    for arguments, name in (
        ({"rule": GradDiff()}, "rule"),
        ({"target": 2.0}, "target"),
        ({"passes": PassOptions(every_n_steps=2)}, "every"),
    ):
        with pytest.raises(HAMUValueError, match=f"Expected `schedule` without `{name}"):
            HAMUCallback(forget_loader(), schedule=schedule, **arguments)  # type: ignore[arg-type]
    with pytest.raises(HAMUValueError, match="Expected `schedule` to be a schedule such as"):
        HAMUCallback(forget_loader(), schedule=GradAscent())  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="Expected a plain optimizer with `schedule`"):
        fit(build(OwnOptimizer), HAMUCallback(forget_loader(), schedule=schedule))
    with pytest.raises(HAMUValueError, match="List it in `rules`"):
        fit(build(Base), HAMUCallback(forget_loader(), schedule=Strange()))
    rules = {"forget": FeasibleDirection({"a": 0.1}), "retain": FeasibleDirection({"a": 0.0})}
    hamu = HAMUCallback({"a": forget_loader()}, schedule=Alternate(1, **rules))
    with pytest.raises(MisconfigurationException, match="to add a request to, but got an Alternate"):
        hamu.add_request("b", forget_loader(), 0.1)


def test_a_fit_that_never_forgets_is_an_error() -> None:
    """Where each max-step was left out."""
    bad = [(torch.full((4, 10), torch.nan), torch.zeros(4).long())]
    with pytest.raises(HAMUStateError, match="it ended with 0 combined steps"):
        fit(build(Base), HAMUCallback(bad, schedule=Alternate(1, 2)), loader=retain_loader())


CASES = {"sgd": Alternate(2, 2), "whole epochs": Alternate(2)}


def run_cases(rank: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {name: train(2, rule=None, callback={"schedule": s}) for name, s in CASES.items()}  # type: ignore[arg-type]


def test_two_processes_are_one_on_the_joint_batch() -> None:
    for result in run_ranks(run_cases, 2, timeout=300):
        for name, schedule in CASES.items():
            expected = train(1, rule=None, callback={"schedule": schedule})  # type: ignore[arg-type]
            assert result[name]["steps"] == expected["steps"] == {"sgd": 4, "whole epochs": 8}[name]
            # Float64, where only the order of sums differs.
            torch.testing.assert_close(
                to_tensor(result[name]["weights"]), to_tensor(expected["weights"]), rtol=0, atol=1e-9
            )
