"""Answers a prompt about an image: `medsight predict`, and `Predictor` for Python."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from PIL import Image

    from medsight.prediction import Prediction

DTYPES = ("auto", "float32", "bfloat16", "float16")
MAX_NEW_TOKENS = 256


class Predictor:
    """A loaded checkpoint that answers prompts about images, one at a time.

    Args:
        model: checkpoint folder; the small one that comes with the package by default.
        device: "auto" (a GPU where there is one), or a torch device such as "cpu" or "cuda:1".
        dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16".

    Raises:
        OSError: the folder or a file of it is missing.
        ValueError: the folder is no complete MedSIGHT checkpoint, or the device or dtype is not to be had.
    """

    def __init__(self, model: str | Path | None = None, device: str = "auto", dtype: str = "auto") -> None:
        from medsight.checkpoint import check_checkpoint, shipped_checkpoint

        folder = shipped_checkpoint() if model is None else Path(model)
        check_checkpoint(folder)
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        self.device = choose_device(device)
        self.model_name = folder.name if model is None else str(model)
        self.model, self.processor = load_checkpoint(folder, dtype)
        self.model.to(self.device).eval()

    def __call__(
        self,
        image: "str | Path | Image.Image",
        prompt: str,
        max_new_tokens: int = MAX_NEW_TOKENS,
        allowed_groups: str | Sequence[int | str] | None = None,
        force_region: bool = False,
        threshold: float = 0.5,
    ) -> "Prediction":
        """Answers `prompt` about `image`, decoding greedily.

        Args:
            image: an image file, or a PIL image.
            prompt: the question or instruction.
            max_new_tokens: the answer is cut there.
            allowed_groups: names or numbers of the groups whose region codes may be cited, or "predicted" for the
                group that the model sees in the image; any group by default.
            force_region: cite at least one region code.
            threshold: probability from which on a pixel belongs to a mask.

        Raises:
            ValueError: the image cannot be read, or an argument is out of range; the message names it.
        """
        import torch

        from medsight.prediction import Prediction

        if not prompt.strip():
            raise ValueError("the prompt is empty; ask about the image, for example 'Segment the liver.'")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens}: expected at least 1")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold {threshold}: expected a probability between 0 and 1")
        pixels = read_image(image)
        content = [{"type": "image", "image": pixels}, {"type": "text", "text": prompt}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
        ).to(self.device, dtype=self.model.dtype)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                allowed_groups=allowed_groups,
                force_region=force_region,
            )
        answer = self.processor.post_process_grounded_answer(output, inputs, threshold=threshold)[0]
        return Prediction(
            answer=answer,
            image=pixels,
            image_name=str(image) if isinstance(image, (str, Path)) else "image",
            prompt=prompt,
            model=self.model_name,
        )


def choose_device(device: str) -> Any:
    """The torch device of that name; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r}: expected auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: this machine or this torch has no CUDA; use cpu")
    return chosen


def load_checkpoint(folder: Path, dtype: str) -> tuple[Any, Any]:
    """The model and processor of a checked checkpoint folder, by this package's own classes, offline.

    Raises:
        ValueError: files of the processor are missing or damaged, or weights and configuration do not belong together.
    """
    from modeling_medsight import MedSightForConditionalGeneration
    from processing_medsight import MedSightProcessor

    try:
        processor = MedSightProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model folder {folder}: its processor cannot be loaded ({reason})") from error
    # Mismatches are let through here to be reported below, with the name of a weight.
    model, loaded = MedSightForConditionalGeneration.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loaded[kind]:
            first = min(entry if isinstance(entry, str) else entry[0] for entry in loaded[kind])
            raise ValueError(
                f"model folder {folder}: its weights do not fit its config.json ({len(loaded[kind])} "
                f"{kind.replace('_', ' ')}, first: {first}); convert or copy it again"
            )
    return model, processor


def read_image(image: "str | Path | Image.Image") -> "Image.Image":
    """An image file, or a PIL image of any mode, as 8-bit RGB, by the range rule of `processing_medsight`.

    Raises:
        ValueError: the file is missing, empty, truncated or of an unknown format, or has no pixels or too many.
    """
    from PIL import Image

    from processing_medsight.image_loading_medsight import load_image, to_array

    name = "image"
    if isinstance(image, (str, Path)):
        name = str(image)
        image = load_image(Path(image))
    return Image.fromarray(to_array(image, name, convert_rgb=True, rescale=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `medsight predict`."""
    parser.epilog = (
        "The output folder appears complete or not at all: answer.json (text and regions), mask-NN.png for each "
        "region (0 and 255, at the image's size, upright where EXIF says so) and overlay.png. Not a medical device."
    )
    parser.add_argument("image", metavar="IMAGE", help="image file (PNG, JPEG, TIFF, ...)")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to ask, such as 'Segment the liver.'")
    parser.add_argument("--model", metavar="DIR", help="checkpoint folder (default: the small one in this package)")
    parser.add_argument("--output", metavar="DIR", help="output folder (default: IMAGE's name + '-medsight', here)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier answer in the output folder")
    parser.add_argument(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="length limit (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="precision (default: the checkpoint's own)")
    parser.add_argument(
        "--allowed-groups",
        metavar="GROUPS",
        help="cite only region codes of these groups: names or numbers with commas between, or 'predicted'",
    )
    parser.add_argument("--force-region", action="store_true", help="cite at least one region")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="probability that makes a mask (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    """Runs `medsight predict`.

    Raises:
        OSError, ValueError: see `Predictor`, `Predictor.__call__` and `Prediction.save`; nothing is written then.
    """
    from medsight.prediction import check_answer_folder

    output = Path(args.output if args.output is not None else f"{Path(args.image).stem}-medsight")
    check_answer_folder(output, args.overwrite)
    image = read_image(args.image)

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    predictor = Predictor(args.model, device=args.device, dtype=args.dtype)
    prediction = predictor(
        image,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        allowed_groups=parse_groups(args.allowed_groups),
        force_region=args.force_region,
        threshold=args.threshold,
    )
    prediction = dataclasses.replace(prediction, image_name=args.image)
    prediction.save(output, overwrite=args.overwrite)
    print(prediction.to_table())
    print(f"\nWritten to {output}/: answer.json, overlay.png, {len(prediction.answer.regions)} mask file(s)")


def parse_groups(text: str | None) -> str | list[int | str] | None:
    """The value of --allowed-groups: "predicted", or names and numbers with commas between."""
    if text is None or text == "predicted":
        return text
    groups = [part.strip() for part in text.split(",")]
    return [int(group) if group.isdecimal() else group for group in groups]
