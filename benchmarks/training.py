"""How fast is training? Steps of stage 4 against plain fine-tuning of the same language model on the same tokens, and
what options cost and save; with `--recipe`, images a second of a real run, and how long it waits for its data.

Both kinds of step of stage 4 read the same token ids and train the same weights of the language model (LoRA adapters,
or all); ours also sees images and learns masks. An option that cannot run here (no GPU, package missing) gives a row
that says why.

Facts: rate (operations a second that utilisation is a share of: `--peak-tflops`, or a measured matrix product's),
waiting_share (`--recipe`: share of the run spent waiting for data).
Rows: what (stage 4's method with its option, or the stage), batch_size, step_s, plain_s, ratio (ours / plain),
utilisation (model operations a second as a share of the rate: forward and backward, none counted twice for gradient
checkpointing), peak_bytes (of a step above the weights), images_per_s, why (what kept an option from running).

    python -m benchmarks.training --preset 8b --device cuda --batch-size 1 --method lora --peak-tflops 989 \\
        --options checkpointing adamw-8bit --output training.json
    python -m benchmarks.training --recipe nano --stage perceiver --steps 50 --output loader.json
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from medsight.training.adapters import add_adapters
from medsight.training.recipe import load_recipe
from medsight.training.run import train
from medsight.training.stage import PARTS, train_only
from medsight.training.stage_conversations import ConversationSettings
from medsight.training.trainer import StageTrainer

from . import measuring, random_inputs


OPTIONS = ("checkpointing", "adamw-8bit")
METHODS = ("full", "lora")
TRAINED = ["language_model", "vision_to_text", "text_to_vision"]  # by stage 4


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.training", __doc__)
    measuring.add_shape(options, (1,))
    options.add_argument("--method", choices=METHODS, default="lora")
    options.add_argument(
        "--options", nargs="*", default=[], metavar="OPTION", help=f"{', '.join(OPTIONS)}, or several joined by +"
    )
    options.add_argument("--words", type=int, default=128, help="of a conversation, besides the image")
    options.add_argument("--codes", type=int, default=2, help="cited in each")
    options.add_argument("--peak-tflops", type=float, help="of the device in this dtype, by its data sheet")
    options.add_argument("--recipe", help="time a real run by this recipe instead")
    options.add_argument("--stage", default="perceiver", help="with --recipe: the stage; the others are left out")
    options.add_argument("--steps", type=int, default=50, help="with --recipe")
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="with --recipe: overrides")
    chosen = options.parse_args(arguments)
    unknown = {name for option in chosen.options for name in option.split("+")} - set(OPTIONS)
    if unknown:
        options.error(f"--options {' '.join(sorted(unknown))}: expected {', '.join(OPTIONS)}")
    device, dtype = measuring.prepare(chosen)
    if chosen.recipe:
        with tempfile.TemporaryDirectory() as folder:
            overrides = [f"output={folder}/run", f"stages.{chosen.stage}.max_steps={chosen.steps}", *chosen.set]
            recipe = load_recipe(chosen.recipe, overrides)
            recipe.stages = [entry for entry in recipe.stages if entry["name"] == chosen.stage]
            row = time_run(recipe, chosen.stage)
        return measuring.report(chosen, device, [row], waiting_share=row["waiting_share"])
    rate = chosen.peak_tflops * 1e12 if chosen.peak_tflops else measuring.matmul_rate(device, dtype)
    rows = [
        unified_row(chosen, device, dtype, size, option, rate)
        for size in chosen.batch_size
        for option in ("", *chosen.options)
    ]
    return measuring.report(chosen, device, rows, rate=rate)


def unified_row(
    chosen: Any, device: torch.device, dtype: torch.dtype, size: int, option: str, rate: float
) -> dict[str, Any]:
    """A step of stage 4 and one of plain fine-tuning, with options or none."""
    row: dict[str, Any] = {"what": " + ".join(filter(None, ("stage 4", chosen.method, option))), "batch_size": size}
    model = random_inputs.random_model(chosen.preset, device, dtype)
    config = model.config
    if chosen.method == "lora":
        trained = add_adapters(model, ConversationSettings(method="lora", trains=TRAINED))
    else:
        train_only(model, [prefix for part in TRAINED for prefix in PARTS[part]])
        trained = model
    trained.train()
    plain = random_inputs.plain_language_model(model)
    if "checkpointing" in option:
        for checkpointed in (model, plain):
            checkpointed.gradient_checkpointing_enable({"use_reentrant": False})

    inputs = random_inputs.prompts(config, [chosen.words] * size, device, dtype)
    for number in range(chosen.codes):  # cited at the end, where an answer stands
        inputs["input_ids"][:, -2 - 3 * number] = config.region_code_start_id + number % config.num_region_codes
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == config.image_token_id, -100)
    masks = [(torch.rand(chosen.codes, *config.mask_size, device=device) > 0.7).float() for _ in range(size)]
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def ours() -> torch.Tensor:
        return trained(**inputs, labels=labels, mask_labels=masks).loss

    def theirs() -> torch.Tensor:
        return plain(**text, labels=labels).loss

    try:
        optimiser = optimiser_of(trained, in_8_bits="adamw-8bit" in option)
        flop = flop_of(model, lambda: ours().backward())
        optimiser.zero_grad()
        cases = {"step": partial(step, ours, optimiser), "plain": partial(step, theirs, optimiser)}
        times = measuring.paired(cases, chosen, device)
        peak = measuring.peak_memory(cases["step"], device)
    except (ImportError, RuntimeError, ValueError) as error:  # no such package, out of memory, another device's kernel
        return {**row, "step_s": None, "why": " ".join(str(error).split())[:120]}
    return {
        **row,
        **measuring.seconds(times),
        "ratio": measuring.ratio(times["step"], times["plain"]),
        "utilisation": measuring.spread([flop / value / rate for value in times["step"]]),
        "peak_bytes": peak,
    }


def step(loss: Callable[[], torch.Tensor], optimiser: torch.optim.Optimizer) -> None:
    loss().backward()
    optimiser.step()
    optimiser.zero_grad()


def flop_of(model: Any, passes: Callable[[], Any]) -> int:
    """Floating-point operations of passes, none made twice for gradient checkpointing, with attention written out: the
    counter does not know the fused kernels' grouped heads."""
    implementation, checkpointing = model.config._attn_implementation, model.is_gradient_checkpointing
    model.set_attn_implementation("eager")
    if checkpointing:
        model.gradient_checkpointing_disable()
    with FlopCounterMode(display=False) as counter:
        passes()
    model.set_attn_implementation(implementation)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return counter.get_total_flops()


def optimiser_of(model: torch.nn.Module, in_8_bits: bool = False) -> torch.optim.Optimizer:
    """AdamW over what a model trains."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not in_8_bits:
        return torch.optim.AdamW(weights, lr=1e-6)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, lr=1e-6)


def time_run(recipe: Any, stage: str) -> dict[str, Any]:
    """Trains one stage by a recipe, for the time that its steps take and the part of it that they wait for data."""
    fetch, waits, marks = StageTrainer.get_batch_samples, [], []

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = fetch(self, *args, **kwargs)
        waits.append(time.perf_counter() - start)
        marks.append((start, self.args.train_batch_size * self.args.gradient_accumulation_steps))
        return result

    with patch.object(StageTrainer, "get_batch_samples", timed):
        train(recipe, stage)
    if len(marks) < 3:
        raise RuntimeError(f"stage {stage} made {len(marks)} steps in {recipe.output}; at least 3 are needed")
    # From the second step on: the first one opens files and starts workers.
    steps, batch_size = len(marks) - 2, marks[0][1]
    whole = marks[-1][0] - marks[1][0]
    return {
        "what": f"stage {stage}, by its recipe",
        "batch_size": batch_size,
        "step_s": whole / steps,
        "waiting_share": sum(waits[1:-1]) / whole,
        "images_per_s": batch_size * steps / whole,
    }


if __name__ == "__main__":
    main()
