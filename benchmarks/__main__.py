"""Run the benchmarks of a kind of machine, or single runs, and write docs/performance.md from what they gave.

    python -m benchmarks cpu
    python -m benchmarks gpu-perceiver gpu-decoding
    python -m benchmarks gpu-masks-cost --set preset=small batch_sizes=[4]
    python -m benchmarks

With --set a run is only printed; the last command only writes the page. Every run is a process of its own and writes a
JSON file; one that fails leaves the others alone. The run that trains and the one in few bits read ../shared/data.
"""

import argparse
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any

import yaml

from medsight.text import nearest

from . import page
from .inference import batches, decoding, masks_cost, perceiver, quantised, two_step
from .measuring import Row, measure
from .startup import loading, startup
from .training import training


# A name begins with the kind of machine. Each benchmark's docstring says what it asks, and the fields of its rows.
RUNS: dict[str, tuple[Callable[..., list[Row]], dict[str, Any]]] = {
    "cpu-masks-cost": (masks_cost, {"preset": "nano", "batch_sizes": [1]}),
    "cpu-batches": (batches, {"preset": "nano"}),
    "cpu-stage-1": (training, {"recipe": "nano", "stage": "perceiver", "steps": 50}),
    "cpu-quantised": (quantised, {"data": "../shared/data/segmentation", "items": 64}),
    "cpu-startup": (startup, {"preset": "small"}),
    "cpu-load-8b": (loading, {"preset": "8b", "repeats": 1}),
    "cpu-two-step": (two_step, {}),
    "gpu-masks-cost": (masks_cost, {"preset": "8b", "batch_sizes": [1, 8]}),
    "gpu-decoding": (decoding, {"preset": "8b", "batch_size": 1}),
    "gpu-decoding-32": (decoding, {"preset": "8b", "batch_size": 32}),
    "gpu-perceiver": (perceiver, {"preset": "8b", "batch_sizes": [1, 8]}),
    "gpu-batches": (batches, {"preset": "8b"}),
    "gpu-stage-1": (
        training,
        {"recipe": "nano", "stage": "perceiver", "steps": 200, "overrides": ["training.dataloader_num_workers=7"]},
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: how many runs failed."""
    asked = dict.fromkeys(f"{function.__name__}: {inspect.getdoc(function)}" for function, _ in RUNS.values())
    options = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="\n\n".join(asked),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ["cpu", "gpu", *RUNS]
    options.add_argument("what", nargs="*", metavar="RUN", help=f"of {', '.join(known)}")
    options.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of these runs")
    chosen = options.parse_args(arguments)
    for name in chosen.what:
        if name not in known:
            options.error(f"unknown run {name!r}; {nearest(name, known)}")
    changes = {key: yaml.safe_load(value) for key, _, value in (entry.partition("=") for entry in chosen.set)}
    failed = []
    for name, (function, settings) in RUNS.items():
        if not {name, name[:3]} & set(chosen.what):
            continue
        file = None if changes else page.RESULTS / f"{name}.json"
        if file is not None:
            file.unlink(missing_ok=True)  # so that a run that fails does not leave what another machine measured
        start = time.monotonic()
        process = get_context("spawn").Process(target=measure, args=(name, function, {**settings, **changes}, file))
        process.start()
        process.join()
        print(f"{name}: {time.monotonic() - start:.0f} s\n", flush=True)
        if process.exitcode:
            failed.append(name)
    if not changes:
        page.write()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
