"""DICOM series with segmentations (SEG) or RT structure sets, in whatever folders they lie.

A segmentation or structure set belongs to the series whose images it refers to; or else to the one in its frame of
reference. Structures are called as segments and regions of interest are. A series that none refers to makes no rows,
and a warning names it.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from medsight.scans import dicom_header
from medsight.scans.dicom import DicomScan
from medsight.scans.dicom_file import NOT_IMAGES, guarded, read_tags
from medsight.scans.file_kinds import recognise
from medsight.scans.segmentations import regions_of_interest, segments
from medsight.text import first_few

from ..modalities import coded_modality
from ..records import told_by_source
from ..registry import Entry, Layout, Source, register
from ..volumes import SliceOptions, entries, is_structure, refuse_images, slice_rows, stacked


_LABELS = {"SEG": segments, "RTSTRUCT": regions_of_interest}  # by modality
_TAGS = [
    *("SOPInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality", "NumberOfFrames", "Rows", "PatientID"),
    *("StudyInstanceUID", "BodyPartExamined"),
]
_REFERENCES = ("ReferencedSOPInstanceUID", "FrameOfReferenceUID", "ReferencedFrameOfReferenceUID")
_LOOKED_AT = 50  # files, for what layout it is
_PSEUDONYM = 16  # hexadecimal digits


@dataclass
class _Series:
    """Images that make one scan: the files, and the UIDs that refer to them."""

    modality: str
    frame_of_reference: str
    patient: str
    body_part: str
    files: list[Path] = field(default_factory=list)
    images: set[str] = field(default_factory=set)
    labels: list[tuple[str, Path]] = field(default_factory=list)  # SEG or RTSTRUCT, and its file

    @property
    def name(self) -> str:
        if len(self.files) == 1:
            return str(self.files[0])
        return os.path.commonpath([file.parent for file in self.files])


def dicom_shards(source: Source) -> list[str]:
    """The folder, or those that match a pattern: what belongs together lies in one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the source names another folder of images.
    """
    refuse_images(source)
    found = [source.path] if os.path.isdir(source.path) else sorted(filter(os.path.isdir, glob(source.path)))
    if not found:
        raise FileNotFoundError(f"{source.path}: no such folder of DICOM files")
    return found


def dicom_rows(shard: str, source: Source) -> Iterator[Entry]:
    """The slices of each series that a segmentation or a structure set refers to."""
    series, objects, bad = _index(Path(shard))
    yield from bad
    for kind, file, references in objects:
        try:
            for owner in _owners(series, references, str(file)):
                owner.labels.append((kind, file))
        except ValueError as error:
            yield Entry(str(file), error=error)
    bare = [each.name for each in series if not each.labels]
    warnings = [f"{shard}: no segmentation refers to {len(bare)} of its series ({first_few(bare)})"] if bare else []
    if series and len(bare) == len(series):
        yield Entry(shard, error=ValueError(f"{warnings[0]}: expected SEG or RTSTRUCT files beside or below them"))
        return
    for each in series:
        if each.labels:
            for entry in entries(each.name, _series_rows(each, shard, source)):
                yield entry._replace(warnings=tuple(warnings))
                warnings = []


def _series_rows(series: _Series, shard: str, source: Source) -> Iterator[dict[str, Any]]:
    if not source.takes({"modality": series.modality}, None):
        return
    name = series.name
    site = source.site or series.body_part.lower() or told_by_source(source, "site", name)
    known = {
        "modality": coded_modality(source, series.modality, name),
        "site": site,
        "dataset": source.name,
        "patient": source.patient_of(name) or series.patient,
        "split": source.split or "train",
    }
    scan = DicomScan(series.files, name)
    with guarded(name, "its header is damaged"):
        orientation = dicom_header.orientation_of(scan.dicom_datasets()[0], 0)
    seed = os.path.relpath(name, shard)
    yield from slice_rows(scan, stacked(_masks(series, scan)), source.options, seed, orientation=orientation, **known)


def _masks(series: _Series, scan: DicomScan) -> Iterator[tuple[str, str, np.ndarray]]:
    for kind, file in series.labels:
        for label, number, mask in _LABELS[kind](file, str(file), scan):
            if not label:
                raise ValueError(f"{file}: its structure {number} has no name")
            if is_structure(label, frozenset({number})):
                yield label, str(file), mask


def _index(folder: Path) -> tuple[list[_Series], list[tuple[str, Path, set[str]]], list[Entry]]:
    """The series of a folder and of those in it; segmentations, with what they refer to; and damaged files."""
    found: dict[tuple[str, str], _Series] = {}
    objects, bad = [], []
    for file in sorted(folder.rglob("*")):
        if not _is_dicom(file):
            continue
        try:
            tags = read_tags(file, str(file), _TAGS)
            with guarded(str(file), "its header is damaged"):
                kind = dicom_header.code_of(tags.get("Modality")) or ""
                if kind in _LABELS:
                    objects.append((kind, file, _references(file)))
                elif "Rows" in tags and kind not in NOT_IMAGES:
                    _add(found, file, tags, kind)
        except ValueError as error:
            bad.append(Entry(str(file), error=error))
    return list(found.values()), objects, bad


def _is_dicom(file: Path) -> bool:
    try:
        return file.is_file() and file.name != "DICOMDIR" and recognise(file, str(file)) == "dicom"
    except ValueError:
        return False  # an archive, or an empty file: no part of a series


def _add(found: dict[tuple[str, str], _Series], file: Path, tags: Any, modality: str) -> None:
    """A file with several frames is a scan by itself."""
    uid = str(tags.SOPInstanceUID)
    key = str(tags.get("SeriesInstanceUID")), uid if dicom_header.number_of_frames(tags) > 1 else ""
    series = found.setdefault(
        key,
        _Series(
            modality,
            str(tags.get("FrameOfReferenceUID") or ""),
            pseudonym(str(tags.get("PatientID") or tags.get("StudyInstanceUID") or key[0])),
            dicom_header.code_of(tags.get("BodyPartExamined")) or "",
        ),
    )
    series.files.append(file)
    series.images.add(uid)


def pseudonym(patient: str) -> str:
    """What a patient is called in rows: the same for the same PatientID, which is not to be read from it.

    Whoever knows a PatientID can tell that it is this patient's.
    """
    return hashlib.sha256(f"medsight\0{patient}".encode()).hexdigest()[:_PSEUDONYM]


def _references(file: Path) -> set[str]:
    """The UIDs of the images, and of the frames of reference, that a segmentation or structure set refers to."""
    elements = read_tags(file, str(file)).iterall()
    return {str(element.value) for element in elements if element.keyword in _REFERENCES and element.value}


def _owners(series: list[_Series], references: set[str], name: str) -> list[_Series]:
    """The series that a segmentation is of."""
    if owners := [each for each in series if each.images & references]:
        return owners
    near = [each for each in series if each.frame_of_reference in references]
    if len(near) == 1:
        return near
    if near:
        names = first_few([each.name for each in near])
        raise ValueError(f"{name} refers to none of the images here, and {len(near)} series lie in its place: {names}")
    raise ValueError(f"{name} refers to no image here, and no series lies in its frame of reference")


def _looks_like(path: Path, record: Mapping[str, Any]) -> bool:
    return path.is_dir() and any(map(_is_dicom, islice(filter(Path.is_file, path.rglob("*")), _LOOKED_AT)))


register(Layout("dicom", "regions", dicom_shards, dicom_rows, _looks_like, SliceOptions, embeds=True))
