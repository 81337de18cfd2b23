"""The files that the pages speak of, drawn small, under the names that the pages give them."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from medsight.checkpoint import shipped_checkpoint
from medsight.demo import write_demo_image
from tests.docs.pages import ROOT
from tests.medsight.conversion.published_files import random_model, write_published
from tests.medsight.data.layouts import test_coco, test_huggingface, test_table, test_yolo
from tests.medsight.data.layouts.picture_sets import save
from tests.medsight.data.layouts.test_pairs import MAPS
from tests.medsight.export.scans import bright_volume, write_dicom_series
from tests.medsight.scans.scan_files import nifti_bytes
from tests.training.tiny_run import draw_data


TRAIN, TEST = 10, 3


def prepare(folder: Path) -> Path:
    """A folder like a checkout of the repository, with its neighbours; commands run in it."""
    checkout = folder / "checkout"
    checkout.mkdir()
    shutil.copytree(shipped_checkpoint(), checkout / "medsight/medsight-nano")
    shutil.copytree(shipped_checkpoint(), checkout / "my-model")
    draw_environment(checkout)
    draw_scans(checkout)
    draw_masks(checkout / "my-masks", "ultrasound_breast", "benign+breast+tumor")
    draw_masks(checkout / "my-oct", "OCT_retina", "macular+fluid")
    draw_layouts(checkout)
    (checkout / "published").mkdir()
    write_published(checkout / "published", random_model())
    shared = folder / "shared/data"
    draw_data(shared / "segmentation")
    draw_questions(shared / "vqa_rad")
    return checkout


def draw_environment(checkout: Path) -> None:
    """What `make` finds there: its Makefile, and a virtual environment that looks installed and is this one."""
    shutil.copy(ROOT / "Makefile", checkout)
    for name in ("setup.py", "pyproject.toml"):
        (checkout / name).touch()
    binaries = checkout / ".venv/bin"
    binaries.mkdir(parents=True)
    for name, arguments in (("python", ""), ("medsight", "-m medsight.cli ")):
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n', encoding="utf-8")
        (binaries / name).chmod(0o755)
    for name in (".installed", ".installed-dev"):
        (checkout / ".venv" / name).touch()


def environment(checkout: Path) -> dict[str, str]:
    """The environment of the pages' commands: this Python and this code, nothing fetched, caches in the folder."""
    return {
        **os.environ,
        "PATH": f"{checkout / '.venv/bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(checkout.parent / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def draw_scans(checkout: Path) -> None:
    """nuclei.png and scan.png, which are the demo's micrograph; scans/ with two parts of it; series/; mr.nii.gz."""
    micrograph = write_demo_image(checkout / "nuclei.png")
    shutil.copy(micrograph, checkout / "scan.png")
    (checkout / "scans").mkdir()
    for number in range(2):
        box = (300 * number, 0, 300 * number + 300, 240)
        Image.open(micrograph).crop(box).save(checkout / f"scans/{number}.png")
    write_dicom_series(checkout / "series", bright_volume((4, 48, 56)))
    random = np.random.default_rng(0)
    head = np.hypot(*np.mgrid[-1:1:48j, -1.2:1.2:56j]) < 0.9
    brain = np.where(head, random.integers(200, 600, (4, 48, 56)), 0).astype(np.int16)
    (checkout / "mr.nii.gz").write_bytes(nifti_bytes(brain.transpose(2, 1, 0), np.diag([1.0, 1, 4, 1]), packed=True))


def draw_masks(root: Path, origin: str, target: str) -> None:
    """A data set in BiomedParse's layout without a manifest: dark ellipses in ultrasound's noise, a patient each.

    Args:
        origin: MODALITY_SITE, as files' names say it.
        target: what the ellipses are, "+" for a space.
    """
    random = np.random.default_rng(0)
    y, x = np.mgrid[:64, :80]
    for split, count, number in (("train", TRAIN, 0), ("test", TEST, 100)):
        (root / split).mkdir(parents=True)
        (root / f"{split}_mask").mkdir()
        for _ in range(count):
            number += 1
            centre, radius = random.integers(24, 40), random.integers(8, 16)
            mask = (y - centre) ** 2 + ((x - centre - 8) / 1.4) ** 2 < radius**2
            pixels = (random.normal(110, 25, mask.shape) - 60 * mask).clip(0, 255).astype(np.uint8)
            name = f"{number:04d}_{origin}"
            Image.fromarray(pixels).save(root / split / f"{name}.png")
            Image.fromarray(mask).save(root / f"{split}_mask" / f"{name}_{target}.png")


def draw_layouts(checkout: Path) -> None:
    """polyps/ and abdomen/, folders of images and masks; and the latter's pictures in other layouts."""
    random = np.random.default_rng(0)
    for number in range(10):
        pixels = random.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        mask = (
            np.hypot(*np.mgrid[-24:24, -28 - number : 36 - number]) < 8 + number
            if number
            else np.zeros((48, 64), bool)
        )
        for folder, picture in (("images", pixels), ("masks", mask)):
            save(checkout / f"polyps/{folder}/p{number // 2}_{number % 2}.png", picture)
    MAPS["numbers"][0](checkout / "abdomen")
    (checkout / "abdomen-names.txt").write_text("1 liver\n2 left kidney\n3 liver tumor\n")
    test_coco.write(checkout / "abdomen-coco")
    test_yolo.write(checkout / "abdomen-yolo")
    (checkout / "abdomen-table").mkdir()
    test_table.write(checkout / "abdomen-table/masks.csv", test_table.records(checkout / "abdomen-table"))
    test_huggingface.in_parquet(checkout / "abdomen-hub", checkout.parent / "files", "list")


def draw_questions(root: Path) -> None:
    """Questions in VQA-RAD's layout, two a split, about a picture each."""
    (root / "images").mkdir(parents=True)
    rows = []
    for number, (split, question, answer) in enumerate(
        [
            ("train", "Is there a fracture?", "No"),
            ("train", "What organ is this?", "Liver"),
            ("test", "Is the heart enlarged?", "Yes"),
            ("test", "Where is the mass?", "Left lung"),
        ]
    ):
        image = f"images/{number}.jpg"
        Image.fromarray(np.full((32, 32), 40 * number, dtype=np.uint8)).save(root / image)
        row = {"id": str(number), "image": image, "question": question, "answer": answer, "split": split}
        kind = {"answer_type": "CLOSED" if answer in ("Yes", "No") else "OPEN", "image_in_test": split == "test"}
        rows.append({**row, **kind, "question_type": "PRES", "phrase_type": "freeform", "site": "CHEST"})
    (root / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
