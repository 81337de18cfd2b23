"""QLoRA: what it saves answers as what was trained."""

from pathlib import Path

import pytest
import torch

from medsight.training.adapters import add_adapters, merge_quantised
from medsight.training.recipe import load_recipe
from medsight.training.run_folder import load_folder, save_folder
from medsight.training.stage_conversations import ConversationSettings
from modeling_medsight import MedSightForConditionalGeneration
from tests.training.tiny_run import UNIFIED


NANO = Path(__file__).parents[2] / "medsight" / "medsight-nano"


@torch.no_grad()
def test_a_merged_model_is_whole_and_answers_as_the_trained_one(tmp_path: Path) -> None:
    """PEFT alone would round every sum of weight and adapter to 4 bits."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    settings, recipe = ConversationSettings(trains=UNIFIED, method="qlora"), load_recipe("nano")
    recipe.model.config = {}
    model, processor = load_folder(NANO, recipe, quantised=True)
    trained = add_adapters(model, settings).eval()
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.02)
    ids = torch.randint(300, 1000, (2, 20))
    expected = trained(input_ids=ids).logits
    save_folder(merge_quantised(trained), processor, tmp_path / "model")
    loaded = MedSightForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert getattr(loaded.config, "quantization_config", None) is None
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)
