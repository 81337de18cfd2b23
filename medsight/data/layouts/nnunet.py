"""Data sets in nnU-Net's raw layout, version 2: `Dataset001_NAME/{dataset.json, imagesTr, labelsTr}`.

`imagesTr/CASE_0000.nii.gz`, `CASE_0001.nii.gz`, ... are the channels of a case, `labelsTr/CASE.nii.gz` its label map;
`imagesTs` are rows where there is a `labelsTs`. `dataset.json` names channels and labels, of which several numbers may
make a region, and says how files end: NIfTI, or pictures that are read, with three colours in one file or in three.
https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsight.scans import Scan, open_scan
from medsight.scans.label_maps import check_grid, read_label_map
from medsight.scans.nifti import NiftiScan

from ..dataset_json import ABOUT, about_above, about_files, channels_of, read_about, says
from ..modalities import known_modality
from ..records import IMAGE_SUFFIXES, told_by_source
from ..registry import Entry, Layout, Source, register
from ..volumes import (
    VOLUME_SUFFIXES,
    ChannelOptions,
    LabelVolume,
    entries,
    inside,
    label_volume,
    named_numbers,
    refuse_images,
    slice_rows,
)


_SPLITS = {"Tr": "train", "Ts": "test"}
_COLOURS = (["r", "g", "b"], ["red", "green", "blue"])
_IGNORE = "ignore"
_NUMBER = "_0000"  # of a channel, in the name of an image


@dataclass(frozen=True)
class _Case:
    """A case: its name, split, label map, and the files of its channels."""

    name: str
    split: str
    label: Path
    channels: list[Path]


@dataclass(frozen=True)
class _Dataset:
    """What `dataset.json` says."""

    folder: Path
    ending: str
    channel_names: list[str]
    named: list[tuple[str, frozenset[int]]]
    listed: Mapping[str, Any] | None

    @classmethod
    def read(cls, file: Path) -> "_Dataset":
        record = read_about(file)
        ending = record.get("file_ending")
        if ending not in (*VOLUME_SUFFIXES, *IMAGE_SUFFIXES):
            known = ", ".join((*VOLUME_SUFFIXES, *IMAGE_SUFFIXES))
            raise ValueError(f"{file}: file_ending is {ending!r}, and {known} are read: convert the files to .nii.gz")
        listed = record.get("dataset")
        if listed is not None and not isinstance(listed, Mapping):
            raise ValueError(f"{file}: expected 'dataset' as {{CASE: {{images, label}}}}, got {listed!r}")
        named = named_numbers(record.get("labels"), f"{file}, labels")
        return cls(file.parent, ending, channels_of(record, "channel_names", file), named, listed)

    @property
    def is_colour(self) -> bool:
        return [name.lower() for name in self.channel_names] in _COLOURS

    def cases(self) -> Iterator[_Case]:
        """Those of `dataset`, where that lists them, and of `imagesTr`; and of `imagesTs`, where they have labels."""
        if self.listed is not None:
            yield from (self._listed_case(name, entry) for name, entry in self.listed.items())
        else:
            yield from self._in_folders("Tr", self._names("images", "Tr") | self._names("labels", "Tr"))
        yield from self._in_folders("Ts", self._names("labels", "Ts"))

    def _in_folders(self, suffix: str, names: set[str]) -> Iterator[_Case]:
        yield from (self._named_case(name, suffix) for name in sorted(names))

    def _names(self, kind: str, suffix: str) -> set[str]:
        """The cases that a folder has files of."""
        number = "_[0-9][0-9][0-9][0-9]" if kind == "images" else ""
        cut = len(self.ending) + (len(_NUMBER) if number else 0)
        return {file.name[:-cut] for file in (self.folder / f"{kind}{suffix}").glob(f"*{number}{self.ending}")}

    def case_of(self, shard: Path) -> _Case:
        """The case that a file of it stands for."""
        if self.listed is not None:
            for name, entry in self.listed.items():
                case = self._listed_case(name, entry)
                if shard in (case.label, *case.channels):
                    return case
        suffix = shard.parent.name[-2:]
        name = shard.name[: -len(self.ending)]
        return self._named_case(name if shard.parent.name.startswith("labels") else name[: -len(_NUMBER)], suffix)

    def _named_case(self, name: str, suffix: str) -> _Case:
        numbers = range(len(self.channel_names))
        images = [self.folder / f"images{suffix}" / f"{name}_{number:04d}{self.ending}" for number in numbers]
        return _Case(name, _SPLITS[suffix], self.folder / f"labels{suffix}" / f"{name}{self.ending}", images)

    def _listed_case(self, name: str, entry: Any) -> _Case:
        place = f"{self.folder / ABOUT}, {name}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("images"), list):
            raise ValueError(f"{place}: expected {{'images': [FILE, ...], 'label': FILE}}, got {entry!r}")
        channels = [inside(self.folder, file, place) for file in entry["images"]]
        if len(channels) != len(self.channel_names) and not (self.is_colour and len(channels) == 1):
            raise ValueError(f"{place}: expected {len(self.channel_names)} images, got {len(channels)}")
        return _Case(name, "train", inside(self.folder, entry.get("label"), place), channels)


def nnunet_shards(source: Source) -> list[str]:
    """The label maps of a data set, or of all data sets in a folder; of a case that has none, its first image.

    Raises:
        FileNotFoundError: there is no dataset.json.
        ValueError: a dataset.json is damaged, or asks for files that are not read.
    """
    refuse_images(source)
    shards = []
    for file in about_files(source.path):
        for case in _Dataset.read(file).cases():
            if source.split in (None, case.split):
                there = [path for path in (case.label, *case.channels) if path.is_file()]
                if not there:
                    raise FileNotFoundError(f"{case.label}: no such file, and no image of {case.name} either")
                shards.append(str(there[0]))
    return shards


def nnunet_rows(shard: str, source: Source) -> Iterator[Entry]:
    """The rows of a case: its slices, or its picture, once for each channel that is asked for."""
    path = Path(shard)
    about = _Dataset.read(about_above(path))
    case = about.case_of(path)
    yield from entries(shard, _case_rows(about, case, source), _said(about, case))


def _said(about: _Dataset, case: _Case) -> list[str]:
    """What is to be known of a data set, with the first case of each split."""
    ignored = any(name.strip().lower() == _IGNORE for name, _ in about.named)
    if not ignored or case != next(other for other in about.cases() if other.split == case.split):
        return []
    return [f"{about.folder / ABOUT}: what is labelled {_IGNORE!r} is taken for no structure: it is outside all masks"]


def _case_rows(about: _Dataset, case: _Case, source: Source) -> Iterator[dict[str, Any]]:
    if not case.label.is_file():
        raise ValueError(f"{case.label}: no such file: expected the label map of {case.channels[0]}")
    known = {
        "dataset": about.folder.absolute().name,
        "patient": source.patient_of(case.label) or case.name,
        "site": told_by_source(source, "site", str(case.label)),
        "split": case.split,
    }
    labels: LabelVolume | None = None
    first: Scan | None = None
    for number in _channels(about, source.options.channel):
        if not source.takes({"case": case.name, "channel": about.channel_names[number]}, case.split):
            continue
        scan = _open(about, case, number)
        if labels is None or first is None:
            first, labels = (
                scan,
                label_volume(read_label_map(case.label, str(case.label), scan), about.named, str(case.label)),
            )
        elif isinstance(scan, NiftiScan) and isinstance(first, NiftiScan):
            check_grid(scan, first)
        elif scan.to_source({}).shape != labels.numbers.shape:
            raise ValueError(f"{scan.name} is of another size than {first.name}")
        word = None if about.is_colour else about.channel_names[number]
        modality = known_modality(source, word, str(about.folder / ABOUT))
        yield from slice_rows(scan, [labels], source.options, case.name, modality=modality, **known)


def _channels(about: _Dataset, asked: int | str) -> list[int]:
    if about.is_colour and asked in (0, "all"):
        return [0]
    return ChannelOptions(channel=asked).chosen(about.channel_names, str(about.folder / ABOUT))


def _open(about: _Dataset, case: _Case, number: int) -> Scan:
    """A channel of a case; the colours of a picture, also where they lie in three files, together."""
    path = case.channels[number]
    if not path.is_file():
        raise ValueError(f"{path}: no such file: expected channel {number} of {case.label}")
    others = [file for file in case.channels[1:] if file.is_file()] if about.is_colour else []
    if not others:
        return open_scan(path, str(path))
    planes = [np.asarray(open_scan(file, str(file)).slice_image(0).convert("L")) for file in (path, *others)]
    if len(planes) != len(about.channel_names) or len({plane.shape for plane in planes}) > 1:
        raise ValueError(f"{path}: expected one picture in colour, or three grey ones of one size, one a colour")
    return open_scan(np.stack(planes, axis=2), str(path))


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    return says(path, record, {"channel_names", "labels", "file_ending"})


register(Layout("nnunet", "regions", nnunet_shards, nnunet_rows, _looks_like, ChannelOptions, embeds=True))
