"""Checkpoints of a sharded run: a folder with a file of slices for each rank, whole or not there.

    last.ckpt/  manifest.json              names, shapes, sizes and CRC-32 of all files
                common.ckpt                what all ranks have alike; a slice's place holds its name
                rank_00000.safetensors …   slices of parameters and of the optimizer's state

PyTorch's own format reads its metadata with pickle, which runs what a file tells it to, and is written in place. Here
tensors are safetensors, the rest is loaded as weights only, and the folder is made beside its place, synced, renamed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from bvpo import ranks
from bvpo.checkpoints import LAST, PARTIAL, PREVIOUS, move, read_checkpoint, remove, sync_folder
from bvpo.errors import UserError

MANIFEST, COMMON = "manifest.json", "common.ckpt"
SLICE = "bvpo.slice"  # the key of a dictionary that stands for a sliced tensor: its name


def save_sharded_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write the folder; all ranks call it. Raises UserError on all ranks where one cannot write."""
    slices: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    common = _take_slices(checkpoint, slices, shapes)
    partial, own = path.with_name(path.name + PARTIAL), f"rank_{ranks.own():05d}.safetensors"
    files: dict[str, list[int]] = {}
    failure = ""
    try:
        _make_folder(partial)
        save_file({name: tensor.contiguous().cpu() for name, tensor in slices.items()}, partial / own)
        files[own] = _synced(partial / own)
        if ranks.own() == 0:
            torch.save(common, partial / COMMON)
            files[COMMON] = _synced(partial / COMMON)
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().splitlines()[0]
        failure = f"{partial / own}: {cause}"
    told = ranks.gather_objects((failure, files))
    failures = [text for text, _ in told if text]
    if not failures and ranks.own() == 0:
        try:
            _finish(path, partial, shapes, {name: facts for _, own in told for name, facts in own.items()})
        except OSError as error:
            failures = [f"{path}: {error.strerror or error}"]
    failures = ranks.of_first(failures)
    if failures:
        if ranks.own() == 0:
            with suppress(OSError):
                remove(partial)
        kept = next((p.name for p in (path, path.with_name(PREVIOUS)) if p.exists()), None)
        last = "no earlier checkpoint exists" if kept is None else f"{kept} is the last good one and is still there"
        raise UserError(
            f"the checkpoint cannot be written: {failures[0]}; {last}. Make room and go on with --ckpt_path last"
        )


def _make_folder(folder: Path) -> None:
    """An empty one, when the first rank has made it. Raises OSError on all ranks where it cannot."""
    failure: OSError | None = None
    if ranks.own() == 0:
        try:
            remove(folder)
            folder.mkdir(parents=True)
        except OSError as error:
            failure = error
    failure = ranks.of_first(failure)
    if failure is not None:
        raise failure


def _finish(path: Path, partial: Path, shapes: dict[str, list[int]], files: dict[str, list[int]]) -> None:
    """The manifest, then the new name; the folder that had it becomes `previous.ckpt`."""
    manifest = {"ranks": ranks.count(), "files": files, "shapes": shapes}
    with (partial / MANIFEST).open("w") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(partial)
    if path.exists():
        if path.name == LAST:
            move(path, path.with_name(PREVIOUS))  # until the next rename, `previous` is the newest
        else:
            remove(path)
    os.replace(partial, path)
    sync_folder(path.parent)


def _synced(path: Path) -> list[int]:
    """The file's size and CRC-32, once the disk has it."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return [path.stat().st_size, _crc(path)]


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def _take_slices(value: Any, slices: dict[str, Tensor], shapes: dict[str, list[int]], name: str = "") -> Any:
    """A copy of nested containers in which every sliced tensor has given its place to its name; tied ones, to one.

    Of a tensor with parts of its own (8-bit moments: codes and scales) each part is a slice.
    """
    if isinstance(value, DTensor):
        own = value.to_local()
        shapes[name] = list(value.shape)
        if is_traceable_wrapper_subclass(own):
            parts, context = own.__tensor_flatten__()
            slices |= {f"{name}#{part}": getattr(own, part) for part in parts}
            return {SLICE: name, "parts": list(parts), "context": list(context)}
        name = next((known for known, other in slices.items() if own.data_ptr() == other.data_ptr() != 0), name)
        slices.setdefault(name, own)
        return {SLICE: name}
    if isinstance(value, dict):
        return {key: _take_slices(item, slices, shapes, f"{name}/{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [_take_slices(item, slices, shapes, f"{name}/{index}") for index, item in enumerate(value)]
    return value


def _give_slices(value: Any, read: Callable[[dict[str, Any]], Any]) -> Any:
    """The inverse of `_take_slices`; `read` is given what stands in a slice's place."""
    if isinstance(value, dict):
        if SLICE in value:
            return read(value)
        return {key: _give_slices(item, read) for key, item in value.items()}
    return [_give_slices(item, read) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------- reading


def load_sharded_checkpoint(path: Path, mesh: DeviceMesh, device: torch.device) -> dict[str, Any]:
    """The checkpoint with this rank's slices, on `device`, as distributed tensors.

    Raises:
        UserError: A file is missing or altered, or the checkpoint is of another number of ranks.
    """
    if path.is_file():
        raise UserError(f"{path}: was not written by a sharded run; go on with the strategy that it was written with")
    manifest = read_manifest(path)
    if manifest["ranks"] != mesh.size():
        raise UserError(
            f"{path}: was written by {manifest['ranks']} processes, this run has {mesh.size()}: a sharded run goes on "
            "with as many; or export it (python -m bvpo.export) and train on from there"
        )
    own = f"rank_{ranks.own():05d}.safetensors"
    failures = [text for text in ranks.gather_objects(_fault(path, manifest, (own, COMMON))) if text]
    if failures:
        raise broken(path, failures[0])
    with safe_open(path / own, "pt") as slices:

        def read(place: dict[str, Any]) -> Tensor:
            name = place[SLICE]
            shape = torch.Size(manifest["shapes"][name])
            if "parts" in place:
                inner = {part: slices.get_tensor(f"{name}#{part}").to(device) for part in place["parts"]}
                part = _moments_8bit(inner, place["context"])
            else:
                part = slices.get_tensor(name).to(device)
            stride = torch.empty(shape, device="meta").stride()
            return DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

        checkpoint = _give_slices(read_checkpoint(path / COMMON), read)
    assert isinstance(checkpoint, dict)
    return checkpoint


def _moments_8bit(parts: dict[str, Tensor], context: list[Any]) -> Tensor:
    from torchao.optim.subclass_8bit import OptimState8bit

    return cast(Tensor, OptimState8bit.__tensor_unflatten__(parts, context))


def read_whole(path: Path) -> dict[str, Any]:
    """A checkpoint of either kind with whole tensors, on the CPU. Raises UserError where it is broken."""
    if not path.is_dir():
        return read_checkpoint(path, mmap=True)
    manifest = read_manifest(path)
    if fault := _fault(path, manifest, tuple(manifest["files"])):
        raise broken(path, fault)
    handles = [safe_open(path / name, "pt") for name in sorted(manifest["files"]) if name != COMMON]

    def read(place: dict[str, Any]) -> Any:
        if "parts" in place:  # of the optimizer's state
            return place
        name = place[SLICE]
        return torch.cat([handle.get_tensor(name) for handle in handles]).view(manifest["shapes"][name])

    checkpoint = _give_slices(read_checkpoint(path / COMMON), read)
    assert isinstance(checkpoint, dict)
    return checkpoint


def read_common(path: Path) -> dict[str, Any]:
    """The same without the tensors that ranks share out: steps, loops, statistics. Raises UserError as `read_whole`."""
    if not path.is_dir():
        return read_checkpoint(path, mmap=True)
    manifest = read_manifest(path)
    missing = [name for name, (size, _) in manifest["files"].items() if _size(path / name) != size]
    if missing or (fault := _fault(path, manifest, (COMMON,))):
        raise broken(path, f"{missing[0]} is missing or cut short" if missing else fault)
    return read_checkpoint(path / COMMON)


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises UserError where the folder has none that can be read."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not {"ranks", "files", "shapes"} <= manifest.keys():
            raise ValueError(f"no ranks, files or shapes in {MANIFEST}")
    except (OSError, ValueError, AttributeError) as error:
        raise broken(path, f"{MANIFEST}: {error}") from error
    assert isinstance(manifest, dict)
    return manifest


def _fault(path: Path, manifest: dict[str, Any], names: tuple[str, ...]) -> str:
    """What is wrong with some of the files; empty where nothing is."""
    for name in names:
        if name not in manifest["files"]:
            return f"{name} is not in {MANIFEST}"
        size, crc = manifest["files"][name]
        if _size(path / name) != size:
            return f"{name} is missing or cut short"
        if _crc(path / name) != crc:
            return f"{name} is not what was written"
    return ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def broken(path: Path, cause: str) -> UserError:
    other = path.with_name(PREVIOUS)
    another = f"Give another one: --ckpt_path {other}" if path.name == LAST and other.exists() else "Give another one"
    return UserError(f"{path}: cannot be read as a checkpoint ({cause}). {another}")
