"""The pure parts of the paper's findings by hand, and small runs of two of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hamu_lightning import HAMUQ, HAMUU, compute_gramian
from hamu_lightning.optim import StepReport
from hamu_lightning.rules import FixedRadius

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


def write_records(path: Path, labels: list[int]) -> np.ndarray:
    """Records whose red, green and blue planes count on from one another."""
    planes = (np.arange(3072) + np.arange(len(labels))[:, None]).astype(np.uint8)
    path.write_bytes(b"".join(bytes([label]) + plane.tobytes() for label, plane in zip(labels, planes, strict=True)))
    return planes


def test_binary_records_are_read(tmp_path: Path) -> None:
    from cifar10 import read_cifar10

    planes = write_records(tmp_path / "some.bin", [3, 9, 0])
    images, labels = read_cifar10(tmp_path / "some.bin")
    assert images.dtype == torch.uint8 and images.shape == (3, 3, 32, 32)
    assert labels.tolist() == [3, 9, 0] and labels.dtype == torch.int64
    assert images[1, 2, 5, 7] == planes[1, 2 * 1024 + 5 * 32 + 7]  # blue, row 5, column 7


def test_the_folder_is_read_and_normalised(tmp_path: Path) -> None:
    from cifar10 import TRAINING_FILES, CIFAR10Classifier, load_cifar10

    for number, name in enumerate(TRAINING_FILES):
        write_records(tmp_path / name, [number])
    images, labels = load_cifar10(tmp_path)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert images[4, 0, 0, 4].item() == pytest.approx((4 / 255 - 0.4914) / 0.2470)
    assert CIFAR10Classifier(width=4)(images).shape == (5, 10)


@pytest.mark.parametrize(
    ("content", "match"), [(b"", "records"), (bytes(3072), "records"), (b"\x0a" + bytes(3072), "10")]
)
def test_other_files_are_refused(content: bytes, match: str, tmp_path: Path) -> None:
    from cifar10 import read_cifar10

    (tmp_path / "other.bin").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_cifar10(tmp_path / "other.bin")


def test_fits() -> None:
    from findings_numbers import fit_line, pearson

    assert pearson([0, 1, 2], [5, 3, 1]) == pytest.approx(-1)
    # The least-squares line through (0, 0), (1, 1), (2, 0) is 1/3, flat: it explains nothing.
    assert fit_line([0, 1, 2], [0, 1, 0]) == pytest.approx((0, 1 / 3, 0), abs=1e-12)
    assert fit_line([0, 1, 2], [1, 3, 5]) == pytest.approx((2, 1, 1))


def test_expected_kappa_is_that_of_the_mean_gradients() -> None:
    from findings_numbers import expected_kappa

    of_class, rest = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share, rho = 0.1, 0.25
    everything = share * of_class + (1 - share) * rest
    forget = (1 - rho) * of_class + rho * everything
    retain = (everything - share * forget) / (1 - share)
    gramian = compute_gramian([of_class], [everything])[0]
    assert expected_kappa(gramian, share, rho) == pytest.approx(float(retain @ forget))
    # The class alone: what is retained is all the rest.
    assert expected_kappa(gramian, share, 0.0) == pytest.approx(float(rest @ of_class))


def make_report(rule: HAMUQ, *blocks: tuple[float, float, float]) -> StepReport:
    """The report of a step, from `rr`, `ff` and `rf` of each block."""
    gramian = torch.tensor([[[rr, rf], [rf, ff]] for rr, ff, rf in blocks], dtype=torch.float64)
    labels = tuple(map(str, range(len(blocks))))
    return StepReport(gramian, rule.coefficients(gramian, lr=1.0), torch.ones(len(blocks)), labels)


def test_the_papers_bound_by_hand() -> None:
    from findings_numbers import paper_bound

    blocks = ((4.0, 1.0, 1.0), (1.0, 9.0, -2.0), (0.0, 4.0, 0.0))
    # R = 0.5: 0.5 sqrt(1 - 1/4) + 0.5 sqrt(9 - 4/1) + 0.5 sqrt(4)
    by_hand = 0.5 * (math.sqrt(0.75) + math.sqrt(5) + 2)
    assert float(paper_bound(make_report(HAMUQ(0.1, radius=FixedRadius(0.5)), *blocks))) == pytest.approx(by_hand)
    # For HAMU-U the objectives change places: 0.5 sqrt(4 - 1/1) + 0.5 sqrt(1 - 4/9) + 0
    by_hand = 0.5 * (math.sqrt(3) + math.sqrt(5 / 9))
    assert float(paper_bound(make_report(HAMUU(0.1, radius=FixedRadius(0.5)), *blocks))) == pytest.approx(by_hand)


def test_the_paper_stops_where_both_objectives_improve() -> None:
    from findings_numbers import judge_stops, passes_certificate, passes_paper_rule
    from unlearning_runs import Run

    rule = HAMUQ(0.5, radius=FixedRadius(1.0))
    helping = make_report(rule, (1.0, 1.0, -0.9))  # sqrt(1 - 0.81) = 0.44 < 0.5, but plain descent gives 0.9
    assert not passes_paper_rule(helping) and passes_certificate(helping)
    conflicting = make_report(rule, (1.0, 1.0, 0.9))  # 0.44 is all that can be had without harm
    assert not passes_paper_rule(conflicting) and not passes_certificate(conflicting)
    easy = make_report(rule, (1.0, 1.0, 0.1))
    assert passes_paper_rule(easy) and passes_certificate(easy)
    stops = judge_stops(Run(reports=[helping, conflicting, easy, easy]))
    assert stops == {
        "steps that the paper's stops": 0.5,
        "of these false": 0.5,
        "steps that ours stops": 0.25,
        "of these, too, false": 0.0,
    }


def test_retain_at_equal_forgetting() -> None:
    from findings_numbers import retain_at
    from unlearning_runs import Run

    run = Run([(0, 0.0, 0.0), (2, 0.1, 1.0), (4, -0.1, 3.0)])
    assert retain_at(run, 0.5) == pytest.approx(0.05) and retain_at(run, 2.0) == pytest.approx(0.0)
    assert math.isnan(retain_at(run, 4.0))


def test_tables_say_how_many_seeds_have_a_number() -> None:
    from findings_experiments import Finding
    from paper_findings import format_table

    table = format_table("name", Finding({"a": {"x": [1.0, 3.0]}, "b": {"y": [2.0, math.nan], "x": [math.nan]}}))
    assert table.splitlines()[2:] == ["| a | 2 ± 1 |  |", "| b |  | 2 (1 of 2) |"]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_networks: None) -> Any:
    """A narrow, short network that has hardly been trained."""
    import paper_findings
    from digits import DigitsClassifier
    from unlearning_runs import Bench, Task

    images, labels = paper_findings.make_digits().images, paper_findings.make_digits().labels
    epochs, lrs = {"early": 1, "converged": 1}, {"early": 0.01, "converged": 0.01}
    task = Task("small", images[:200], labels[:200], lambda: DigitsClassifier(width=4), epochs, lrs)
    monkeypatch.setattr(paper_findings, "make_digits", lambda: task)
    return Bench(task, range(2), tmp_path, steps=2, batch_size=8)


def test_rho_is_the_share_drawn_at_random(bench: Any) -> None:
    from forgetting import MIXTURE_CLASS

    the_class, drawn = bench.case(0, 0.0), bench.case(0, 1.0)
    labels = bench.task.labels
    assert torch.equal(the_class.forget.sort().values, (labels == MIXTURE_CLASS).nonzero().flatten())
    assert len(drawn.forget) == len(the_class.forget) and labels[drawn.forget].unique().numel() > 5
    everything = torch.cat((drawn.forget, drawn.retain)).sort().values
    assert torch.equal(everything, torch.arange(len(labels)))


def test_originals_are_trained_once(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = bench.case(0, 0.0).original, bench.case(0, 1.0).original
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not first.training and capsys.readouterr().out.count("Training the early original") == 1


def test_a_run_measures_and_leaves_the_original_alone(bench: Any) -> None:
    case = bench.case(0, 0.0)
    before = [p.clone() for p in case.original.parameters()]
    run = bench.unlearn(case, HAMUQ(0.5 * case.capacity * case.lr), steps=3, measure_every=2)
    assert all(torch.equal(p, b) for p, b in zip(case.original.parameters(), before, strict=True))
    assert [step for step, _, _ in run.path] == [0, 2, 3] and run.steps == len(run.reports) == 3
    # Plain SGD: the trust region is used up, to within the rounding of float32 weights.
    assert run.lengths == pytest.approx([1, 1, 1], rel=1e-2)
    refused = bench.unlearn(case, HAMUQ(0.1), approve=lambda report: False)
    assert refused.steps == 0 and refused.path == [(0, 0.0, 0.0)] and len(refused.reports) == 1


def test_small_runs_of_two_findings(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from paper_findings import main

    argv = ["--findings", "hardness", "stopping", "--seeds", "1", "--steps", "2", "--batch-size", "8"]
    main([*argv, "--out", str(tmp_path)])
    table = capsys.readouterr().out
    assert "| early: HAMU-Q, mean of the steps |" in table and "| rho = 1, Q relative, joint certificate |" in table
    assert (tmp_path / "hardness.png").exists() and (tmp_path / "stopping.png").exists()


@pytest.mark.parametrize("name", ["quotas", "methods", "allocations", "batches", "bases"])
@pytest.mark.slow
def test_small_runs_of_the_others(name: str, bench: Any) -> None:
    from paper_findings import FINDINGS, format_table

    finding = FINDINGS[name](bench)
    assert len(format_table(name, finding).splitlines()) == 2 + len(finding.rows)
    for draw in finding.figures.values():
        assert draw().axes
