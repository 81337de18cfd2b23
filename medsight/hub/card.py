"""The model card of a checkpoint folder: what the folder, its evaluations and its training run know of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medsight.checkpoint import read_json
from medsight.hub.files import ADAPTER_CONFIG, CARD, check_repo_id, files_to_push


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
    """The text of a checkpoint's README.md. No figure is in it that was not measured on these very weights.

    Args:
        repo_id: `namespace/name` on the Hub.

    Raises:
        OSError: a file that the facts name is missing.
        ValueError: figures or a run are of other weights, or an adapter's base model is unknown.
    """
    from configuration_medsight.card_medsight import render_card as fill_in

    facts = facts or CardFacts()
    base = facts.base_model
    if (folder / ADAPTER_CONFIG).is_file():
        if facts.metrics:
            raise ValueError(
                f"{folder} is an adapter, which is not evaluated alone: publish figures with a merged model"
            )
        base = base_model_of_adapter(folder, base)
        own: dict[str, Any] = {"adapter": True}
        sections: dict[str, Any] = {}
        if facts.run is not None:
            sections = _training_sections(facts.run, own)
    else:
        own, sections = _of_model(folder, repo_id, facts)
    sections["limits"] = facts.limits
    card = fill_in(repo_id, license=facts.license, base_model=base, sections=sections, **own)
    return str(card) if str(card).endswith("\n") else f"{card}\n"


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
    scratch = path.with_name(f".{CARD}.new")
    scratch.write_text(render_card(folder, repo_id, facts), encoding="utf-8")
    scratch.replace(path)
    return path


def base_model_of_adapter(folder: Path, base_model: str | None) -> str:
    """The Hub id of the model that an adapter is for: the one given, or the one that its configuration names.

    Raises:
        ValueError: it is no Hub id.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    named = base_model or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or ""
    try:
        validate_repo_id(named)
        known = "/" in named and not Path(named).exists()
    except HFValidationError:
        known = False
    if not known:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: base model {named!r} is no Hub id: name it with base_model (--base-model)"
        )
    return named


def _of_model(folder: Path, repo_id: str, facts: CardFacts) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header fields and sections of a whole model's card."""
    from huggingface_hub import hf_hub_url

    from medsight.evaluation.runner import checkpoint_fingerprint
    from medsight.hub.results import eval_results, read_metrics, results_text
    from medsight.hub.training_record import run_of

    config = read_json(folder / "config.json")
    classes = config.get("mask_class_names") or []
    prompt = facts.prompt or f"Segment the {classes[0] if classes else 'liver'}."
    widget = {"text": prompt, "example_title": "Segmentation"}
    if (folder / "example.png").is_file():
        widget["src"] = hf_hub_url(repo_id, "example.png")
    own: dict[str, Any] = {"prompt": prompt, "widget": [widget]}
    sections: dict[str, Any] = {"image_size": config.get("image_size")}
    paths = facts.metrics or tuple(sorted(folder.glob("metrics*.json")))
    if paths:
        measured = read_metrics(paths, checkpoint_fingerprint(folder)["weights_sha256"])
        own["eval_results"] = eval_results(measured)
        sections["results"] = results_text(measured)
    run = facts.run or run_of(folder)
    if facts.run is not None:
        _refuse_other_run(folder, facts.run)
    if run is not None:
        sections |= _training_sections(run, own)
    return own, sections


def _training_sections(run: Path, own: dict[str, Any]) -> dict[str, Any]:
    from medsight.hub.training_record import read_run

    try:
        record = read_run(run)
    except ModuleNotFoundError as error:
        raise ValueError(f"to read the run {run}, install {error.name}: pip install 'medsight[train]'") from error
    own |= {"datasets": record.datasets, "co2_eq_emissions": record.emissions}
    return {"training_data": record.data, "training": record.training}


def _refuse_other_run(folder: Path, run: Path) -> None:
    from medsight.evaluation.runner import checkpoint_fingerprint

    result = run / "model"
    if not result.is_dir():
        raise FileNotFoundError(f"{run} is no finished training run: it has no folder model")
    ours, its = (checkpoint_fingerprint(path)["weights_sha256"] for path in (folder, result))
    if ours != its:
        raise ValueError(f"the run {run} ended with weights {its[:12]}…, but those to publish are {ours[:12]}…")
