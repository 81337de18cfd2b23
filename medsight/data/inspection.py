"""Decodes the images and masks of rows, in parallel processes, and says what is wrong with them."""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from itertools import islice
from multiprocessing import get_context
from typing import Any

from .pictures import EmptyMaskError, MaskSizeError, picture_name, read_mask, read_picture
from .report import Finding


_CHUNK = 16  # rows a task


@dataclasses.dataclass(frozen=True)
class Job:
    """The pictures of one row: `owners[i]` is the index of the image of mask i.

    Example:
        >>> job = Job(images=[{"path": "nowhere.png", "bytes": None}], masks=[], owners=[])
        >>> [finding.kind for finding in inspect_pictures([job])]
        ['missing image']
    """

    images: list[dict[str, Any]]
    masks: list[dict[str, Any]]
    owners: list[int]


def inspect_in_parallel(jobs: Iterable[Job], workers: int) -> Iterator[list[Finding]]:
    """What is wrong with the pictures of some rows at a time, in order; few rows are in memory at once.

    Args:
        jobs: drawn as they are needed.
        workers: processes; 1 stays in this one.
    """
    rows = iter(jobs)
    chunks = iter(lambda: list(islice(rows, _CHUNK)), [])
    if workers == 1:
        for cached in (_image_file, _mask_file):
            cached.cache_clear()  # files may have changed since an earlier check
        yield from map(inspect_pictures, chunks)
        return
    waiting: deque[Future[list[Finding]]] = deque()
    # Spawned, not forked: pyarrow and torch have threads by now, whose locks a forked process would inherit.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for chunk in chunks:
            waiting.append(pool.submit(inspect_pictures, chunk))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def inspect_pictures(jobs: Iterable[Job]) -> list[Finding]:
    """What is wrong with the images and masks of some rows; every one is decoded wholly."""
    findings: list[Finding] = []
    for job in jobs:
        sizes = []
        for entry in job.images:
            size, finding = _image(entry) if entry.get("bytes") is not None else _image_file(entry.get("path"))
            sizes.append(size)
            findings += [finding] if finding else []
        for entry, owner in zip(job.masks, job.owners, strict=True):
            if entry.get("bytes") is not None:
                finding = _mask(entry, sizes[owner])
            else:
                finding = _mask_file(entry.get("path"), sizes[owner])
            findings += [finding] if finding else []
    return findings


# An image, and so its masks, may be in many conversations.
@lru_cache(maxsize=4096)
def _image_file(path: str | None) -> tuple[tuple[int, int] | None, Finding | None]:
    return _image({"path": path})


@lru_cache(maxsize=4096)
def _mask_file(path: str | None, size: tuple[int, int] | None) -> Finding | None:
    return _mask({"path": path}, size)


def _image(entry: dict[str, Any]) -> tuple[tuple[int, int] | None, Finding | None]:
    """An image's size, or what is wrong with it."""
    try:
        return read_picture(entry).size, None
    except FileNotFoundError as error:
        return None, Finding("missing image", picture_name(entry), str(error))
    except (ValueError, OSError) as error:
        return None, Finding("broken image", picture_name(entry), str(error))


def _mask(entry: dict[str, Any], size: tuple[int, int] | None) -> Finding | None:
    """What is wrong with a mask; its size is not looked at where its image's is not known."""
    try:
        read_mask(entry, size or read_picture(entry).size)
        return None
    except MaskSizeError as error:
        kind, message = "mask of another size", str(error)
    except EmptyMaskError as error:
        kind, message = "empty mask", str(error)
    except FileNotFoundError as error:
        kind, message = "missing mask", str(error)
    except (ValueError, OSError) as error:
        kind, message = "broken mask", str(error)
    return Finding(kind, picture_name(entry), message)
