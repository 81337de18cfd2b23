"""The processor's fixtures: scans are read for it."""

from tests.processing_medsight.conftest import bare_tokenizer, builder, image, processor, tokenizer


__all__ = ["bare_tokenizer", "builder", "image", "processor", "tokenizer"]
