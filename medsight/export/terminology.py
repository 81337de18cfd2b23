"""Codes of what a label names, from the context groups of DICOM PS3.16 as pydicom carries them.

A label is looked up whole ("spleen"), then without "left" or "right" before it, which becomes its laterality, then
under the name that DICOM has for it (`SYNONYMS`). A label that ends in the word for a lesion or a tube ("malignant
breast tumor") gets that word's code. No other part of a label is ever looked up: "femoral head" is not a head. What
is found in none of these ways is coded as Tissue (SCT 85756007); the label itself says what it is.
"""

from typing import TYPE_CHECKING, NamedTuple

from .regions import label_key


if TYPE_CHECKING:
    from pydicom.sr.coding import Code

# Segmentation property types (CID 7151), by category (CID 7150).
CATEGORIES = (
    ("AnatomicalStructure", "cid7192"),
    ("MorphologicallyAbnormalStructure", "cid7194"),
    ("PhysicalObject", "cid7193"),
    ("Tissue", "cid7191"),
)
# Types that these context groups, which may be extended, do not list.
OTHER_TYPES = {
    "GroundGlassOpacity": ("MorphologicallyAbnormalStructure", "DCM"),
    "Nucleus": ("AnatomicalStructure", "SCT"),
    "SkinLesion": ("MorphologicallyAbnormalStructure", "SCT"),
    "Tube": ("PhysicalObject", "SCT"),
}
SIDES = {"left": "Left", "right": "Right"}
SYNONYMS = {
    "adrenal": "AdrenalGland",
    "airway": "AirwayStructure",
    "anterior hippocampus": "Hippocampus",
    "cardiomediastinum": "Mediastinum",
    "cerebral white matter": "CerebralWhiteMatter",
    "fetal head": "Head",
    "gluteus maximus": "MuscleOfLowerLimb",
    "grey matter": "GrayMatter",
    "iliopsoas": "MuscleOfLowerLimb",
    "large bowel": "Colon",
    "large intestine": "Colon",
    "portal vein and splenic vein": "Vein",
    "posterior hippocampus": "Hippocampus",
    "retinal vessel": "BloodVessel",
    "small bowel": "SmallIntestine",
    "thyroid gland": "Thyroid",
    "urinary bladder": "Bladder",
    "vertebrae": "Vertebra",
}
LAST_WORDS = {
    "abscess": "Abscess",
    "adenoma": "Neoplasm",
    "cancer": "Neoplasm",
    "carcinoma": "Neoplasm",
    "catheter": "Catheter",
    "consolidation": "Lesion",
    "cyst": "Cyst",
    "edema": "Edema",
    "hemorrhage": "Hemorrhage",
    "lesion": "Lesion",
    "mass": "Mass",
    "melanoma": "Neoplasm",
    "metastasis": "NeoplasmSecondary",
    "neoplasm": "Neoplasm",
    "nodule": "Nodule",
    "polyp": "Lesion",
    "sarcoma": "Neoplasm",
    "tube": "Tube",
    "tubing": "Tube",
    "tumor": "Neoplasm",
    "tumour": "Neoplasm",
    "vessel": "BloodVessel",
}


class SegmentCodes(NamedTuple):
    """Category, type and, where the label names one, side of a segment."""

    category: "Code"
    property_type: "Code"
    laterality: "Code | None" = None


def segment_codes(label: str) -> SegmentCodes:
    """The codes of `label`; see the top of this module for how they are found."""
    from pydicom.sr.codedict import codes

    name = label_key(label)
    side, _, rest = name.partition(" ")
    found, laterality = _structure(name), None
    if found is None and side in SIDES and rest:
        found, laterality = _structure(rest), getattr(codes.SCT, SIDES[side])
    last_word = _singular(name).rpartition(" ")[2]
    found = found or _type_in_category(LAST_WORDS.get(last_word, "Tissue"))
    if found is None:
        raise LookupError(f"pydicom's context groups lack the code of {label!r}")
    return SegmentCodes(*found, laterality)


def _structure(name: str) -> "tuple[Code, Code] | None":
    for candidate in (name, _singular(name)):
        keyword = SYNONYMS.get(candidate) or "".join(word.capitalize() for word in candidate.split(" "))
        if keyword.isidentifier() and (found := _type_in_category(keyword)):
            return found
    return None


def _type_in_category(keyword: str) -> "tuple[Code, Code] | None":
    from pydicom.sr.codedict import codes

    if keyword in OTHER_TYPES:
        category, scheme = OTHER_TYPES[keyword]
        return getattr(codes.cid7150, category), getattr(getattr(codes, scheme), keyword)
    for category, group in CATEGORIES:
        if keyword in getattr(codes, group).dir(keyword):
            return getattr(codes.cid7150, category), getattr(getattr(codes, group), keyword)
    return None


def _singular(name: str) -> str:
    return name[:-1] if name.endswith("s") and not name.endswith(("ss", "us", "is")) else name
