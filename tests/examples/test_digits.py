"""The quickstart's parts: the data, the ordinary module, what is forgotten, and the table."""

from __future__ import annotations

from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")


def test_splits_are_disjoint_stratified_and_always_the_same() -> None:
    from digits import load_splits

    splits = load_splits()
    assert [len(split) for split in splits] == [1077, 270, 450]
    for split in splits:
        images, labels = split.tensors
        assert images.shape[1:] == (1, 8, 8) and images.min() == 0 and images.max() == 1
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert (shares - 0.1).abs().max() < 0.01  # the digits hold 9.7 to 10.2 % of each
    assert torch.equal(torch.cat([s.tensors[0] for s in splits]), torch.cat([s.tensors[0] for s in load_splits()]))
    everything = torch.cat([split.tensors[0].flatten(1) for split in splits])
    assert len(everything.unique(dim=0)) == 1797  # no image is in two splits


def test_resnet_has_twenty_layers() -> None:
    from digits import DigitsClassifier
    from torch import nn

    module = DigitsClassifier(width=4)
    shortcuts = [m for name, m in module.named_modules() if "shortcut.0" in name]
    layers = [m for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in shortcuts]
    assert len(layers) == 20
    assert module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert type(module.configure_optimizers()) is torch.optim.SGD


def test_classes_and_shares_to_forget() -> None:
    from forgetting import choose_forget

    labels = torch.arange(1000) % 10
    assert choose_forget(labels, "class", 3.0, seed=0) == list(range(3, 1000, 10))
    drawn = choose_forget(labels, "random", 0.1, seed=0)
    assert len(set(drawn)) == 100 and set(labels[drawn].tolist()) == set(range(10))
    assert drawn == choose_forget(labels, "random", 0.1, seed=0) != choose_forget(labels, "random", 0.1, seed=1)


@pytest.mark.parametrize(("rho", "least", "most"), [(0.0, 100, 100), (0.5, 50, 65), (1.0, 2, 20)])
def test_mixture_of_a_class_and_random_samples(rho: float, least: int, most: int) -> None:
    from forgetting import choose_forget

    labels = torch.arange(1000) % 10
    chosen = choose_forget(labels, "mixture", rho, seed=0)
    assert len(set(chosen)) == 100
    # The random part holds a few more of the class: about 50 * 50/950 and 100 * 100/1000 are expected.
    assert least <= int((labels[chosen] == 3).sum()) <= most


@pytest.mark.parametrize("argv", [["--forget", "class:10"], ["--forget", "all"], ["--rho", "2"], ["--rho", "x"]])
def test_wrong_arguments_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from quickstart import parse_args

    with pytest.raises(SystemExit):
        parse_args(argv)
    assert argv[0] in capsys.readouterr().err


def test_evaluation_is_in_eval_mode_and_leaves_no_trace() -> None:
    from digits import DigitsClassifier, load_splits
    from evaluation import evaluate

    module, (_, val, _) = DigitsClassifier(width=4), load_splits()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    first, second = evaluate(module, val), evaluate(module, val)
    assert torch.equal(first.losses, second.losses) and len(first.labels) == len(val)
    assert module.training and all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def run_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *argv: str) -> Any:
    import quickstart
    from digits import DigitsClassifier

    monkeypatch.setattr(quickstart, "EPOCHS", 1)
    monkeypatch.setattr(quickstart, "MEASURE_EVERY", 3)
    monkeypatch.setattr(quickstart, "DigitsClassifier", lambda: DigitsClassifier(width=4))
    monkeypatch.setattr(quickstart, "RETRAINED", 3)
    monkeypatch.setattr(quickstart, "ATTACKS", ("round_4bit",))
    if argv:  # one of the runs writes its report
        monkeypatch.setattr(quickstart, "write_report", lambda *_: "")
    options = ["--steps", "4", "--workers", "1", "--out", str(tmp_path)]
    return quickstart.run(quickstart.parse_args([*argv, *options]))


def make_samples(*logits: list[float], label: int = 0) -> Any:
    from evaluation import Samples

    return Samples(torch.tensor(logits), torch.full((len(logits),), label))


def test_distances_of_a_retrained_model_are_those_from_the_others() -> None:
    from evaluation import make_row

    right, wrong = make_samples([200.0, 0.0]), make_samples([0.0, 200.0])
    first, second, original = (
        make_row(name, right, forget, right, gone=[])
        for name, forget in (("retrained", right), ("another retrained", wrong), ("original", right))
    )
    retrained = [first, second]
    # Of four numbers the accuracy on the forget set differs by 1, and the AUC of one sample against one by 1/2.
    assert first.gap(retrained) == second.gap(retrained) == pytest.approx(1.5 / 4)
    assert first.js(retrained) == second.js(retrained) == pytest.approx(1)
    assert original.gap(retrained) == pytest.approx(0.75 / 4) and original.js(retrained) == pytest.approx(0.5)


def test_test_samples_of_a_class_that_goes_count_for_the_membership_test_alone() -> None:
    from evaluation import Samples, make_row

    kept = make_samples([3.0, 0.0])
    test = Samples(torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 1]))
    row = make_row("unlearned", kept, make_samples([1.0, 0.0], label=1), test, gone=[1])
    assert len(row.test.labels) == 1 and row.test.accuracy == 1
    assert row.auc == 1  # the forgotten sample's loss is lower than that of the test sample of its class


@pytest.mark.filterwarnings("ignore:.*`validation_step` but have no `val_dataloader`.*")
@pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning")
@pytest.mark.filterwarnings("ignore:The forget loss is .* before the first step:UserWarning")
@pytest.mark.parametrize("argv", [(), ("--rho", "0.5")])
def test_small_run_from_end_to_end(argv: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluation import format_table
    from quickstart import draw, explain

    result = run_small(tmp_path, monkeypatch, *argv)
    assert [row.name for row in result.rows] == ["original", "unlearned", "retrained", *["another retrained"] * 2]
    assert (
        result.floor == pytest.approx(100 / 3 * sum(row.gap(result.retrained) for row in result.retrained))
        and result.floor > 0
    )
    # The first point of the path is the original.
    assert result.path[0][1:] == (result.rows[0].retain.loss, result.rows[0].forget.loss)
    assert [step for step, _, _ in result.path] == [0, 3, 4] and result.history.steps.tolist() == [1, 2, 3, 4]
    assert result.summary.startswith("HAMU: 4 combined steps")
    draw(result, tmp_path)
    assert (tmp_path / "tradeoff.png").exists() and (tmp_path / "hardness.png").exists()
    if not argv:
        assert result.verdict in unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert bool(result.verdict) != bool(argv)
    assert list(tmp_path.glob("logs/unlearned/events.out.tfevents.*"))
    table = format_table(result.rows, result.retrained, [3])
    assert "without 3" in table and "without" not in format_table(result.rows, result.retrained, [])
    assert all(len(line) <= 80 for line in f"{table}\n{explain(result)}".splitlines())


@pytest.mark.slow
@pytest.mark.usefixtures("short_networks")
@pytest.mark.filterwarnings("ignore:.*`validation_step` but have no `val_dataloader`.*")
@pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning")
@pytest.mark.filterwarnings("ignore:The forget loss is .* before the first step:UserWarning")
def test_same_seed_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (run_small(tmp_path / name, monkeypatch, "--rho", "0") for name in "ab")
    assert first.path == second.path
    assert [row.auc for row in first.rows] == [row.auc for row in second.rows]
