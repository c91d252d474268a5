"""The checkpoint format: a folder of safetensors shards and an index that makes it complete.

    checkpoints/step-00000120/
        shard-00000-of-00001.safetensors     tensors; a rank writes one shard
        index.json                           written last: what is where, sizes, checksums, and all that is no
        tensor

A folder without `index.json` is an unfinished write and is never loaded. Loading reads safetensors and JSON,
which hold data only; nothing here unpickles, so a checkpoint from elsewhere cannot execute code. What the
tensors and values mean is `gtddp_dist.training_state`'s matter.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UserError
from .files import flush_directory, write_atomically, write_text_atomically

FORMAT = "gtddp-checkpoint"
VERSION = 1
INDEX = "index.json"

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]
"""A value that a JSON file holds."""

_FOLDER = re.compile(r"step-(\d{8,})")
_SHARD = re.compile(r"shard-\d{5}-of-\d{5}\.safetensors")
_UNFINISHED_REMOVAL = ".removed-"


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The message names the file and, where there is one, the key."""


class ShardEntry(TypedDict):
    """What the index says of a shard: plain data, so that a rank can send it to the one that writes the index."""

    file: str
    bytes: int
    sha256: str
    tensors: dict[str, TensorEntry]


class TensorEntry(TypedDict):
    """What the index says of a tensor."""

    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read whole: its checksums, shapes and names are as its index says."""

    folder: Path
    step: int
    """Training steps done."""
    tensors: dict[str, Tensor]
    """On the CPU, by key: `model/<parameter or buffer>`, `optimizer/<parameter>/<state>`, `random/<generator>`."""
    values: dict[str, JSON]
    """Everything that is no tensor."""


@dataclass(frozen=True)
class Refused:
    """A checkpoint that was not used."""

    folder: Path
    reason: str
    complete: bool
    """False for a folder without an index: a write that was interrupted."""


def folder_of(directory: Path, step: int) -> Path:
    """The folder of the checkpoint of a step, in the directory of checkpoints."""
    return directory / f"step-{step:08d}"


def save(directory: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, JSON], keep: int) -> Path:
    """Writes the checkpoint of one process, then removes all but the `keep` newest; returns its folder."""
    folder = begin(directory, step)
    shard = write_shard(folder, tensors, rank=0, world=1)
    write_index(folder, step, [shard], values)
    prune(directory, keep)
    return folder


def begin(directory: Path, step: int) -> Path:
    """Makes an empty folder for the checkpoint of a step (one rank does, before any writes its shard).

    What an interrupted write, or a run that was resumed from an earlier step, left under that name is
    removed.
    """
    folder = folder_of(directory, step)
    directory.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        _remove(folder)
    folder.mkdir()
    return folder


def write_shard(folder: Path, tensors: Mapping[str, Tensor], *, rank: int, world: int) -> ShardEntry:
    """Writes the tensors of one rank (0 to `world - 1`) and returns the entry of the index about them."""
    path = folder / f"shard-{rank:05d}-of-{world:05d}.safetensors"
    # A copy of each: safetensors takes no tensors that share memory (tied weights) or are views of larger
    # ones.
    copies = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    write_atomically(path, lambda temporary: save_file(copies, temporary))
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "tensors": {name: _describe(tensor) for name, tensor in copies.items()},
    }


def write_index(folder: Path, step: int, shards: Sequence[ShardEntry], values: Mapping[str, JSON]) -> None:
    """Makes the checkpoint complete (one rank does, when all shards are written).

    Raises ValueError for a key that two shards hold, or a value that JSON cannot hold exactly.
    """
    tensors: dict[str, JSON] = {}
    for shard in shards:
        for name, entry in shard["tensors"].items():
            if name in tensors:
                raise ValueError(f"two shards hold the tensor {name!r}")
            tensors[name] = {"shard": shard["file"], "shape": list(entry["shape"]), "dtype": entry["dtype"]}
    content: dict[str, JSON] = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "shards": {s["file"]: {"bytes": s["bytes"], "sha256": s["sha256"]} for s in shards},
        "tensors": tensors,
        "values": dict(values),
    }
    content["sha256"] = _content_checksum(content)
    write_text_atomically(folder / INDEX, json.dumps(content, indent=1, allow_nan=False) + "\n")


def load(folder: Path) -> Checkpoint:
    """Reads a checkpoint and verifies all of it: sizes, checksums, names, shapes, types.

    Raises CheckpointError that names the file, and the key where one is at fault.
    """
    try:
        return _load(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error


def newest_valid(directory: Path) -> tuple[Checkpoint | None, list[Refused]]:
    """The newest checkpoint that can be used, or None, and the newer ones that were refused, each with the reason."""
    refused: list[Refused] = []
    for folder in reversed(_folders(directory)):
        complete = (folder / INDEX).is_file()
        try:
            return load(folder), refused
        except CheckpointError as error:
            refused.append(Refused(folder, str(error), complete))
    return None, refused


def set_aside(refused: Sequence[Refused]) -> None:
    """Takes refused checkpoints out of the way of a run that continues from an older one.

    A damaged one is renamed to `refused-step-...` and left for its owner to look at; an unfinished one is
    removed.
    """
    for item in refused:
        aside = item.folder.with_name(f"refused-{item.folder.name}")
        if not item.complete:
            _remove(item.folder)
        else:
            if aside.exists():
                _remove(aside)
            item.folder.rename(aside)
    if refused:
        flush_directory(refused[0].folder.parent)


def prune(directory: Path, keep: int) -> None:
    """Removes all complete checkpoints but the `keep` newest, and what an interrupted removal left.

    Raises ValueError where `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}: at least the newest checkpoint has to stay")
    for leftover in directory.glob(f"{_UNFINISHED_REMOVAL}*"):
        shutil.rmtree(leftover)
    complete = [folder for folder in _folders(directory) if (folder / INDEX).is_file()]
    for folder in complete[:-keep]:
        _remove(folder)


def _folders(directory: Path) -> list[Path]:
    """Folders of checkpoints, complete or not, oldest first."""
    if not directory.is_dir():
        return []
    found = [(match, path) for path in directory.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda item: int(item[0][1]))]


def _remove(folder: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that a half removed one is never taken for a checkpoint."""
    doomed = folder.with_name(f"{_UNFINISHED_REMOVAL}{folder.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _load(folder: Path) -> Checkpoint:
    index = _read_index(folder)
    shards = _mapping(index, "shards", folder)
    expected = _mapping(index, "tensors", folder)
    tensors: dict[str, Tensor] = {}
    for file, entry in shards.items():
        path = folder / file
        # A name with a path in it would make the loader read outside the folder.
        if not _SHARD.fullmatch(file) or not isinstance(entry, dict):
            raise CheckpointError(f"{folder / INDEX}: shards: {file!r} is not the name of a shard")
        _verify_bytes(path, entry)
        names = [name for name, at in expected.items() if isinstance(at, dict) and at.get("shard") == file]
        tensors.update(_read_shard(path, {name: cast(TensorEntry, expected[name]) for name in names}))
    for name in expected:
        if name not in tensors:
            raise CheckpointError(f"{folder / INDEX}: the tensor {name!r} is in no shard that it lists")
    step = index.get("step")
    if not isinstance(step, int) or folder.name != folder_of(folder.parent, step).name:
        raise CheckpointError(f"{folder / INDEX}: step is {step!r}, which the folder's name does not say")
    return Checkpoint(folder, step, tensors, _mapping(index, "values", folder))


def _read_index(folder: Path) -> dict[str, JSON]:
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {INDEX}, so writing it was interrupted")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not the index of a {FORMAT}")
    if index.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: has version {index.get('version')!r} of the format, this program reads version {VERSION}"
        )
    if index.pop("sha256", None) != _content_checksum(index):
        raise CheckpointError(f"{path}: its content does not match its checksum (sha256): it was changed or damaged")
    return index


def _mapping(index: dict[str, JSON], key: str, folder: Path) -> dict[str, JSON]:
    value = index.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / INDEX}: {key} is missing or not an object")
    return value


def _verify_bytes(path: Path, entry: dict[str, JSON]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing")
    size = path.stat().st_size
    if size != entry.get("bytes"):
        raise CheckpointError(f"{path}: has {size} bytes, its index says {entry.get('bytes')}: an incomplete copy?")
    if _sha256(path) != entry.get("sha256"):
        raise CheckpointError(f"{path}: its content does not match its checksum (sha256): it was changed or damaged")


def _read_shard(path: Path, expected: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if found != expected.keys():
                raise CheckpointError(f"{path}: {_difference(found, set(expected))} its index")
            tensors = {name: file.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is not a safetensors file: {error}") from error
    for name, tensor in tensors.items():
        entry = _describe(tensor)
        if entry["shape"] != expected[name].get("shape") or entry["dtype"] != expected[name].get("dtype"):
            raise CheckpointError(
                f"{path}: {name!r} is {entry['dtype']} {entry['shape']}, its index says "
                f"{expected[name].get('dtype')} {expected[name].get('shape')}"
            )
    return tensors


def _difference(found: set[str], expected: set[str]) -> str:
    """One key that makes two sets of keys differ, as the first half of a sentence."""
    missing = sorted(expected - found)
    return f"lacks the key {missing[0]!r} of" if missing else f"has the key {min(found - expected)!r}, not in"


def _describe(tensor: Tensor) -> TensorEntry:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _content_checksum(content: Mapping[str, JSON]) -> str:
    # Python writes a float with the digits that give it back exactly, so the text is the same after reading.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
