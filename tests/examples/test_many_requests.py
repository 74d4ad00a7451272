"""The example of many requests: its groups, its table, and a short run."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")


def test_groups_are_disjoint_and_cover_the_training_set() -> None:
    from many_requests import PROTECTED, REQUESTS, load_data

    data = load_data(seed=1)
    groups = {"retain": data.retain, **data.forget, **data.protect}
    assert [*groups] == ["retain", *REQUESTS, *PROTECTED]
    positions = [index for group in groups.values() for index in group.indices]
    assert sorted(positions) == list(range(len(data.train)))
    for name, digit in PROTECTED.items():
        labels = data.train.tensors[1][list(groups[name].indices)]
        assert (labels == digit).all()


def test_the_table_has_a_column_for_each_model() -> None:
    from many_requests import format_table

    table = format_table({"original": {"a": 100.0, "longer": 9.5}, "protected": {"a": 99.0, "longer": 0.0}})
    assert [line.split() for line in table.splitlines()] == [
        ["accuracy,", "%", "original", "protected"],
        ["a", "100.0", "99.0"],
        ["longer", "9.5", "0.0"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("short_networks")
@pytest.mark.filterwarnings("ignore:The fit has ended before the target:UserWarning")
@pytest.mark.filterwarnings("ignore:The target should be reached in:UserWarning")
@pytest.mark.filterwarnings("ignore:The forget loss is .* before the first step:UserWarning")  # barely trained
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import many_requests
    import quickstart

    monkeypatch.setattr(quickstart, "EPOCHS", 3)
    args = many_requests.parse_args(["--steps", "2", "--out", str(tmp_path)])
    rows, costs, summary = many_requests.run(args)
    assert [*rows] == ["original", "unprotected", "protected"]
    assert tuple(costs.shape) == (2, 3)
    assert summary.startswith("HAMU: 2 combined steps")
