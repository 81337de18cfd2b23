"""Stage 2: the vision-to-text projector, on captions and questions that need no region.

medsight train CONFIG.yaml --stage vision_to_text
"""

from dataclasses import dataclass

import torch
from torch import nn

from .items import Items
from .language import LanguageSettings, LanguageStage
from .stage import in_batches


@dataclass
class VisionToTextSettings(LanguageSettings):
    """Settings of stage 2.

    Attributes:
        start_at_word_scale: scale the projector's last layer so that image rows start as long as words' embeddings:
            region codes start as its rows and share the head with words.
    """

    start_at_word_scale: bool = False


class VisionToTextStage(LanguageStage):
    """Trains P_{v→t} alone."""

    key, folder, Settings = "vision_to_text", "2_vision_to_text", VisionToTextSettings

    def trains(self) -> tuple[str, ...]:
        return ("model.vision_to_text_projector.",)

    @torch.no_grad()
    def start(self, model: nn.Module, items: Items) -> None:
        if not self.settings.start_at_word_scale:
            return
        model.eval()
        chosen = range(0, len(items), max(1, len(items) // 64))
        lengths = []
        for batch in in_batches(items, chosen, self.collator(), 8, model.device):
            if "pixel_values" in batch:
                regions = model.get_region_features(batch["pixel_values"])
                lengths.append(model.model.project_regions(regions).norm(dim=-1).mean())
        if not lengths:
            raise ValueError("start_at_word_scale: no conversation has an image whose rows could be measured")
        words = model.get_input_embeddings().weight[: self.config.region_code_start_id].norm(dim=-1).mean()
        model.model.vision_to_text_projector.linear_2.weight *= words / torch.stack(lengths).mean()
