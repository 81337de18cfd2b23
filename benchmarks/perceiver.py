"""How near is the region perceiver to the rate of matrix products? One pass against its operations at that rate.

The second pass draws the masks of `--codes` queries from what the first has left.

Facts: matmul_flops (operations a second of a large product), image_flop (operations of one pass, an image).
Rows: batch_size, pass_s, codes_s (the second pass), limit_ratio (pass / operations at the rate), pass_bytes,
codes_bytes (peak memory of a GPU above what was held before).

    python -m benchmarks.perceiver --preset 8b --device cuda --batch-size 1 8 --output perceiver.json
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from configuration_medsight import MedSightConfig
from modeling_medsight.region_perceiver_medsight import RegionPerceiver

from . import measuring


def perceiver_of(config: MedSightConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A perceiver by itself, with random weights of usual size."""
    torch.manual_seed(0)
    with torch.device(device):
        perceiver = RegionPerceiver(config).to(dtype).eval()
    for queries in (perceiver.region_queries, perceiver.class_queries):
        if queries is not None:
            queries.data.normal_()
    return perceiver


def flop_of_image(config: MedSightConfig) -> int:
    """Floating-point operations of one pass over one image, counted without computing."""
    with torch.device("meta"):
        perceiver = RegionPerceiver(config).requires_grad_(False)
        grid = torch.empty(1, *config.patch_grid, config.vision_hidden_size)
    with FlopCounterMode(display=False) as counter:
        perceiver(grid)
    return counter.get_total_flops()


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = measuring.parser("benchmarks.perceiver", __doc__)
    measuring.add_shape(options)
    options.add_argument("--codes", type=int, default=2, help="queries of the second pass")
    chosen = options.parse_args(arguments)
    device, dtype = measuring.prepare(chosen)
    config = MedSightConfig.from_preset(chosen.preset)
    config._attn_implementation = "sdpa"
    perceiver = perceiver_of(config, device, dtype)
    flop, rate = flop_of_image(config), measuring.matmul_rate(device, dtype)
    rows = []
    for size in chosen.batch_size:
        grid = torch.randn(size, *config.patch_grid, config.vision_hidden_size, device=device).to(dtype)
        codes = torch.randn(size, chosen.codes, config.vision_hidden_size, device=device).to(dtype)
        upsampled = perceiver(grid).upsampled_features
        cases = {
            "pass": partial(perceiver, grid),
            "codes": partial(perceiver, grid, codes, upsampled_features=upsampled),
        }
        times = measuring.paired(cases, chosen, device)
        rows.append(
            {
                "batch_size": size,
                **measuring.seconds(times),
                "limit_ratio": measuring.spread([value / (size * flop / rate) for value in times["pass"]]),
                **{f"{name}_bytes": measuring.peak_memory(run, device) for name, run in cases.items()},
            }
        )
    return measuring.report(chosen, device, rows, matmul_flops=rate, image_flop=flop)


if __name__ == "__main__":
    main()
