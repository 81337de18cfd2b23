"""The model card that a push writes: hub_card.md, filled in.

In a checkpoint folder, where code travels without other files, the template stands in this module itself.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData


TAGS = ("medical", "image-segmentation", "visual-question-answering", "grounded", "medsight")
TEMPLATE = r'''---
{{ card_data }}
---

# {{ repo_id.split("/")[-1] }}

{% if adapter -%}
An adapter for [{{ base_model }}](https://huggingface.co/{{ base_model }}), a medical vision-language model that answers in
words and in masks. It holds neither the model nor its code: both come from there.
{%- else -%}
A medical vision-language model that answers in words and in masks. Where an answer speaks of something in the image, it
cites a *region code* such as `[C0_16]`, and every code decodes to a mask of the image's own size.
{%- endif %}

> **Not a medical device.** No regulator has cleared this model, and no clinical study supports it. Its answers and masks
> can be wrong while reading as certain. Never use them to diagnose, to treat, to triage, or to put off seeing a clinician.

## Use

```python
{% if adapter -%}
from peft import PeftModel
{% endif -%}
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

{% if adapter -%}
base = "{{ base_model }}"
processor = AutoProcessor.from_pretrained(base, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{{ repo_id }}")
{%- else -%}
processor = AutoProcessor.from_pretrained("{{ repo_id }}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{{ repo_id }}", trust_remote_code=True)
{%- endif %}

image = Image.open("scan.png")
content = [{"type": "image", "image": image}, {"type": "text", "text": {{ prompt | default("Segment the liver.", true) | tojson }}}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    tokenize=True,
    return_dict=True,
    add_generation_prompt=True,
    return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True)
answer = processor.post_process_grounded_answer(output, inputs)[0]
print(answer.text)
for region in answer.regions:  # mask: boolean, at the image's own size
    print(region.code, region.group_name, region.phrase, region.box, region.area, region.score, region.mask.shape)
```

`trust_remote_code=True` runs the Python files of this repository: read them first, and pin a `revision`, or install the
package `medsight`, whose classes load the weights without it. Weights are safetensors files only.

## Intended use

* Research on grounded medical vision-language models: methods, evaluation, failure analysis.
* Teaching, and building tools whose output a qualified person checks before anything depends on it.

## Forbidden use

* Any clinical decision, for a person or an animal, with or without a clinician in the loop.
* Presenting answers or masks as expert readings, or as measurements.
* Identifying people, or inferring anything about a person who did not agree to it.

## Results

{{ results | default("None were measured for this checkpoint.", true) }}

## Known limits

* An answer may name what is not in the image, miss what is, or put a correct word on a wrong mask. A score is the model's
  own confidence; it is not calibrated.
* It sees single two-dimensional images at a low resolution{% if image_size %} ({{ image_size }} × {{ image_size }} pixels){% endif %}. Fine structures are lost, and a volume's other slices,
  earlier studies and the patient's history are unknown to it.
* Scanners, protocols, populations, body sites and languages outside its training data are untested. English only.
* Nothing has been measured on how errors differ between groups of patients.
{% if limits -%}
{{ limits }}
{% endif %}
## Training data and licences

{{ training_data | default("Not recorded for this checkpoint. Do not assume that its weights may be used commercially.", true) }}

The code is under Apache-2.0. The weights are under the licence named at the top of this card; "other" means that none was
stated, and that the licences of the training data and of the models it started from decide.

## Training, time and carbon

{{ training | default("Time, hardware and carbon were not recorded for this checkpoint.", true) }}

## How to cite

The architecture follows MedSIGHT (arXiv 2606.06760, ICML 2026). This implementation is independent of its authors.

```bibtex
@inproceedings{medsight2026,
  title = {MedSIGHT},
  booktitle = {International Conference on Machine Learning},
  year = {2026},
  note = {arXiv:2606.06760}
}
```
'''


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
