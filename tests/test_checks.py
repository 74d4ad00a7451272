"""One place that checks arguments: what is a number, a count, a flag; and what is told of anything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hamu_lightning.checks import (
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_optional,
    check_seed,
    describe,
    is_iterable,
)
from hamu_lightning.errors import HAMUValueError

NUMBERS = [
    2,
    2.0,
    -0.0,
    np.float32(0.5),
    np.float64(0.5),
    np.int64(2),
    torch.tensor(0.5),
    torch.tensor(2),
    np.array(0.5),
]
NO_NUMBERS = [None, "x", "1e-3", True, np.bool_(True), torch.tensor(True), torch.ones(1), [], {}, object(), int, 1j]


@pytest.mark.parametrize("value", [*NUMBERS, Fraction(1, 2), 2**70, 1e300, 1e-320])
def test_numbers_of_all_kinds_become_floats(value: Any) -> None:
    found = check_number("x", value)
    assert type(found) is float and found == float(value)


@pytest.mark.parametrize("value", NO_NUMBERS, ids=[type(value).__name__ for value in NO_NUMBERS])
@pytest.mark.parametrize("check", [check_number, check_count])
def test_what_is_no_number_is_refused(check: Callable[..., Any], value: Any) -> None:
    with pytest.raises(HAMUValueError, match="Expected `x` to be .*number, but got "):
        check("x", value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, torch.tensor(math.nan), np.float32("inf")])
def test_what_is_not_finite_is_refused(value: Any) -> None:
    with pytest.raises(HAMUValueError, match="Expected `x` to be a finite number, but got .* It has to be finite"):
        check_number("x", value)


@pytest.mark.parametrize("value", [2, np.int64(2), np.uint8(2), torch.tensor(2), np.array(2)])
def test_counts_of_all_kinds_become_ints(value: Any) -> None:
    found = check_count("x", value)
    assert type(found) is int and found == 2


@pytest.mark.parametrize("value", [1.5, 2.0, np.float64(2), torch.tensor(2.0), math.inf, math.nan])
def test_a_count_is_whole(value: Any) -> None:
    with pytest.raises(HAMUValueError, match="Expected `x` to be at least 1, a whole number, but got "):
        check_count("x", value)


def test_ranges_are_told() -> None:
    for call, wanted in (
        (lambda: check_count("x", 0), "to be at least 1, but got 0."),
        (lambda: check_count("x", 2**70), f"to be at most {2**63 - 1}, but got {2**70}."),
        (lambda: check_number("x", 1, least=0, below=1), "to be at least 0 and below 1, but got 1.0."),
        (lambda: check_number("x", 2, least=0, most=1), "to be between 0 and 1, but got 2.0."),
        (lambda: check_number("x", 0, above=0, cure="Try 1."), "to be positive, but got 0.0. Try 1."),
        (lambda: check_number("x", "1e-3"), "YAML reads 1e-3 as text, and 1.0e-3 as a number."),
        (lambda: check_seed(10**400), "`seed` to be at most"),
        (lambda: check_flag("x", 1), "to be True or False, but got 1."),
        (lambda: check_choice("x", torch.ones(3), ("a", "b")), "to be one of 'a', 'b', but got a Tensor of shape [3]"),
    ):
        with pytest.raises(HAMUValueError) as caught:
            call()
        assert wanted in str(caught.value)


def test_flags_and_optional_values() -> None:
    assert check_flag("x", np.bool_(False)) is False and check_flag("x", True) is True
    assert check_optional(check_count, "x", None) is None and check_optional(check_count, "x", 3) == 3


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def test_nothing_of_the_data_is_told() -> None:
    """Types and sizes, whatever an argument holds; and never another error in its place."""
    rows = TensorDataset(torch.tensor([[1.25, 7.5]]), torch.tensor([3]))
    told = {
        "a TensorDataset of length 1": rows,
        "a Subset of length 1": torch.utils.data.Subset(rows, [0]),
        "a DataLoader": DataLoader(Endless()),
        "a list of length 1": [["Jane Doe", "AB-123"]],
        "a dict of length 1": {"Jane Doe": 1.25},
        "text of 19 characters": "Jane Doe, born 1980",
        "a Tensor of shape [2] and torch.float32": torch.tensor([1.25, 7.5]),
        "an array of shape [2] and float64": np.array([1.25, 7.5]),
        "the class int": int,
        "a function": lambda: 1.25,
        "an integer of 1329 bits": 10**400,
        "'best_effort'": "best_effort",
        "None": None,
        "0.5": np.float32(0.5),
    }
    assert {describe(value) for value in told.values()} == set(told)
    assert [describe(value) for value in told.values()] == list(told)


def test_what_a_loop_can_go_over() -> None:
    assert all(map(is_iterable, ([], {}, torch.ones(2), iter([]), DataLoader(Endless()))))
    assert not any(map(is_iterable, ("text", b"", None, 1.0, torch.tensor(1.0), int, np.float32(1))))
