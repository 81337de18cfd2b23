"""Stage 3b: the text-to-vision projector and the region codes' rows of the vocabulary, on grounded answers.

medsight train CONFIG.yaml --stage text_to_vision
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .language import GroundedStage


class TextToVisionStage(GroundedStage):
    """Trains P_{t→v} and the K*M code rows; every other row of the vocabulary stays as it is.

    The rows are chosen by their gradient, so there is no weight decay, and parameters may not be sharded.
    """

    key, folder = "text_to_vision", "3b_text_to_vision"
    shardable = decays = False
    hooks: list[RemovableHandle]

    def trains(self) -> tuple[str, ...]:
        return ("model.text_to_vision_projector.", "model.language_model.embed_tokens.", "lm_head.")

    def prepare(self, model: nn.Module) -> nn.Module:
        model = super().prepare(model)
        self.hooks = [train_code_rows_only(weight, self.config) for weight in vocabularies(model)]
        return model

    def finish(self, model: nn.Module) -> nn.Module:
        for hook in self.hooks:
            hook.remove()
        return model


def vocabularies(model: nn.Module) -> list[nn.Parameter]:
    """The embedding and, where it is not the same, the language modelling head."""
    embeddings = model.get_input_embeddings().weight
    return [embeddings] if model.lm_head.weight is embeddings else [embeddings, model.lm_head.weight]


def train_code_rows_only(weight: nn.Parameter, config: Any) -> RemovableHandle:
    """Zero the gradient of every row but the region codes': with a fresh optimizer the words then stay as they are."""
    first, count = config.region_code_start_id, config.num_region_codes
    rows = torch.zeros(len(weight), 1, dtype=torch.bool)
    rows[first : first + count] = True
    return weight.register_hook(lambda gradient: gradient * rows.to(gradient.device))
