"""What the benchmarks share: options, paired timing, memory, the machine's description, a table and a JSON file."""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from configuration_medsight.presets_medsight import PRESETS


PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "peft", "bitsandbytes", "liger-kernel")


def parser(module: str, description: str | None, repeats: int = 7) -> argparse.ArgumentParser:
    """The options of every benchmark; a benchmark adds its own."""
    options = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.set_defaults(module=module)
    options.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    options.add_argument("--repeats", type=int, default=repeats, help="timed rounds; every case once in each")
    options.add_argument("--warmup", type=int, default=2, help="rounds before these")
    options.add_argument("--threads", type=int, help="of torch on a CPU")
    options.add_argument("--output", type=Path, metavar="FILE", help="JSON of the results")
    return options


def add_shape(options: argparse.ArgumentParser, batch_sizes: Sequence[int] = (1, 8)) -> None:
    """Options of benchmarks that draw a random model of a preset."""
    options.add_argument("--preset", default="nano", choices=sorted(PRESETS))
    options.add_argument("--batch-size", type=int, nargs="+", default=list(batch_sizes), metavar="N")


def add_folder(options: argparse.ArgumentParser) -> None:
    """Options of benchmarks that need a trained model."""
    shipped = Path(__file__).resolve().parents[1] / "medsight" / "medsight-nano"
    options.add_argument("--model", type=Path, default=shipped, metavar="DIR", help="checkpoint folder")


def prepare(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """Device and dtype that were asked for; by default a GPU in bfloat16, or the CPU in float32."""
    if options.threads:
        torch.set_num_threads(options.threads)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device = torch.device(name)
    if options.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, options.dtype)


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
    cases: Mapping[str, Callable[..., Any]], options: argparse.Namespace, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every case in every round. Rounds go through the cases forwards and backwards in turn, so that what
    else the machine does falls on all of them alike."""
    for _ in range(options.warmup):
        for run in cases.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(options.repeats):
        for name in list(cases)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds_of(cases[name], device))
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles (of fewer than four values: the extremes)."""
    if len(values) < 4:
        return {"median": statistics.median(values), "low": min(values), "high": max(values)}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Spread of the quotients, round by round."""
    return spread([n / d for n, d in zip(numerators, denominators, strict=True)])


def peak_memory(run: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that a call takes above what was taken before; `None` where the system does not tell.

    On a GPU what tensors take, on a CPU the process' resident memory (Linux).
    """
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    run()  # what libraries keep from a first call on is held before
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is counted from here
        before = process_memory("VmRSS")
    except OSError:
        run()
        return None
    run()
    return max(0, process_memory("VmHWM") - before)


@contextmanager
def blocks_given_back() -> Iterator[None]:
    """Let the allocator (glibc's) return blocks from 64 KiB on to the system once they are free, so that resident
    memory is what is in use. It does so only in a process that has not used much memory before."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    threshold = -3  # M_MMAP_THRESHOLD
    if set_option is not None:
        set_option(threshold, 2**16)
    yield
    if set_option is not None:
        set_option(threshold, 2**25)  # what it grows to by itself


def process_memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """Floating-point operations a second of a large square matrix product; the best of ten."""
    size = size or (8192 if device.type == "cuda" else 1024)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = min(seconds_of(lambda: left @ right, device) for _ in range(10))
    return 2 * size**3 / best


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes read and written a second by copying a large tensor; the best of ten."""
    size = size or (2**30 if device.type == "cuda" else 2**27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), device) for _ in range(10))
    return 2 * size / best


def machine(device: torch.device) -> dict[str, Any]:
    """Where a result was measured."""

    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "gpu": gpu,
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: of(package) for package in PACKAGES},
    }


def processor() -> str:
    """The name that the processor gives itself (Linux), or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def report(
    options: argparse.Namespace, device: torch.device, rows: list[dict[str, Any]], **facts: Any
) -> dict[str, Any]:
    """Print the rows as a table, write all as JSON where it was asked for, and return it.

    The JSON has `benchmark`, `command`, `settings`, `machine`, `facts` and `rows`. A spread is a median with
    quartiles; what could not be measured here is null.
    """
    settings = {name: os.path.relpath(v) if isinstance(v, Path) else v for name, v in vars(options).items()}
    module = settings.pop("module")
    settings.pop("output")
    record = {
        "benchmark": module.rpartition(".")[2],
        "command": f"python -m {module} {' '.join(sys.argv[1:])}".strip(),
        "settings": settings,
        "machine": machine(device),
        "facts": facts,
        "rows": rows,
    }
    for name, value in facts.items():
        print(f"{name}: {cell(value)}")
    print_table(rows)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        partial = options.output.with_name(f".{options.output.name}.partial")
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, options.output)
    return record


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns are the rows' fields, in the order in which they come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([cell(row[name]) if name in row else "" for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "not measured"
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g} ({value['low']:.4g}-{value['high']:.4g})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
