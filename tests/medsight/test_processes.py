"""Processes that work together, and the folder that they work in."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medsight.processes import LOCK_FILE, lock


TOGETHER = """
import time
from datetime import timedelta

import torch

from medsight.processes import gather, join_processes, on_main

def fail():
    raise ValueError("on purpose")

state = join_processes(cpu=True, timeout=timedelta(seconds=2))
rank = state.process_index
assert gather(10 * rank) == [0, 10]
assert on_main(lambda: time.sleep(4) or rank) == 0
try:
    on_main(fail)
except ValueError as error:
    assert str(error) == "on purpose"
    print("raised", rank, flush=True)
began = time.monotonic()
if rank == 0:
    try:
        torch.distributed.barrier()
    except RuntimeError:
        assert time.monotonic() - began < 30
        print("hung", flush=True)
on_main(lambda: None)
state.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_wait_for_one_that_works_and_not_for_a_collective_that_hangs(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(TOGETHER, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, tmp_path / "together.py"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["hung", "raised 0", "raised 1"]


def test_a_folder_is_worked_in_once_at_a_time_and_stays_only_with_content(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with (
        lock(folder, "training"),
        pytest.raises(ValueError, match="run: another process is training there"),
        lock(folder, "training"),
    ):
        pass
    assert not folder.exists()
    with lock(folder, "training"):
        (folder / "model").touch()
    assert {path.name for path in folder.iterdir()} - {LOCK_FILE} == {"model"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EROFS])
def test_a_file_system_without_locks_is_told_from_a_folder_that_is_taken(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    if number == errno.EROFS:
        with pytest.raises(OSError, match="Read-only"), lock(tmp_path, "training"):
            pass
        return
    with lock(tmp_path, "training"):
        said = f"{tmp_path}: its file system has no locks ({os.strerror(number)}); make sure that no other process is"
        assert said in capsys.readouterr().err
