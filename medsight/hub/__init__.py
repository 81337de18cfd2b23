"""Publishing checkpoints on the Hugging Face Hub: what is uploaded, the model card, and the upload."""

from medsight.hub.card import CardFacts, render_card, write_card
from medsight.hub.files import Upload, UploadFile, files_to_push
from medsight.hub.push import Push, push


__all__ = ["CardFacts", "Push", "Upload", "UploadFile", "files_to_push", "push", "render_card", "write_card"]
