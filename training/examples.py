"""Pictures of what the model makes of a few validation samples, at every evaluation."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TrainerCallback

from medsight.export.drawing import draw_overlay

from .dataset import SampleDataset, Skipped
from .stage import Stage


class ExamplePictures(TrainerCallback):
    """Draws `count` validation samples, evenly over the split: what was wanted, and what the model gives.

    Files `step-N-i.png` in `folder`.
    """

    def __init__(self, stage: Stage, dataset: SampleDataset, folder: Path, count: int) -> None:
        self.stage, self.dataset, self.folder = stage, dataset, folder
        self.chosen = range(0, len(dataset), max(1, len(dataset) // count))[:count]

    @torch.no_grad()
    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or args.world_size > 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        training = model.training
        model.eval()
        for number, index in enumerate(self.chosen):
            sample = self.dataset[index]
            if isinstance(sample, Skipped) or not len(sample["pixel_values"]):
                continue
            picture = self.draw(model, sample)
            picture.save(self.folder / f"step-{state.global_step:06d}-{number}.png")
        model.train(training)

    def draw(self, model: Any, sample: dict[str, Any]) -> Any:
        """One sample, wanted regions on the left and given ones on the right, as a PIL image."""
        canvas, wanted = self.stage.canvas, [] if sample["mask_labels"] is None else list(sample["mask_labels"])
        pixels = (
            sample["pixel_values"] if isinstance(sample["pixel_values"], torch.Tensor) else sample["pixel_values"][-1]
        )
        array = ((pixels * canvas.std + canvas.mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(array)
        size = (image.height, image.width)
        masks, labels = self.stage.example(model, sample)
        sides = [
            draw_overlay(image, at_size(wanted, size), ["wanted"] * len(wanted)),
            draw_overlay(image, at_size(masks, size), labels[: len(masks)]),
        ]
        joined = Image.new("RGB", (sum(side.width for side in sides), max(side.height for side in sides)), "white")
        joined.paste(sides[0], (0, 0))
        joined.paste(sides[1], (sides[0].width, 0))
        return joined


def at_size(masks: Any, size: tuple[int, int]) -> list[Any]:
    """Masks (H, W), boolean or in [0, 1], as boolean arrays of another size."""
    result = []
    for mask in masks:
        resized = torch.nn.functional.interpolate(mask[None, None].float(), size=size, mode="bilinear")[0, 0]
        result.append((resized >= 0.5).cpu().numpy())
    return result
