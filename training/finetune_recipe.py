"""The recipe of a fine-tuning: stages, batches and steps by the model, the data, the machine and the time there is."""

from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import yaml

from configuration_medsight.configuration_medsight import MedSightConfig
from medsight.data.sources import Source
from processing_medsight.region_codes_medsight import find_region_codes

from .probe import Measured, probe
from .recipe import Recipe, build


SMALL = 50_000_000  # parameters of a language model that is trained whole; of a larger one, adapters
PASSES = 150  # over the new images at most: more of them teach nothing
KEPT_IN_MEMORY = 4000  # images, decoded once
SHARES = {"perceiver": 0.62, "codebook": 0.04, "text_to_vision": 0.06, "unified": 0.28}  # of the time for training
LEAST_STEPS = {"perceiver": 60, "codebook": 40, "text_to_vision": 20, "unified": 40}
MUON = {"muon_learning_rate": 1.0e-3, "weight_decay": 0.01}
HEADER = """\
# Written by medsight finetune. Edit it before training begins, if you like, and go on with the same command; or train
# without evaluations and report: medsight train {file}
"""


@dataclass(frozen=True)
class Budget:
    """What a fine-tuning may take.

    Attributes:
        seconds: all of it.
        evaluation: seconds that scoring took before training, and will take again after it.
        seed: of the run.
    """

    seconds: float
    evaluation: float = 0.0
    seed: int = 0


def choose_recipe(
    start: Path, known: MedSightConfig, data: Source, replay: Source | None, output: Path, budget: Budget
) -> str:
    """The text of a recipe that trains the checkpoint `start` on data, in about the time of the budget.

    Args:
        start: the checkpoint to train from, which knows all structures and groups of the data.
        known: the configuration of the model that it was extended from: its other groups are new.
        output: folder of the run.
    """
    began = perf_counter()
    values = draft(start, known, data, replay, output, budget.seed)
    measured = probe(build(Recipe, values, "fine-tuning"))
    values["data"]["keep_in_memory"] = measured.images <= KEPT_IN_MEMORY
    set_steps(values["stages"], measured, budget.seconds - 2 * budget.evaluation - (perf_counter() - began))
    return HEADER.format(file=output.parent / "finetune.yaml") + yaml.safe_dump(values, sort_keys=False, width=119)


def draft(
    start: Path, known: MedSightConfig, data: Source, replay: Source | None, output: Path, seed: int
) -> dict[str, Any]:
    """The recipe without the steps that its stages make.

    A model whose encoder was trained from scratch is trained whole; of one of pretrained parts the encoder stays, and
    a large language model gets adapters. What is new of a codebook is trained alone.
    """
    config = MedSightConfig.from_pretrained(start, local_files_only=True)
    from_scratch = config.vision_config.model_type == "medsight_unet"
    new_groups = [name for name in config.group_names if name not in known.group_names]
    described = config.use_region_codebook and find_region_codes(start, local_files_only=True) is not None
    stages = [
        perceiver_stage(config, from_scratch, described),
        *(new_code_stages(new_groups, from_scratch) if new_groups else []),
        unified_stage(config, from_scratch),
    ]
    for stage in stages if replay else ():
        if stage["kind"] != "codebook":
            stage["replay_share"] = 0.5
    return {
        "output": str(output),
        "seed": seed,
        "model": {"folder": str(start), "save_dtype": "bfloat16" if from_scratch else "float32"},
        "data": {
            "regions": [data.to_mapping()],
            "replay": [replay.to_mapping()] if replay else [],
            "validation_fraction": 0.1,
        },
        "annotations": {"grounded": {"per_image": 8, "plain_share": 0.3, "prompt_noise": 0.1}},
        "augmentation": {"flip": "unsided"},
        "training": {"adam_beta2": 0.99, "eval_strategy": "steps", "save_steps": 50, "logging_steps": 20},
        "stages": stages,
    }


def perceiver_stage(config: MedSightConfig, from_scratch: bool, described: bool) -> dict[str, Any]:
    """Learns the new masks; `described` is whether the checkpoint says what it has learnt to find."""
    return {
        "name": "perceiver",
        "kind": "regions",
        "trains": ["image_encoder"] * from_scratch + ["region_perceiver"],
        "per_device_train_batch_size": 12 if from_scratch else 8,
        "learning_rate": 3.0e-4 if from_scratch else 1.0e-4,
        **(MUON if from_scratch else {}),
        "rarity_power": 0.5,
        "matched_share": 0.25 if config.use_class_queries else 1.0,
        "recalled": 4 if config.use_class_queries and described else 0,
    }


def new_code_stages(groups: list[str], from_scratch: bool) -> list[dict[str, Any]]:
    """Learn the codes of new groups, and how they are written and drawn."""
    return [
        {
            "name": "codebook",
            "kind": "codebook",
            "groups": [*groups],
            "per_device_train_batch_size": 8,
            "learning_rate": 5.0e-3,
        },
        {
            "name": "text_to_vision",
            "kind": "conversations",
            "trains": ["text_to_vision", "code_rows"],
            "data": ["grounded"],
            "groups": [*groups],
            "per_device_train_batch_size": 8,
            "learning_rate": 2.0e-3 if from_scratch else 5.0e-4,
            "rarity_power": 0.5,
        },
    ]


def unified_stage(config: MedSightConfig, from_scratch: bool) -> dict[str, Any]:
    """Learns the words: a small language model whole, a larger one by adapters."""
    small = parameters(config.text_config) < SMALL
    return {
        "name": "unified",
        "kind": "conversations",
        "trains": ["language_model", "vision_to_text", "text_to_vision"],
        "data": ["grounded"],
        "method": "full" if small else "lora",
        "per_device_train_batch_size": 12 if small else 4,
        "learning_rate": 3.0e-4 if small else 2.0e-4,
        **(MUON if small and from_scratch else {}),
        "rarity_power": 0.5,
        "mask_share": 0.3 if from_scratch else 1.0,
        "eval_batches": 8,
    }


def parameters(text_config: Any) -> int:
    """Parameters of a language model, by its configuration."""
    from transformers import AutoModel

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModel.from_config(text_config).parameters())


def set_steps(stages: list[dict[str, Any]], measured: Measured, seconds: float) -> None:
    """Divide the time over the stages, by what a step of each takes; none makes fewer steps than it must, nor more
    than passes over the new images that still teach."""
    present = {stage["name"]: SHARES[stage["name"]] for stage in stages}
    seconds -= measured.annotation
    for stage in stages:
        name, size = stage["name"], stage["per_device_train_batch_size"]
        steps = int(seconds * present[name] / sum(present.values()) / measured.steps[name])
        most = PASSES * max(measured.new_images, size) // size
        steps = max(LEAST_STEPS[name], min(steps, most)) // 10 * 10
        stage |= {"max_steps": steps, "warmup_steps": max(5, steps // 20), "eval_steps": max(1, steps // 2)}
