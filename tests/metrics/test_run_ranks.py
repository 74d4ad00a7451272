"""The helper that runs a function on several processes."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from tests.distributed import run_ranks


def add_ranks(rank: int, offset: int) -> tuple[int, int, str]:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return int(total), dist.get_world_size(), os.environ["LOCAL_RANK"]


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("no such batch")
    dist.barrier()


def hang(rank: int) -> None:
    time.sleep(60)


def test_results_come_in_the_order_of_ranks() -> None:
    assert run_ranks(add_ranks, 2, 10) == [(21, 2, "0"), (21, 2, "1")]


def test_an_error_of_one_rank_is_raised_and_ends_the_other() -> None:
    with pytest.raises(ProcessRaisedException, match=r"(?s)Rank 1 failed.*ValueError: no such batch"):
        run_ranks(fail_on_one, 2)


def test_timeout() -> None:
    run_ranks(add_ranks, 1, 0)  # the first ranks wait for imports
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="hang did not end on 1 ranks within 1.0 s"):
        run_ranks(hang, 1, timeout=1.0)
    assert time.monotonic() - start < 30
