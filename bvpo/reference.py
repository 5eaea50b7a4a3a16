"""The reference model's log-probabilities: from a frozen copy in memory, or from the disk, computed once.

The cache is a folder of Arrow files, a thousand rows each, named by a hash of all that the values depend on: weights,
tokenized rows, precision. Runs of a sweep share it; an interrupted computation goes on with the first missing file; and
where anything differs there is another folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bvpo.batches import PairBatch, SequenceBatch, collate
from bvpo.errors import UserError
from bvpo.losses import PairLogps
from bvpo.policy import by_side, completion_logps

ROWS_A_FILE = 1000
SAMPLED = 4096  # elements of each tensor that enter the fingerprint of the weights
FEATURES = {
    "reference_trace": datasets.List(datasets.Value("float64")),  # chosen, rejected
    "reference_empty": datasets.List(datasets.Value("float64")),
    "reference_anchors": datasets.List(datasets.Value("float64")),  # of anchor_chosen, then of anchor_rejected
}


class Reference(ABC):
    """π_ref: gives the reference's log-probabilities of a batch, without a gradient."""

    @abstractmethod
    def completion_logps(self, batch: SequenceBatch) -> Tensor:
        """(S,) log π_ref(completion | prompt), without a gradient."""

    def logps(self, batch: SequenceBatch) -> PairLogps:
        """The same of a branch's pairs."""
        return by_side(self.completion_logps(batch), batch)


class LiveReference(Reference):
    """A frozen model in memory. It is no `nn.Module`, so Lightning puts it into no checkpoint and no optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def copy_of(cls, policy: nn.Module) -> LiveReference:
        """The policy as it is now."""
        return cls(copy.deepcopy(policy))

    @torch.no_grad()
    def completion_logps(self, batch: SequenceBatch) -> Tensor:
        return completion_logps(self.model, batch)

    def to(self, device: torch.device) -> None:
        self.model.to(device)


class CachedReference(Reference):
    """Values that came with the rows."""

    def completion_logps(self, batch: SequenceBatch) -> Tensor:
        assert batch.reference is not None, "these rows have no cached log-probabilities"
        return batch.reference


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes and dtypes of all parameters, and of up to 4,096 elements of each, evenly spaced."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous().view(torch.uint8)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


class ReferenceCache:
    """The folder of one reference, one set of tokenized rows and one precision.

    Args:
        root: Parent of all such folders.
        weights: `weights_fingerprint` of the reference.
        rows: As `pairs.tokenize_rows` gives them.
        precision: The trainer's, and the dtype of the weights.
    """

    def __init__(self, root: Path, weights: str, rows: datasets.Dataset, precision: str) -> None:
        self.rows = rows
        self.facts = {"weights": weights, "rows": rows._fingerprint, "count": len(rows), "precision": precision}
        name = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:24]
        self.folder = root / name

    def missing(self) -> list[Path]:
        """The files that are still to be computed."""
        return [path for path in self._files() if not path.exists()]

    def _files(self) -> list[Path]:
        return [self.folder / f"{start:09d}.arrow" for start in range(0, len(self.rows), ROWS_A_FILE)]

    def compute(
        self,
        model: nn.Module,
        batch_size: int,
        pad_token_id: int,
        move: Callable[[PairBatch], PairBatch],
        context: Callable[[], AbstractContextManager[Any]],
        progress: str | None = None,
    ) -> None:
        """Fill in what is missing.

        Args:
            model: The reference, on its device.
            batch_size: Rows taken through the model at once.
            move: Brings a batch to that device.
            context: The precision that the trainer computes in.
            progress: The progress bar's label; None shows no bar.

        Raises:
            UserError: The disk takes no more.
        """
        files, was_training = self.missing(), model.training
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "facts.json").write_text(json.dumps(self.facts, indent=1))
        model.eval()
        with tqdm(total=len(files) * ROWS_A_FILE, desc=progress, disable=progress is None, unit="row") as bar:
            for path in files:
                start = int(path.stem)
                indices = range(start, min(start + ROWS_A_FILE, len(self.rows)))
                values: dict[int, dict[str, list[float]]] = {}
                for batch_rows in self._batches(indices, batch_size):
                    rows = [self.rows[index] for index in batch_rows]
                    with torch.no_grad(), context():
                        found = row_values(model, rows, move(collate(rows, pad_token_id)))
                    values.update(zip(batch_rows, found, strict=True))
                    bar.update(len(rows))
                _write(path, [values[index] for index in indices])
        model.train(was_training)

    def _batches(self, indices: range, batch_size: int) -> Iterator[list[int]]:
        """Rows of similar length together."""
        lengths = self.rows["length"][indices.start : indices.stop]
        order = sorted(indices, key=lambda index: lengths[index - indices.start])
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    def attached(self) -> datasets.Dataset:
        """The rows with their reference's values, memory-mapped. Raises UserError where a file is damaged."""
        try:
            parts = [datasets.Dataset.from_file(str(path)) for path in self._files()]
            values = datasets.concatenate_datasets(parts)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{self.folder}: cached log-probabilities cannot be read ({error}); delete it") from error
        if len(values) != len(self.rows):
            raise UserError(f"{self.folder}: expected values of {len(self.rows)} rows, found {len(values)}; delete it")
        return datasets.concatenate_datasets([self.rows, values], axis=1)


def row_values(model: nn.Module, rows: list[dict[str, Any]], batch: PairBatch) -> list[dict[str, list[float]]]:
    """The columns of `FEATURES` for the rows of one batch."""
    values: list[dict[str, list[float]]] = [{name: [] for name in FEATURES} for _ in rows]
    for name, column, sequences in (
        ("reference_trace", "chosen", batch.trace),
        ("reference_empty", "empty_chosen", batch.empty),
    ):
        own = [value for value, row in zip(values, rows, strict=True) if row[column]]
        if own:
            chosen, rejected = completion_logps(model, sequences).double().cpu().chunk(2)
            for value, pair in zip(own, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True):
                value[name] = list(pair)
    if batch.anchors is not None:
        width = max(len(batch.trace.lengths), 1)
        sequences, total = batch.anchors.sequences, len(batch.anchors.completion)
        parts = [sequences.part(slice(start, start + width)) for start in range(0, total, width)]
        logps = torch.cat([completion_logps(model, part) for part in parts]).double().cpu()
        own = [value for value, row in zip(values, rows, strict=True) if row["chosen"]]
        for completion, logp in zip(batch.anchors.completion.tolist(), logps.tolist(), strict=True):
            own[completion % len(own)]["reference_anchors"].append(logp)  # chosen ones come first
    return values


def _write(path: Path, values: list[dict[str, list[float]]]) -> None:
    """One Arrow file, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    features = datasets.Features(FEATURES)
    table = pa.Table.from_pylist(values, features.arrow_schema)
    try:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; make room and start again") from error
