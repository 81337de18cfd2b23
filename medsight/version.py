"""The version of the package, in a file of its own: whatever states it imports nothing else."""

__version__ = "0.1.0"
