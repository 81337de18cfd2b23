"""Publishing checkpoints on the Hugging Face Hub: what is uploaded, the model card, and the upload."""

from .card import CardFacts, render_card, write_card
from .files import Upload, files_to_push
from .push import Push, push


__all__ = ["CardFacts", "Push", "Upload", "files_to_push", "push", "render_card", "write_card"]
