"""How fast is training? Steps of stage 4 against plain fine-tuning of the same language model on the same tokens; what
options cost and save; images a second of stage 1; and, with `--recipe`, how long a real run waits for its data.

Both kinds of step of stage 4 read the same token ids and train the same weights of the language model (LoRA adapters,
or all); ours also sees images and learns masks. An option that cannot run here (no GPU, package missing) gives a row
that says why.

Facts: rate (operations a second that utilisation is a share of: `--peak-tflops`, or a measured matrix product's),
rate_measured, tokens (a step), waiting_share (`--recipe`: share of the run spent waiting for data).
Rows: what (stage 4's method with its option, or stage 1), batch_size, step_s, plain_s, ratio (ours / plain),
utilisation (model operations a second as a share of the rate: forward and backward, none counted twice for gradient
checkpointing), peak_bytes (of a step above the weights), images_per_s, why (what kept an option from running).

    python -m benchmarks.training --preset 8b --device cuda --batch-size 1 --method lora --peak-tflops 989 \\
        --options checkpointing fused-loss adamw-8bit --output training.json
    python -m benchmarks.training --recipe nano --stage perceiver --steps 50 --output loader.json
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import measuring, random_inputs


OPTIONS = ("checkpointing", "fused-loss", "adamw-8bit")
METHODS = ("full", "lora")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.training", __doc__)
    measuring.add_shape(options, (1,))
    options.add_argument("--method", nargs="+", choices=METHODS, default=["lora"])
    options.add_argument(
        "--options", nargs="*", default=[], metavar="OPTION", help=f"{', '.join(OPTIONS)}, or several joined by +"
    )
    options.add_argument("--words", type=int, default=128, help="of a conversation, besides the image")
    options.add_argument("--codes", type=int, default=2, help="cited in each")
    options.add_argument("--peak-tflops", type=float, help="of the device in this dtype, by its data sheet")
    options.add_argument("--recipe", help="time a real run by this recipe instead")
    options.add_argument("--stage", default="perceiver", help="with --recipe: the stage; those before it are left out")
    options.add_argument("--steps", type=int, default=50, help="with --recipe")
    options.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="with --recipe: overrides")
    chosen = options.parse_args(arguments)
    unknown = {name for option in chosen.options for name in option.split("+")} - set(OPTIONS)
    if unknown:
        options.error(f"--options {' '.join(sorted(unknown))}: expected {', '.join(OPTIONS)}")
    device, dtype = measuring.prepare(chosen)
    if chosen.recipe:
        from medsight.training.recipe import load_recipe

        with tempfile.TemporaryDirectory() as folder:
            names = [entry["name"] for entry in load_recipe(chosen.recipe).stages]
            before = itertools.takewhile(lambda name: name != chosen.stage, names)
            overrides = [f"output={folder}/run", f"stages.{chosen.stage}.max_steps={chosen.steps}"]
            overrides += [*(f"stages.{name}=null" for name in before), *chosen.set]
            row = time_run(load_recipe(chosen.recipe, overrides), chosen.stage)
        return measuring.report(chosen, device, [row], waiting_share=row["waiting_share"])
    measured = chosen.peak_tflops is None
    rate = measuring.matmul_rate(device, dtype) if measured else chosen.peak_tflops * 1e12
    rows = []
    for size in chosen.batch_size:
        for method in chosen.method:
            for option in ("", *chosen.options):
                rows.append(unified_row(chosen, device, dtype, size, method, option, rate))
        rows.append(perceiver_row(chosen, device, dtype, size))
    tokens = [row["tokens"] for row in rows if "tokens" in row]
    return measuring.report(
        chosen, device, rows, rate=rate, rate_measured=measured, tokens=tokens[0] if tokens else None
    )


def unified_row(
    chosen: Any, device: torch.device, dtype: torch.dtype, size: int, method: str, option: str, rate: float
) -> dict[str, Any]:
    """A step of stage 4 and one of plain fine-tuning, with options or none."""
    from medsight.training.adapters import add_adapters
    from medsight.training.stage import PARTS, train_only
    from medsight.training.stage_conversations import ConversationSettings

    parts = ["language_model", "vision_to_text", "text_to_vision"]
    row: dict[str, Any] = {"what": " + ".join(filter(None, ("stage 4", method, option))), "batch_size": size}
    model = random_inputs.random_model(chosen.preset, device, dtype)
    config = model.config
    if method == "lora":
        trained = add_adapters(model, ConversationSettings(trains=parts, method="lora"))
    else:
        train_only(model, [prefix for part in parts for prefix in PARTS[part]])
        trained = model
    trained.train()
    plain = random_inputs.plain_language_model(model)
    if "checkpointing" in option:
        for one in (model, plain):
            one.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        optimiser = optimiser_of([p for p in trained.parameters() if p.requires_grad], "adamw-8bit" in option)
        loss_of = fused_loss() if "fused-loss" in option else None
    except (ImportError, RuntimeError, ValueError) as error:
        return {**row, "step_s": None, "why": " ".join(str(error).split())}

    inputs = random_inputs.prompts(config, [chosen.words] * size, device, dtype)
    ids = inputs["input_ids"].clone()
    for number in range(chosen.codes):  # cited at the end, where an answer stands
        ids[:, -2 - 3 * number] = config.region_code_start_id + number % config.num_region_codes
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    masks = [(torch.rand(chosen.codes, *config.mask_size, device=device) > 0.7).float() for _ in range(size)]
    read = {**inputs, "input_ids": ids}
    text = {name: read[name] for name in ("input_ids", "attention_mask")}

    def step(loss: Callable[[], torch.Tensor]) -> None:
        loss().backward()
        optimiser.step()
        optimiser.zero_grad()

    def ours() -> torch.Tensor:
        if loss_of is None:
            return trained(**read, labels=labels, mask_labels=masks).loss
        # The whole model's forward on a single column of logits, and the loss of words from the hidden states.
        out = trained(**read, mask_labels=masks, logits_to_keep=1, output_hidden_states=True)
        return out.mask_loss + loss_of(model.lm_head, out.hidden_states[-1], labels)

    def theirs() -> torch.Tensor:
        if loss_of is None:
            return plain(**text, labels=labels).loss
        return loss_of(plain.lm_head, plain.model(**text).last_hidden_state, labels)

    try:
        flop = flop_of(model, lambda: trained(**read, labels=labels, mask_labels=masks).loss.backward())
        optimiser.zero_grad()
        times = measuring.paired({"step": lambda: step(ours), "plain": lambda: step(theirs)}, chosen, device)
        peak = measuring.peak_memory(lambda: step(ours), device)
    except RuntimeError as error:  # out of memory, or a kernel that is not for this device
        return {**row, "step_s": None, "why": " ".join(str(error).split())[:120]}
    return {
        **row,
        "tokens": int(inputs["attention_mask"].sum()),
        **{f"{name}_s": measuring.spread(values) for name, values in times.items()},
        "ratio": measuring.ratio(times["step"], times["plain"]),
        "utilisation": measuring.spread([flop / value / rate for value in times["step"]]),
        "peak_bytes": peak,
    }


def perceiver_row(chosen: Any, device: torch.device, dtype: torch.dtype, size: int) -> dict[str, Any]:
    """A step of stage 1 against the forward pass of encoder and perceiver alone."""
    from medsight.training.stage import train_only

    model = random_inputs.random_model(chosen.preset, device, dtype)
    config = model.config
    train_only(model, ("model.region_perceiver.",))
    model.train()
    optimiser = optimiser_of([p for p in model.parameters() if p.requires_grad])
    pixels = random_inputs.prompts(config, [8] * size, device, dtype)["pixel_values"]
    masks = [(torch.rand(3, *config.mask_size, device=device) > 0.7).float() for _ in range(size)]
    classes = [torch.arange(3, device=device) % config.num_mask_classes for _ in range(size)]

    def step() -> None:
        model(pixel_values=pixels, mask_labels=masks, class_labels=classes).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    def look() -> None:
        with torch.no_grad():
            model.get_region_features(pixels)

    times = measuring.paired({"step": step, "look": look}, chosen, device)
    return {
        "what": "stage 1 (plain: its forward pass)",
        "batch_size": size,
        "step_s": measuring.spread(times["step"]),
        "plain_s": measuring.spread(times["look"]),
        "ratio": measuring.ratio(times["step"], times["look"]),
        "peak_bytes": measuring.peak_memory(step, device),
        "images_per_s": measuring.spread([size / value for value in times["step"]]),
    }


def flop_of(model: Any, passes: Callable[[], Any]) -> int:
    """Floating-point operations of passes, none made twice for gradient checkpointing, with attention written out: the
    counter does not know the fused kernels' grouped heads."""
    usual, again = model.config._attn_implementation, model.is_gradient_checkpointing
    model.set_attn_implementation("eager")
    if again:
        model.gradient_checkpointing_disable()
    with FlopCounterMode(display=False) as counter:
        passes()
    model.set_attn_implementation(usual)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return counter.get_total_flops()


def optimiser_of(weights: list[torch.nn.Parameter], in_8_bits: bool = False) -> torch.optim.Optimizer:
    if not in_8_bits:
        return torch.optim.AdamW(weights, lr=1e-6)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, lr=1e-6)


def fused_loss() -> Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]:
    """liger-kernel's cross-entropy, which never holds the logits of all tokens."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()

    def of(head: torch.nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return loss(head.weight, hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    return of


def time_run(recipe: Any, stage: str) -> dict[str, Any]:
    """Train one stage by a recipe, for the time that its steps take and the part of it that they wait for data."""
    from medsight.training.run import train
    from medsight.training.trainer import StageTrainer

    fetch, waits, marks = StageTrainer.get_batch_samples, [], []

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = fetch(self, *args, **kwargs)
        waits.append(time.perf_counter() - start)
        marks.append((start, self.args.train_batch_size * self.args.gradient_accumulation_steps))
        return result

    with patch.object(StageTrainer, "get_batch_samples", timed):
        train(recipe, stage)
    if not marks:
        raise RuntimeError(f"no step of stage {stage} was made in {recipe.output}")
    # From the second step on: the first one opens files and starts workers.
    whole = marks[-1][0] - marks[1][0] if len(marks) > 2 else None
    steps = len(marks) - 2
    return {
        "what": f"stage {stage}, by its recipe",
        "batch_size": marks[0][1],
        "step_s": whole / steps if whole else None,
        "waiting_share": sum(waits[1:-1]) / whole if whole else None,
        "images_per_s": marks[0][1] * steps / whole if whole else None,
    }


if __name__ == "__main__":
    main()
