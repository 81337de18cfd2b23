"""The processes that `accelerate launch` or `torchrun` started together, and the folder that they work in."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from medsight.text import note


LOCK_FILE = ".lock"
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def join_processes(cpu: bool, **options: Any) -> PartialState:
    """Meet the other processes of this launch; alone, without any.

    Args:
        cpu: compute on the CPU, also where there is a GPU.
        options: of `torch.distributed.init_process_group`, such as the `timeout` of a collective.

    Raises:
        ValueError: the launcher was asked for more processes than there are.
    """
    state = PartialState(cpu=cpu, **options)
    asked = os.environ.get("WORLD_SIZE", "1")
    # accelerate's launcher for the CPU starts one process whatever it is asked for, and sets a port for several.
    if {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        asked = "several"
    if state.num_processes == 1 and asked != "1":
        raise ValueError(
            f"{asked} processes were asked for and this one is alone: start them with torchrun --nproc_per_node N, or "
            "accelerate launch --config_file training/accelerate/cpu.yaml --num_processes N (without --cpu); or start "
            "one, without a launcher"
        )
    return state


@cache
def waiting_group() -> Any:
    """All processes, where they wait for one that works: however long it takes, it does not hang."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order, in all of them; they wait for each other, however long."""
    state = PartialState()
    if state.num_processes == 1:
        return [value]
    values = [None] * state.num_processes
    torch.distributed.all_gather_object(values, value, group=waiting_group())
    return values


def on_main(work: Callable[[], Any]) -> Any:
    """Do something on the main process alone; all get what it returns, and all raise if it fails."""
    result, error = None, None
    if PartialState().is_main_process:
        try:
            result = work()
        except (OSError, ValueError) as caught:
            error = caught
    result, error = gather((result, error))[0]
    if error is not None:
        raise error
    return result


@contextmanager
def lock(folder: Path, doing: str) -> Iterator[None]:
    """Keep a folder, made if need be, from being worked in twice at once; the lock ends with the main process.

    Where the file system has no locks, that is said, and the work goes on. A folder that stays empty goes again.

    Raises:
        OSError: the folder cannot be written.
        ValueError: another process is `doing` its work there.
    """
    file, is_new = FileLock(folder / LOCK_FILE), not folder.exists()

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file.acquire(blocking=False)
        except Timeout as error:
            raise ValueError(
                f"{folder}: another process is {doing} there; wait for it, or end it (if there is none, remove "
                f"{file.lock_file})"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            reason = f"its file system has no locks ({error.strerror})"
            note(f"{folder}: {reason}; make sure that no other process is {doing} there")

    on_main(acquire)
    try:
        yield
    finally:
        file.release()
        if is_new and PartialState().is_main_process and {path.name for path in folder.iterdir()} <= {LOCK_FILE}:
            shutil.rmtree(folder)
