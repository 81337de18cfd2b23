"""How long until something happens, and how much memory does loading take?

`imports`: what the three packages add, in one process, to transformers and to what it loads for any model.
`predict`: `medsight predict` from cold against either import plus the answer by itself.
`load`: a random sharded checkpoint of `--preset`, written once, loaded in a fresh process, where every weight is then
read (files that are mapped are not before): peak memory by its size.
Resident memory counts the pages of files that are mapped, private memory only what was copied (on Linux, which alone
tells).

Rows: what, base_s, s, added_s (imports: s - base_s), answer_s, ratio (imports: s / base_s; predict: s / (base_s +
answer_s); load: peak_bytes / file_bytes), file_bytes, peak_bytes, private_ratio.

    python -m benchmarks.startup --preset small --output startup.json
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from medsight.inference.predictor import Predictor

from . import measuring, random_inputs


LOADED = """
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoProcessor, BaseImageProcessor, GenerationMixin, PreTrainedModel, ProcessorMixin
"""
IMPORTS = f"""
import json, time
start = time.perf_counter()
import torch, transformers
bare = time.perf_counter()
{LOADED}
loaded = time.perf_counter()
import configuration_medsight, modeling_medsight, processing_medsight
print(json.dumps([bare - start, loaded - start, time.perf_counter() - start]))
"""
LOAD = """
import json, sys, threading
from pathlib import Path
from benchmarks.startup import process_memory
from modeling_medsight import MedSightForConditionalGeneration
from transformers.models.auto import modeling_auto, tokenization_auto  # what loading imports is not its memory

before, private, done = process_memory("VmRSS"), process_memory("RssAnon"), threading.Event()
most = [0]
def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], process_memory("RssAnon"))
watcher = threading.Thread(target=watch)
watcher.start()
Path("/proc/self/clear_refs").write_text("5")
model = MedSightForConditionalGeneration.from_pretrained(sys.argv[1], dtype="auto")
for weight in model.parameters():
    weight.sum()
peak = process_memory("VmHWM")
done.set()
watcher.join()
print(json.dumps([peak - before, most[0] - private]))
"""


def process_memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def run_python(*arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:2])[:80]}: {done.stderr.strip()[-500:]}")
    return done.stdout


def import_rows(chosen: Any) -> list[dict[str, Any]]:
    rounds = [json.loads(run_python("-c", IMPORTS)) for _ in range(chosen.warmup + chosen.repeats)][chosen.warmup :]
    bare, loaded, whole = zip(*rounds, strict=True)
    return [
        {
            "what": f"imports, over {name}",
            "base_s": measuring.spread(base),
            "s": measuring.spread(whole),
            "added_s": measuring.spread([w - b for w, b in zip(whole, base, strict=True)]),
            "ratio": measuring.ratio(whole, base),
        }
        for name, base in {
            "torch and transformers with what any model loads": loaded,
            "import torch, transformers": bare,
        }.items()
    ]


def predict_rows(chosen: Any, device: torch.device) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        image, question = Path(folder) / "image.png", "Segment the lesion."
        Image.effect_noise((320, 256), 60).convert("RGB").save(image)
        command = ["-m", "medsight.cli", "predict", str(image), "--prompt", question, "--model", str(chosen.model)]
        command += ["--device", str(device), "--output", f"{folder}/answer", "--overwrite"]
        cases: dict[str, Callable[[], Any]] = {
            "bare": partial(run_python, "-c", "import torch, transformers"),
            "loaded": partial(run_python, "-c", f"import torch, transformers\n{LOADED}"),
            "predict": partial(run_python, *command),
            "answer": partial(Predictor(chosen.model, device=str(device)), image, question),
        }
        times = measuring.paired(cases, chosen, device)
    return [
        {
            "what": f"predict, over {name}",
            "base_s": measuring.spread(times[base]),
            "s": measuring.spread(times["predict"]),
            "answer_s": measuring.spread(times["answer"]),
            "ratio": measuring.ratio(times["predict"], list(map(sum, zip(times[base], times["answer"], strict=True)))),
        }
        for name, base in {
            "import torch, transformers": "bare",
            "these with what any model loads": "loaded",
        }.items()
    ]


def load_row(chosen: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        model = random_inputs.random_model(chosen.preset, torch.device("cpu"), torch.bfloat16)
        model.save_pretrained(folder, max_shard_size=max(random_inputs.weight_bytes(model) // 4, 2**16))
        del model
        sizes = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
        peaks = [json.loads(run_python("-c", LOAD, folder)) for _ in range(chosen.repeats)]
    return {
        "what": f"load {chosen.preset}, {len(sizes)} files",
        "file_bytes": sum(sizes),
        "peak_bytes": max(peak for peak, _ in peaks),
        "ratio": measuring.spread([peak / sum(sizes) for peak, _ in peaks]),
        "private_ratio": measuring.spread([private / sum(sizes) for _, private in peaks]),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.startup", __doc__)
    measuring.add_folder(options)
    options.add_argument("--preset", default="small", help="of the checkpoint that is loaded")
    options.add_argument("--folder", type=Path, metavar="DIR", help="where it is written for that time")
    parts = ["imports", "predict", "load"]
    options.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=", ".join(parts))
    chosen = options.parse_args(arguments)
    device, _ = measuring.prepare(chosen)
    rows = import_rows(chosen) if "imports" in chosen.only else []
    rows += predict_rows(chosen, device) if "predict" in chosen.only else []
    rows += [load_row(chosen)] if "load" in chosen.only else []
    return measuring.report(chosen, device, rows)


if __name__ == "__main__":
    main()
