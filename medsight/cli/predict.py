"""Answers a prompt about images: `medsight predict`."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from medsight import __version__
from medsight.checkpoint import check_checkpoint, checkpoint_sha256, sha256_of, shipped_checkpoint
from medsight.inference.answer_folder import ANSWER_FILE, check_answer_folder, read_answer, safe_name
from medsight.inference.settings import BATCH_SIZE, AnswerSettings
from medsight.text import first_few, note, printable, quiet_transformers

from .console import Device, Json, Overwrite, Results, results


if TYPE_CHECKING:
    from medsight.inference.prediction import Prediction
    from medsight.inference.predictor import Predictor, Slice
    from medsight.inference.predictor import Window as View

MANY_OUTPUT = "medsight-answers"
LISTED_FILES = 8

Model = Annotated[str | None, typer.Option(metavar="DIR", help="Checkpoint folder  [default: the small one shipped].")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Precision; auto is the checkpoint's own.")
]
Window = Annotated[
    str | None,
    typer.Option(
        metavar="WINDOW",
        help="Grey levels shown: abdomen, lung, bone, brain, soft tissue, file (its own), or CENTRE,WIDTH.",
    ),
]
Plane = Annotated[
    str | None,
    typer.Option(
        metavar="PLANE",
        help="Of a NIfTI volume: axial, coronal, sagittal, or what is at the right and the bottom of its slices, as "
        "AI  [default: as the model learnt it].",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Length limit of an answer.")]
AllowedGroups = Annotated[
    str | None,
    typer.Option(
        metavar="GROUPS", help="Cite only codes of these groups: names or numbers, commas between, or 'predicted'."
    ),
]
ForceRegion = Annotated[bool, typer.Option("--force-region", help="Cite at least one region.")]
Threshold = Annotated[float, typer.Option(metavar="P", help="Probability that makes a mask.")]
Formats = Annotated[
    str,
    typer.Option(metavar="FORMATS", help="Of masks: some of png, coco, nifti, dicom-seg, rtstruct; commas between."),
]
Deidentify = Annotated[
    bool, typer.Option("--deidentify", help="Write neither names nor ids, of patients or of files, into the output.")
]


@dataclass(eq=False)
class Job:
    """An image, or the folder of a series, to answer about."""

    image: Path
    folder: Path = Path()  # where the answer goes
    expected: int = 0  # slices of it that are asked about
    predictions: "list[Prediction]" = field(default_factory=list)  # so far
    error: Exception | None = None  # why there is no answer

    @cached_property
    def sha256(self) -> str:
        """Of all that the image is read from."""
        from medsight.inference.image_files import image_content

        return sha256_of(image_content(self.image))


def command(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE",
            help="Pictures, DICOM or NIfTI files, folders of them or of a DICOM series, or quoted patterns.",
        ),
    ],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to ask, such as 'Segment the liver.'")],
    model: Model = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help=f"Output folder  [default: IMAGE's name + '-medsight'; of several: {MANY_OUTPUT}]."
        ),
    ] = None,
    overwrite: Overwrite = False,
    slices: Annotated[
        str, typer.Option(metavar="SLICES", help="Of a volume: N, A-B, middle, all or largest-foreground.")
    ] = "middle",
    window: Window = None,
    plane: Plane = None,
    formats: Formats = "png",
    deidentify: Deidentify = False,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Slices answered at once.")] = BATCH_SIZE,
    max_new_tokens: MaxNewTokens = AnswerSettings.max_new_tokens,
    allowed_groups: AllowedGroups = None,
    force_region: ForceRegion = False,
    threshold: Threshold = AnswerSettings.threshold,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Answer a prompt about images, with a mask for every region that the answer cites.

    Of one image, the output folder holds answer.json (text and regions), the masks (mask-NN.png: 0 and 255, at the
    image's size) and overlay.png; it appears complete or not at all. Of several images, a folder, or a pattern, each
    image has such a folder in the output folder, and what is finished is not answered again: run the same command to
    resume after an interruption. A broken file among several is reported at the end (exit status 1). Not a medical
    device.
    """
    from medsight.inference.image_files import find_images
    from medsight.inference.orientations import LearntOrientations
    from medsight.inference.predictor import Predictor, user_turn

    settings = AnswerSettings(max_new_tokens, parse_groups(allowed_groups), force_region, threshold)
    user_turn(prompt)
    view, kinds = parse_window(window), parse_formats(formats)
    checkpoint = shipped_checkpoint() if model is None else Path(model)
    check_checkpoint(checkpoint)
    found = find_images(images)
    for reason, paths in (("no image", found.left_out), ("another name of an image", found.repeated)):
        if paths:
            note(f"left out, {reason}: {len(paths):,} ({first_few([str(path) for path in paths])})")
    jobs = [Job(image) for image in found.images]
    place(jobs, None if output is None else Path(output), found.is_single, deidentify)
    run = {
        "prompt": prompt,
        "model_sha256": checkpoint_sha256(checkpoint),
        "dtype": dtype,
        "slices": slices,
        "window": window,
        "plane": plane,
        "formats": kinds,
        "deidentify": deidentify,
        **asdict(settings),
    }
    finished = [job for job in jobs if is_finished(job, run, overwrite)]
    unfinished = [job for job in jobs if job not in finished]
    failed: list[Job] = []
    with results(as_json) as out:
        for job in finished:
            show(out, job, found.is_single, "Answered before:")
        learnt = LearntOrientations.read(checkpoint)
        opening = {"learnt": learnt, "plane": plane, "prompt": prompt, "allowed_groups": settings.allowed_groups}
        reading = read_jobs(unfinished, slices, view, opening, kinds)
        # Read before the model is loaded, which takes longer than to see that the one image is broken.
        if first := list(islice(reading, 1)):
            if found.is_single and unfinished[0].error is not None:
                raise unfinished[0].error
            with quiet_transformers():
                predictor = Predictor(model, device=device, dtype=dtype)
            for job in answer_jobs(predictor, chain(first, reading), prompt, batch_size, settings):
                write(job, run, overwrite, kinds, deidentify)
                if job.error is None:
                    show(out, job, found.is_single, "Written to")
                elif found.is_single:
                    raise job.error
                else:
                    failed.append(job)
    for job in failed:
        reason = " ".join(str(job.error).split())
        note(reason if str(job.image) in reason else f"{job.image}: {reason}")
    if failed:
        raise ValueError(f"{len(failed):,} of {len(jobs):,} images could not be answered (named above)")


def place(jobs: Sequence[Job], output: Path | None, is_single: bool, deidentify: bool) -> None:
    """Gives each job the folder of its answer, which does not depend on what else is asked about, if names differ."""
    names = [f"image-{job.sha256[:12]}" if deidentify else safe_name(job.image) for job in jobs]
    if is_single:
        jobs[0].folder = output or Path(f"{names[0]}-medsight")
        return
    root = output or Path(MANY_OUTPUT)
    if (root / ANSWER_FILE).exists():
        raise FileExistsError(f"output folder {root} is the answer of one image; name another one")
    uses = Counter(name.casefold() for name in names)  # some file systems do not tell cases apart
    for job, name in zip(jobs, names, strict=True):
        if uses[name.casefold()] > 1:
            name += f"-{hashlib.sha256(bytes(job.image.resolve())).hexdigest()[:8]}"
        job.folder = root / name


def is_finished(job: Job, run: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds the answer that this run would give; an error if it holds anything else."""
    earlier = None if overwrite else read_answer(job.folder)
    if earlier is None:
        check_answer_folder(job.folder, overwrite)
        return False
    now = {"medsight_version": __version__, "sha256": job.sha256, **run}
    before = {"medsight_version": earlier["medsight_version"], **(earlier["run"] or {})}
    differing = ["image" if name == "sha256" else name for name in now if before.get(name) != now[name]]
    if differing:
        raise FileExistsError(
            f"output folder {job.folder} holds an answer of another {', '.join(differing)}; name another folder, or "
            "add --overwrite"
        )
    missing = [name for name in earlier["files"] if not (job.folder / name).is_file()]
    if missing:
        raise FileExistsError(f"output folder {job.folder} lacks {missing[0]}; add --overwrite to answer again")
    return True


def read_jobs(
    jobs: Iterable[Job], slices: str, window: "View", opening: dict[str, Any], formats: Sequence[str]
) -> "Iterator[tuple[Job, Slice | None]]":
    """The slices of all jobs, one by one; None, and the job's `error`, where an image cannot be read, or its masks not
    be written in one of the formats. `opening` are arguments of `open_as_learnt`."""
    from medsight.export import check_formats
    from medsight.inference.orientations import open_as_learnt
    from medsight.inference.predictor import read_slices

    for job in jobs:
        try:
            scan = open_as_learnt(job.image, **opening)
            chosen = scan.choose_slices(slices)
            check_formats(scan, formats, chosen)
            job.expected = len(chosen)
            for shown in read_slices(scan, chosen, window):
                yield job, shown
        except (ValueError, OSError) as error:
            job.error = error
            yield job, None


def answer_jobs(
    predictor: "Predictor",
    read: "Iterator[tuple[Job, Slice | None]]",
    prompt: str,
    batch_size: int,
    settings: AnswerSettings,
) -> Iterator[Job]:
    """Answers slices in batches, whichever images they are of; each job once it is complete or has failed."""
    from tqdm import tqdm

    with tqdm(unit="slice", desc="answering", disable=None, leave=False) as bar:
        while batch := list(islice(read, batch_size)):
            asked = [(job, shown) for job, shown in batch if shown is not None]
            names = [printable(str(job.image)) for job, _ in asked]
            shown_slices = [shown for _, shown in asked]
            if asked:
                predictions = predictor.predict_slices(shown_slices, [prompt] * len(asked), names, **asdict(settings))
                for (job, _), prediction in zip(asked, predictions, strict=True):
                    job.predictions.append(prediction)
            bar.update(len(asked))
            for job in dict.fromkeys(job for job, _ in batch):
                if job.error is not None or len(job.predictions) == job.expected:
                    yield job


def write(job: Job, run: dict[str, Any], overwrite: bool, formats: Sequence[str], deidentify: bool) -> None:
    """Saves a complete job, and lets go of its pixels. What cannot be written is an error of the job's."""
    from medsight.inference.prediction import save_answer

    try:
        if job.error is None:
            save_answer(job.predictions, job.folder, overwrite, formats, deidentify, {"sha256": job.sha256, **run})
    except (ValueError, OSError) as error:
        job.error = error
    job.predictions = []


def show(out: Results, job: Job, is_single: bool, done: str) -> None:
    """Prints the answer in a job's folder."""
    from medsight.inference.prediction import to_parts

    content = read_answer(job.folder)
    if content is None:
        raise FileNotFoundError(f"{job.folder / ANSWER_FILE} is not there any more")
    files = content["files"]
    listed = f", {', '.join(files)}" if len(files) <= LISTED_FILES else f" and {len(files)} more"
    parts = [*to_parts(content), f"\n{done} {job.folder}/: {ANSWER_FILE}{listed}"]
    shown = {**content, "image": printable(str(job.image)), "output": printable(str(job.folder))}
    out.show(shown, *(parts if is_single else [str(job.image), *parts, ""]))


def parse_groups(text: str | None) -> str | list[int | str] | None:
    """The value of --allowed-groups: "predicted", or names and numbers with commas between."""
    if text is None or text == "predicted":
        return text
    groups = [part.strip() for part in text.split(",")]
    return [int(group) if group.isdecimal() else group for group in groups]


def parse_window(text: str | None) -> "View":
    """The value of --window: a name, "file", or CENTRE,WIDTH; a ValueError if it is neither."""
    from medsight.scans import windows

    if text is None or windows.is_file_window(text):
        return text
    try:
        centre, width = map(float, text.split(","))
    except ValueError:
        windows.parse_window(text)
        return text
    windows.parse_window((centre, width))
    return centre, width


def parse_formats(text: str) -> list[str]:
    """The value of --formats: names with commas between; a ValueError if one is unknown."""
    from medsight.export import FORMATS

    formats = list(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"--formats: unknown {unknown[0]!r}; expected some of {', '.join(FORMATS)}")
    return formats
