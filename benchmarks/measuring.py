"""What the benchmarks share: a run and its record, paired timing, memory, and a device's rates."""

import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medsight.files import write_json
from medsight.text import align


NOT_MEASURED = "not measured"
PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "peft", "bitsandbytes")

Row = dict[str, Any]


def measure(name: str, function: Callable[..., list[Row]], settings: dict[str, Any], file: Path | None) -> None:
    """Runs a benchmark, prints its rows as a table, and writes everything as JSON. What is not measured is null."""
    device = torch.device("cuda" if name.startswith("gpu") else "cpu")
    rows = function(device, **settings)
    fields = list(dict.fromkeys(field for row in rows for field in row))
    print(align([fields, *([cell(row[field]) if field in row else "" for field in fields] for row in rows)]))
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "benchmark": function.__name__,
        "command": f"python -m benchmarks {name}",
        "settings": settings,
        "machine": machine(device),
        "rows": rows,
    }
    write_json(file, record)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def paired(
    cases: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int = 7, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every case in every round. Rounds go through the cases forwards and backwards in turn, so that what
    else the machine does falls on all of them alike."""
    for _ in range(warmup):
        for run in cases.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(repeats):
        for name in list(cases)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds_of(cases[name], device))
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    return dict(zip(("low", "median", "high"), np.percentile(values, [25, 50, 75]).tolist(), strict=True))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Spread of the quotients, round by round."""
    return spread([n / d for n, d in zip(numerators, denominators, strict=True)])


def seconds(times: Mapping[str, Sequence[float]]) -> Row:
    """Spreads of what `paired` gives, as the fields `NAME_s` of a row."""
    return {f"{name}_s": spread(values) for name, values in times.items()}


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes of a GPU that a call takes above what was taken before; `None` on a CPU, which does not count them."""
    if device.type != "cuda":
        return None
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    synchronise(device)
    return torch.cuda.max_memory_allocated(device) - before


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large square matrix product; the best of ten."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: left @ right, device) for _ in range(10))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by copying a large tensor; the best of ten."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / min(seconds_of(lambda: target.copy_(source), device) for _ in range(10))


def machine(device: torch.device) -> dict[str, Any]:
    """Where a result is measured. A processor has the name that it gives itself (Linux), or its architecture's."""
    about = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.+)$", about.read_text("utf-8"), re.MULTILINE) if about.exists() else None
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processor": named[1] if named else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES if find_spec(package)},
    }


def cell(value: Any) -> str:
    """A text as it is; a number with three digits; a spread as its median and, in brackets, its ends."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, dict):
        return f"{cell(value['median'])} ({cell(value['low'])}–{cell(value['high'])})"
    if isinstance(value, str):
        return value
    if abs(value) >= 100:
        return f"{value:.0f}"
    digits = f"{value:.3g}"
    return digits if "e" not in digits else f"{value:.5f}".rstrip("0")
