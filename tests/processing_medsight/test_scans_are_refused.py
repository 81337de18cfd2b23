"""The processor takes pictures: whoever hands it a scan, or a choice that is of scans, is shown what opens one."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from processing_medsight import MedSightImageProcessor, MedSightProcessor, load_image
from tests.medsight.scans.scan_files import npy_bytes


HOW = r"`from medsight import open_scan`, then `open_scan\(path\)\.slice_image\(i\)`"
NIFTI = (348).to_bytes(4, "little") + bytes(340) + b"n+1\0" + bytes(700)
SCANS = {
    "dicom": bytes(128) + b"DICM" + bytes(500),
    "dicom that begins as a TIFF does": b"II*\0" + bytes(124) + b"DICM" + bytes(500),
    "dicom without a prefix": b"\x08\0\x05\0CS" + bytes(100),
    "nifti": NIFTI,
    "nifti-2": (540).to_bytes(4, "big") + b"n+2\0" + bytes(600),
    "nifti.gz": gzip.compress(NIFTI),
}


@pytest.mark.parametrize("kind", [*SCANS, "folder"])
def test_a_scan_is_refused_by_name_with_what_opens_it(kind: str, tmp_path: Path, processor: MedSightProcessor) -> None:
    path = tmp_path / "series.png"
    path.mkdir() if kind == "folder" else path.write_bytes(SCANS[kind])
    message = rf"series\.png is a .*{HOW}"
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=message) as error:
            load_image(source)
        assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=message):
            processor.image_processor([Image.new("L", (8, 8)), source])
        with pytest.raises(ValueError, match=message):
            processor(text="<|image_pad|>", images=source)
        content = [{"type": "image", "path": str(source)}]
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
    if kind != "folder":
        with pytest.raises(ValueError, match=f"image 1 is a .*{HOW}"):
            processor.image_processor([Image.new("L", (8, 8)), SCANS[kind]])


def test_an_array_of_slices_is_refused_and_one_of_channels_is_a_picture(tmp_path: Path) -> None:
    processor = MedSightImageProcessor(size=28)
    volume, picture = np.zeros((7, 9, 6), np.int16), np.arange(54, dtype=np.int16).reshape(9, 6)
    for source in (volume, torch.from_numpy(volume), npy_bytes(volume)):
        with pytest.raises(ValueError, match=f"image 0: expected 1 to 4 channels.*{HOW}"):
            processor([source])
    (tmp_path / "picture.npy").write_bytes(npy_bytes(picture))
    expected = processor(picture, return_tensors="pt")["pixel_values"]
    for source in (tmp_path / "picture.npy", npy_bytes(picture), np.stack([picture] * 3), npy_bytes(picture[None])):
        assert torch.equal(processor(source, return_tensors="pt")["pixel_values"], expected)
