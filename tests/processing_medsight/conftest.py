"""Fixtures for the processor's tests: a tiny tokenizer and processor, and Qwen3's own tokenizer where dashscope is."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from processing_medsight import MedSightImageProcessor, MedSightProcessor, add_region_codes


GROUPS, CODES = 3, 4
IMAGE_ROWS = 5


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    """The module that builds tokenizers for these tests."""
    spec = importlib.util.spec_from_file_location("qwen3_tokenizer", Path(__file__).with_name("qwen3_tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def qwen3_ranks() -> Path:
    """The file of Qwen3's ranks, which the package dashscope ships (install it with --no-deps)."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None:
        pytest.skip("the package dashscope, which ships Qwen's vocabulary, is not installed")
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="session")
def qwen3_saved(builder: ModuleType, qwen3_ranks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Qwen3's tokenizer, without region codes."""
    folder = tmp_path_factory.mktemp("qwen3")
    builder.build_qwen3_tokenizer(qwen3_ranks).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen3_with_codes(qwen3_saved: Path) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer with the published model's 18 x 32 codes. Not to be changed."""
    tokenizer = AutoTokenizer.from_pretrained(qwen3_saved)
    assert add_region_codes(tokenizer, 18, 32) == 151_669
    return tokenizer


@pytest.fixture
def bare_tokenizer(builder: ModuleType) -> PreTrainedTokenizerBase:
    return builder.build_tiny_tokenizer()


@pytest.fixture
def tokenizer(bare_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    add_region_codes(bare_tokenizer, GROUPS, CODES)
    return bare_tokenizer


@pytest.fixture
def processor(tokenizer: PreTrainedTokenizerBase) -> MedSightProcessor:
    return MedSightProcessor(
        MedSightImageProcessor(size=28),
        tokenizer,
        image_seq_length=IMAGE_ROWS,
        group_names=["CT abdomen", "MRI brain", "endoscopy"],
    )


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
