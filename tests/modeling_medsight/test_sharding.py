"""Sharded over two processes by `fully_shard`, a model gives the losses, gradients and masks that it gives whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import yaml
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from medsight.training.sharding import gather_in_methods
from medsight.training.stage import train_only
from modeling_medsight import MedSightForConditionalGeneration, MedSightRegionModel
from tests.modeling_medsight.configurations import labelled, make_batch, make_config, make_model, perceiving


TOLERANCE = 1e-5
SHIPPED = Path(__file__).resolve().parents[2] / "training" / "accelerate" / "fsdp2.yaml"
LAYERS = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
# accelerate's own choice, where nobody says which layers are units.
DEFAULT = ",".join(make_model(make_config("clip-qwen3"))._no_split_modules)
# Layers that are units of their own, and the text that each process sees: one may see an image, or cite codes, where
# the other does not.
CASES: dict[str, tuple[str, tuple[str, str]]] = {
    "image-and-none": (LAYERS, ("tItCtCt", "ttttt")),
    "codes-and-none, tied": (LAYERS, ("tItttt", "tICtIttCC")),
    "default, image-and-none": (DEFAULT, ("tItCtCt", "ttttt")),
    "default, none-and-images": (DEFAULT, ("ttttt", "tICtIttCC")),
    "default, image-and-codes": (DEFAULT, ("tItttt", "tICtIttCC")),
}
PARTS = ("whole", "regions")
# What stage 4 trains, and stages 1 and 3a.
LANGUAGE = (
    *("model.language_model.", "lm_head."),
    *("model.vision_to_text_projector.", "model.text_to_vision_projector."),
)
REGIONS = ("vision_tower.", "region_perceiver.", "codebook.", "group_classifier.")


def model_of(case: str) -> MedSightForConditionalGeneration:
    config = make_config("clip-qwen3", use_class_queries=True, auxiliary_loss=True, vision_feature_layer=-1)
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = "tied" in case
    return make_model(config, seed=1)


def shard(model: MedSightForConditionalGeneration | MedSightRegionModel, classes: str) -> None:
    """As accelerate does: the layers, the embedding and what follows the layers are units, the rest is the root's."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules())[::-1]:
        if type(module).__name__ in classes.split(","):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if isinstance(model, MedSightRegionModel):
        fully_shard(model, mesh=mesh)
        return
    embedding, tail = model.get_input_embeddings(), [model.model.language_model.norm, model.lm_head]
    if model.lm_head.weight is embedding.weight:
        tail.insert(1, embedding)
    else:
        fully_shard(embedding, mesh=mesh, reshard_after_forward=True)
    fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    gather_in_methods(model)


def outcomes(case: str, rank: int, sharded: bool) -> dict[str, torch.Tensor]:
    """What one process finds: losses and gradients, features, an answer and its masks.

    Gradients of a sharded model are averages over the processes.
    """
    classes, texts = CASES[case]
    found: dict[str, torch.Tensor] = {}
    for trained in (LANGUAGE, REGIONS):
        whole = model_of(case).train()
        model = whole if trained is LANGUAGE else whole.region_model
        train_only(model, trained)
        if sharded:
            shard(model, classes)
        images = perceiving(model.config, (1 + rank, 3 - 2 * rank))
        output = model(**(labelled(model.config, [texts[rank]]) if trained is LANGUAGE else images))
        output.loss.backward()
        found |= {name: value.detach().clone() for name, value in output.items() if name.endswith("_loss")}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                found[f"gradient of {name}"] = parameter.grad.full_tensor() if sharded else parameter.grad

    model = model_of(case).eval()
    if sharded:
        shard(model, classes)
    with torch.no_grad():
        regions = model.get_region_features(images["pixel_values"])
        perceiver = model.model.region_perceiver
        grid = regions.patch_features.unflatten(1, model.config.patch_grid)
        found["region masks"] = regions.masks_queries_logits
        found["asked masks"] = perceiver(grid, queries=perceiver.class_queries.expand(2, -1, -1)).masks_queries_logits
        found["codes"] = model.quantize_regions(regions.region_embeddings, torch.tensor([0, 1])).code_indices
    sees = "I" in texts[rank]
    prompt = make_batch(model.config, [texts[rank].replace("C", "t")], seed=rank)
    answer = model.generate(**prompt, max_new_tokens=6 - 3 * rank, do_sample=False, force_region=sees)
    found["answer"] = answer.sequences
    found["masks of the answer"], found["scores of the answer"] = answer.mask_logits[0], answer.region_scores[0]
    if all("I" in text for text in texts):
        decoded = model.decode_regions(answer.sequences, prompt["pixel_values"])
        found["decoded masks"] = decoded.mask_logits[0]
    return {name: value.contiguous() for name, value in found.items()}


def gradients_of(rank: int, part: str, parallel: bool) -> dict[str, torch.Tensor]:
    """Gradients of one process' batch after two steps with everything trainable, encoder and codebook too."""
    whole = make_model(make_config("clip-qwen3", use_class_queries=True), seed=1).train()
    model: Any = whole if part == "whole" else whole.region_model
    texts, images = labelled(whole.config, [("tItCtCt", "ttttt")[rank]]), perceiving(whole.config, (1 + rank, 0))
    called = DistributedDataParallel(model) if parallel else model
    for _ in range(2):
        model.zero_grad()
        called(**(texts if part == "whole" else images)).loss.backward()
    return {name: torch.zeros(1) if p.grad is None else p.grad for name, p in model.named_parameters()}


def run_process(rank: int, folder: Path) -> None:
    """One of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for case in CASES:
        save_file(outcomes(case, rank, sharded=True), folder / f"{case}-{rank}.safetensors")
    for part in PARTS:
        save_file(gradients_of(rank, part, parallel=True), folder / f"{part}-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes found, a file a case and process."""
    folder = tmp_path_factory.mktemp("sharded")
    multiprocessing.start_processes(run_process, args=(folder,), nprocs=2, start_method="spawn")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_is_the_whole_one(folder: Path, case: str) -> None:
    whole = [outcomes(case, rank, sharded=False) for rank in range(2)]
    gradients = {name: (whole[0][name] + whole[1][name]) / 2 for name in whole[0] if name.startswith("gradient of ")}
    assert sum(len(found["masks of the answer"]) for found in whole) > 0
    assert sum(bool(gradient.abs().max() > 1e-3) for gradient in gradients.values()) > len(gradients) / 2
    for rank in range(2):
        sharded = load_file(folder / f"{case}-{rank}.safetensors")
        torch.testing.assert_close(sharded, {**whole[rank], **gradients}, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_plain_data_parallelism_trains_everything(folder: Path, part: str) -> None:
    """Also where one process has neither image nor code, and without a search for unused parameters."""
    alone = [gradients_of(rank, part, parallel=False) for rank in range(2)]
    expected = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    assert not all(value.any() for value in expected.values())
    for rank in range(2):
        given = load_file(folder / f"{part}-{rank}.safetensors")
        unread = {name for name, value in expected.items() if value.shape != given[name].shape}
        assert all(not given[name].any() for name in unread)
        read = expected.keys() - unread
        torch.testing.assert_close(
            {name: given[name] for name in read},
            {name: expected[name] for name in read},
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )
