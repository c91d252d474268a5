"""The checkpoint format: a folder of safetensors shards and an index that makes it complete.

    checkpoints/step-00000120/
        shard-00000-of-00001.safetensors     tensors; a rank writes one shard, or none where it has no tensors
        index.json                           written last: what is where, sizes, checksums, and all that is no
        tensor

While it is written, a checkpoint is called `unfinished-step-00000120-<attempt>`; that folder, or one without
`index.json`, is never loaded. Keys are global names, so whoever reads need not be as many ranks as wrote: each
takes the keys it wants and verifies the shards that hold them. Loading reads safetensors and JSON, which hold
data only; nothing here unpickles, so a checkpoint from elsewhere cannot execute code. What the tensors and
values mean is `gtddp_dist.training_state`'s matter; how ranks write together is `checkpoint_writer`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import FAILED, UserError
from .files import flush_directory, write_atomically, write_text_atomically

FORMAT = "gtddp-checkpoint"
VERSION = 1
INDEX = "index.json"

JSON = None | bool | int | float | str | list["JSON"] | dict[str, "JSON"]
"""A value that a JSON file holds."""

Wanted = Callable[[str], bool]
"""Says of a key whether the tensor is to be read."""

AllGather = Callable[[str], list[str]]
"""Gives every rank the texts of all, in the order of ranks; all ranks call it, equally often."""

_FOLDER = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"unfinished-step-(\d{8,})-[A-Za-z0-9._-]+")
_ATTEMPT = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SHARD = re.compile(r"shard-\d{5}-of-\d{5}\.safetensors")
_UNFINISHED_REMOVAL = ".removed-"


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The message names the file and, where there is one, the key."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint that could not be written. The message names the file. Earlier checkpoints are as they were."""

    exit_code = FAILED


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
    """A checkpoint of which all that was wanted was read: checksums, shapes and names are as its index says."""

    folder: Path
    step: int
    """Training steps done."""
    tensors: dict[str, Tensor]
    """Those that were wanted, on the CPU, by key: `model/<parameter or buffer>`, `optimizer/<parameter>/<state>`,
    `random/<generator>`."""
    values: dict[str, JSON]
    """Everything that is no tensor."""


@dataclass(frozen=True)
class Refused:
    """A checkpoint that was not used."""

    folder: Path
    reason: str
    complete: bool
    """False for a write that was interrupted."""


def folder_of(directory: Path, step: int) -> Path:
    """The folder of the checkpoint of a step, in the directory of checkpoints."""
    return directory / f"step-{step:08d}"


def unfinished_folder_of(directory: Path, step: int, attempt: str) -> Path:
    """The folder in which the checkpoint of a step is while it is written.

    `attempt` sets this write apart from every other, so that nothing an interrupted one left is ever taken for
    a part of it. Raises ValueError where it is no plain word.
    """
    if not _ATTEMPT.fullmatch(attempt):
        raise ValueError(f"attempt is {attempt!r}: at most 64 letters, digits, '.', '_' and '-' are allowed")
    return directory / f"unfinished-step-{step:08d}-{attempt}"


def save(directory: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, JSON], keep: int) -> Path:
    """Writes the checkpoint of one process, then removes all but the `keep` newest; returns its folder.

    Raises CheckpointWriteError where it cannot be written; earlier checkpoints are as they were.
    """
    folder = begin(directory, step, secrets.token_hex(8))
    shard = write_shard(folder, tensors, rank=0, world=1)
    write_index(folder, step, [shard], values)
    finished = publish(folder)
    prune(directory, keep)
    return finished


def begin(directory: Path, step: int, attempt: str) -> Path:
    """Makes the folder in which a checkpoint is written, where no other rank has made it."""
    folder = unfinished_folder_of(directory, step, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each with memory of its own.

    safetensors takes no tensors that share memory (tied weights) or are views of larger ones.
    """
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def write_shard(folder: Path, tensors: Mapping[str, Tensor], *, rank: int, world: int) -> ShardEntry:
    """Writes the tensors of one rank (0 to `world - 1`) and returns the entry of the index about them.

    Raises CheckpointWriteError where it cannot be written.
    """
    return write_snapshot(folder, snapshot(tensors), rank=rank, world=world)


def write_snapshot(folder: Path, tensors: dict[str, Tensor], *, rank: int, world: int) -> ShardEntry:
    """`write_shard` for tensors that come from `snapshot`."""
    path = folder / f"shard-{rank:05d}-of-{world:05d}.safetensors"
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary))
    except (OSError, SafetensorError) as error:  # the latter also for a full disk
        raise CheckpointWriteError(f"{path}: cannot be written: {error}") from error
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "tensors": {name: _describe(tensor) for name, tensor in tensors.items()},
    }


def write_index(folder: Path, step: int, shards: Sequence[ShardEntry], values: Mapping[str, JSON]) -> None:
    """Writes what makes the checkpoint complete (one rank does, when all shards are written).

    Raises ValueError for a key that two shards hold, or a value that JSON cannot hold exactly;
    CheckpointWriteError where it cannot be written.
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
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    try:
        write_text_atomically(folder / INDEX, text)
    except OSError as error:
        raise CheckpointWriteError(f"{folder / INDEX}: cannot be written: {error}") from error


def publish(folder: Path) -> Path:
    """Gives a checkpoint that is complete the name under which it is found; returns the folder.

    What a run that was resumed from an earlier step left under that name is removed, and so is what
    interrupted writes up to that step left.
    """
    match = _UNFINISHED.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder}: is not the folder of an unfinished checkpoint")
    step, directory = int(match[1]), folder.parent
    finished = folder_of(directory, step)
    if finished.exists():
        _remove(finished)
    folder.rename(finished)
    flush_directory(directory)
    # Of later steps may be the next one, which a faster rank has begun.
    for leftover in directory.iterdir():
        if (match := _UNFINISHED.fullmatch(leftover.name)) and int(match[1]) <= step:
            _remove(leftover)
    return finished


def load(folder: Path, wanted: Wanted | None = None) -> Checkpoint:
    """Reads the tensors that are `wanted` (all, without it) and verifies them: sizes, checksums, names, shapes, types.

    The index is always verified, the shards only where they hold a tensor that is wanted. Raises
    CheckpointError that names the file, and the key where one is at fault.
    """
    try:
        return _load(folder, wanted)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from error


def newest_valid(directory: Path, wanted: Wanted | None = None) -> tuple[Checkpoint | None, list[Refused]]:
    """The newest checkpoint that can be used, or None, and the newer ones that were refused, each with the reason."""
    return newest_agreed(directory, wanted, lambda text: [text])


def find_valid(directory: Path, wanted: Wanted | None = None) -> tuple[list[int], list[Refused]]:
    """Steps of all checkpoints of which this process can use what it wants, newest first, and those it cannot use.

    Every one of them is read: to continue a run, ask `newest_agreed`.
    """
    steps: list[int] = []
    refused: list[Refused] = []
    for folder in reversed(_folders(directory)):
        finding, checkpoint = _examine(folder, wanted)
        if checkpoint is not None:
            steps.append(checkpoint.step)
        else:
            refused.append(Refused(folder, finding["reason"], finding["complete"]))
    return steps, refused


def newest_agreed(
    directory: Path, wanted: Wanted | None, allgather: AllGather
) -> tuple[Checkpoint | None, list[Refused]]:
    """The newest checkpoint that every rank can use, or None, and the newer ones that were refused.

    All ranks call it; each reads and verifies what it wants itself, newest first, and they stop at the first
    that all of them can use. One that only some can use is refused on all, with the reasons of those that
    cannot. Nothing is changed: `set_aside` is for one rank to call.

    Raises CheckpointError, on all ranks, where one of them cannot list `directory`.
    """
    refused: list[Refused] = []
    for name in _agreed_names(directory, allgather):
        folder = directory / name
        finding, checkpoint = _examine(folder, wanted)
        findings = [cast(_Finding, json.loads(text)) for text in allgather(json.dumps(finding))]
        reasons = _reasons([one["reason"] for one in findings])
        if not reasons and len({one["index"] for one in findings}) > 1:
            # A file system may show one rank what another rank no longer sees.
            reasons = f"{folder / INDEX}: is not the same file for all ranks: are they on one file system?"
        if not reasons:
            return checkpoint, refused
        refused.append(Refused(folder, reasons, any(one["complete"] for one in findings)))
    return None, refused


def set_aside(refused: Sequence[Refused]) -> None:
    """Takes refused checkpoints out of the way of a run that continues from an older one (one rank does).

    The other ranks need not wait for it: nothing that they write from then on has the name of a refused one.
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
        shutil.rmtree(leftover, ignore_errors=True)
    complete = [folder for folder in _folders(directory) if (folder / INDEX).is_file()]
    for folder in complete[:-keep]:
        _remove(folder)


def _folders(directory: Path) -> list[Path]:
    """Folders of checkpoints, complete or not, oldest first; of a step, the unfinished ones first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _age(path.name)), key=lambda path: _age(path.name))


def _age(name: str) -> tuple[int, bool, str] | tuple[()]:
    """Sorts names of checkpoints; empty for another name."""
    match = _FOLDER.fullmatch(name) or _UNFINISHED.fullmatch(name)
    return (int(match[1]), match.re is _FOLDER, name) if match else ()


class _Finding(TypedDict):
    """What a rank says to the others of a checkpoint."""

    reason: str
    """Why it cannot be used; empty where it can."""
    complete: bool
    index: str
    """Checksum of the index; empty where the checkpoint cannot be used."""


def _examine(folder: Path, wanted: Wanted | None) -> tuple[_Finding, Checkpoint | None]:
    complete = _FOLDER.fullmatch(folder.name) is not None and (folder / INDEX).is_file()
    try:
        if _UNFINISHED.fullmatch(folder.name):
            raise CheckpointError(f"{folder}: is unfinished: writing it was interrupted")
        checkpoint = load(folder, wanted)
        return {"reason": "", "complete": complete, "index": _sha256(folder / INDEX)}, checkpoint
    except CheckpointError as error:
        return {"reason": str(error), "complete": complete, "index": ""}, None
    except OSError as error:  # the checkpoint was removed since it was read
        return {"reason": f"{folder}: cannot be read: {error}", "complete": complete, "index": ""}, None


def _agreed_names(directory: Path, allgather: AllGather) -> list[str]:
    """Names of the folders of checkpoints that any rank sees, newest first."""
    names: list[str] = []
    problem = ""
    try:
        names = [folder.name for folder in _folders(directory)]
    except OSError as error:
        problem = f"{directory}: cannot be listed: {error}"
    answers = [json.loads(text) for text in allgather(json.dumps([names, problem]))]
    if problems := _reasons([problem for _, problem in answers]):
        raise CheckpointError(problems)
    return sorted({name for names, _ in answers for name in names}, key=_age, reverse=True)


def _reasons(reasons: Sequence[str]) -> str:
    """The reasons that ranks give, in the order of ranks, each once with those that give it; empty reasons left out."""
    told: list[str] = []
    for reason in dict.fromkeys(reason for reason in reasons if reason):
        who = [str(rank) for rank, other in enumerate(reasons) if other == reason]
        by = "" if len(who) == len(reasons) else f"rank{'s' if len(who) > 1 else ''} {', '.join(who)}: "
        told.append(by + reason)
    return "; ".join(told)


def _remove(folder: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that a half removed one is never taken for a checkpoint."""
    doomed = folder.with_name(f"{_UNFINISHED_REMOVAL}{folder.name}-{secrets.token_hex(4)}")
    folder.rename(doomed)
    # A network file system keeps a file while another process has it open: `prune` removes the rest later.
    shutil.rmtree(doomed, ignore_errors=True)


def _load(folder: Path, wanted: Wanted | None) -> Checkpoint:
    index = _read_index(folder)
    shards = _mapping(index, "shards", folder)
    for listed, entry in shards.items():
        # A name with a path in it would make the loader read outside the folder.
        if not _SHARD.fullmatch(listed) or not isinstance(entry, dict):
            raise CheckpointError(f"{folder / INDEX}: shards: {listed!r} is not the name of a shard")
    held: dict[str, dict[str, TensorEntry]] = {file: {} for file in shards}
    for name, at in _mapping(index, "tensors", folder).items():
        file = at.get("shard") if isinstance(at, dict) else None
        if not isinstance(file, str) or file not in held:
            raise CheckpointError(f"{folder / INDEX}: the tensor {name!r} is in no shard that it lists")
        held[file][name] = cast(TensorEntry, at)
    step = index.get("step")
    if not isinstance(step, int) or folder.name != folder_of(folder.parent, step).name:
        raise CheckpointError(f"{folder / INDEX}: step is {step!r}, which the folder's name does not say")
    values = _mapping(index, "values", folder)
    tensors: dict[str, Tensor] = {}
    for shard, expected in held.items():
        chosen = [name for name in expected if wanted is None or wanted(name)]
        if chosen or wanted is None:
            _verify_bytes(folder / shard, cast(dict[str, JSON], shards[shard]))
            tensors |= _read_shard(folder / shard, expected, chosen)
    return Checkpoint(folder, step, tensors, values)


def _read_index(folder: Path) -> dict[str, JSON]:
    path = folder / INDEX
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {INDEX}, so writing it was interrupted")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
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


def _read_shard(path: Path, expected: Mapping[str, TensorEntry], chosen: Sequence[str]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = set(file.keys())
            if found != expected.keys():
                raise CheckpointError(f"{path}: {_difference(found, set(expected))} its index")
            tensors = {name: file.get_tensor(name) for name in chosen}
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
