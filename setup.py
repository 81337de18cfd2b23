"""Builds and installs MedSIGHT: `pip install .`, or `pip install -e ".[dev]"` to work on it."""

import re
from pathlib import Path

from setuptools import setup


ROOT = Path(__file__).resolve().parent
METRICS = [f"medsight.metrics.{name}" for name in ("medical_vqa", "mask_dice", "region_codes")]
PACKAGES = [
    *("configuration_medsight", "modeling_medsight", "processing_medsight"),
    *("medsight", "medsight.app", "medsight.cli", "medsight.conversion", "medsight.data", "medsight.evaluation"),
    *("medsight.export", "medsight.hub", "medsight.inference", "medsight.metrics", "medsight.scans"),
    *METRICS,
]
# `training/` stands at the top of the repository and is installed as `medsight.training`, so as not to take that name.
TRAINING = ["medsight.training", "medsight.training.baselines"]

version = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "medsight/version.py").read_text("utf-8"), re.MULTILINE)
if version is None:
    raise ValueError('medsight/version.py: expected a line `__version__ = "..."`, found none')
readme = ROOT / "README.md"

# The ranges were tested together; nothing here may require torchvision or timm, which pull the CUDA builds.
runtime = [
    "torch>=2.6",
    "transformers>=5.17,<6",
    "tokenizers>=0.23.1,<0.24",
    "safetensors>=0.8",
    "huggingface_hub>=1.31,<3",
    "scipy>=1.11",
    "numpy>=1.26",
    "pillow>=11",
    "jinja2>=3.1",
    "rich>=13",
    "tqdm>=4.60",
    "typer>=0.15",
]
extras = {
    "train": [
        "accelerate>=1.10",
        "datasets>=4.7",
        "peft>=0.18",
        "pyyaml>=6",
        "tensorboard>=2.16",
        "trl>=1.0",
    ],
    "eval": [
        *("evaluate>=0.4.6", "datasets>=4.7", "pyyaml>=6", "accelerate>=1.10"),
        *("pycocotools>=2.0.10", "segmentationmetrics>=1.2,<2", "scipy>=1.11,<2"),
    ],
    "medical": [
        *("pydicom>=3.0", "nibabel>=5.2", "highdicom>=0.26", "contourpy>=1.3", "pycocotools>=2.0.10"),
        *("pylibjpeg>=2.0", "pylibjpeg-openjpeg>=2.3"),
    ],
    "jpeg": ["pylibjpeg-libjpeg>=2.1"],  # lossless and 12-bit JPEG in DICOM; under the GPL, so by itself
    "quant": ["bitsandbytes>=0.46.1", "accelerate>=1.10"],
    "app": ["gradio>=6.31,<7"],
    "demo": ["mahotas>=1.4.13"],
    "dev": [
        *("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12", "mypy>=1.16", "setuptools>=77", "pip>=23.2"),
        *("SimpleITK>=2.4", "playwright>=1.50", "import-linter>=2.1", "grimp>=3"),
    ],
}

setup(
    name="medsight",
    version=version[1],
    description="A grounded medical vision-language model: answers in words and in masks, Hugging Face-native",
    long_description=readme.read_text("utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0 AND CC-BY-SA-4.0",  # the code; the weights of medsight-nano
    license_files=["LICENSE"],
    packages=PACKAGES + TRAINING,
    package_dir={"medsight.training": "training"},
    package_data={
        "configuration_medsight": ["hub_card.md"],
        "medsight": ["medsight-nano/*"],
        "medsight.app": ["*.css"],
        "medsight.hub": ["*.yaml"],
        "medsight.data": ["*.yaml"],
        "medsight.evaluation": ["*.yaml", "*.jinja"],
        **{name: ["README.md", "requirements.txt"] for name in METRICS},
        "medsight.training": ["configs/*.yaml", "configs/ablations/*.yaml", "accelerate/*.yaml"],
    },
    python_requires=">=3.10",
    install_requires=runtime,
    extras_require=extras,
    entry_points={"console_scripts": ["medsight = medsight.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
