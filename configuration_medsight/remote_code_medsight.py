"""Writes the model's own code into a checkpoint folder, so that it loads with `trust_remote_code=True` anywhere.

The loader of remote code copies, flat, the modules that `auto_map` names and those that they import relatively. In the
packages, modules of one folder import each other relatively and of another folder absolutely; in a checkpoint folder
all lie side by side, so absolute imports of our packages are rewritten to relative ones.

setup.py and `make nano-code` run this file by its path, so it needs the standard library alone:

    python configuration_medsight/remote_code_medsight.py CHECKPOINT modeling_medsight processing_medsight
"""

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any


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

_PACKAGE_IMPORT = re.compile(
    r"^(\s*)from (?:configuration|modeling|processing)_medsight\.(\w+_medsight) import", flags=re.MULTILINE
)


def write_remote_code(save_directory: str | os.PathLike, *folders: str | os.PathLike) -> None:
    """Write the modules of this file's folder and of `folders`, flat, into `save_directory`, made where it is missing.

    Works from the packages and from a checkpoint's own copy of the code alike.
    """
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    for folder in {Path(__file__).resolve().parent, *(Path(folder).resolve() for folder in folders)}:
        for source in folder.glob("*_medsight.py"):
            text = _PACKAGE_IMPORT.sub(r"\1from .\2 import", source.read_text(encoding="utf-8"))
            if source != target.resolve() / source.name:
                (target / source.name).write_text(text, encoding="utf-8")


class RemoteCodeMixin:
    """Has `save_pretrained` write, beside what transformers saves, the code that loads it.

    That is the class's own package and this one: a whole checkpoint's code comes together when the model and the
    processor are saved into one folder, in either order.
    """

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the code that loads the files is written beside them."""
        save_directory = os.path.normpath(save_directory)  # whose last part names a repository that is pushed to
        files = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            self._save_beside(save_directory)
        return files

    def _upload_modified_files(self, working_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        self._save_beside(working_dir)  # save_pretrained(push_to_hub=True) uploads before it returns
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]

    def _save_beside(self, save_directory: str | os.PathLike) -> None:
        """Write what transformers does not save."""
        ours = [cls for cls in type(self).__mro__ if cls.__module__.endswith("_medsight")]
        write_remote_code(save_directory, *{Path(inspect.getfile(cls)).parent for cls in ours})


if __name__ == "__main__":
    write_remote_code(*sys.argv[1:])
