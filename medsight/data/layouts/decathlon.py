"""Tasks of the Medical Segmentation Decathlon: `Task04_Hippocampus/{dataset.json, imagesTr, labelsTr}`.

`dataset.json` lists the pairs that are trained on (`training: [{image, label}]`), and names labels and modalities, one
a channel of a volume of four axes. What is listed under `test` has no labels, and makes no rows. http://medicaldecathlon.com
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medsight.scans.label_maps import read_label_map
from medsight.scans.nifti import NiftiScan

from ..dataset_json import ABOUT, about_above, about_files, channels_of, read_about, says
from ..modalities import known_modality
from ..records import told_by_source
from ..registry import Entry, Layout, Source, register
from ..volumes import ChannelOptions, entries, inside, label_volume, named_numbers, refuse_images, slice_rows, stem_of


def decathlon_shards(source: Source) -> list[str]:
    """The label maps of a task, or of all tasks in a folder.

    Raises:
        FileNotFoundError: there is no dataset.json, or a label map that it lists is missing.
        ValueError: a dataset.json is damaged, or lists what is no pair of files in its folder.
    """
    refuse_images(source)
    labels = [label for file in about_files(source.path) for _, label in _pairs(file, read_about(file))]
    for label in labels:
        if not label.is_file():
            raise FileNotFoundError(f"{label}: no such file, though {ABOUT} lists it")
    return list(map(str, labels))


def decathlon_rows(shard: str, source: Source) -> Iterator[Entry]:
    """The slices of a volume, once for each channel that is asked for."""
    yield from entries(shard, _rows(Path(shard), source))


def _rows(label: Path, source: Source) -> Iterator[dict[str, Any]]:
    file = about_above(label)
    record = read_about(file)
    image = next(image for image, other in _pairs(file, record) if other == label)
    channels = channels_of(record, "modality", file)
    if not image.is_file():
        raise ValueError(f"{image}: no such file, though {ABOUT} lists it")
    labels = None
    for number in source.options.chosen(channels, str(file)):
        if not source.takes({"case": stem_of(image), "channel": channels[number]}, "train"):
            continue
        scan = NiftiScan(image, str(image), "axial", channel=number)
        if scan.num_channels != len(channels):
            raise ValueError(f"{image} has {scan.num_channels} channel(s), and {file} names {len(channels)}")
        if labels is None:
            named = named_numbers(record.get("labels"), f"{file}, labels")
            labels = label_volume(read_label_map(label, str(label), scan), named, str(label))
        yield from slice_rows(
            scan,
            [labels],
            source.options,
            stem_of(image),
            dataset=file.parent.absolute().name,
            patient=source.patient_of(image) or stem_of(image),
            modality=known_modality(source, channels[number], str(file)),
            site=told_by_source(source, "site", str(image)),
            split="train",
        )


def _pairs(file: Path, record: Mapping[str, Any]) -> list[tuple[Path, Path]]:
    """Image and label map of each item that is trained on."""
    items = record.get("training")
    if not isinstance(items, list) or not items:
        raise ValueError(f"{file}: expected training as a list of {{image, label}}, got {items!r}")
    pairs = []
    for number, item in enumerate(items, 1):
        place = f"{file}, training item {number}"
        if not isinstance(item, Mapping):
            raise ValueError(f"{place}: expected {{image, label}}, got {item!r}")
        pairs.append((inside(file.parent, item.get("image"), place), inside(file.parent, item.get("label"), place)))
    return pairs


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    return says(path, record, {"training", "modality", "labels"})


register(Layout("decathlon", "regions", decathlon_shards, decathlon_rows, _looks_like, ChannelOptions, embeds=True))
