"""The model card of a checkpoint folder: hub_card.md, filled in from the folder, its evaluations and its training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_url

from medsight.checkpoint import read_json, weights_sha256
from medsight.files import write_text

from .files import ADAPTER_CONFIG, CARD, check_repo_id, files_to_push, is_repo_id
from .results import eval_results, read_metrics, results_text


TEMPLATE = Path(__file__).with_name("hub_card.md").read_text(encoding="utf-8")
TAGS = ["medical", "image-segmentation", "visual-question-answering", "grounded", "medsight"]
TRAINING_RECORD = "training_record.json"  # which training writes into the folder of a run


@dataclass(frozen=True)
class CardFacts:
    """What a card says besides what the folder holds.

    Example:
        >>> facts = CardFacts(license="cc-by-sa-4.0", limits="Not tried on children.")
        >>> "Not tried on children." in render_card(Path("medsight/medsight-nano"), "my-name/my-model", facts)
        True

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
    header, sections = _of_training(folder, facts.run, adapter)
    if adapter:
        if facts.metrics:
            raise ValueError(f"{folder} is an adapter, not evaluated alone: publish figures with a merged model")
        header["base_model"] = base_model_of_adapter(folder, facts.base_model)
        header["base_model_relation"] = "adapter"
    else:
        header["base_model"] = facts.base_model
        _add_model(header, sections, folder, repo_id, facts)
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
    if not is_repo_id(name) or Path(name).exists():
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: base model {name!r} is no Hub id: name it with base_model (--base-model)"
        )
    return name


def _add_model(header: dict[str, Any], sections: dict[str, Any], folder: Path, repo_id: str, facts: CardFacts) -> None:
    """The example and the figures of a whole model."""
    config = read_json(folder / "config.json")
    classes = config.get("mask_class_names") or ["liver"]
    prompt = facts.prompt or f"Segment the {classes[0]}."
    sections |= {"prompt": prompt, "image_size": config.get("image_size")}
    header["widget"] = [{"text": prompt, "example_title": "Segmentation"}]
    if (folder / "example.png").is_file():
        header["widget"][0]["src"] = hf_hub_url(repo_id, "example.png")
    paths = facts.metrics or tuple(sorted(folder.glob("metrics*.json")))
    if paths:
        measured = read_metrics(paths, weights_sha256(folder))
        header |= {"eval_results": eval_results(measured), "model_name": repo_id.split("/")[-1]}
        sections["results"] = results_text(measured)


def _of_training(folder: Path, run: Path | None, adapter: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header fields and sections from what training recorded in the folder of a run, if there is one."""
    above = folder.absolute().parent
    if run is None and folder.absolute().name == "model" and (above / TRAINING_RECORD).is_file():
        run = above
    if run is None:
        return {}, {}
    path = run / TRAINING_RECORD
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: train on with this version, which writes it, or omit --run")
    if not adapter and (theirs := weights_sha256(run / "model")) != (ours := weights_sha256(folder)):
        raise ValueError(f"the run {run} ended with weights {theirs[:12]}…, but those to publish are {ours[:12]}…")
    record = read_json(path)
    try:
        header = {"datasets": record["datasets"], "co2_eq_emissions": record["emissions"]}
        return header, {"training_data": record["data"], "training": record["training"]}
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: it is no record of training") from error
