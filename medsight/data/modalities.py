"""What images are of: a data set's own word for it, in the spelling of this project's data."""

import re

from .records import told_by_source
from .registry import Source


# Modalities as DICOM, nnU-Net, the Decathlon and file names spell them -> as this project's data do.
_MODALITIES = {
    **{"ct": "CT", "mr": "MRI", "mrt": "MRI", "mri": "MRI", "pt": "PET", "pet": "PET", "nm": "nuclear medicine"},
    **{"t1": "MRI-T1", "t1w": "MRI-T1", "t2": "MRI-T2", "t2w": "MRI-T2", "flair": "MRI-FLAIR", "t2flair": "MRI-FLAIR"},
    **dict.fromkeys(("t1gd", "t1ce", "t1c", "t1post"), "MRI-T1Gd"),
    **{"adc": "MRI-ADC", "dwi": "MRI-DWI", "dce": "MRI-DCE", "cine": "MRI-cine"},
    **dict.fromkeys(("us", "ultrasound"), "ultrasound"),
    **dict.fromkeys(("cr", "dx", "rg", "mg", "xray"), "X-Ray"),
    **{"op": "fundus", "fundus": "fundus", "opt": "OCT", "oct": "OCT", "es": "endoscope", "endoscopy": "endoscope"},
    **{"sm": "pathology", "pathology": "pathology", "dermoscopy": "dermoscopy", "fluorescence": "fluorescence"},
}


def known_modality(source: Source, word: str | None, place: str) -> str:
    """The modality of images: as the source says, or else by a data set's own word for it.

    Raises:
        ValueError: the source does not say, and the word is not known.
    """
    if source.modality is not None or not word:
        return told_by_source(source, "modality", place)
    if (name := modality_name(word)) is None:
        raise ValueError(f"{place}: its word for the modality, {word!r}, is not known: say modality: NAME")
    return name


def coded_modality(source: Source, code: str, place: str) -> str:
    """The modality of images of which a file says it by a code, which the source may say more exactly (MRI-T1 of MR).

    Raises:
        ValueError: the source says another one, or nothing of an unknown code.
    """
    name = modality_name(code)
    if source.modality is None or name is None:
        return known_modality(source, code, place)
    if source.modality != name and not source.modality.startswith(f"{name}-"):
        raise ValueError(f"{place}: its modality is {name} by its own word, {code}; the source says {source.modality}")
    return source.modality


def modality_name(word: str) -> str | None:
    """What this project's data call a modality that a file spells in its own way; None where that is not known."""
    plain = re.sub(r"[^a-z0-9]", "", word.lower())
    return _MODALITIES.get(plain) or _MODALITIES.get(re.sub("^mri?", "", plain))
