"""The layout ``sharded``: every rank writes its own shards through ``torch.distributed.checkpoint`` (DCP).

DCP plans which rank writes and reads what, for any number of ranks; storage is ours. DCP's file storage
pickles its metadata, which can execute code when read; its safetensors storage has no index and no checksums
(LOG.md, 2026-11-30). Ours is safetensors and JSON. It uses only DCP's documented extension points:
``StorageWriter``, ``StorageReader`` and ``DefaultSavePlanner.lookup_object``.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from pretrain import distributed
from pretrain.checkpoints import store
from pretrain.checkpoints.found import Found
from pretrain.checkpoints.tensors import (
    INDEX,
    NAMES,
    Entry,
    Piece,
    copy_to_cpu,
    opened,
    read_piece,
    read_pieces,
    write_tensors,
)
from pretrain.errors import UserError


def save_sharded(
    folder: Path,
    iteration: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    keep: int | None,
    group: dist.ProcessGroup | None = None,
    copies: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint of the run in ``folder``, which all ranks see. Each calls this with the same names.

    Args:
        folder: of the run.
        iteration: steps done.
        tensors: DTensors, and plain tensors that are equal on all ranks (one of them writes).
        meta: JSON values of the main process; ``iteration`` and ``layout`` are added.
        keep: how many of the newest checkpoints stay; None: all.
        group: the process group for DCP's collectives; None: the default one.
        copies: this rank's values, copied earlier; None: those of now.

    Raises:
        OSError: names the folder that some rank cannot write; earlier checkpoints stay whole.
    """
    planner = _CopiesPlanner(copy_to_cpu(tensors) if copies is None else copies)
    writer = _Writer(folder, iteration, meta, keep)
    with store.failing_whole(folder, iteration), torch.no_grad(), _plainly():
        dcp.save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
    return store.directory(folder, iteration)


def load(found: Found, tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's values into ``tensors`` in place. Every rank calls this with the same names.

    Reads either layout, into plain tensors (whole on every rank) and DTensors (each rank reads its own part),
    for any number of ranks. Ignores tensors that were not asked for (:meth:`Found.contents` lists them).

    Raises:
        UserError: names a tensor that is missing or differs in shape or dtype, or a file that cannot be read.
    """
    entries = found.contents()
    for name, tensor in tensors.items():
        if name not in entries:
            raise UserError(f"checkpoint: {found.path} holds no tensor {name}")
        theirs = f"{entries[name].dtype} {list(entries[name].shape)}"
        if theirs != (ours := f"{tensor.dtype} {list(tensor.shape)}"):
            raise UserError(f"checkpoint: {found.path}: {name} is {theirs}, not {ours}")
    entries = {name: entries[name] for name in tensors}
    with torch.no_grad():
        if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            with _plainly():
                dcp.load(dict(tensors), storage_reader=_Reader(found.path, entries), planner=planner)
            return
        for name, piece, values in read_pieces(found.path, entries):
            tensors[name].detach()[piece.slices].copy_(values)


@contextmanager
def _plainly() -> Iterator[None]:
    """Unwrap the exception into which DCP gathers the errors of all ranks."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if isinstance(cause, (UserError, OSError)):
            raise cause from None
        raise RuntimeError(f"checkpoint: rank {rank}: {type(cause).__name__}: {cause}") from error


class _CopiesPlanner(dcp.DefaultSavePlanner):
    """Plans with the tensors and takes values from the copies: training may change the tensors meanwhile."""

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.copies[index.fqn]


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class _Storage:
    """What DCP asks of any storage, and ours does not need."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """An object reads or writes one checkpoint."""

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Writer(_Storage, dcp.StorageWriter):
    """One safetensors file per rank; the coordinator creates and publishes the directory."""

    def __init__(self, folder: Path, iteration: int, meta: Mapping[str, Any], keep: int | None) -> None:
        self.folder, self.iteration, self.meta, self.keep = folder, iteration, meta, keep
        self.part = store.unfinished(folder, iteration)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        store.begin(self.folder, self.iteration)  # on the coordinator, before any rank gets its plan
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file = f"shard_{distributed.rank():05}.safetensors"
        pieces, values = {}, {}
        for item in plan.items:
            assert item.tensor_data is not None, f"{item.index.fqn} is no tensor"
            chunk = item.tensor_data.chunk
            if not chunk.sizes.numel():  # fewer rows than ranks
                continue
            key = f"{item.index.fqn}@{','.join(map(str, chunk.offsets))}"
            pieces[item.index] = Piece(file, key, tuple(chunk.offsets), tuple(chunk.sizes))
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor) and tensor.shape == chunk.sizes, item.index
            values[key] = tensor
        if not values:
            return _done([])
        record = write_tensors(self.part / file, values)
        return _done([WriteResult(index, record["size"], (piece, record)) for index, piece in pieces.items()])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        index: dict[str, dict[str, Any]] = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), f"{name} is no tensor"
            index[name] = {"dtype": NAMES[entry.properties.dtype], "shape": list(entry.size), "pieces": []}
        records: dict[str, store.Record] = {}
        for result in (result for rank in results for result in rank):
            piece, records[piece.file] = result.storage_data
            index[result.index.fqn]["pieces"].append(vars(piece))
        for name in records:
            if not (self.part / name).is_file():  # another machine wrote it to its own disk
                unseen = f"{self.part / name} cannot be seen by the main process"
                raise OSError(None, f"{unseen}: no shared file system")
        records[INDEX] = store.write_json(self.part / INDEX, index)
        store.publish(self.folder, self.iteration, {**self.meta, "layout": "sharded"}, records, self.keep)


class _Reader(_Storage, dcp.StorageReader):
    """Reads the pieces that the plan asks for, from either layout."""

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        self.path, self.entries = path, entries
        named = [(name, piece) for name, entry in entries.items() for piece in entry.pieces]
        self.pieces = {MetadataIndex(name, torch.Size(piece.offsets)): piece for name, piece in named}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found: dict[str, Any] = {}
        for name, entry in self.entries.items():
            chunks = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.shape)) for p in entry.pieces]
            kind = TensorProperties(dtype=entry.dtype)
            found[name] = TensorStorageMetadata(kind, torch.Size(entry.shape), chunks)
        return Metadata(found)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.pieces[item.storage_index].file, []).append(item)
        for name, items in by_file.items():
            with opened(self.path / name) as file:
                for item in items:
                    places = zip(item.storage_offsets, item.lengths)
                    block = tuple(slice(start, start + n) for start, n in places)
                    dtype = self.entries[item.storage_index.fqn].dtype
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(read_piece(file, self.pieces[item.storage_index], dtype, block or None))
                    planner.commit_tensor(item, target)
        return _done(None)
