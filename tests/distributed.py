"""Several processes on one machine, for tests of what is exchanged between ranks."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing import ProcessRaisedException

# The first ranks wait for imports, which take seconds on a loaded machine; the exchange itself takes milliseconds.
TIMEOUT = 120.0
# What most ranks import, and the time of which they consist: the fork server does so once. It runs no threads.
IMPORTS = ["hamu_lightning.callbacks", "hamu_lightning.metrics", "torch.distributed.tensor", "pytest"]


def run_ranks(fn: Callable[..., Any], world_size: int = 2, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Run `fn(rank, *args)` in `world_size` processes that form a gloo process group, and return what they returned.

    The ranks find each other through a file, so that no port is taken, and talk over the loopback interface. They are
    forked from one process that has imported Lightning, and so iterate over a set of strings in the same order.
    `tests/callbacks/test_spawn.py` looks at ranks of which each is an interpreter of its own.

    Args:
        fn: A function at module level (the processes import it by name). Its result is pickled.
        world_size: Number of processes.
        *args: Further arguments of `fn`, pickled.
        timeout: Seconds until the processes are ended.

    Raises:
        torch.multiprocessing.ProcessRaisedException: With the traceback of the first process that failed.
        TimeoutError: If the processes did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.get_context("forkserver").set_forkserver_preload(IMPORTS)
        context = mp.start_processes(
            _run, (fn, world_size, folder, timeout, args), world_size, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{fn.__name__} did not end on {world_size} ranks within {timeout} s.")
        except ProcessRaisedException as error:
            first = Path(folder) / "error"
            if first.exists():
                pid = getattr(error, "error_pid", 0)  # torch 2.6 has it under another name
                raise ProcessRaisedException(first.read_text(), error.error_index, pid) from None
            raise
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(world_size)]


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result_{rank}"


def _run(
    rank: int, fn: Callable[..., Any], world_size: int, folder: str, timeout: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    np.random.seed()  # the fork server's state is the same for all
    # As a launcher sets them: Lightning then starts no processes of its own.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0", WORLD_SIZE=str(world_size))
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = (Path(folder) / "store").as_uri()
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    try:
        result = fn(rank, *args)
        _result(folder, rank).write_bytes(pickle.dumps(result))
    except Exception:
        # Before the connections close: the other ranks fail then, and their errors say nothing of the cause.
        own = Path(folder) / f"error_{rank}"
        own.write_text(f"Rank {rank} failed:\n{traceback.format_exc()}")
        with suppress(FileExistsError):
            os.link(own, Path(folder) / "error")
        raise
    finally:
        dist.destroy_process_group()
