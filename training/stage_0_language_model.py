"""Stage 0: the language model alone, on the corpus' own text; for presets without a pretrained one.

medsight train CONFIG.yaml --stage language_model
"""

from .language import LanguageStage


class LanguageModelStage(LanguageStage):
    """Trains the language model on questions and answers without images; questions are learnt as text too."""

    key, folder = "language_model", "0_language_model"
    label_prompts = text_only = True

    def trains(self) -> tuple[str, ...]:
        return ("model.language_model.", "lm_head.")
