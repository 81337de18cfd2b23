"""How long until something happens, and how much memory does loading take?"""

import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from medsight.checkpoint import shipped_checkpoint
from medsight.inference.predictor import Predictor
from modeling_medsight import MedSightForConditionalGeneration

from .measuring import Row, paired, ratio, spread
from .random_inputs import random_model, weight_bytes


BARE = "import torch, transformers"
LOADED = """
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoProcessor, BaseImageProcessor, GenerationMixin, PreTrainedModel, ProcessorMixin
"""
IMPORTS = f"""
import json, time
start = time.perf_counter()
{BARE}
bare = time.perf_counter()
{LOADED}
loaded = time.perf_counter()
import configuration_medsight, modeling_medsight, processing_medsight
print(json.dumps([bare - start, loaded - start, time.perf_counter() - start]))
"""


def startup(device: torch.device, preset: str, repeats: int = 7, warmup: int = 2) -> list[Row]:
    """`imports`: what the three packages add, in one process, to transformers and to what it loads for any model.
    `predict`: `medsight predict` from cold against either import plus the answer by itself. `load`: see `loading`.

    Rows: what, s, added_s (imports: above the base), ratio (predict: to base and answer); those of `loading`.
    """
    rounds = [json.loads(run_python("-c", IMPORTS)) for _ in range(warmup + repeats)][warmup:]
    bare, loaded, whole = zip(*rounds, strict=True)
    rows = []
    for name, base in {"torch and transformers with what any model loads": loaded, BARE: bare}.items():
        added = spread([w - b for w, b in zip(whole, base, strict=True)])
        rows.append({"what": f"imports, over {name}", "s": spread(whole), "added_s": added})
    with tempfile.TemporaryDirectory() as folder:
        image, question = Path(folder) / "image.png", "Segment the lesion."
        Image.effect_noise((320, 256), 60).convert("RGB").save(image)
        command = ["-m", "medsight.cli", "predict", str(image), "--prompt", question, "--device", str(device)]
        command += ["--output", f"{folder}/answer", "--overwrite"]
        cases: dict[str, Callable[[], Any]] = {
            BARE: partial(run_python, "-c", BARE),
            "these with what any model loads": partial(run_python, "-c", BARE + LOADED),
            "predict": partial(run_python, *command),
            "answer": partial(Predictor(shipped_checkpoint(), device=str(device)), image, question),
        }
        times = paired(cases, device, repeats, warmup)
    for name in list(cases)[:2]:
        expected = [base + answer for base, answer in zip(times[name], times["answer"], strict=True)]
        quotient = ratio(times["predict"], expected)
        rows.append({"what": f"predict, over {name}", "s": spread(times["predict"]), "ratio": quotient})
    return [*rows, *loading(device, preset, repeats)]


def loading(device: torch.device, preset: str, repeats: int = 7) -> list[Row]:
    """A random sharded checkpoint, written once, loaded onto the CPU in a fresh process, where every weight is then
    read (files that are mapped are not before): peak memory by the files' size.

    Resident memory counts the pages of files that are mapped, private memory only what was copied (on Linux, which
    alone tells).

    Rows: what, file_bytes, peak_bytes, ratio (peak_bytes / file_bytes), private_ratio.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(preset, torch.device("cpu"), torch.bfloat16)
        model.save_pretrained(folder, max_shard_size=max(weight_bytes(model) // 4, 2**16))
        del model
        sizes = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
        context = multiprocessing.get_context("spawn")
        peaks = []
        for _ in range(repeats):
            with context.Pool(1) as pool:
                peaks.append(pool.apply(loading_peaks, (folder,)))
    return [
        {
            "what": f"load {preset}, {len(sizes)} files",
            "file_bytes": sum(sizes),
            "peak_bytes": max(peak for peak, _ in peaks),
            "ratio": spread([peak / sum(sizes) for peak, _ in peaks]),
            "private_ratio": spread([private / sum(sizes) for _, private in peaks]),
        }
    ]


def loading_peaks(folder: str) -> tuple[int, int]:
    """Bytes by which resident and private memory of this process rise at most while it loads a checkpoint."""
    from transformers.models.auto import modeling_auto, tokenization_auto  # noqa: F401  no memory of the checkpoint's

    before, private, done = process_memory("VmRSS"), process_memory("RssAnon"), threading.Event()
    most = private

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, process_memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    Path("/proc/self/clear_refs").write_text("5")  # peaks are counted from here
    model = MedSightForConditionalGeneration.from_pretrained(folder, dtype="auto")
    for weight in model.parameters():
        weight.sum()
    peak = process_memory("VmHWM")
    done.set()
    watcher.join()
    return peak - before, most - private


def process_memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def run_python(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
