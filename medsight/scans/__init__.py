"""Scans: DICOM, NIfTI, TIFF stacks and arrays, read to slices that the model takes, and masks back in their place."""

from .opening import open_scan
from .scan import Scan


__all__ = ["Scan", "open_scan"]
