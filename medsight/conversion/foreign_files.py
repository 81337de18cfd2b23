"""Reads foreign checkpoint files without executing anything in them, and brings their tensors under our names."""

import argparse
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from medsight.checkpoint import tensor_names, weight_files

from .state_dict_adapter import DROPPED_ENTRIES, WEIGHTS_ENTRIES, to_ours


@dataclass
class Source:
    """The tensors of one foreign checkpoint under their own names, and the file that each stands in."""

    kind: str
    path: Path
    tensors: Mapping[str, torch.Tensor]
    files: Mapping[str, Path] = field(default_factory=dict)
    unknown_entries: Collection[str] = ()

    def place(self, their_name: str) -> str:
        """A tensor's file, or where it would be looked for, and its name there."""
        return f"{self.files.get(their_name, self.path)}: {their_name}"

    @classmethod
    def read_file(cls, kind: str, path: Path) -> "Source":
        """Reads a loose file: `.safetensors`, or anything that `torch.save` wrote."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        if path.suffix == ".safetensors":
            tensor_names(path)  # which names a damaged file
            return cls(kind, path, load_file(path))
        content = read_pickled(path)
        entry = next((name for name in WEIGHTS_ENTRIES if isinstance(content.get(name), dict)), None)
        if entry is None:
            return cls(kind, path, content)
        unknown = [str(name) for name in content if name != entry and name not in DROPPED_ENTRIES]
        return cls(kind, path, content[entry], unknown_entries=unknown)

    @classmethod
    def read_llm_folder(cls, folder: Path) -> "Source":
        """Maps the safetensors files of a folder into memory; they are read when they are written."""
        tensors: dict[str, torch.Tensor] = {}
        files: dict[str, Path] = {}
        for path in weight_files(folder):
            shard = load_file(path)
            tensors.update(shard)
            files.update(dict.fromkeys(shard, path))
        return cls("llm", folder, tensors, files)


def read_pickled(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, read without executing anything; of classes, only argparse.Namespace is let through.

    Raises:
        ValueError: the file is damaged, holds code, or holds something else than a dictionary.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a broken file makes the reader raise
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if refused:
            reason = f"it asks for {refused[1]}: that is code, not weights, and was not run"
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason}); get one that you trust") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return content


def merge(sources: Iterable[Source]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """All tensors under our names, the first source's where several hold one, and what is not known about the files.

    Raises:
        ValueError: two sources hold the same tensor with different values.
    """
    merged: dict[str, torch.Tensor] = {}
    found_in: dict[str, str] = {}
    problems: set[str] = set()
    for source in sources:
        problems.update(f"{source.path}: entry {name!r} is unexpected" for name in source.unknown_entries)
        for name, tensor in source.tensors.items():
            ours, place = to_ours(source.kind, name), source.place(name)
            if ours is None or not isinstance(tensor, torch.Tensor):
                problems.add(f"{place} is unexpected")
                continue
            # Parts are copied: tensors that share memory are not saved as they are.
            split = len(ours) > 1
            parts = [part.clone() for part in tensor.tensor_split(len(ours))] if split else [tensor] * len(ours)
            for our_name, part in zip(ours, parts, strict=True):
                if our_name not in merged:
                    merged[our_name], found_in[our_name] = part, place
                elif not same(merged[our_name], part):
                    raise ValueError(
                        f"{place} differs from {found_in[our_name]}: both stand for {our_name}, and must be equal"
                    )
    return merged, problems


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal in the less precise dtype of the two."""
    dtype = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    return first.shape == second.shape and torch.equal(first.to(dtype), second.to(dtype))
