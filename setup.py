"""Builds and installs MedSIGHT: `pip install .`, or `pip install -e ".[dev]"` to work on it."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


ROOT = Path(__file__).resolve().parent
# What a checkpoint folder carries, flat: see configuration_medsight/remote_code_medsight.py.
MODEL = ("configuration_medsight", "modeling_medsight", "processing_medsight")


class BuildWithCode(build_py):
    """Writes the model's code into medsight-nano, which then loads by itself; an editable install gets it in place."""

    def run(self) -> None:
        super().run()
        base = ROOT if self.editable_mode else Path(self.build_lib)
        folder = base / "medsight" / "medsight-nano"
        for earlier in folder.glob("*_medsight.py"):
            earlier.unlink()
        module = runpy.run_path(str(ROOT / "configuration_medsight" / "remote_code_medsight.py"))
        module["write_remote_code"](folder, *(ROOT / name for name in MODEL))


# The ranges were tested together; nothing here may require torchvision or timm, which pull the CUDA builds.
runtime = [
    *("torch>=2.6", "transformers>=5.17,<6", "tokenizers>=0.23.1,<0.24", "safetensors>=0.8", "scipy>=1.11"),
    *("huggingface_hub>=1.31,<3", "numpy>=1.26", "pillow>=11", "jinja2>=3.1", "rich>=13", "tqdm>=4.60", "typer>=0.15"),
]
extras = {
    "train": [
        *("accelerate>=1.10", "datasets>=4.7", "filelock>=3.10", "peft>=0.18", "pyyaml>=6", "tensorboard>=2.16"),
        "trl>=1.0",
    ],
    "eval": [
        *("evaluate>=0.4.6", "datasets>=4.7", "filelock>=3.10", "pyyaml>=6", "accelerate>=1.10"),
        *("pycocotools>=2.0.10", "segmentationmetrics>=1.2,<2", "scipy>=1.11,<2"),
    ],
    "medical": [
        *("pydicom>=3.0", "nibabel>=5.2", "highdicom>=0.26", "contourpy>=1.3", "pycocotools>=2.0.10"),
        *("pylibjpeg>=2.0", "pylibjpeg-openjpeg>=2.3", "tifffile>=2023.2.3", "imagecodecs>=2023.1.23"),
    ],
    "jpeg": ["pylibjpeg-libjpeg>=2.1"],  # lossless and 12-bit JPEG in DICOM; under the GPL, so by itself
    "quant": ["bitsandbytes>=0.46.1", "accelerate>=1.10"],
    "app": ["gradio>=6.31,<7"],
    "demo": ["mahotas>=1.4.13"],
    "dev": [
        *("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.12", "mypy>=1.16", "setuptools>=77", "pip>=23.2"),
        *("SimpleITK>=2.4", "playwright>=1.50", "import-linter>=2.1", "grimp>=3"),
        *("onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5", "gguf>=0.10"),
    ],
}

setup(
    name="medsight",
    version=runpy.run_path(str(ROOT / "medsight" / "version.py"))["__version__"],
    description="A grounded medical vision-language model: answers in words and in masks, Hugging Face-native",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0 AND CC-BY-SA-4.0",  # the code; the weights of medsight-nano
    license_files=["LICENSE"],
    packages=[
        *find_packages(include=[*MODEL, "medsight", "medsight.*"]),
        # `training/` stands at the top of the repository, and is installed as `medsight.training`.
        *("medsight.training", *(f"medsight.training.{name}" for name in find_packages("training"))),
    ],
    package_dir={"medsight.training": "training"},
    package_data={
        "": ["*.css", "*.jinja", "*.md", "*.yaml", "requirements.txt"],
        "medsight": [f"medsight-nano/{name}" for name in ("*.jinja", "*.json", "*.md", "*.safetensors")],
        "medsight.training": ["configs/*.yaml", "configs/ablations/*.yaml", "accelerate/*.yaml"],
    },
    cmdclass={"build_py": BuildWithCode},
    python_requires=">=3.10",
    install_requires=runtime,
    extras_require=extras,
    entry_points={"console_scripts": ["medsight = medsight.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
