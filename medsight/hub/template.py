"""The model card that a push writes: hub_card.md, filled in.

In a checkpoint folder, where code travels without other files, the template stands in this module itself.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData


TAGS = ("medical", "image-segmentation", "visual-question-answering", "grounded", "medsight")
TEMPLATE = Path(__file__).with_name("hub_card.md").read_text(encoding="utf-8")


def render_card(
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    adapter: bool = False,
    prompt: str | None = None,
    sections: dict[str, Any] | None = None,
    **metadata: Any,
) -> ModelCard:
    """The card of a checkpoint; what is not given it says to be unknown.

    Args:
        repo_id: `namespace/name` on the Hub.
        license: identifier of the weights' licence; "other" where none is stated.
        base_model: Hub id of what the checkpoint was made from.
        adapter: whether it is an adapter of `base_model`.
        prompt: a request that it understands, for the example.
        sections: texts of the template, in Markdown: results, limits, training_data, training; and image_size.
        metadata: further fields of the header, such as datasets, eval_results, widget.
    """
    if adapter:
        metadata["base_model_relation"] = "adapter"
    if metadata.get("eval_results"):
        metadata["model_name"] = repo_id.split("/")[-1]
    data = ModelCardData(
        language="en",
        license=license or "other",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=[*TAGS] if adapter else [*TAGS, "custom_code"],
        base_model=base_model,
        **{name: value for name, value in metadata.items() if value},
    )
    return ModelCard.from_template(
        data, template_str=TEMPLATE, repo_id=repo_id, adapter=adapter, prompt=prompt, **(sections or {})
    )


class HubCardMixin:
    """Has `push_to_hub` of whatever transformers saves put this model's card where the repository has none."""

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        token = kwargs.get("token")
        if not HfApi().file_exists(repo_id, "README.md", token=token):
            config: Any = getattr(self, "config", self)
            card = render_card(repo_id, base_model=_hub_id(getattr(config, "_name_or_path", ""), token))
            card.save(Path(working_dir) / "README.md")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]


def _hub_id(name_or_path: str, token: Any) -> str | None:
    """What a model was loaded from, if it is on the Hub."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path) and not Path(name_or_path).exists()
    return name_or_path if is_id and HfApi().repo_exists(name_or_path, token=token) else None
