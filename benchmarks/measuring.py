"""What the benchmarks share: options, paired timing, memory, the machine's description, a table and a JSON file."""

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from configuration_medsight.presets_medsight import PRESETS
from medsight.checkpoint import shipped_checkpoint
from medsight.files import write_json
from medsight.text import align


NOT_MEASURED = "not measured"
PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "peft", "bitsandbytes")


def parser(module: str, description: str | None, repeats: int = 7) -> argparse.ArgumentParser:
    """The options of every benchmark; a benchmark adds its own."""
    options = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.set_defaults(module=module)
    options.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options.add_argument("--repeats", type=int, default=repeats, help="timed rounds; every case once in each")
    options.add_argument("--warmup", type=int, default=2, help="rounds before these")
    options.add_argument("--output", type=Path, metavar="FILE", help="JSON of the results")
    return options


def add_shape(options: argparse.ArgumentParser, batch_sizes: Sequence[int] = (1, 8)) -> None:
    """Options of benchmarks that draw a random model of a preset."""
    options.add_argument("--preset", default="nano", choices=sorted(PRESETS))
    options.add_argument("--batch-size", type=int, nargs="+", default=list(batch_sizes), metavar="N")


def add_lengths(options: argparse.ArgumentParser) -> None:
    """Options of benchmarks that generate."""
    options.add_argument("--prompt-words", type=int, default=32, help="of the longest prompt, besides the image")
    options.add_argument("--new-tokens", type=int, default=24, help="of the longest answer")


def add_folder(options: argparse.ArgumentParser) -> None:
    """Options of benchmarks that need a trained model."""
    options.add_argument("--model", type=Path, default=shipped_checkpoint(), metavar="DIR", help="checkpoint folder")


def prepare(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """The device and its dtype: bfloat16 on a GPU, which is taken by default, and float32 on a CPU."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    return torch.device(name), torch.bfloat16 if name.startswith("cuda") else torch.float32


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


def seconds(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
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
    """Prints the rows as a table, writes everything as JSON if `--output` asks for it, and returns that.

    The JSON has `benchmark`, `command`, `settings`, `machine`, `facts` and `rows`. A spread is a median with
    quartiles; what could not be measured is null.
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
    names = list(dict.fromkeys(name for row in rows for name in row))
    print(align([names, *([cell(row[name]) if name in row else "" for name in names] for row in rows)]))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, record)
    return record


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
