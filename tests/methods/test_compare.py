"""Comparisons: everything equal but the method, nothing run twice, and results that can be read."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from hamu_lightning import HAMUQ, HAMUCallback, compare
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.errors import HAMUValueError
from hamu_lightning.methods import SSD, Comparison, FisherForgetting, Retrain, Run, Search, TrainingRun
from hamu_lightning.methods._table import confidence, format_cell
from tests.methods.setups import OPTIONS, Classifier, make_samples, make_split, weights_of


def run_with(callback: Callable[[Any, int], Callback]) -> TrainingRun:
    return TrainingRun(callback, OPTIONS)


def hamu(quota: float) -> TrainingRun:
    return run_with(
        lambda forget, seed: HAMUCallback(forget, HAMUQ(quota), passes=PassOptions(batch_size=8), seed=seed)
    )


def run_compare(out: Path, methods: Any, **settings: Any) -> Comparison:
    source, forget = make_split()
    source, forget = settings.pop("data", (source, forget))
    seeds = settings.pop("seeds", (0, 1))
    settings = {"seeds": seeds, "tune_seeds": seeds or None, "pool": 0, "trials": 2, "options": OPTIONS, **settings}
    return compare(Classifier, source, forget, methods, out=out, **settings)


METHODS = {"HAMU": Search(hamu, 1e-3, 1e-1), "SSD": Search(SSD, 0.1, 1.0), "noise": FisherForgetting(1e-8)}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    torch.manual_seed(0)
    metrics = {"norm": lambda module, parts: float(weights_of(module).norm())}
    return run_compare(tmp_path_factory.mktemp("out"), METHODS, metrics=metrics)


def test_all_runs_are_there(result: Comparison) -> None:
    found = sorted((run.name, run.seed, run.trial) for run in result.runs)
    trials = {"HAMU": 2, "SSD": 2, "noise": 1, "original": 1, "retrained": 1}
    assert found == sorted((name, seed, t) for name, n in trials.items() for seed in (0, 1) for t in range(n))
    assert result.gaps("retrained") == [0.0, 0.0]
    assert {run.value for run in result.runs if run.name == "SSD"} == {0.1, 1.0}
    assert all(run.numbers["norm"] > 0 and run.seconds > 0 for run in result.runs)


def test_the_kept_value_has_the_lowest_mean_score(result: Comparison) -> None:
    for name in METHODS:
        means = {}
        for trial in {run.trial for run in result.runs if run.name == name}:
            scores = [run.score for run in result.runs if (run.name, run.trial) == (name, trial)]
            means[trial] = sum(scores) / len(scores)
        assert means[result.chosen[name]] == min(means.values())


def test_paths_begin_at_the_original_and_end_at_the_numbers(result: Comparison) -> None:
    for run in result.runs:
        (origin,) = (r.numbers for r in result.best("original") if r.seed == run.seed)
        assert run.path[0] == (0, origin["retain_loss"], origin["forget_loss"])
        assert run.path[-1][1:] == (run.numbers["retain_loss"], run.numbers["forget_loss"])
    assert [step for step, *_ in result.paths()["SSD"]] == [0, 1]
    assert [len(path) > 2 for name, path in result.paths().items() if name == "HAMU"] == [True]


def test_the_table_is_narrow_and_ranked(result: Comparison) -> None:
    table = result.table()
    assert max(map(len, table.splitlines())) <= 120
    names = [line.split()[0] for line in table.splitlines()[1:6]]
    assert names == ["retrained", "original", *result.ranking()]
    gaps = [sum(result.gaps(name)) for name in result.ranking()]
    assert gaps == sorted(gaps)
    assert "norm" in table


def test_files(result: Comparison, tmp_path: Path) -> None:
    result.to_json(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["ranking"] == result.ranking() and len(content["runs"]) == len(result.runs)
    result.to_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(result.runs)
    assert {(row["name"], int(row["trial"])) for row in rows if row["chosen"] == "True"} == set(result.chosen.items())
    assert float(rows[0]["UA"]) == result.runs[0].numbers["UA"]


def test_the_picture_has_every_method(result: Comparison) -> None:
    pytest.importorskip("matplotlib")
    axes = result.plot().axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()][2:] == result.ranking()
    ends = {str(line.get_label()): line.get_xydata()[-1].tolist() for line in axes.get_lines()}
    for name in METHODS:
        (origin, *_, end) = result.paths()[name]
        assert ends[name] == [origin[1] - end[1], end[2] - origin[2]]


@dataclass(frozen=True)
class Watching:
    """Notes what it is given."""

    notes: list[tuple[int, Tensor, Tensor, float]]
    seed: int = -1

    def __call__(self, module: Any, datamodule: Any, forget: Any) -> Any:
        batches = torch.cat([x for x, _ in datamodule.train_dataloader()])
        self.notes.append((self.seed, weights_of(module), batches, float(torch.rand(()))))
        return module


def test_every_method_sees_the_same(tmp_path: Path) -> None:
    one, two = Watching([]), Watching([])
    run_compare(tmp_path, {"one": one, "between": hamu(1e-2), "two": two})
    assert len(one.notes) == len(two.notes) == 2
    for first, second in zip(one.notes, two.notes, strict=True):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert [note[0] for note in one.notes] == [0, 1]
    assert not torch.equal(one.notes[0][1], one.notes[1][1])


def test_a_method_that_changes_its_module_does_not_spoil_the_next(tmp_path: Path) -> None:
    def zero(module: Any, datamodule: Any, forget: Any) -> Any:
        with torch.no_grad():
            module.net[0].weight.zero_()
        return module

    watching = Watching([])
    run_compare(tmp_path, {"zero": zero, "w": watching}, seeds=(0,))
    assert watching.notes[0][1][:10].abs().min() > 0


@pytest.mark.gpu
def test_on_an_accelerator(tmp_path: Path) -> None:
    device = torch.accelerator.current_accelerator()
    watching = Watching([])
    methods = {"w": watching, "SSD": SSD(0.5), "noise": FisherForgetting(1e-8), "HAMU": hamu(1e-2)}
    run_compare(tmp_path, methods, seeds=(0,), device=device)
    assert watching.notes[0][1].device.type == device.type


def test_the_references_are_trained_on_both_sets_and_on_the_retain_set(tmp_path: Path) -> None:
    source, forget = make_split()
    watching = Watching([])
    result = run_compare(tmp_path, {"w": watching}, data=(source, forget), seeds=(3,))
    retrained = Retrain(Classifier, OPTIONS, seed=3)(None, source)
    accuracy = float((retrained.eval()(source.test.tensors[0]).argmax(dim=1) == source.test.tensors[1]).double().mean())
    assert result.best("retrained")[0].numbers["TA"] == accuracy
    assert not torch.equal(weights_of(retrained), watching.notes[0][1])


class Stop(Exception):
    pass


class Counting(SSD):
    """Counts its runs, and fails after so many."""

    runs: ClassVar[list[float]] = []
    limit: ClassVar[int] = 0

    def __call__(self, module: Any, datamodule: Any, forget: Any) -> Any:
        if len(Counting.runs) == Counting.limit:
            raise Stop
        Counting.runs.append(self.alpha)
        return super().__call__(module, datamodule, forget)


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = {"c": Search(Counting, 0.1, 1.0)}
    monkeypatch.setattr(Counting, "runs", [])
    monkeypatch.setattr(Counting, "limit", 3)
    with pytest.raises(Stop):
        run_compare(tmp_path, methods)
    assert len(list((tmp_path / "runs").iterdir())) == 3
    monkeypatch.setattr(Counting, "limit", 99)
    resumed = run_compare(tmp_path, methods)
    assert Counting.runs == [0.1, 1.0, 0.1, 1.0]
    monkeypatch.setattr(Counting, "limit", 4)
    assert run_compare(tmp_path, methods).runs == resumed.runs
    assert all(run.seconds > 0 for run in resumed.runs)
    # Without interruption the same, but for the time.
    monkeypatch.setattr(Counting, "limit", 99)
    fresh = run_compare(tmp_path / "fresh", methods)
    untimed = [[replace(run, seconds=0.0, memory=0.0) for run in found.runs] for found in (fresh, resumed)]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize("change", ["options", "data", "method", "metrics"])
def test_other_settings_are_other_runs(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "runs", [])
    monkeypatch.setattr(Counting, "limit", 99)
    source, forget = make_split()
    settings: dict[str, Any] = {"seeds": (0,), "data": (source, forget)}
    run_compare(tmp_path, {"c": Counting(1.0)}, **settings)
    if change == "options":
        settings["options"] = {**OPTIONS, "max_epochs": 1}
    if change == "data":
        source.test = make_samples(60, seed=77)
    if change == "metrics":
        settings["metrics"] = {"one": lambda module, parts: 1.0}
    run_compare(tmp_path, {"c": Counting(2.0 if change == "method" else 1.0)}, **settings)
    assert len(Counting.runs) == 2


def test_test_data_do_not_choose(tmp_path: Path) -> None:
    source, forget = make_split()
    first = run_compare(tmp_path / "a", {"SSD": METHODS["SSD"]}, data=(source, forget))
    source.test = make_samples(60, seed=77)
    source.test.tensors[1][:] = 1
    second = run_compare(tmp_path / "b", {"SSD": METHODS["SSD"]}, data=(source, forget))
    assert [run.score for run in first.runs] == [run.score for run in second.runs]
    assert [run.numbers["TA"] for run in first.runs] != [run.numbers["TA"] for run in second.runs]


def test_a_method_that_ends_in_nothing_is_last(tmp_path: Path) -> None:
    def destroy(module: Any, datamodule: Any, forget: Any) -> Any:
        result = SSD()(module, datamodule, forget)
        with torch.no_grad():
            result.net[0].weight.fill_(math.nan)
        return result

    result = run_compare(tmp_path, [destroy, SSD(0.5)])
    assert result.ranking() == ["SSD", "destroy"]
    assert result.best("destroy")[0].score == math.inf
    result.to_json(tmp_path / "a.json")
    assert "NaN" not in (tmp_path / "a.json").read_text()
    pytest.importorskip("matplotlib")
    result.plot()


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`:UserWarning")
def test_a_lightning_datamodule_is_set_up_and_its_hooks_are_used(tmp_path: Path) -> None:
    source, forget = make_split()

    class Data(LightningDataModule):
        scale = 1.0

        stages = ""

        def setup(self, stage: str) -> None:
            self.stages += stage

        def train_dataloader(self) -> Any:
            assert "fit" in self.stages
            return source.train_dataloader()

        def val_dataloader(self) -> Any:
            return source.val_dataloader()

        def test_dataloader(self) -> Any:
            assert "test" in self.stages
            return source.test_dataloader()

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return self.scale * batch[0], batch[1]

    methods = {"SSD": SSD(0.3), "noise": FisherForgetting(1e-8)}
    plain = run_compare(tmp_path / "a", methods, data=(source, forget))
    hooked = run_compare(tmp_path / "b", methods, data=(Data(), forget))
    assert [run.numbers for run in plain.runs] == [run.numbers for run in hooked.runs]
    scaled = Data()
    scaled.scale = 0.5
    other = run_compare(tmp_path / "b", methods, data=(scaled, forget))
    assert all(a.numbers != b.numbers for a, b in zip(plain.runs, other.runs, strict=True))


@pytest.mark.parametrize(
    ("methods", "settings", "message"),
    [
        ([SSD(), SSD(1.0)], {}, "Expected methods of different classes, but got"),
        ({"original": SSD()}, {}, r"Expected other names than \['original'\]"),
        ([SSD()], {"seeds": ()}, "Expected different `seeds`, at least one"),
        ([SSD()], {"seeds": (1, 1)}, "Expected different `seeds`, at least one"),
        ([SSD()], {"trials": 0}, "Expected `trials` to be at least 1"),
        ([SSD()], {"tune_by": "test"}, "Expected `tune_by` to be one of 'retrained', 'validation'"),
    ],
)
def test_wrong_arguments(methods: Any, settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(HAMUValueError, match=message):
        run_compare(tmp_path, methods, **settings)


def test_missing_data(tmp_path: Path) -> None:
    source, forget = make_split()

    class TrainOnly:
        def train_dataloader(self) -> Any:
            return source.train_dataloader()

    with pytest.raises(HAMUValueError, match=r"Expected `datamodule` to have `val_dataloader\(\)`, but TrainOnly"):
        run_compare(tmp_path, [SSD()], data=(TrainOnly(), forget))
    with pytest.raises(HAMUValueError, match="Expected `forget` to come from a Dataset with a length"):
        run_compare(tmp_path, [SSD()], data=(source, list(DataLoader(forget))))


def test_confidence_intervals_are_students() -> None:
    # R: qt(0.975, c(2, 11, 30)) = 4.302653, 2.200985, 2.042272
    for n, quantile in ((3, 4.302653), (12, 2.200985), (31, 2.042272)):
        values = [float(i % 4) for i in range(n)]
        middle = sum(values) / n
        deviation = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1))
        # The table has four digits, the expansion an error of 1e-3.
        assert confidence(values) == pytest.approx((middle, quantile * deviation / math.sqrt(n)), rel=1e-3)
    assert math.isnan(confidence([1.0])[1])


@pytest.mark.parametrize("middle", [0.0, 9.99, 66.7, 272.8, 998.0])
@pytest.mark.parametrize("deviation", [0.0, 3.0, 9.0, 60.0, 300.0, 3000.0])
def test_cells_fit_into_their_column(middle: float, deviation: float) -> None:
    """A method that destroys the model with one of the seeds has an interval wider than its mean."""
    assert len(format_cell([middle - deviation, middle, middle + deviation], 2)) <= 10


def test_one_seed_has_no_interval() -> None:
    numbers = {"UA": 0.1, "RA": 0.9, "TA": 0.8, "MIA": 0.5, "KL": 0.0, "retain_loss": 0.0, "forget_loss": 0.0}
    runs = [Run(n, 0, 0, None, 0.0, numbers, 1.0, math.nan, []) for n in ("original", "retrained", "a" * 40)]
    table = Comparison(runs, {run.name: 0 for run in runs}, "retrained").table()
    assert "±" not in table and table.splitlines()[-1].endswith("-")
