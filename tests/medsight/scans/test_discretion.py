"""What pydicom and its kin say of a file may quote a patient: nobody hears it, and everything else is heard."""

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest

from medsight.scans import open_scan
from medsight.scans.dicom_file import guarded
from tests.medsight.scans.scan_files import STORED, dicom_bytes, dicom_dataset


pytest.importorskip("pydicom")
LOGGERS = ("pydicom", "pydicom.pixels.decoders.base", "highdicom.seg.sop")


@pytest.fixture
def state() -> Iterator[None]:
    """Nothing of the process's own is another after the test than before."""

    def now() -> list:
        loggers = [logging.getLogger(name) for name in LOGGERS]
        return [list(warnings.filters), *((each.level, each.disabled, list(each.filters)) for each in loggers)]

    before = now()
    yield
    assert now() == before


def speak(text: str) -> None:
    for name in LOGGERS:
        logging.getLogger(name).warning(text)
    warnings.warn(text, stacklevel=1)


@pytest.mark.usefixtures("state")
def test_threads_that_read_are_not_heard_and_others_are(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    rounds, together, failed = 50, threading.Barrier(6), []

    def work(reads: bool) -> None:
        together.wait()
        for _ in range(rounds):
            with guarded("file", "damaged") if reads else nullcontext():
                with guarded("file", "damaged") if reads else nullcontext():
                    pass
                speak("Doe^Secret" if reads else "heard")

    def read(content: bytes, expected: np.ndarray) -> None:
        together.wait()
        for _ in range(rounds):
            if not np.array_equal(open_scan(content).slice_image(0, (100, 4000)), expected):
                failed.append(content)

    content = dicom_bytes(dicom_dataset(STORED, SpecificCharacterSet="Doe^Secret"))
    warnings.simplefilter("always")
    caplog.clear()
    recwarn.clear()
    seen = np.asarray(open_scan(content).slice_image(0, (100, 4000)))
    speak("used before")  # a logger remembers what it is enabled for
    workers = [threading.Thread(target=work, args=(bool(i % 2),)) for i in range(4)]
    workers += [threading.Thread(target=read, args=(content, seen)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    speak("used after")
    said = [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in recwarn]
    assert not failed and not any("Doe" in text for text in said)
    for text, times in (("heard", 2 * rounds), ("used before", 1), ("used after", 1)):
        assert said.count(text) == times * (len(LOGGERS) + 1)


@pytest.mark.usefixtures("state")
def test_one_scan_is_shown_to_many_threads_as_to_one() -> None:
    frames = np.stack([STORED + 100 * i for i in range(8)])
    scan, shown = open_scan(dicom_bytes(dicom_dataset(frames))), {}
    expected = [np.asarray(open_scan(dicom_bytes(dicom_dataset(frame))).slice_image(0)) for frame in frames]
    workers = [threading.Thread(target=lambda i=i: shown.update({i: scan.slice_image(i)})) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(shown[i], expected[i]) for i in range(8))
