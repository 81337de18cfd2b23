"""From a checkpoint with a codebook to one with a single [SEG] token: where an ablation starts that shares stages."""

import json
import tempfile
from pathlib import Path
from typing import Any

from configuration_medsight.configuration_medsight import MedSightConfig
from processing_medsight.processing_medsight import MedSightProcessor
from processing_medsight.region_codes_medsight import add_region_codes, region_code_ids


# The weights whose shapes the codes give.
CODES_OWN = {"model.codebook.codes", "model.group_classifier.weight", "model.group_classifier.bias"}


def drop_codebook(config: MedSightConfig, processor: MedSightProcessor) -> None:
    """Make a configuration and its processor those of one `[SEG]`, in place.

    `[SEG]` takes the id of the first code, so no row of the language model moves; the other codes' rows stay unused.
    `CODES_OWN` are to be initialised anew.
    """
    config.use_region_codebook, config.group_names = False, ["any"]
    config.group_patterns = config.group_orientations = None
    config.num_groups = config.codes_per_group = 1
    processor.group_names = list(config.group_names)
    processor.tokenizer = without_codes(processor.tokenizer)
    first = add_region_codes(processor.tokenizer, 1, 1, use_region_codebook=False)
    if first != config.region_code_start_id:
        raise ValueError(
            f"the region codes are not the last of the tokenizer's entries: [SEG] got the id {first}, they start at "
            f"{config.region_code_start_id}"
        )


def without_codes(tokenizer: Any) -> Any:
    """The same tokenizer without its region codes, which are added tokens at its end."""
    codes = region_code_ids(tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        file = Path(scratch) / "tokenizer.json"
        values = json.loads(file.read_text(encoding="utf-8"))
        values["added_tokens"] = [entry for entry in values["added_tokens"] if entry["id"] not in codes]
        file.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
        return type(tokenizer).from_pretrained(scratch, local_files_only=True)
