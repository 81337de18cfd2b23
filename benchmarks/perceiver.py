"""How near is the perceiver to the rate of matrix products? One pass against its operations at that rate, and against
a direct transcription of its description (perceiver_reference.py), whose result it must agree with.

Facts: matmul_flops (operations a second of a large product), image_flop (of one pass an image), error (largest
difference of mask logits from the reference in float32, relative to the largest logit).
Rows: batch_size, pass_s, reference_s, ratio (pass / reference), limit_ratio (pass / operations at the rate),
memory_ratio, pass_bytes, reference_bytes (peak memory above what was held before). The same of the second pass, with
`--codes` queries, is codes_s, reference_codes_s, codes_ratio, codes_memory_ratio, codes_bytes, reference_codes_bytes.

    python -m benchmarks.perceiver --preset 8b --device cuda --batch-size 1 8 --output perceiver.json
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from configuration_medsight import MedSightConfig
from modeling_medsight.region_perceiver_medsight import RegionPerceiver

from . import measuring
from .perceiver_reference import Reference


AGREEMENT = 1e-4


def perceiver_of(config: MedSightConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A perceiver by itself with random weights of usual size."""
    torch.manual_seed(0)
    with torch.device(device):
        perceiver = RegionPerceiver(config).to(dtype)
    with torch.no_grad():
        perceiver.region_queries.normal_()
        if perceiver.class_queries is not None:
            perceiver.class_queries.normal_()
    return perceiver.eval()


def flop_of_image(config: MedSightConfig) -> int:
    """Floating-point operations of one pass over one image, counted without computing."""
    with torch.device("meta"):
        perceiver = RegionPerceiver(config).requires_grad_(False)
        grid = torch.empty(1, *config.patch_grid, config.vision_hidden_size)
    with FlopCounterMode(display=False) as counter:
        perceiver(grid)
    return counter.get_total_flops()


def error_of(config: MedSightConfig, device: torch.device) -> float:
    """Largest difference of mask logits from the reference, in float32, relative to the largest logit."""
    perceiver = perceiver_of(config, device, torch.float32)
    grid = torch.randn(1, *config.patch_grid, config.vision_hidden_size, device=device)
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    convolutions, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    given = perceiver(grid).masks_queries_logits
    expected = Reference(perceiver.state_dict(), config.perceiver_num_heads)(grid)[0]
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed, convolutions
    return float((given - expected).abs().max() / expected.abs().max())


def quotient(taken: int | None, by_reference: int | None) -> float | None:
    return taken / by_reference if taken is not None and by_reference else None


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.perceiver", __doc__)
    measuring.add_shape(options)
    options.add_argument("--codes", type=int, default=2, help="queries of the second pass")
    chosen = options.parse_args(arguments)
    device, dtype = measuring.prepare(chosen)
    config = MedSightConfig.from_preset(chosen.preset)
    config._attn_implementation = "sdpa"
    error = error_of(config, device)
    if not error < AGREEMENT:
        raise RuntimeError(f"the perceiver differs from the reference by {error:.2g} of the largest logit")
    perceiver = perceiver_of(config, device, dtype)
    reference = Reference(perceiver.state_dict(), config.perceiver_num_heads)

    def cases_of(size: int) -> dict[str, Callable[[], Any]]:
        grid = torch.randn(size, *config.patch_grid, config.vision_hidden_size, device=device).to(dtype)
        codes = torch.randn(size, chosen.codes, config.vision_hidden_size, device=device).to(dtype)
        upsampled = perceiver(grid).upsampled_features
        return {
            "pass": partial(perceiver, grid),
            "codes": partial(perceiver, grid, codes, upsampled_features=upsampled),
            "reference": partial(reference, grid),
            "reference_codes": partial(reference, grid, codes),
        }

    with measuring.blocks_given_back():
        memory = [
            {name: measuring.peak_memory(run, device) for name, run in cases_of(size).items()}
            for size in chosen.batch_size
        ]
    flop, rate = flop_of_image(config), measuring.matmul_rate(device, dtype)
    rows = []
    for size, taken in zip(chosen.batch_size, memory, strict=True):
        times = measuring.paired(cases_of(size), chosen, device)
        rows.append(
            {
                "batch_size": size,
                **{f"{name}_s": measuring.spread(values) for name, values in times.items()},
                "ratio": measuring.ratio(times["pass"], times["reference"]),
                "codes_ratio": measuring.ratio(times["codes"], times["reference_codes"]),
                "limit_ratio": measuring.spread([value / (size * flop / rate) for value in times["pass"]]),
                "memory_ratio": quotient(taken["pass"], taken["reference"]),
                "codes_memory_ratio": quotient(taken["codes"], taken["reference_codes"]),
                **{f"{name}_bytes": value for name, value in taken.items()},
            }
        )
    return measuring.report(chosen, device, rows, matmul_flops=rate, image_flop=flop, error=error)


if __name__ == "__main__":
    main()
