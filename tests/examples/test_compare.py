"""The comparison's parts: the methods and their equal treatment, a run that is taken up again, a run that explodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")

from hamu_lightning import HAMUCallback
from hamu_lightning.callbacks import PassOptions
from hamu_lightning.methods import Comparison, Method, Search, TrainingRun

STEPS = 7
# The module has a `validation_step`, and the fits have nothing to validate on.
no_validation = pytest.mark.filterwarnings("ignore:.*`validation_step` but have no `val_dataloader`.*")


def make_methods(kind: tuple[str, float] = ("class", 3.0)) -> dict[str, list[Method]]:
    """All methods with the three values that are tried."""
    from compare import make_entries
    from quickstart import load_data

    entries = make_entries(load_data(kind, 0), STEPS)
    methods = {name: entry.method for name, entry in entries.items()}
    return {n: [m.make(v) for v in m.values(3)] if isinstance(m, Search) else [m] for n, m in methods.items()}


@pytest.mark.parametrize("kind", [("class", 3.0), ("random", 0.1), ("mixture", 0.25)])
def test_every_method_builds_with_each_value(kind: tuple[str, float]) -> None:
    methods = make_methods(kind)
    assert len(methods) >= 12
    # The title of the table's first column is this wide.
    assert max(map(len, methods)) <= 22
    for name, made in methods.items():
        assert len(made) == (1 if name in ("HAMU-Q, Unseen", "HAMU-Q, target as is") else 3)
        for method in made:
            if isinstance(method, TrainingRun):
                assert isinstance(method.callback_factory([], 5), HAMUCallback)


def test_methods_of_steps_get_the_same_batches_and_the_same_number_of_steps() -> None:
    for name, made in make_methods().items():
        for method in made:
            if not isinstance(method, TrainingRun):
                continue
            settings = method.callback_factory([], 5).settings  # type: ignore[attr-defined]
            assert (settings.seed, settings.passes) == (5, PassOptions()), name
            assert (method.options["max_epochs"], method.options["max_steps"]) == (-1, STEPS)
            assert ("HAMU" in name) == (method.options.get("gradient_clip_val") is None), name


def test_objectives_are_not_shared_between_fits() -> None:
    for method in (made[0] for made in make_methods().values()):
        if isinstance(method, TrainingRun):
            first, second = (method.callback_factory([], 0).settings.objective for _ in range(2))  # type: ignore[attr-defined]
            assert first is None or first is not second


def run_tiny(out: Path, monkeypatch: pytest.MonkeyPatch, *argv: str) -> tuple[Comparison, dict[str, Any]]:
    import compare
    import problems

    monkeypatch.setattr(problems, "EPOCHS", 1)
    argv = ("--steps", "2", "--trials", "2", "--seeds", "1", "--pool", "2", *argv)
    args = compare.parse_args(["--out", str(out), *argv])
    args.width = 4
    return compare.run(args)


@no_validation
@pytest.mark.usefixtures("short_networks")
def test_a_second_call_reads_what_the_first_one_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compare import format_settings

    names = ["HAMU-Q, quota", "bad teacher", "GRU"]
    argv = ("--relearn", "3", "--methods", *names)
    first, entries = run_tiny(tmp_path, monkeypatch, *argv)
    assert all(0 <= run.numbers["relearn steps"] <= 3 for run in first.runs)
    assert list(entries) == names and set(first.ranking()) == set(names)
    assert [run.path[-1][0] for name in names for run in first.best(name)] == [2, 2, 2]

    def refuse(*args: Any) -> None:
        raise AssertionError("this run was made before")

    monkeypatch.setattr(TrainingRun, "__call__", refuse)
    second, _ = run_tiny(tmp_path, monkeypatch, *argv)
    assert second.runs == first.runs
    assert max(map(len, second.table().splitlines())) <= 120
    assert "quota: HAMU-Q, quota" in format_settings(entries, 2)


@no_validation
@pytest.mark.usefixtures("short_networks")
def test_a_model_that_explodes_ranks_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import compare
    from compare import Entry, step_with

    from hamu_lightning.rules import GradAscent

    wild = {"wild": Entry("nothing", step_with(2, GradAscent(), lr=1e30)), "none": Entry("nothing", lambda m, d, f: m)}
    monkeypatch.setattr(compare, "make_entries", lambda data, steps, lr: wild)
    found, _ = run_tiny(tmp_path, monkeypatch)
    assert found.ranking() == ["none", "wild"]
    assert found.best("wild")[0].score == float("inf")
    found.to_json(tmp_path / "found.json")
    found.plot().savefig(tmp_path / "found.png")


def test_quick_is_narrow_and_has_one_seed() -> None:
    from compare import parse_args

    quick, usual = parse_args(["--quick"]), parse_args(["--rho", "0.25"])
    assert (quick.width, quick.seeds, usual.width, usual.seeds) == (8, 1, 16, 3)
    assert usual.forget == ("mixture", 0.25)
