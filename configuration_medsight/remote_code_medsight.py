"""Writes the model's own code into a checkpoint folder, so that it loads with `trust_remote_code=True` anywhere.

The loader of remote code copies, flat, the modules that `auto_map` names and what they import relatively. In the
packages, modules of one folder import each other relatively and of another folder absolutely; in a checkpoint folder
all lie side by side, so absolute imports of our packages are rewritten to relative ones. The loader takes no other
files along, so the model card's template is written into its module.
"""

import inspect
import os
import re
from pathlib import Path


AUTO_MAP = {
    "AutoConfig": "configuration_medsight.MedSightConfig",
    "AutoModel": "modeling_medsight.MedSightForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_medsight.MedSightForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_medsight.MedSightForConditionalGeneration",
    "AutoModelForMaskGeneration": "region_model_medsight.MedSightRegionModel",
    "AutoModelForMultimodalLM": "modeling_medsight.MedSightForConditionalGeneration",
    "AutoProcessor": "processing_medsight.MedSightProcessor",
    "AutoImageProcessor": "image_processing_medsight.MedSightImageProcessor",
}

_OWN_IMPORT = re.compile(
    r"^(\s*)from (?:configuration|modeling|processing)_medsight\.(\w+_medsight) import", flags=re.MULTILINE
)
_TEMPLATE = re.compile(r'^TEMPLATE = (Path\(__file__\)\.with_name\("(\w+\.md)"\).*)$', flags=re.MULTILINE)


def write_remote_code(save_directory: str | os.PathLike) -> None:
    """Write every module of the model and the processor, flat, into `save_directory` (made where it is missing).

    Works from the installed packages and from a checkpoint's own copy of the code alike.
    """
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    for folder in _source_folders():
        for source in sorted(folder.glob("*_medsight.py")):
            text = _OWN_IMPORT.sub(r"\1from .\2 import", source.read_text(encoding="utf-8"))
            template = _TEMPLATE.search(text)
            if template:
                content = (folder / template[2]).read_text(encoding="utf-8")
                text = text.replace(template[1], f"r'''{content}'''")
            if source.resolve() != (target / source.name).resolve():
                (target / source.name).write_text(text, encoding="utf-8")


def _source_folders() -> list[Path]:
    # These imports also tell the loader of remote code that a module's folder needs all of the files, not only its
    # own.
    from configuration_medsight.configuration_medsight import MedSightConfig
    from modeling_medsight.modeling_medsight import MedSightForConditionalGeneration
    from processing_medsight.processing_medsight import MedSightProcessor

    classes = (MedSightConfig, MedSightForConditionalGeneration, MedSightProcessor)
    return sorted({Path(inspect.getfile(cls)).parent for cls in classes})
