"""Reads foreign checkpoint files without executing anything in them, and brings their tensors under our names."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from medsight.checkpoint import weight_files

from .state_dict_adapter import DROPPED_ENTRIES, WEIGHTS_ENTRIES, to_ours


@dataclass
class Source:
    """The tensors of one foreign checkpoint under their own names, and the file that each stands in."""

    kind: str
    path: Path
    tensors: Mapping[str, torch.Tensor]
    files: Mapping[str, Path] = field(default_factory=dict)
    unknown_entries: Collection[str] = ()

    def file_of(self, their_name: str) -> Path:
        """The file that holds a tensor, or where it would be looked for."""
        return self.files.get(their_name, self.path)

    def our_names(self) -> set[str]:
        """Our names for what it holds."""
        return {ours for name in self.tensors for ours in to_ours(self.kind, name) or ()}

    @classmethod
    def read_file(cls, kind: str, path: Path) -> "Source":
        """Reads a loose file: `.safetensors`, or anything that `torch.save` wrote."""
        content: dict[str, Any] = read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)
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
        for path, indexed in weight_files(folder).items():
            shard = read_safetensors(path)
            absent = sorted(indexed - set(shard))
            if absent:
                raise ValueError(f"{path} lacks {absent[0]}, which the index says it holds; copy both again")
            tensors.update(shard)
            files.update(dict.fromkeys(shard, path))
        return cls("llm", folder, tensors, files)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, mapped, not copied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights file {path} is damaged or incomplete ({error}); copy it again") from error


def read_pickled(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, read without executing anything; of classes, only argparse.Namespace is let through.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, holds code, or holds something else than a dictionary.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise ValueError(f"{path} is no checkpoint that can be read safely ({_first_line(error)})") from error
        raise ValueError(
            f"{path} asks for {refused[1]} when it is read: that is code, not weights. Refused, and nothing was run; "
            "get the file from a source you trust, as plain tensors"
        ) from error
    except Exception as error:  # whatever a broken file makes the reader raise
        raise ValueError(f"{path} cannot be read as a checkpoint ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
            ours = to_ours(source.kind, name)
            where = f"{source.file_of(name)}: {name}"
            if ours is None or not isinstance(tensor, torch.Tensor):
                problems.add(f"{where} is unexpected")
                continue
            if len(ours) > 1 and tensor.shape[:1].numel() % len(ours):
                raise ValueError(
                    f"{where} has shape {tuple(tensor.shape)}: its rows do not split into {len(ours)} equal parts"
                )
            # Parts are copied: tensors that share memory are not saved as they are.
            parts = [part.clone() for part in tensor.chunk(len(ours))] if len(ours) > 1 else [tensor] * len(ours)
            for our_name, part in zip(ours, parts, strict=True):
                if our_name not in merged:
                    merged[our_name], found_in[our_name] = part, where
                elif not same(merged[our_name], part):
                    raise ValueError(
                        f"{where} differs from {found_in[our_name]}: both stand for {our_name}, and must be equal"
                    )
    return merged, problems


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    dtype = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    return first.shape == second.shape and torch.equal(first.to(dtype), second.to(dtype))
