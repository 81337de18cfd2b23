"""Scans: DICOM, NIfTI, TIFF stacks and arrays, read to slices that the model takes."""
