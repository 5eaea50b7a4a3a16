"""The reference's log-probabilities on the disk, computed once.

The cache is a folder of Arrow files, a thousand rows each, named by a hash of all that the values depend on: weights,
tokenized rows, precision. Runs of a sweep share it; an interrupted computation goes on with the first missing file; and
where anything differs there is another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import torch
from torch import nn
from tqdm.auto import tqdm

from bvpo import ranks
from bvpo.batches import PairBatch, collate
from bvpo.errors import UserError
from bvpo.policy import completion_logps, in_step
from bvpo.slices import is_sharded, local

ROWS_A_FILE = 1000
IRRELEVANT = {"dtype", "torch_dtype", "transformers_version"}  # of a configuration, or known from elsewhere
FEATURES = {
    "reference_trace": datasets.List(datasets.Value("float64")),  # chosen, rejected
    "reference_empty": datasets.List(datasets.Value("float64")),
    "reference_anchors": datasets.List(datasets.Value("float64")),  # of anchor_chosen, then of anchor_rejected
}
Values = dict[str, list[float]]  # of one row, by the columns of `FEATURES`


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of all that a model's values follow from: its configuration, where it has one, and the names, shapes,
    dtypes and bytes of all parameters and saved buffers.

    Of each slice of its own, where the model is sharded.
    """
    config = getattr(model, "config", None)
    facts = None if config is None else _relevant(config.to_diff_dict())
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(local(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if is_sharded(model):
        return " ".join(ranks.gather_objects(digest.hexdigest()))
    return digest.hexdigest()


def _relevant(facts: Any) -> Any:
    """A configuration without what no value follows from: names of files, versions, what attention is computed by."""
    if not isinstance(facts, dict):
        return facts
    kept = {str(key): _relevant(value) for key, value in facts.items()}
    return {key: value for key, value in kept.items() if key not in IRRELEVANT and not key.startswith("_")}


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
        max_tokens: int | None,
        pad_token_id: int,
        move: Callable[[PairBatch], PairBatch],
        context: Callable[[], AbstractContextManager[Any]],
        progress: str | None = None,
    ) -> None:
        """Fill in what is missing; all ranks call it and share the work.

        Args:
            model: The reference, on its device.
            batch_size: Rows taken through the model at once.
            max_tokens: Tokens, padding included, that go through it at once; a batch with more is taken in parts.
            move: Brings a batch to that device.
            context: The precision that the trainer computes in.
            progress: The progress bar's label; None shows no bar.

        Raises:
            UserError: The disk takes no more.
        """
        files, was_training, together = ranks.of_first(self.missing()), model.training, is_sharded(model)
        if not together:
            files = files[ranks.own() :: ranks.count()]
        model.eval()
        failure = ""
        with tqdm(total=len(files) * ROWS_A_FILE, desc=progress, disable=progress is None, unit="row") as bar:
            for path in files:
                start = int(path.stem)
                indices = range(start, min(start + ROWS_A_FILE, len(self.rows)))
                values: dict[int, Values] = {}
                for batch_rows in self._batches(indices, batch_size, together):
                    rows = [self.rows[index] for index in batch_rows]
                    with torch.no_grad(), context():
                        found = row_values(model, rows, move(collate(rows, pad_token_id)), max_tokens)
                    values.update(zip(batch_rows, found, strict=True))
                    bar.update(len(rows))
                if together:
                    values = {index: value for part in ranks.gather_objects(values) for index, value in part.items()}
                if not failure and not (together and ranks.own()):
                    failure = self._write(path, [values[index] for index in indices])
        model.train(was_training)
        if failures := [text for text in ranks.gather_objects(failure) if text]:
            raise UserError(failures[0])

    def _write(self, path: Path, values: list[Values]) -> str:
        """One Arrow file, whole or not at all; what went wrong, or nothing."""
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        features = datasets.Features(FEATURES)
        table = pa.Table.from_pylist(values, features.arrow_schema)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "facts.json").write_text(json.dumps(self.facts, indent=1))
            with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            unfinished.replace(path)
        except OSError as error:
            with suppress(OSError):  # there may not even be a folder
                unfinished.unlink()
            return f"{path}: cannot be written: {error.strerror or error}; make room, or give another reference_cache"
        return ""

    def _batches(self, indices: range, batch_size: int, together: bool) -> Iterator[list[int]]:
        """Rows of similar length together; with `together`, this rank's share of them, as often on every rank."""
        lengths = self.rows["length"][indices.start : indices.stop]
        order = sorted(indices, key=lambda index: lengths[index - indices.start])
        shares = ranks.count() if together else 1
        for start in range(0, len(order), batch_size * shares):
            batch = order[start : start + batch_size * shares]
            yield batch[ranks.own() :: shares] if together else batch

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


def row_values(model: nn.Module, rows: list[dict[str, Any]], batch: PairBatch, max_tokens: int | None) -> list[Values]:
    """The values for the rows of one batch, at most `max_tokens` tokens, or a pair, at a time."""
    values: list[Values] = [{name: [] for name in FEATURES} for _ in rows]
    branches = [
        (name, column, sequences)
        for name, column, sequences in (
            ("reference_trace", "chosen", batch.trace),
            ("reference_empty", "empty_chosen", batch.empty),
        )
        if sequences.pairs
    ]
    cuts = [sequences.cuts(max_tokens) for *_, sequences in branches]
    parts = [sequences.part(cut) for (*_, sequences), own in zip(branches, cuts, strict=True) for cut in own]
    of_anchors: list[slice] = []
    if batch.anchors is not None:
        of_anchors = batch.anchors.cuts(max(len(batch.trace.lengths), 1), max_tokens)
        parts += [batch.anchors.sequences.part(cut) for cut in of_anchors]
    found = iter([completion_logps(model, part).double().cpu() for part, _ in in_step(model, parts)])
    for (name, column, sequences), own_cuts in zip(branches, cuts, strict=True):
        logps = torch.empty(2 * sequences.pairs, dtype=torch.float64)
        for cut in own_cuts:
            logps[cut] = next(found)
        own = [value for value, row in zip(values, rows, strict=True) if row[column]]
        for value, *pair in zip(own, *(side.tolist() for side in logps.chunk(2)), strict=True):
            value[name] = pair
    if batch.anchors is not None:
        logps = torch.cat([next(found) for _ in of_anchors])
        own = [value for value, row in zip(values, rows, strict=True) if row["chosen"]]
        for completion, logp in zip(batch.anchors.completion.tolist(), logps.tolist(), strict=True):
            own[completion % len(own)]["reference_anchors"].append(logp)  # chosen ones come first
    return values
