"""Preflight: its numbers, its intervals, its advice, and that it changes nothing."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUU, Chance, HAMUCallback, preflight
from hamu_lightning.callbacks import PassOptions, PreflightReport
from hamu_lightning.callbacks.forecast._estimates import bootstrap
from hamu_lightning.callbacks.forecast._report import make_report
from hamu_lightning.errors import HAMUStateError, HAMUValueError
from hamu_lightning.rules import FineTune, FixedRadius, RelativeRadius, TargetQuota
from tests.callbacks.modules import MODULES, Base, EditsItsBatch, WithBatchNorm, WithDropout, build, fit, make_data
from tests.callbacks.test_invariants import attributes, forget_loader
from tests.distributed import run_ranks
from tests.oracles import JointProblem, inner, share_proportionally, solve_certificate, solve_hamu_q

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")
RULE = HAMUQ(0.02, radius=RelativeRadius(0.05))
TARGET = HAMUQ(TargetQuota(Chance()), radius=RelativeRadius(0.05))


def retain_loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(make_data(), batch_size=16, **{"shuffle": True, **options})


def states() -> list[Any]:
    """All global random states."""
    return [torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()]


# Nothing changes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batchnorm", ["freeze", "retain"])
@pytest.mark.parametrize("kind", MODULES)
def test_the_function_leaves_no_trace(kind: type[Base], batchnorm: Any) -> None:
    """BatchNorm buffers are in the state; the loaders have generators of their own."""
    module = build(kind)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    loaders = [retain_loader(generator=generators[0]), DataLoader(make_data(40, 9), 8, True, generator=generators[1])]

    def everything() -> dict[str, Any]:
        tensors = {f"grad {name}": p.grad for name, p in module.named_parameters()} | module.state_dict()
        found: dict[str, Any] = {name: None if t is None else t.tolist() for name, t in tensors.items()}
        modes = [m.training for m in module.modules()]
        return (
            found
            | attributes(module)
            | {"random": states(), "modes": modes, "own": [*map(repr, vars(module))]}
            | {f"generator {n}": g.get_state().tolist() for n, g in enumerate(generators)}
        )

    before = everything()
    report = preflight(module, *loaders, RULE, batchnorm=batchnorm)
    assert everything() == before
    assert report.pairs == 6


def run(preflight: bool, kind: type[Base] = Base, rule: Any = RULE, **settings: Any) -> tuple[dict[str, Any], Any]:
    """A fit, all that is left of it, and the callback."""
    module = build(kind, settings.pop("optimizer", "sgd"))
    forget = settings.pop("forget", None)
    callback = HAMUCallback(
        forget, rule, preflight=preflight, passes=PassOptions(batchnorm=settings.pop("batchnorm", "freeze"))
    )
    trainer, recorder = fit(module, callback, **settings)
    found: dict[str, Any] = {name: value.tolist() for name, value in module.state_dict().items()}
    found |= {f"logged {name}": float(value) for name, value in trainer.callback_metrics.items()}
    found |= {"steps": recorder.values, "backwards": recorder.backwards, "random": states()}
    return found | attributes(module), callback


def paired(**options: Any) -> CombinedLoader:
    return CombinedLoader({"retain": retain_loader(**options), "forget": forget_loader()}, "max_size_cycle")


def own_generator() -> DataLoader[Any]:
    return retain_loader(generator=torch.Generator().manual_seed(4))


class Batches:
    """Hands out the same objects in each pass."""

    def __init__(self) -> None:
        self.batches = list(retain_loader())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Shuffles(Sampler[int]):
    """A sampler with random numbers of its own, another order in each pass."""

    def __init__(self) -> None:
        self.numbers = np.random.default_rng(3)

    def __iter__(self) -> Iterator[int]:
        yield from self.numbers.permutation(96).tolist()

    def __len__(self) -> int:
        return 96


RUNS: dict[str, dict[str, Any]] = {
    **{kind.__name__: {"kind": kind, "batchnorm": "retain"} for kind in MODULES},
    "frozen BatchNorm": {"kind": WithBatchNorm},
    "accumulation": {"kind": WithDropout, "accumulate_grad_batches": 4},
    "clipping": {"gradient_clip_val": 0.05},
    "adamw": {"optimizer": "adamw", "rule": FineTune()},
    "momentum": {"optimizer": "momentum", "rule": FineTune()},
    "16-mixed": {"kind": WithBatchNorm, "precision": "16-mixed"},
    "16-mixed, clipping": {"precision": "16-mixed", "gradient_clip_val": 0.05},
    "bf16-mixed": {"kind": WithDropout, "precision": "bf16-mixed"},
    "paired": {"kind": WithDropout, "loader": paired, "forget": lambda: None},
    "a generator of the loader": {"kind": WithDropout, "loader": own_generator},
    "the same batches, edited in place": {"loader": lambda: Batches(), "kind": EditsItsBatch},
    "a sampler with a state": {"loader": lambda: DataLoader(make_data(), 16, sampler=Shuffles())},
    "a target": {"kind": WithBatchNorm, "rule": TARGET},
    "workers that stay": {"loader": lambda: retain_loader(num_workers=2, persistent_workers=True)},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_with_and_without(name: str) -> None:
    results = []
    for flag in (False, True):
        settings = {**RUNS[name], "forget": RUNS[name].get("forget", forget_loader)()}
        if "loader" in settings:
            torch.manual_seed(2)
            settings["loader"] = settings["loader"]()
        found, callback = run(flag, **settings)
        assert (callback.preflight_report is not None) == flag
        results.append(found)
    assert results[0] == results[1]


def test_the_callback_finds_what_the_function_finds() -> None:
    """With accumulation too, where Lightning divides the loss of each batch."""
    expected = preflight(build(WithBatchNorm), retain_loader(), forget_loader(), RULE).as_dict()
    for settings in ({}, {"accumulate_grad_batches": 4}):
        _, callback = run(True, WithBatchNorm, forget=forget_loader(), **settings)  # type: ignore[arg-type]
        found = callback.preflight_report.as_dict()
        assert found["pairs"] == expected["pairs"] == 6
        for key in ("kappa", "retain_cost", "free_quota", "forget_loss"):
            assert found[key]["values"] == pytest.approx(expected[key]["values"], rel=1e-5), key  # float32 gradients


def test_clipping_and_the_loss_scale_are_taken_into_account() -> None:
    _, plain = run(True, forget=forget_loader())
    _, scaled = run(True, forget=forget_loader(), precision="16-mixed")
    for key in ("kappa", "retain_norm", "forget_norm"):
        expected = plain.preflight_report.estimates[key].mean
        assert scaled.preflight_report.estimates[key].mean == pytest.approx(expected, rel=0.02), key  # half precision
    for precision in ("32-true", "16-mixed"):
        _, clipped = run(True, forget=forget_loader(), gradient_clip_val=0.05, precision=precision)
        for key in ("retain_norm", "forget_norm"):
            assert clipped.preflight_report.estimates[key].mean == pytest.approx(0.05, rel=1e-3), key


def test_a_target_is_measured_and_divided_among_the_steps() -> None:
    """In the fit: log 3 in two thirds of 12 steps. Without a Trainer: both given."""
    given = HAMUQ(TargetQuota(math.log(3), steps=8), radius=RelativeRadius(0.05))
    reports = [preflight(build(Base), retain_loader(), forget_loader(), given)]
    reports.append(run(True, forget=forget_loader(), rule=TARGET)[1].preflight_report)
    for report in reports:
        assert report.target == pytest.approx(math.log(3))
        for quota, loss, largest in zip(
            *(report.estimates[name].values for name in ("quota", "forget_loss", "largest_quota")), strict=True
        ):
            assert quota == pytest.approx(min((math.log(3) - loss) / 8, 0.9 * largest), abs=1e-6)  # float32 losses
    assert reports[0].as_dict()["steps_to_target"] is not None


def test_limited_batches() -> None:
    _, callback = run(True, forget=forget_loader(), limit_train_batches=2)
    assert callback.preflight_report.pairs == 2


# The numbers --------------------------------------------------------------------------------------------------------


def gradients(module: Base, batch: Any) -> tuple[float, list[Any]]:
    loss = cross_entropy(module(batch[0]), batch[1])
    return loss.item(), [g.flatten().numpy() for g in torch.autograd.grad(loss, list(module.parameters()))]


@pytest.mark.parametrize("quota", [1e-4, 0.02, 5.0])
def test_the_numbers_are_those_of_a_slow_oracle(quota: float) -> None:
    module = build(Base).double()
    tensors = [TensorDataset(d.tensors[0].double(), d.tensors[1]) for d in (make_data(24), make_data(24, 9))]
    retain, forget = (list(DataLoader(data, batch_size=8)) for data in tensors)
    report = preflight(module, retain, forget, HAMUQ(quota, radius=FixedRadius(0.1)), target=1.5)
    rows = []
    for r, f in zip(retain, forget, strict=True):
        (retain_loss, g_r), (forget_loss, g_f) = gradients(module, r), gradients(module, f)
        problem = JointProblem(tuple(g_r), tuple(g_f), np.full(4, 0.1))
        products = [(inner(a, a), inner(b, b), inner(a, b)) for a, b in zip(g_r, g_f, strict=True)]
        shares = share_proportionally([0.1 * np.linalg.norm(g) for g in g_f], quota)
        steps = [solve_hamu_q(*p, share, 0.1) for p, share in zip(products, shares, strict=True)]
        gain, kept = problem.improvements(np.array([[float(s.c_r), float(s.c_f)] for s in steps]))
        rr, ff, rf = (float(sum(column)) for column in zip(*products, strict=True))
        rows.append(
            {
                "retain_loss": retain_loss,
                "forget_loss": forget_loss,
                "retain_norm": math.sqrt(rr),
                "forget_norm": math.sqrt(ff),
                "kappa": rf,
                "cosine": rf / math.sqrt(rr * ff),
                "kappa_1": -quota / 0.2 * math.sqrt(rr),  # four blocks of radius 0.1 make 0.2
                "kappa_2": math.sqrt(rr) * math.sqrt(max(ff - (quota / 0.2) ** 2, 0)),
                "conflicting_blocks": np.mean([float(p[2] > 0) for p in products]),
                "direct_blocks": np.mean([s.branch == "direct" for s in steps]),
                "damaging_blocks": np.mean(
                    [
                        float(p[2]) > math.sqrt(float(p[0]) * max(float(p[1]) - (share / 0.1) ** 2, 0)) and p[2] > 0
                        for p, share in zip(products, shares, strict=True)
                    ]
                ),
                "quota": quota,
                "largest_quota": problem.forget_reach,
                "free_quota": solve_certificate(problem),
                "infeasible": float(quota > problem.forget_reach),
                "forget_improvement": gain,
                "retain_cost": -kept,
            }
        )
    for name in rows[0]:
        expected = [row[name] for row in rows]
        estimate = report.estimates[name]
        assert estimate.values == pytest.approx(expected, rel=1e-6, abs=1e-6), name  # of the cone solver
        assert estimate.mean == pytest.approx(sum(expected) / 3, rel=1e-6, abs=1e-6), name
    means = {name: sum(row[name] for row in rows) / 3 for name in rows[0]}
    steps_left = (1.5 - means["forget_loss"]) / means["forget_improvement"]
    assert report.estimates["steps_to_target"].mean == pytest.approx(steps_left, rel=1e-6)
    assert report.estimates["retain_cost_to_target"].mean == pytest.approx(steps_left * means["retain_cost"], rel=1e-5)


def test_hamu_u_exchanges_the_objectives() -> None:
    """Of one gradient for both: F is 0, and the capacity is that of the retain gradient."""
    batches = list(DataLoader(make_data(), batch_size=16))
    report = preflight(build(Base), batches, batches, HAMUU(1e-3, radius=FixedRadius(0.1)), batches=2)
    estimates = report.estimates
    assert report.pairs == 2
    assert estimates["free_quota"].mean == pytest.approx(0, abs=1e-6)  # float32 gradients
    assert estimates["largest_quota"].mean > estimates["retain_norm"].mean * 0.1
    assert "must undo forgetting" in report.advice[0]
    assert "each step is predicted to lower the forget loss by 0.001" in report.advice[1]


def test_hamu_u_is_hamu_q_of_the_other_loader() -> None:
    one, other = (list(DataLoader(make_data(48, seed), batch_size=16)) for seed in (1, 2))
    found = preflight(build(Base), one, other, HAMUU(0.01, radius=FixedRadius(0.1))).estimates
    expected = preflight(build(Base), other, one, HAMUQ(0.01, radius=FixedRadius(0.1))).estimates
    for name in ("kappa_1", "kappa_2", "largest_quota", "free_quota", "infeasible", "damaging_blocks"):
        assert found[name].values == pytest.approx(expected[name].values, rel=1e-5), name  # float32 gradients
    assert found["forget_improvement"].mean == pytest.approx(-expected["retain_cost"].mean, rel=1e-4)
    assert found["retain_cost"].mean == pytest.approx(-expected["forget_improvement"].mean, rel=1e-4)


@pytest.mark.parametrize("ratio", [False, True])
def test_intervals_cover_the_truth(ratio: bool) -> None:
    """Of 400 samples of 16. A percentile interval of a mean of 16 covers 92 to 93 %; two standard errors are 2.6 %."""
    generator = torch.Generator().manual_seed(3)
    hits = 0
    for seed in range(400):
        samples = torch.randn(16, 2, generator=generator, dtype=torch.float64) * 0.3 + torch.tensor([1.0, 2.0])
        statistic = (lambda means: means[:, 0] / means[:, 1]) if ratio else (lambda means: means[:, 0])
        value, low, high = bootstrap(samples, statistic, seed=seed)
        assert low <= value <= high
        hits += low <= (0.5 if ratio else 1.0) <= high
    assert 0.89 <= hits / 400 <= 0.97


def test_one_pair_has_no_interval() -> None:
    estimate = preflight(build(Base), retain_loader(), forget_loader(), RULE, batches=1).estimates["kappa"]
    assert math.isnan(estimate.low)
    assert str(estimate).endswith(" -")


@pytest.mark.parametrize(
    ("optimizer", "lr", "expected"), [("sgd", None, 0.05), ("adamw", None, 0.01), ("sgd", 0.3, 0.3)]
)
def test_learning_rates_come_from_the_module_or_the_argument(optimizer: str, lr: Any, expected: float) -> None:
    report = preflight(build(Base, optimizer), retain_loader(), forget_loader(), FineTune(), lr=lr).estimates
    squares = [norm**2 for norm in report["retain_norm"].values]
    assert report["retain_cost"].values == pytest.approx([-expected * square for square in squares], rel=1e-5)


class WarmsUp(Base):
    """The first learning rate is 0; a list of optimizers and a list of schedulers."""

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 5, 1.0))]


def test_a_warm_up_from_0_counts_with_its_full_rate() -> None:
    found = [preflight(build(kind), retain_loader(), forget_loader(), HAMUQ(1e-3)) for kind in (Base, WarmsUp)]
    assert found[0].as_dict() == found[1].as_dict()


# The advice ---------------------------------------------------------------------------------------------------------


class Constant(Base):
    """Its loss on forget batches (labels all 7) does not depend on what is trained."""

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = cross_entropy(self(x), y.clamp(max=2))
        return loss * (y != 7).all()


def labelled(label: int) -> list[list[Tensor]]:
    return [[make_data(16, n).tensors[0], torch.full((16,), label)] for n in range(4)]


@pytest.mark.parametrize(
    ("kind", "retain", "forget", "quota", "sentences"),
    [
        (
            Base,
            labelled(0),
            labelled(0),
            0.01,
            [
                r"conflict in \d+ % of the blocks \(cosine (1|0\.9\d*) over all\): a quota above \S+ per step must",
                r"The quota of 0\.01 is above what is free of damage: each step is predicted to raise the retain loss",
            ],
        ),
        (
            Base,
            labelled(0),
            labelled(2),
            0.001,
            [
                r"hardly conflict \(cosine -0\.\d+, positive in \d+ % of the blocks\): any quota up to 0\.\d+ per step",
                r"The quota of 0\.001 can be had without damage: each step is predicted to lower the retain loss",
            ],
        ),
        (
            Base,
            labelled(0),
            labelled(2),
            7.0,
            [
                r"hardly conflict",
                r"The quota of 7 cannot be had: the trust region allows 0\.\d+ at most\. .* make the radius \d+ times",
            ],
        ),
        (Constant, labelled(0), labelled(7), 0.01, [r"There is no forget signal: the forget gradient is 0 in every"]),
    ],
    ids=["conflict", "harmony", "infeasible", "no forget signal"],
)
def test_advice(kind: type[Base], retain: Any, forget: Any, quota: float, sentences: list[str]) -> None:
    report = preflight(build(kind), retain, forget, HAMUQ(quota, radius=FixedRadius(0.1)))
    assert len(report.advice) == len(sentences)
    printed = str(report)
    assert max(map(len, printed.splitlines())) <= 80
    for sentence, pattern in zip(report.advice, sentences, strict=True):
        assert re.search(pattern, sentence), sentence
        assert sentence.split() in [item.split() for item in re.split(r"^- ", printed, flags=re.MULTILINE)]


def make_rows(**changes: list[float]) -> list[dict[str, float]]:
    names = ("retain_norm", "forget_norm", "largest_quota", "free_quota", "quota", "forget_improvement")
    base = {**dict.fromkeys(names, 1.0), **dict.fromkeys(("infeasible", "cosine", "conflicting_blocks"), 0.0)}
    count = max(map(len, changes.values()))
    base |= {"forget_loss": 0.5, "retain_cost": 0.1}
    return [base | {name: values[n] for name, values in changes.items()} for n in range(count)]


@pytest.mark.parametrize(
    ("rows", "left_out", "target", "sentence"),
    [
        ([], 3, None, r"^3 of 3 batch pairs gave numbers that are not finite"),
        (make_rows(quota=[0.5]), 1, None, r"^1 of 2 batch pairs gave numbers that are not finite"),
        (make_rows(largest_quota=[0.0]), 0, None, r"^No block can move: every radius is 0"),
        (make_rows(largest_quota=[0.8, 2.0], infeasible=[1, 0]), 0, None, r"^In 50 % of .* allows 0\.8 in the worst"),
        (make_rows(quota=[0.5]), 0, None, r"can be had without damage.* raise the retain loss by 0\.1\. allocation="),
        (
            make_rows(quota=[0.5]),
            0,
            3.0,
            r"^The target of 3 is about 3 steps away: .* raise the retain loss by 0\.25 in",
        ),
        (make_rows(quota=[0.5, 0.5]), 0, 3.0, r"3 steps away \(2 to 2\)|3 steps away \(3 to 3\)"),
        (make_rows(quota=[0.5]), 0, 0.4, r"^The target of 0\.4 is reached already: the forget loss is 0\.5 now"),
        (make_rows(forget_improvement=[-1.0]), 0, 3.0, r"^The target of 3 cannot be reached with this rule"),
    ],
)
def test_advice_in_other_situations(rows: Any, left_out: int, target: Any, sentence: str) -> None:
    report = make_report(rows, left_out=left_out, blocks=2, target=target, bound="forget")
    assert any(re.search(sentence, line) for line in report.advice), report.advice


def test_nan_in_some_pairs() -> None:
    forget = labelled(1)
    forget[1][0][0, 0] = torch.nan
    report = preflight(build(Base), labelled(0), forget, RULE)
    assert (report.pairs, report.left_out) == (3, 1)
    assert all(math.isfinite(e.mean) for e in report.estimates.values())


def test_the_report_as_text_and_data(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        _, callback = run(True, forget=forget_loader())
    report = callback.preflight_report
    assert str(report) in caplog.text
    found = json.loads(json.dumps(report.as_dict()))
    assert found["kappa"]["mean"] == pytest.approx(sum(found["kappa"]["values"]) / 6)
    assert found["steps_to_target"] is None
    assert str(pickle.loads(pickle.dumps(callback)).preflight_report) == str(report)
    assert isinstance(report, PreflightReport)


# Refusals -----------------------------------------------------------------------------------------------------------


class Manual(Base):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class AsksForTrainer(Base):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (self.trainer.max_epochs or 1)


class ConfiguresWithTrainer(Base):
    @override
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.estimated_stepping_batches)


class TwoOptimizers(Base):
    @override
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]


class GivesNone(Base):
    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


def one_shot() -> Iterator[Any]:
    yield from retain_loader()


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (Manual, {}, HAMUValueError, "Expected automatic optimization"),
        (AsksForTrainer, {}, HAMUStateError, "it asks for one. Use HAMUCallback\\(preflight=True\\)"),
        (ConfiguresWithTrainer, {}, HAMUStateError, "pass `lr`"),
        (TwoOptimizers, {}, HAMUValueError, "to return one optimizer, but got 2"),
        (GivesNone, {}, HAMUStateError, "returned None for all forget data"),
        (Base, {"rule": 0.1}, HAMUValueError, "Expected `rule` to be a rule"),
        (Base, {"rule": TARGET}, HAMUValueError, "Expected a number as target and a number of steps"),
        (Base, {"batches": 0}, HAMUValueError, "Expected `batches` to be at least 1"),
        (Base, {"lr": 0.0}, HAMUValueError, "Expected a learning rate above 0"),
        (Base, {"batchnorm": "eval"}, HAMUValueError, "Expected `batchnorm` to be 'freeze' or 'retain'"),
        (Base, {"retain_loader": make_data()}, HAMUValueError, "A Dataset becomes one by DataLoader"),
        (Base, {"forget_loader": []}, HAMUValueError, "`forget_loader` to hold at least one batch, but it is empty"),
        (Base, {"forget_loader": one_shot()}, HAMUValueError, "got a generator, which can be iterated only once"),
        (lambda: nn.Linear(1, 1), {}, HAMUValueError, "but Linear has none. Give the LightningModule"),
    ],
)
def test_what_cannot_work_is_said(kind: Any, arguments: dict[str, Any], error: Any, message: str) -> None:
    module = build(kind) if isinstance(kind, type) else kind()
    options = {"retain_loader": retain_loader(), "forget_loader": forget_loader(), "rule": RULE, **arguments}
    with pytest.raises(error, match=message):
        preflight(module, **options)


class PreparesInHooks(Base):
    """Callbacks' hooks run before its own ones."""

    @override
    def on_train_start(self) -> None:
        self.scale = 2.0

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.names = tuple(self.__dict__)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.scale * len(self.names)


@pytest.mark.parametrize("kind", [AsksForTrainer, ConfiguresWithTrainer, PreparesInHooks])
def test_what_needs_a_trainer_works_in_a_fit(kind: type[Base]) -> None:
    _, callback = run(True, kind, forget=forget_loader())
    assert callback.preflight_report.pairs == 6


def test_a_module_without_lightning() -> None:
    class Plain(nn.Linear):
        def training_step(self, batch: Any) -> Any:
            return cross_entropy(self(batch[0]), batch[1])

    report = preflight(Plain(10, 3), retain_loader(), forget_loader(), RULE, lr=0.1)
    assert (report.pairs, report.blocks) == (6, 2)
    with pytest.raises(HAMUValueError, match="Expected `lr`, since the module has no"):
        preflight(Plain(10, 3), retain_loader(), forget_loader(), RULE)


class OneShot:
    """A training loader that is its own iterator."""

    def __init__(self) -> None:
        self.batches = iter(retain_loader())

    def __iter__(self) -> OneShot:
        return self

    def __next__(self) -> Any:
        return next(self.batches)


def test_a_training_loader_that_would_be_used_up_is_refused_in_a_fit() -> None:
    with pytest.raises(MisconfigurationException, match="got a OneShot, which can be iterated only once"):
        run(True, forget=forget_loader(), loader=OneShot())


def fit_on_a_rank(rank: int) -> str:
    callback = HAMUCallback(forget_loader(), RULE, preflight=True)
    try:
        fit(build(Base), callback, strategy=DDPStrategy(process_group_backend="gloo"), devices=2)
    except MisconfigurationException as error:
        return str(error)
    return "not refused"


def test_several_processes_are_refused() -> None:
    assert all("Expected one process with `preflight=True`" in message for message in run_ranks(fit_on_a_rank, 2))
