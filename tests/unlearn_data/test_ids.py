"""What ids are taken for: lists, arrays, masks, files; and which samples they mean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from hamu_lightning import UnlearnData
from hamu_lightning.errors import HAMUValueError


class Records(Dataset[Any]):
    """Samples 0, 10, 20, ...; the table has the columns of a DataFrame."""

    def __init__(self, size: int = 6, **held: Any) -> None:
        self.size = size
        vars(self).update(held)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return torch.tensor(10 * index)


class Table:
    """What a DataFrame, a pyarrow Table and a Dataset of Hugging Face have in common."""

    def __init__(self, **columns: Any) -> None:
        self.columns, self._values = [*columns], columns

    def __getitem__(self, name: str) -> Any:
        return self._values[name]


class Wrapper(Dataset[Any]):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return {"who": f"c{index // 2}", "x": torch.tensor(10 * index)}


def forgotten(dataset: Any, forget: Any, **options: Any) -> list[int]:
    """The samples to forget, by position; what is retained is the rest."""
    data = UnlearnData(DataLoader(dataset, batch_size=2), forget, **options)
    kept, gone = (loader.dataset.indices for loader in (data.train_dataloader(), data.forget_dataloader()))
    assert sorted(kept + gone) == [*range(len(dataset))]
    return gone


@pytest.mark.parametrize(
    "forget",
    [
        [1, 4],
        (4, 1),
        range(1, 5, 3),
        torch.tensor([4, 1]),
        torch.tensor([[1], [4]]),
        np.array([1, 4], dtype=np.int16),
        [1.0, 4.0],
        ["1", " 4"],
        [False, True, False, False, True, False],
        torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.bool),
        np.array([0, 1, 0, 0, 1, 0], dtype=bool),
        lambda sample: int(sample) in (10, 40),
    ],
)
def test_positions_masks_and_a_function(forget: Any) -> None:
    assert forgotten(Records(), forget) == [1, 4]


WHO = ["a", "b", "b", "c", "a", "d"]
NUMBERS = [7, 8, 8, 9, 7, 10]


@pytest.mark.parametrize(
    ("dataset", "by"),
    [
        (Records(who=WHO), "who"),
        (Records(who=np.array(WHO)), "who"),
        (Records(who=[name.encode() for name in WHO]), "who"),
        (Records(table=Table(who=WHO, x=NUMBERS)), "who"),
        (Records(columns={"who": WHO}), "who"),
        (Records(rows=[{"who": name} for name in WHO]), "who"),
        (Wrapper(Records(who=WHO)), "who"),
        (Wrapper(Subset(Records(8, who=["b", "x", *WHO]), range(2, 8))), "who"),
        (ConcatDataset([Records(2, who=WHO[:2]), Records(4, who=WHO[2:])]), "who"),
        (Records(targets=[0, 1, 1, 2, 0, 3], class_to_idx={"a": 0, "b": 1, "c": 2, "d": 3}), "targets"),
        (Records(), WHO),
        (Records(), lambda dataset: WHO[: len(dataset)]),
    ],
)
def test_values_of_a_column(dataset: Any, by: Any) -> None:
    assert forgotten(dataset, ["b", "d"], by=by) == [1, 2, 5]


@pytest.mark.parametrize(
    "values", [NUMBERS, torch.tensor(NUMBERS), np.array(NUMBERS, dtype=float), [*map(str, NUMBERS)]]
)
@pytest.mark.parametrize("ids", [[8, 10], ["8", "10"]])
def test_numbers_and_text_are_the_same_id(values: Any, ids: Any) -> None:
    assert forgotten(Records(number=values), ids, by="number") == [1, 2, 5]


def test_an_id_is_found_as_number_and_as_text() -> None:
    """In a union each Dataset has its own way to write ids."""
    union = ConcatDataset([Records(3, number=[7, 8, 9]), Records(3, number=["7", "8", "007"])])
    for id_ in (7, "7"):
        assert forgotten(union, [id_], by="number") == [0, 3]
    text = Records(4, number=["007", "7", " 7 ", "07"])
    assert forgotten(text, ["007"], by="number") == [0]
    assert forgotten(text, [7], by="number") == [1, 2]


def test_a_gap_is_no_id() -> None:
    gaps = Records(3, number=[1.0, float("nan"), None])
    assert forgotten(gaps, [1], by="number") == [0]
    for gap in (float("nan"), None):
        with pytest.raises(HAMUValueError, match=r"but 1 is not: (nan|None)\."):
            forgotten(gaps, [1, gap], by="number")


def test_samples_that_stand_in_the_data_twice_are_said() -> None:
    base = Records(4, who=["a", "b", "c", "d"])
    union = ConcatDataset([Subset(base, [0, 1]), Subset(base, [1, 2, 3])])
    with pytest.warns(UserWarning, match="^1 of the samples to forget stands in the training data more than once"):
        assert forgotten(union, [1, 4]) == [1, 4]
    assert forgotten(union, ["b"], by="who") == [1, 2]


def test_a_tensor_of_a_tensor_dataset_and_samples_that_are_dicts() -> None:
    assert forgotten(TensorDataset(torch.arange(6), torch.tensor(NUMBERS)), [7], by=1) == [0, 4]
    assert forgotten(Rows(), ["c1"], by="who") == [2, 3]


def test_files_of_an_image_folder() -> None:
    files = ["/d/cat/1.png", "/d/cat/2.png", "/d/dog/1.png", "/d/dog/3.png"]
    dataset = Records(4, samples=[(file, i // 2) for i, file in enumerate(files)], root="/d")
    assert forgotten(dataset, ["/d/cat/1.png", "dog/1.png", "3.png"], by="samples") == [0, 2, 3]
    with pytest.raises(HAMUValueError, match=r"but 1 is not: 1.png\."):  # two files have this name
        forgotten(dataset, ["1.png"], by="samples")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ids.txt", "b\n\nd\n"),
        ("ids.csv", "who\nb\nd\n"),
        ("ids.csv", "b\nd\n"),
        ("ids.csv", "customer\nb\nd\n"),
        ("ids.csv", '\ufeffdate,who\n2026-01-01,b\n2026-01-02,"d"\n'),
        ("ids.csv", "date;who\r\n2026-01-01;b\r\n2026-01-02;d\r\n"),
        ("ids.tsv", "who\tdate\nb\t2026\nd\t2026\n"),
    ],
)
def test_files_of_ids(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert forgotten(Records(who=WHO), tmp_path / name, by="who") == [1, 2, 5]


def test_a_file_of_positions(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("row\n1\n4\n")
    assert forgotten(Records(), str(tmp_path / "ids.csv")) == [1, 4]


@pytest.mark.parametrize("first", ["z9", "9", "z@x.org", "z/1.png"])
def test_an_unknown_id_in_the_first_line_is_no_header(first: str, tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text(f"{first}\nb\n")
    with pytest.raises(HAMUValueError, match=f"but 1 is not: {first}"):
        forgotten(Records(who=WHO), tmp_path / "ids.csv", by="who")
    if first == "9":
        (tmp_path / "ids.csv").write_text("9\n4\n")
        with pytest.raises(HAMUValueError, match="but 1 is not: 9. Positions"):
            forgotten(Records(), tmp_path / "ids.csv")


def test_ids_that_do_not_exist_are_listed() -> None:
    ids = ["b", *(f"z{i}" for i in range(7))]
    with pytest.raises(HAMUValueError, match=r"but 7 are not: z0, z1, z2, z3, z4 and 2 more\. If they are rightly"):
        forgotten(Records(who=WHO), ids, by="who")
    with pytest.warns(UserWarning, match="z0, z1, z2, z3, z4 and 2 more. The others are to be forgotten"):
        assert forgotten(Records(who=WHO), ids, by="who", missing="warn") == [1, 2]
    with pytest.raises(HAMUValueError, match="but 1 is not: z"):
        forgotten(Records(who=WHO), ["z"], by="who", missing="warn")
    with pytest.raises(HAMUValueError, match=r"but 2 are not: 6, -1\. Positions count from 0"):
        forgotten(Records(), [1, 6, -1])


def test_repeated_ids_are_said() -> None:
    with pytest.warns(UserWarning, match="^2 ids of 'forget' were given more than once"):
        assert forgotten(Records(), [1, 4, 1, 1]) == [1, 4]


def test_requests_that_overlap_are_said() -> None:
    data = UnlearnData(DataLoader(Records(), batch_size=2), {"a": [1, 2, 3], "b": [3, 2]})
    with pytest.warns(UserWarning, match="'b' and 'a' share 2 samples"):
        loaders = data.forget_dataloaders()
    assert {name: loader.dataset.indices for name, loader in loaders.items()} == {"a": [1, 2, 3], "b": [2, 3]}
    assert data.forget_dataloader().dataset.indices == [1, 2, 3]
    assert data.names == {0: 1, 1: 2, 2: 3, ("a", 0): 1, ("a", 1): 2, ("a", 2): 3, ("b", 0): 2, ("b", 1): 3}


@pytest.mark.parametrize(
    ("forget", "options", "message"),
    [
        ("none.csv", {}, "to name a file of ids, but 'none.csv' cannot be read"),
        ([], {}, "at least one id"),
        (None, {}, "to be ids, but got None"),
        (3, {}, "to be ids, but got 3"),
        ([True], {}, "a mask with one of True and False for each of the 6 samples, but got 1"),
        ([*range(6)], {}, "some samples to forget and some to retain, but got 6 of 6"),
        ({"retain": [1]}, {}, "names of requests other than 'retain'"),
        (["b"], {"by": "whom"}, r"to have 'whom', .* There is 'who'; or give the values"),
        (["b"], {"by": 3}, "to have 3"),
        (["b"], {"by": WHO[1:]}, "a value for each of the 6 samples"),
        ([1], {"holdout": [1, 2]}, "no sample both in `forget` and in `holdout`, but got 1"),
        ([1], {"missing": "skip"}, "missing"),
        ([1], {"batch_size": 3}, "`batch_size` to go with a Dataset"),
    ],
)
def test_what_is_refused(forget: Any, options: Any, message: str) -> None:
    with pytest.raises(HAMUValueError, match=message):
        forgotten(Records(who=WHO), forget, **options)


def test_a_file_without_the_column(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("a,b\n1,2\n")
    with pytest.raises(HAMUValueError, match="a column 'who' in .*, but its first line names 2 others"):
        forgotten(Records(who=WHO), tmp_path / "ids.csv", by="who")
    (tmp_path / "ids.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HAMUValueError, match="text in UTF-8"):
        forgotten(Records(who=WHO), tmp_path / "ids.txt", by="who")


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(7))


def test_a_stream_is_parted_by_a_function() -> None:
    requests = {"a": lambda sample: sample == 1, "b": lambda sample: sample == 4}
    loader = DataLoader(Stream(), batch_size=2, drop_last=True)
    data = UnlearnData(loader, requests, holdout=lambda sample: sample == 6)
    assert torch.cat([*data.train_dataloader()]).tolist() == [0, 2, 3, 5]
    assert torch.cat([*data.forget_dataloader()]).tolist() == [1, 4]
    assert torch.cat([*data.forget_dataloaders()["b"]]).tolist() == [4]
    assert torch.cat([*data.holdout_dataloader()]).tolist() == [6]
    with pytest.raises(
        HAMUValueError, match="a function that is true for a sample to forget, since Stream is a stream"
    ):
        UnlearnData(loader, [1]).train_dataloader()
