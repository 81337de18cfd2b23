"""Fixtures for the processor's tests: a tiny tokenizer and processor, and Qwen3's own tokenizer where dashscope is."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from processing_medsight import MedSightImageProcessor, MedSightProcessor, add_region_codes
from tests.processing_medsight.qwen3_tokenizer import build_qwen3_tokenizer, build_tiny_tokenizer


GROUPS, CODES = 3, 4
IMAGE_ROWS = 5


@pytest.fixture(scope="session")
def qwen3_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Qwen3's tokenizer, from the ranks that the package dashscope ships (install it with --no-deps)."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None:
        pytest.skip("the package dashscope, which ships Qwen's vocabulary, is not installed")
    folder = tmp_path_factory.mktemp("qwen3")
    build_qwen3_tokenizer(Path(spec.origin).parent / "resources" / "qwen.tiktoken").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen3_with_codes(qwen3_saved: Path) -> PreTrainedTokenizerBase:
    """Qwen3's tokenizer with the published model's 18 x 32 codes. Not to be changed."""
    tokenizer = AutoTokenizer.from_pretrained(qwen3_saved)
    assert add_region_codes(tokenizer, 18, 32) == 151_669
    return tokenizer


@pytest.fixture
def bare_tokenizer() -> PreTrainedTokenizerBase:
    return build_tiny_tokenizer()


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
