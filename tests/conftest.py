"""What all tests share."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is no accelerator."""
    if torch.accelerator.is_available():
        return
    skip = pytest.mark.skip(reason="needs an accelerator")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Give each test the same random numbers, whatever ran before it in the same process."""
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:  # `torch.manual_seed` writes down the stack for each kind of accelerator, a millisecond or more
        torch.default_generator.manual_seed(0)
