"""The numbers of the preflight against a slow oracle, their intervals, and the words."""

from __future__ import annotations

import json
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from hamu_lightning import HAMUQ, HAMUU, preflight
from hamu_lightning.callbacks import PreflightReport
from hamu_lightning.callbacks.forecast._estimates import bootstrap
from hamu_lightning.callbacks.forecast._report import make_report
from hamu_lightning.rules import FixedRadius
from tests.callbacks.forecast.setups import RULE, gradients, retain_loader, run
from tests.callbacks.modules import Base, build, make_data
from tests.callbacks.passes.test_invariants import forget_loader
from tests.oracles import JointProblem, inner, share_proportionally, solve_certificate, solve_hamu_q

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


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
