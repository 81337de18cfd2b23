"""Pictures of what the model makes of a few validation samples, at every evaluation."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TrainerCallback

from medsight.export.drawing import draw_overlay
from modeling_medsight.loss_medsight import resize_masks

from .dataset import SampleDataset, Skipped
from .stage import Stage, evenly


class ExamplePictures(TrainerCallback):
    """Draws `count` validation samples, evenly over the split: what was wanted, and what the model gives.

    Files `step-N-i.png` in `folder`.
    """

    def __init__(self, stage: Stage, dataset: SampleDataset, folder: Path, count: int) -> None:
        self.stage, self.dataset, self.folder = stage, dataset, folder
        self.chosen = evenly(len(dataset), count)[:count]

    @torch.no_grad()
    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or args.world_size > 1:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        training = model.training
        model.eval()
        for number, index in enumerate(self.chosen):
            sample = self.dataset[index]
            if not isinstance(sample, Skipped) and len(sample["pixel_values"]):
                self.draw(model, sample).save(self.folder / f"step-{state.global_step:06d}-{number}.png")
        model.train(training)

    def draw(self, model: Any, sample: dict[str, Any]) -> Any:
        """One sample, wanted regions on the left and given ones on the right, as a PIL image."""
        canvas, pixels = self.stage.canvas, sample["pixel_values"]
        pixels = pixels if isinstance(pixels, torch.Tensor) else pixels[-1]
        array = ((pixels * canvas.std + canvas.mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        image, size = Image.fromarray(array), array.shape[:2]
        wanted = [] if sample["mask_labels"] is None else list(sample["mask_labels"])
        masks, labels = self.stage.example(model, sample)
        left, right = (
            draw_overlay(image, [(resize_masks(mask[None], size)[0] >= 0.5).cpu().numpy() for mask in drawn], names)
            for drawn, names in ((wanted, ["wanted"] * len(wanted)), (masks, labels[: len(masks)]))
        )
        joined = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
        joined.paste(left, (0, 0))
        joined.paste(right, (left.width, 0))
        return joined
