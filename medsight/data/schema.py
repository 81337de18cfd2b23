"""What every layout yields, whatever lies on disk: rows of one of two kinds, for the library `datasets`.

Pictures stay undecoded, `{"path": ..., "bytes": ...}`, until a sample is drawn: nothing is loaded whole, and an error
can name the file. The rows of `iterate` say more than is trained on: `REGION_EXTRAS` and `CONVERSATION_EXTRAS`.
"""

from typing import Any

from datasets import Features, Image, List, Value


_PICTURE = Image(decode=False)
_ORIGIN = {name: Value("string") for name in ("dataset", "modality", "site", "split", "patient")}

# One image with all its masks, a row; for stages 1 and 3a.
REGION_FEATURES = Features(
    {
        "image": _PICTURE,
        "masks": List(_PICTURE),
        "targets": List(Value("string")),  # what each mask shows, in the order of the masks
        "absent": List(Value("string")),  # structures that are known not to be in the image
        "finding": Value("string"),  # e.g. "benign", or none
        "label_origin": Value("string"),  # "expert", "model", ..., or none
        "orientation": Value("string"),  # of a slice of a volume, see `medsight.scans.scan.orientation_of`; or none
        **_ORIGIN,
    }
)

# One conversation about one or more images, a row; for stages 2, 3b and 4.
CONVERSATION_FEATURES = Features(
    {
        "id": Value("string"),
        "images": List(_PICTURE),
        # "<image>" in a user's content stands for the next of the images; region codes stand in assistants' contents
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "masks": List(_PICTURE),  # mask i is the target of the i-th region code
        "targets": List(Value("string")),  # what each mask shows, in the order of the masks; "" where unknown
        **_ORIGIN,
    }
)

IMAGE_MARKER = "<image>"

# What is read besides. Of regions: (row, column) size in mm of the pixels of each mask, None where unknown; and for a
# model card the licences and addresses that the data state.
REGION_EXTRAS = ("spacing_mm", "licences", "source_urls")
# Of conversations: "CLOSED" or "OPEN", None where the data do not say; and what can be chosen from.
CONVERSATION_EXTRAS = ("answer_type", "options")

# Rows as `medsight data convert` stores them: with what is read besides, and whether the data say of themselves that a
# patient or image is in another split too.
_TEXTS = List(Value("string"))
STORED_FEATURES = {
    "regions": Features(
        {
            **REGION_FEATURES,
            "spacing_mm": List(List(Value("float64"))),
            **{"licences": _TEXTS, "source_urls": _TEXTS, "image_in_test": Value("bool")},
        }
    ),
    "conversations": Features(
        {
            **CONVERSATION_FEATURES,
            **{"answer_type": Value("string"), "options": _TEXTS, "image_in_test": Value("bool")},
        }
    ),
}


def region_row(
    image: dict[str, Any], masks: list[dict[str, Any]], targets: list[str], split: str, **known: Any
) -> dict[str, Any]:
    """A row about one image with its masks; what is not known is None, or empty where it is a list."""
    row: dict[str, Any] = dict.fromkeys((*REGION_FEATURES, *REGION_EXTRAS))
    row |= {"image": image, "masks": masks, "targets": targets, "split": split}
    return row | {"absent": [], "spacing_mm": [None] * len(masks), "licences": [], "source_urls": [], **known}


def conversation_row(
    id: str, images: list[dict[str, Any]], messages: list[dict[str, str]], split: str, **known: Any
) -> dict[str, Any]:
    """A row of one conversation; what is not known is None, or empty where it is a list."""
    row: dict[str, Any] = dict.fromkeys((*CONVERSATION_FEATURES, *CONVERSATION_EXTRAS))
    row |= {"id": id, "images": images, "messages": messages, "split": split}
    return row | {"masks": [], "targets": [], "options": [], **known}
