"""A BiomedParse folder of a few small pictures, drawn here, and the smallest model that the stages can train."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configuration_medsight.configuration_medsight import MedSightConfig
from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration
from processing_medsight.image_processing_medsight import MedSightImageProcessor
from processing_medsight.processing_medsight import MedSightProcessor
from processing_medsight.region_codes_medsight import add_region_codes
from training.data import GROUP_NAMES, class_names, read_manifest
from training.tokenizer import train_tokenizer


SETS = (
    ("sunnybrook", "MRI-cine", "heart", ("left ventricle",)),
    ("busi", "ultrasound", "breast", ("benign breast tumor",)),
    ("totalsegmentator", "CT", "torso", ("left kidney", "liver")),
)


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rows, generator = [], np.random.default_rng(0)
    for name, modality, site, targets in SETS:
        for folder in ("train", "train_mask"):
            (root / name / folder).mkdir(parents=True)
        for number in range(6):
            pixels = generator.integers(0, 60, (24, 32), dtype=np.uint8)
            image = f"{name}/train/{number}_{modality}_{site}.png"
            common = {"image": image, "modality": modality, "site": site, "split": "train"}
            common |= {"group": f"{name}:{number}", "finding": "benign" if name == "busi" else None}
            for index, target in enumerate(targets):
                mask = np.zeros((24, 32), dtype=bool)
                mask[4 + number : 14 + number, 2 + 12 * index : 12 + 12 * index] = True
                pixels[mask] = 150 + 60 * index
                path = f"{name}/train_mask/{number}_{modality}_{site}_{target.replace(' ', '+')}.png"
                Image.fromarray(mask).save(root / path)
                rows.append({**common, "mask": path, "target": target})
            Image.fromarray(pixels).save(root / image)
    absent = {**rows[6], "mask": None, "target": "breast tumor", "absent": True, "image": "busi/train/normal.png"}
    Image.fromarray(np.full((24, 32), 30, dtype=np.uint8)).save(root / "busi/train/normal.png")
    rows.append({**absent, "group": "busi:normal"})
    (root / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def records(data_root: Path) -> list:
    return read_manifest(data_root, "train")


@pytest.fixture(scope="session")
def image_processor() -> MedSightImageProcessor:
    return MedSightImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)


@pytest.fixture
def model(records: list) -> MedSightForConditionalGeneration:
    torch.manual_seed(0)
    names = class_names(records)
    return MedSightForConditionalGeneration(
        MedSightConfig(
            text_config={
                "model_type": "qwen3",
                "vocab_size": 320,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "max_position_embeddings": 1024,
                "pad_token_id": 256,
                "eos_token_id": 258,
                "tie_word_embeddings": True,
            },
            vision_config={
                "model_type": "resnet",
                "embedding_size": 8,
                "hidden_sizes": [8, 16],
                "depths": [1, 1],
                "layer_type": "basic",
            },
            image_size=32,
            image_token_id=268,
            vision_feature_layer=-1,
            num_region_queries=4,
            perceiver_num_stages=1,
            perceiver_num_heads=2,
            perceiver_head_dim=8,
            perceiver_ffn_multiplier=1,
            num_mask_classes=len(names),
            mask_class_names=names,
            num_groups=len(GROUP_NAMES),
            group_names=list(GROUP_NAMES),
            codes_per_group=2,
            code_dim=8,
            region_code_start_id=282,
        )
    )


@pytest.fixture
def processor(model: MedSightForConditionalGeneration, image_processor: MedSightImageProcessor) -> MedSightProcessor:
    tokenizer = train_tokenizer(["no merges"], 256)
    add_region_codes(tokenizer, model.config.num_groups, model.config.codes_per_group)
    return MedSightProcessor(
        image_processor=image_processor, tokenizer=tokenizer, image_seq_length=model.config.image_seq_length
    )


@pytest.fixture
def chance() -> random.Random:
    return random.Random(0)
