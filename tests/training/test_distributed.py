"""A step is the same however its batch is cut: into micro-batches, processes, before and after a stop."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.data_loader import BatchSamplerShard
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from configuration_medsight import MedSightConfig
from medsight.training.collators import ConversationCollator, RegionCollator
from medsight.training.dataset import encode
from medsight.training.recipe import load_recipe
from medsight.training.run import train
from medsight.training.sampler import DrawSampler
from medsight.training.stage import PARTS, stage_kinds, trained_module
from medsight.training.stage_conversations import ConversationStage
from medsight.training.trainer import LOSSES, count_terms
from modeling_medsight import MedSightForConditionalGeneration
from tests.modeling_medsight.configurations import CONFIGURATIONS, labelled, make_config, make_model, perceiving
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_processor


ROOT = Path(__file__).resolve().parents[2]
CLASSES = ["kidney", "liver", "spleen", "tumor"]
GROUPS = ["CT abdomen", "MRI brain"]
SETTINGS: dict[str, Any] = {
    "num_groups": len(GROUPS),
    "group_names": GROUPS,
    "num_mask_classes": len(CLASSES),
    "mask_class_names": CLASSES,
    "use_class_queries": True,
    "auxiliary_loss": True,
    "quantize_unmatched_regions": False,
}
TOLERANCE = 1e-5
TIMES = ("_runtime", "_per_second")


# Draws


def steps_of(sampler: DrawSampler, processes: int, size: int, accumulation: int) -> list[list[int]]:
    """The draws of each step of an epoch, as accelerate deals them to processes, in order of their numbers."""
    shards = [
        list(BatchSamplerShard(BatchSampler(sampler, size, drop_last=False), processes, index))
        for index in range(processes)
    ]
    assert len({len(shard) for shard in shards}) == 1
    starts = range(0, len(shards[0]), accumulation)
    return [
        sorted(draw for shard in shards for batch in shard[start : start + accumulation] for draw in batch)
        for start in starts
    ]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_a_step_is_the_same_draws_for_any_number_of_processes(epoch: int, weighted: bool) -> None:
    weights = torch.arange(1.0, 12.0, dtype=torch.float64) if weighted else None
    sampler = DrawSampler(11, seed=3, weights=weights, batch_size=4)
    sampler.set_epoch(epoch)
    whole = steps_of(sampler, 1, 4, 1)
    assert [len(step) for step in whole] == [4, 4, 4]
    for cut in ((1, 1, 4), (2, 1, 2), (2, 2, 1), (4, 1, 1)):
        assert steps_of(sampler, *cut) == whole


# Losses


def region_samples(config: MedSightConfig) -> list[dict[str, Any]]:
    """Images with as many masks as queries, more, few and none."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number, count in enumerate((2, config.num_region_queries + 2, 0, 1, 3)):
        masks = torch.rand(count, *config.mask_size, generator=generator)
        classes = torch.randint(len(CLASSES), (count,), generator=generator)
        samples.append(
            {
                "pixel_values": torch.randn(3, config.image_size, config.image_size, generator=generator),
                "mask_labels": masks.round(),
                "class_labels": classes,
                "group": number % len(GROUPS),
                "asked": classes[: 1 + number],
                "unlabelled": torch.arange(config.num_mask_classes) % 3 == number % 3,
                "chance": 0.0,
                "matched": 1.0,
                "file": f"image {number}",
            }
        )
    return samples


def conversation_samples(config: MedSightConfig) -> list[dict[str, Any]]:
    """Conversations that cite two codes, none, one whose mask is left out, three; and one without an image."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number, (codes, images, decoded) in enumerate(
        ((2, 1, True), (0, 1, True), (1, 1, False), (0, 0, True), (3, 1, True))
    ):
        cited = " ".join(f"[C{number % len(GROUPS)}_{code}]" for code in range(codes))
        masks = torch.rand(codes, *config.mask_size, generator=generator)
        samples.append(
            {
                "encoded": encode(
                    [
                        {"role": "user", "content": "<image>" * images + "What is seen" + "?" * number},
                        {"role": "assistant", "content": f"{'So ' * number}this: {cited}."},
                    ],
                    tiny_processor(config),
                ),
                "pixel_values": [torch.randn(3, config.image_size, config.image_size, generator=generator)] * images,
                "mask_labels": masks if decoded else None,
                "code_classes": torch.arange(codes) - int(number == 4),  # one of the three has no known class
                "file": f"conversation {number}",
            }
        )
    return samples


CUT = (slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 5))


@pytest.fixture(scope="module")
def model() -> MedSightForConditionalGeneration:
    torch.manual_seed(0)
    return MedSightForConditionalGeneration(MedSightConfig.from_preset("tiny", **SETTINGS)).train()


def losses_and_gradients(
    model: MedSightForConditionalGeneration, batches: list[dict[str, Any]]
) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """Each loss summed over the batches, averaged over what is in all of them, and its gradients."""
    counts = [count_terms(batch, model.config.num_region_queries) for batch in batches]
    totals = {name: max(1.0, sum(count[name] for count in counts)) for name in counts[0]}
    parameters = list(model.parameters())
    sums: dict[str, torch.Tensor] = {}
    gradients: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "files"}
        if "labels" in inputs:
            inputs["num_items_in_batch"] = totals["tokens"]
        called = model if "labels" in inputs else model.region_model
        outputs = called(**inputs, loss_counts=totals)
        for name in ("loss", *LOSSES):
            if outputs.get(name) is None or not outputs[name].requires_grad:
                continue
            parts = torch.autograd.grad(outputs[name], parameters, retain_graph=True, materialize_grads=True)
            sums[name] = sums.get(name, torch.zeros(())) + outputs[name].detach()
            so_far = gradients.get(name, [torch.zeros(()) for _ in parts])
            gradients[name] = [before + part for before, part in zip(so_far, parts, strict=True)]
    return {name: (sums[name], gradients[name]) for name in sums}


@pytest.mark.parametrize("kind", ["perceiver", "codebook", "conversations"])
def test_losses_and_gradients_of_uneven_parts_sum_to_those_of_the_whole(
    model: MedSightForConditionalGeneration, kind: str
) -> None:
    expected = {
        "perceiver": {"perceiver_loss", "class_query_loss"},
        "codebook": {"perceiver_loss", "codebook_loss", "vq_loss", "reconstruction_loss", "group_loss"},
        "conversations": {"lm_loss", "mask_loss", "alignment_loss"},
    }
    assert set().union(*expected.values()) == set(LOSSES)
    if kind == "conversations":
        samples, collate = (
            conversation_samples(model.config),
            ConversationCollator(tiny_processor(model.config), class_labels=True),
        )
    else:
        samples, collate = region_samples(model.config), RegionCollator(kind == "perceiver", groups=kind == "codebook")
    whole = losses_and_gradients(model, [collate(samples)])
    parts = losses_and_gradients(model, [collate(samples[part]) for part in CUT])
    assert set(whole) == {"loss", *expected[kind]}
    for name, (loss, gradients) in whole.items():
        assert loss > 0
        assert any(float(gradient.abs().max()) > 1e-3 for gradient in gradients), name
        torch.testing.assert_close(parts[name], (loss, gradients), rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("kind", ["regions", "codebook", "conversations"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_batch_reaches_all_that_a_stage_trains(name: str, kind: str) -> None:
    """Else processes wait for gradients that never come."""
    config = make_config(name, use_class_queries=True)
    of_kind = stage_kinds()[kind]
    stage = of_kind(
        "all", of_kind.Settings(trains=[*of_kind.parts]), SimpleNamespace(config=config, processor=None), 0
    )
    model = stage.prepare(make_model(config).train())
    module = trained_module(model, stage)
    trained = {key: parameter for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {part for part in of_kind.parts if any(key.startswith(PARTS[part]) for key in trained)} == {*of_kind.parts}
    if kind == "conversations":
        batches = [labelled(config, [row]) for row in ("ttt", "tIt", "tItC")]
        batches.append({**batches[-1], "mask_labels": [None]})
    else:
        batches = [perceiving(config, counts, groups=kind == "codebook") for counts in ((2, 0, 1), (0,))]
    for batch in batches:
        gradients = torch.autograd.grad(module(**batch)["loss"], [*trained.values()], allow_unused=True)
        assert not [key for key, gradient in zip(trained, gradients, strict=True) if gradient is None]


# Whole runs


def draw_data(root: Path, count: int = 14) -> Path:
    """Images with one to three masks in BiomedParse's layout, conversations that cite them or none, and bare words."""
    generator = np.random.default_rng(0)
    grounded = []

    def save(pixels: np.ndarray, path: Path) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return path.relative_to(root).as_posix()

    for number in range(count):
        brain = number % 3 == 0
        stem = f"{number}_{'MRI_brain' if brain else 'CT_abdomen'}"
        targets = ["tumor"] if brain else CLASSES[: 1 + number % 3]
        pixels = generator.integers(0, 60, (28, 28)).astype(np.uint8)
        files = []
        for place, target in enumerate(targets):
            y, x = generator.integers(0, 16, 2)
            mask = np.zeros((28, 28), dtype=bool)
            mask[y : y + 8 + place, x : x + 10] = True
            pixels[mask] += np.uint8(60 + 40 * place)
            files.append(save(mask, root / "scans" / "train_mask" / f"{stem}_{target}.png"))
        image = save(pixels, root / "scans" / "train" / f"{stem}.png")
        cited = ", ".join(f"{target} [C{int(brain)}_{generator.integers(4)}]" for target in targets)
        grounded.append(
            {
                "id": f"all-{number}",
                "image": image,
                "conversations": turns("<image>\nSegment all.", f"I see {cited}."),
                "mask_files": {str(place): file for place, file in enumerate(files)},
                "mask_orders": list(range(len(files))),
            }
        )
        if number % 2:
            reply = "A brain." if brain else "An abdomen, from the front."
            grounded.append({"id": f"what-{number}", "image": image, "conversations": turns("<image>\nWhat?", reply)})
    words = [("What is CT?", "A scan."), ("And MRI?", "Also a scan, by magnets."), ("Is it safe?", "Yes.")] * 2
    plain = [{"id": number, "conversations": turns(*pair)} for number, pair in enumerate(words)]
    for name, items in (("grounded", grounded), ("words", plain)):
        (root / f"{name}.json").write_text(json.dumps(items), encoding="utf-8")
    return root


def turns(question: str, reply: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a model to start from."""
    folder = tmp_path_factory.mktemp("distributed")
    draw_data(folder / "data")
    save_tiny_checkpoint(folder / "start", **SETTINGS)
    return folder


def write_recipe(folder: Path, name: str, size: int, accumulation: int) -> Path:
    """Two epochs of every stage, none of whose rows fill whole steps of four; a checkpoint every four steps."""
    speaks, trained = {"kind": "conversations"}, [*ConversationStage.parts]
    recipe = {
        "output": str(folder / name),
        "threads": 1,
        "model": {"folder": str(folder / "start")},
        "data": {
            "regions": [{"layout": "biomedparse", "path": str(folder / "data")}],
            "conversations": {
                "grounded": {"layout": "grounded", "path": str(folder / "data" / "grounded.json")},
                "words": {"layout": "llava", "path": str(folder / "data" / "words.json")},
            },
            "validation_fraction": 0.2,
        },
        "annotations": {"plain": {"per_image": 1, "plain_share": 1.0}},
        "training": {
            "per_device_train_batch_size": size,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": accumulation,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            # a gradient that is only rounding must not become a whole step
            "adam_epsilon": 1e-3,
            "save_steps": 4,
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            "example_images": 0,
        },
        "stages": [
            {"name": "perceiver", "kind": "regions", "trains": ["image_encoder", "region_perceiver"]},
            {**speaks, "name": "vision_to_text", "trains": ["vision_to_text"], "data": ["plain", "words"]},
            {"name": "codebook", "kind": "codebook", "revive_every": 3, "revive_until": 1.0, "kmeans_rounds": 2},
            {**speaks, "name": "text_to_vision", "trains": ["text_to_vision", "code_rows"], "data": ["grounded"]},
            {**speaks, "name": "unified", "trains": trained, "data": ["grounded", "words"], "mask_share": 0.7},
        ],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Path:
    """The run of one process that takes a step's samples at once."""
    train(load_recipe(write_recipe(folder, "one-process", size=4, accumulation=1)))
    return folder / "one-process"


def steps(run: Path, key: str) -> list[dict[str, float]]:
    lines = (run / "stages" / key / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same_run(run: Path, reference: Path) -> None:
    """Every loss of every step, all metrics and all weights of all stages."""
    for key in ("perceiver", "vision_to_text", "codebook", "text_to_vision", "unified"):
        ours, theirs = steps(run, key), steps(reference, key)
        assert [step["step"] for step in ours] == list(range(1, len(theirs) + 1))
        assert ours == [pytest.approx(step, rel=TOLERANCE, abs=TOLERANCE) for step in theirs], key
        stages = [folder / "stages" / key for folder in (run, reference)]
        weights = [load_file(stage / "model" / "model.safetensors") for stage in stages]
        torch.testing.assert_close(*weights, rtol=TOLERANCE, atol=TOLERANCE)
        metrics = [json.loads((stage / "finished.json").read_text(encoding="utf-8"))["metrics"] for stage in stages]
        scores = [
            {name: value for name, value in some.items() if name.startswith("eval_") and not name.endswith(TIMES)}
            for some in metrics
        ]
        assert len(scores[1]) > 1
        assert scores[0] == pytest.approx(scores[1], rel=TOLERANCE, abs=TOLERANCE, nan_ok=True), key
        assert not list(stages[0].glob("checkpoint-*"))


@pytest.mark.slow
def test_accumulated_parts_train_like_the_whole(folder: Path, one_process: Path) -> None:
    train(load_recipe(write_recipe(folder, "accumulated", size=1, accumulation=4)))
    assert_same_run(folder / "accumulated", one_process)
    for key, counts in {"perceiver": 6, "codebook": 6, "unified": 12}.items():
        assert len(steps(one_process, key)) == counts


def start_two(recipe: Path, *arguments: str) -> subprocess.Popen:
    """Two processes of torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_CACHE": str(recipe.parent / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    with open(recipe.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, str(ROOT / "tests" / "training" / "distributed_run.py"), str(recipe), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.slow
def test_two_processes_killed_and_stopped_train_like_one(folder: Path, one_process: Path) -> None:
    recipe = write_recipe(folder, "two-processes", size=1, accumulation=2)
    run, log = folder / "two-processes", recipe.with_suffix(".log")

    killed = start_two(recipe)
    deadline = time.monotonic() + 300
    while not list((run / "stages").glob("*/checkpoint-*")):
        assert killed.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, "no checkpoint after five minutes"
        time.sleep(0.01)
    for pid in recipe.with_suffix(".pids").read_text(encoding="utf-8").split():
        os.kill(int(pid), signal.SIGKILL)
    assert killed.wait(timeout=60) != 0
    assert not (run / "stages" / "vision_to_text").exists()

    assert start_two(recipe, "--leave").wait(timeout=600) == 0, log.read_text(encoding="utf-8")
    assert_same_run(run, one_process)
    calls = recipe.with_suffix(".calls").read_text(encoding="utf-8").splitlines()
    assert {line.split()[0] for line in calls} == {"annotate_regions", "save_folder", "write_text", "kmeans"}
    assert {line.split()[1] for line in calls} == {"0"}
    assert calls.count("kmeans 0") == len(GROUPS)
