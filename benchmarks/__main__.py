"""Run the benchmarks of a kind of machine, or single ones, and write docs/performance.md from what they gave.

    python -m benchmarks cpu
    python -m benchmarks gpu-perceiver gpu-decoding
    python -m benchmarks

The last one runs nothing: it only writes the page. Every run is a process of its own and writes a JSON file; one that
fails leaves the others alone. The benchmark that trains and the one of masks in few bits read ../shared/data.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from medsight.text import nearest

from . import page


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: how many runs failed."""
    options = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ["cpu", "gpu", *page.RUNS]
    options.add_argument("what", nargs="*", metavar="RUN", help=f"of {', '.join(known)}")
    options.add_argument("--results", type=Path, default=page.RESULTS, metavar="DIR", help="of the JSON files")
    options.add_argument("--page", type=Path, default=page.PAGE, metavar="FILE", help="that is written")
    chosen = options.parse_args(arguments)
    for name in chosen.what:
        if name not in known:
            options.error(f"unknown run {name!r}; {nearest(name, known)}")
    failed = []
    for name in page.RUNS:
        if not {name, name.partition("-")[0]} & set(chosen.what):
            continue
        command = page.command_of(name)
        print(f"{name}: {command}", flush=True)
        file = chosen.results / f"{name}.json"
        file.unlink(missing_ok=True)  # so that a run that fails does not leave what another machine measured
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, *shlex.split(command)[1:], "--output", os.path.relpath(file)], check=False
        )
        print(f"{name}: {time.monotonic() - start:.0f} s\n", flush=True)
        if done.returncode:
            failed.append(name)
    page.write(chosen.results, chosen.page)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
