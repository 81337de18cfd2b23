"""The model card of a checkpoint folder: hub_card.md, filled in from the folder, its evaluations and its training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_url
from huggingface_hub.utils import HFValidationError, validate_repo_id

from medsight.checkpoint import read_json, weights_sha256
from medsight.files import write_text

from .files import ADAPTER_CONFIG, CARD, check_repo_id, files_to_push
from .results import eval_results, read_metrics, results_text


TEMPLATE = Path(__file__).with_name("hub_card.md").read_text(encoding="utf-8")
TAGS = ["medical", "image-segmentation", "visual-question-answering", "grounded", "medsight"]
TRAINING_RECORD = "training_record.json"  # which training writes into the folder of a run
RECORD_FIELDS = ("datasets", "emissions", "data", "training")


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides what the folder holds.

    Attributes:
        license: the weights' licence, as the Hub calls it ("cc-by-sa-4.0"); unknown if None.
        base_model: Hub id of the model that this one was made from; for an adapter, the one that it is for.
        metrics: metrics.json files, or output folders, of `medsight evaluate`; by default those in the folder.
        run: folder of the training run; by default the one that the folder is the result of.
        limits: further known limits, as Markdown.
        prompt: the request of the example; by default for the first of the model's classes.
    """

    license: str | None = None
    base_model: str | None = None
    metrics: tuple[Path, ...] = ()
    run: Path | None = None
    limits: str | None = None
    prompt: str | None = None


def render_card(folder: Path, repo_id: str, facts: CardFacts | None = None) -> str:
    """The text of a checkpoint's README.md. It has no figure that was not measured on these very weights.

    Args:
        repo_id: `namespace/name` on the Hub.

    Raises:
        OSError: a file that the facts name is missing.
        ValueError: figures or a run are of other weights, or an adapter's base model is unknown.
    """
    facts = facts or CardFacts()
    adapter = (folder / ADAPTER_CONFIG).is_file()
    header, sections = _of_adapter(folder, facts) if adapter else _of_model(folder, repo_id, facts)
    data = ModelCardData(
        language="en",
        license=facts.license or "other",
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=TAGS if adapter else [*TAGS, "custom_code"],
        **{name: value for name, value in header.items() if value},
    )
    card = ModelCard.from_template(
        data, template_str=TEMPLATE, repo_id=repo_id, adapter=adapter, limits=facts.limits, **sections
    )
    return f"{str(card).rstrip()}\n"


def write_card(folder: Path, repo_id: str, facts: CardFacts | None = None) -> Path:
    """Write the card into the folder, to be read and edited before it is published; returns its path.

    Raises:
        OSError, ValueError: as `render_card` and `files_to_push`; or the folder has a README.md already.
    """
    check_repo_id(repo_id)
    files_to_push(folder)
    path = folder / CARD
    if path.exists():
        raise FileExistsError(f"{path} exists: remove it to have another one written")
    write_text(path, render_card(folder, repo_id, facts))
    return path


def base_model_of_adapter(folder: Path, base_model: str | None) -> str:
    """The Hub id of the model that an adapter is for: the one given, or the one that its configuration names.

    Raises:
        ValueError: it is no Hub id.
    """
    name = base_model or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    try:
        validate_repo_id(name)
        known = "/" in name and not Path(name).exists()
    except HFValidationError:
        known = False
    if not known:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: base model {name!r} is no Hub id: name it with base_model (--base-model)"
        )
    return name


def _of_adapter(folder: Path, facts: CardFacts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header fields and sections of an adapter's card."""
    if facts.metrics:
        raise ValueError(f"{folder} is an adapter, which is not evaluated alone: publish figures with a merged model")
    header, sections = _of_training(facts.run)
    header |= {"base_model": base_model_of_adapter(folder, facts.base_model), "base_model_relation": "adapter"}
    return header, sections


def _of_model(folder: Path, repo_id: str, facts: CardFacts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header fields and sections of a whole model's card."""
    run = facts.run
    if run is not None:
        _refuse_other_run(folder, run)
    elif folder.absolute().name == "model" and (folder.absolute().parent / TRAINING_RECORD).is_file():
        run = folder.absolute().parent
    header, sections = _of_training(run)
    config = read_json(folder / "config.json")
    classes = config.get("mask_class_names") or ["liver"]
    prompt = facts.prompt or f"Segment the {classes[0]}."
    widget = {"text": prompt, "example_title": "Segmentation"}
    if (folder / "example.png").is_file():
        widget["src"] = hf_hub_url(repo_id, "example.png")
    header |= {"base_model": facts.base_model, "widget": [widget]}
    sections |= {"prompt": prompt, "image_size": config.get("image_size")}
    paths = facts.metrics or tuple(sorted(folder.glob("metrics*.json")))
    if paths:
        measured = read_metrics(paths, weights_sha256(folder))
        header |= {"eval_results": eval_results(measured), "model_name": repo_id.split("/")[-1]}
        sections["results"] = results_text(measured)
    return header, sections


def _of_training(run: Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header fields and sections from what training recorded in the folder of a run, if there is one."""
    if run is None:
        return {}, {}
    path = run / TRAINING_RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} has no {TRAINING_RECORD}, which training writes when a stage ends: train on with this version, or "
            "leave out --run"
        )
    record = read_json(path)
    missing = [name for name in RECORD_FIELDS if name not in record]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}: it is no record of training")
    header = {"datasets": record["datasets"], "co2_eq_emissions": record["emissions"]}
    return header, {"training_data": record["data"], "training": record["training"]}


def _refuse_other_run(folder: Path, run: Path) -> None:
    result = run / "model"
    if not result.is_dir():
        raise FileNotFoundError(f"{run} is no finished training run: it has no folder model")
    ours, theirs = weights_sha256(folder), weights_sha256(result)
    if ours != theirs:
        raise ValueError(f"the run {run} ended with weights {theirs[:12]}…, but those to publish are {ours[:12]}…")
