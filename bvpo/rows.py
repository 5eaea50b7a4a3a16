"""Files → rows: what people have, read, recognised, brought into text and checked. Nothing is repaired in silence.

A file that cannot be read is refused whole. A row that can be read and is no pair of pairs is a *bad row*: its
problem is found here, and `pairs.tokenize_rows` refuses or drops and counts it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import datasets
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from bvpo.batches import BRANCHES, PREFIX, Branch
from bvpo.errors import UserError
from bvpo.traces import QWEN3, ThinkFormat, own_stops, render_prompt, split

BUILTIN = {"builtin:tiny_reasoner": Path(__file__).parent / "assets" / "tiny_reasoner_pairs.parquet"}
TEXT_COLUMNS = ("prompt", "chosen", "rejected", "empty_prompt", "empty_chosen", "empty_rejected")
PROBLEM = "bvpo_problem"  # the column in which a reader notes what is wrong with a row
COMPLETIONS = ("chosen", "rejected", "empty_chosen", "empty_rejected")

TEXT, NUMBER = datasets.Value("string"), datasets.Value("float64")
MESSAGES = datasets.List({"role": TEXT, "content": TEXT, "reasoning_content": TEXT})
CANDIDATES = datasets.List({"trace": TEXT, "answer": TEXT, "score": NUMBER, "finish_reason": TEXT})
OPTIONAL_COLUMNS = {
    "prompt_id": TEXT,
    "conversation": MESSAGES,
    "trace_candidates": CANDIDATES,
    "empty_candidates": CANDIDATES,
    "anchor_traces": datasets.List({"trace": TEXT, "logprob": NUMBER}),
    "template_sha": TEXT,
    "sampler_model": TEXT,
    "reward_model": TEXT,
    "all_generated_responses": datasets.List(TEXT),
    "all_rm_scores": datasets.List(NUMBER),
}
STRUCTURE = {
    "trace_candidates": "objects with trace, answer, score and finish_reason",
    "empty_candidates": "objects with trace, answer, score and finish_reason",
    "anchor_traces": "objects with trace and logprob",
    "all_generated_responses": "a list of texts",
    "all_rm_scores": "a list of numbers",
}


# ---------------------------------------------------------------------- reading


def read_records(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a file or a Hub data set as they stand, whatever their columns. Raises UserError as `load_rows`."""
    path = Path(source)
    if path.suffix not in (".json", ".jsonl"):
        yield from _open(source)
        return
    _check_file(path, source)
    for number, value in enumerate(_json_values(path, source), 1):
        if not isinstance(value, dict):
            raise UserError(f"{source}, row {number}: expected an object with named fields, found {_describe(value)}")
        yield value


def load_rows(source: str, one_sided: bool = False) -> datasets.Dataset:
    """The rows of a JSON, JSON Lines or Parquet file, a built-in set, or a Hub data set (its `train` split).

    Args:
        one_sided: Whether the columns of one branch may be absent.

    Raises:
        UserError: The source does not exist, cannot be read, is empty, or lacks a column.
    """
    rows = _open(source)
    if len(rows) == 0:
        raise UserError(f"{source}: no rows; expected one row a prompt")
    _check_columns(rows, source, one_sided)
    return rows


def _open(source: str) -> datasets.Dataset:
    path = BUILTIN.get(source, Path(source))
    is_file = path.suffix in (".json", ".jsonl", ".parquet")
    if is_file:
        _check_file(path, source)
    elif path.exists() or source.startswith(("builtin:", ".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"{source}: not a data set; give a .jsonl or .parquet file, a Hub id, or {_builtin()}")
    kind = ("parquet" if path.suffix == ".parquet" else "JSON") if is_file else source
    try:
        if kind == "JSON":
            rows = _read_json(path, source)
        else:
            where = {"data_files": str(path)} if is_file else {}
            rows = cast(datasets.Dataset, datasets.load_dataset(kind, split="train", **where))
    except Exception as error:  # datasets raises whatever its reader, the network or Arrow raises
        if isinstance(root := error.__cause__ or error, UserError):
            raise root from None
        if "corresponds to no data" in str(error):
            raise UserError(f"{source}: no rows; expected one row a prompt") from error
        raise UserError(f"{source}: cannot be read as {kind}: {_first_line(root)}") from error
    return rows


def _check_file(path: Path, source: str) -> None:
    if path.is_dir():
        raise UserError(f"{source}: is a folder; give a JSONL or Parquet file, a Hub id, or {_builtin()}")
    if not path.is_file():
        raise UserError(f"{source}: there is no such file; give a JSONL or Parquet file, a Hub id, or {_builtin()}")
    if path.stat().st_size == 0:
        raise UserError(f"{source}: the file is empty; expected one row a prompt")


def _builtin() -> str:
    return ", ".join(BUILTIN)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _read_json(path: Path, source: str) -> datasets.Dataset:
    """A JSON file's rows, converted to Arrow row by row: memory is bounded, and each error has its row."""
    kinds = dict.fromkeys(TEXT_COLUMNS, TEXT) | OPTIONAL_COLUMNS
    first = next((row for row in _json_values(path, source) if isinstance(row, dict)), {})
    kinds |= {name: MESSAGES for name in TEXT_COLUMNS if first.get(name) and isinstance(first[name], list)}
    stat = path.stat()
    stamp = sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode() + Path(__file__).read_bytes())
    rows = datasets.Dataset.from_generator(
        json_rows,
        features=datasets.Features(kinds | {PROBLEM: TEXT}),
        gen_kwargs={"path": str(path), "source": source, "kinds": kinds, "stamp": stamp.hexdigest()},
    )
    absent = [name for name in rows.column_names if rows.data.column(name).null_count == len(rows)]
    if len(absent) == len(rows.column_names):
        absent.remove(PROBLEM)  # a data set without columns has no rows
    return rows.remove_columns(absent)


def json_rows(path: str, source: str, kinds: Mapping[str, Any], stamp: str) -> Iterator[dict[str, Any]]:
    """Every known column of every row, None where it is absent; what does not fit is named in the column `PROBLEM`.

    `stamp` changes with the file's content: `datasets` caches by the arguments.
    """
    for value in _json_values(Path(path), source):
        row: dict[str, Any] = {PROBLEM: None}
        if not isinstance(value, dict):
            row[PROBLEM] = f"expected an object with named fields, found {_describe(value)}"
            value = dict.fromkeys(TEXT_COLUMNS)
        if isinstance(value.get("prompt_id"), int):
            value["prompt_id"] = str(value["prompt_id"])
        for name, kind in kinds.items():
            row[name] = None
            try:
                row[name] = conform(value.get(name), kind)
            except ValueError as error:
                expected = STRUCTURE.get(name) or ("text" if kind == TEXT else "a list of messages")
                row[PROBLEM] = row[PROBLEM] or f"field {name}: expected {expected}, found {error}"
            if row[name] is None and name in value and name in TEXT_COLUMNS:
                row[name] = "" if kind == TEXT else []  # present, but nothing that can be used
        yield row


def _json_values(path: Path, source: str) -> Iterator[Any]:
    """The values of a JSON Lines file, or of a file that holds one JSON list. Blank lines are no rows."""
    with path.open("rb") as file:
        head = file.read(4)
        if head[:2] == b"\x1f\x8b":
            raise UserError(f"{source}: cannot be read as JSON: it is gzip-compressed; decompress it first")
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in head:
            raise UserError(f"{source}: cannot be read as JSON: expected text in UTF-8, found UTF-16 or binary data")
        bom = 3 if head[:3] == b"\xef\xbb\xbf" else 0
        file.seek(bom)
        if file.read(1) == b"[":
            file.seek(bom)
            try:
                yield from json.loads(file.read())
                return
            except (ValueError, RecursionError):  # lists on lines of their own, or damaged: the lines say which
                pass
        file.seek(bom)
        row = 0
        for line in file:
            if not line.strip():
                continue
            row += 1
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError as error:
                found = f"the byte 0x{line[error.start]:02x} at position {error.start}"
                raise UserError(f"{source}: cannot be read: row {row}: expected UTF-8, found {found}") from None
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{source}: cannot be read: row {row}: expected one JSON object on the line, found "
                    f"{line[:40].decode(errors='replace').strip()!r} ({_first_line(error)})"
                ) from None
            yield value


def conform(value: Any, kind: Any) -> Any:
    """The part of a JSON value that a column of this kind holds. Raises ValueError with what was found instead."""
    if value is None:
        return None
    if kind == TEXT and isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("text with half a surrogate pair, which is no character") from None
        return value
    if kind == NUMBER and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, datasets.List) and isinstance(value, list):
        return [conform(item, kind.feature) for item in value]
    if isinstance(kind, dict) and isinstance(value, dict):
        return {name: conform(value.get(name), own) for name, own in kind.items()}
    raise ValueError(_describe(value))


def _describe(value: Any) -> str:
    return "nothing" if value in (None, "", []) else f"{type(value).__name__} {str(value)[:40]!r}"


def _check_columns(rows: datasets.Dataset, source: str, one_sided: bool) -> None:
    """Raises UserError, saying what the file seems to be and what it lacks."""
    columns = [name for name in rows.column_names if name != PROBLEM]
    conversational = any(
        name in columns and not isinstance(rows.features[name], datasets.Value) for name in COMPLETIONS
    )
    pairs = [prefix for prefix in PREFIX.values() if {f"{prefix}chosen", f"{prefix}rejected"} <= set(columns)]
    prompts = [f"{prefix}prompt" in columns for prefix in pairs]
    if len(pairs) >= (1 if one_sided else 2) and (conversational or all(prompts) or not any(prompts)):
        return
    rendered = {"prompt", "empty_prompt"} if conversational else set()
    missing = [name for name in TEXT_COLUMNS if name not in columns and name not in rendered]
    hint = f"A row needs {', '.join(TEXT_COLUMNS)}"
    if {"chosen", "rejected"} <= set(columns):
        best = "best and worst of all_generated_responses by all_rm_scores" if "all_rm_scores" in columns else "TRL"
        shape = "conversational" if conversational else "standard"
        hint = (
            f"These are {shape} preference rows ({best}) with one pair a prompt. BVPO needs two: answer the same "
            "prompts with thinking disabled, score the answers, and add the best and the worst as empty_chosen and "
            "empty_rejected" + ("" if conversational else ", with empty_prompt, the prompt that they answer")
        ) + "; or set on_one_sided to keep, and train on one estimator"
    raise UserError(f"{source}: no column {', '.join(missing)}; it has {', '.join(columns) or 'none of them'}. {hint}")


# ---------------------------------------------------------------------- conversations → text


def to_text(
    row: Mapping[str, Any],
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    think: ThinkFormat = QWEN3,
    stops: Sequence[str] = (),
) -> dict[str, Any]:
    """A row whose six columns are text: message lists, as TRL and SimPO write them, are rendered.

    Prompts go through the chat template. Completions never do, it may cut the trace: a completion is the message's
    `reasoning_content` between the tags, its content as it stands, and the EOS, the first of `stops`. A row of text
    without prompts has them inside its completions. The columns of a pair that the row does not have are None.

    Raises:
        UserError: The messages are no prompt with one answer.
    """
    if row.get(PROBLEM):
        raise UserError(f"{where}: {row[PROBLEM]}")
    text = dict.fromkeys(TEXT_COLUMNS) | dict(row)
    answers = {name: row[name] for name in COMPLETIONS if isinstance(row.get(name), list)}
    if not answers:
        return _with_prompts(row, where, think)
    eos = next(iter(stops or own_stops(tokenizer)), "")
    for name, messages in answers.items():
        if not _are_messages(messages) or messages[-1]["role"] != "assistant":
            found = _describe(messages)
            raise UserError(f"{where}: field {name}: expected messages that end in the assistant's, found {found}")
    try:
        conversation = _conversation(row.get("prompt"), [messages[:-1] for messages in answers.values()])
        text["prompt"] = render_prompt(tokenizer, conversation, "thinking", think)
        if not isinstance(row.get("empty_prompt"), str):
            text["empty_prompt"] = render_prompt(tokenizer, conversation, "no_thinking", think)
        for name, messages in answers.items():
            prompt = str(text["empty_prompt" if name.startswith("empty_") else "prompt"])
            text[name] = completion_text(messages[-1], prompt, eos, think)
    except (ValueError, TemplateError) as error:
        raise UserError(f"{where}: {_first_line(error)}") from error
    return text


def prefixes_without_prompt(row: Mapping[str, Any]) -> list[str]:
    """Prefixes of the pairs whose prompts are inside chosen and rejected, TRL's implicit form: there is no column."""
    return [
        prefix
        for prefix in PREFIX.values()
        if isinstance(row.get(f"{prefix}chosen"), str) and f"{prefix}prompt" not in row
    ]


def _with_prompts(row: Mapping[str, Any], where: str, think: ThinkFormat) -> dict[str, Any]:
    """Text whose pairs have prompts: those without are cut out of chosen and rejected."""
    text = dict.fromkeys(TEXT_COLUMNS) | dict(row)
    for prefix in prefixes_without_prompt(row):
        names = f"{prefix}prompt", f"{prefix}chosen", f"{prefix}rejected"
        chosen, rejected = text[names[1]] or "", text[names[2]] or ""
        prompt = shared_prompt(chosen, rejected, think, closed=bool(prefix))
        if not prompt and chosen and rejected:
            raise UserError(
                f"{where}: no field {names[0]}, and {names[1]} and {names[2]} do not start with a prompt that they "
                "share; give one"
            )
        text |= {names[0]: prompt, names[1]: chosen[len(prompt) :], names[2]: rejected[len(prompt) :]}
    return text


def shared_prompt(chosen: str, rejected: str, think: ThinkFormat, closed: bool) -> str:
    """The prompt that two texts start with.

    It ends where the think block begins, or with the tag where the format's prompt opens it; behind the block where
    that is `closed`, as in an empty-trace pair. Texts without a think block share a prompt up to the last white space
    before they differ.
    """
    end = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = chosen[: min(len(chosen), len(rejected)) if end is None else end]
    if closed:
        before, block, _ = shared.rpartition(think.empty)
        if block:
            return before + block
    before, tag, after = shared.rpartition(think.open)
    if tag and think.prompt_opens:
        return before + tag + after[: len(after) - len(after.lstrip())]
    if tag:
        return before
    return shared[: max((i + 1 for i, letter in enumerate(shared) if letter.isspace()), default=0)]


def _are_messages(value: list[Any]) -> bool:
    """Whether these are one or more messages with a role and text, or a trace, as their content."""
    return bool(value) and all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content") or "", str)
        and isinstance(message.get("reasoning_content") or "", str)
        for message in value
    )


def _conversation(prompt: Any, starts: list[list[dict[str, Any]]]) -> list[dict[str, str]]:
    """What the completions answer: the explicit prompt, or what their own messages share up to the last one."""
    given = prompt if isinstance(prompt, list) else []
    shared = next((start for start in starts if start), [])
    if any(start and start != shared for start in starts):
        raise ValueError(
            "the completions answer different conversations; expected one conversation before the last message"
        )
    messages = [*given, *shared] or ([{"role": "user", "content": prompt}] if prompt else [])
    if not _are_messages(messages) or not all(message.get("content") for message in messages):
        raise ValueError(f"field prompt: expected messages with role and content, found {_describe(messages)}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def completion_text(message: Mapping[str, Any], prompt: str, eos: str, think: ThinkFormat = QWEN3) -> str:
    """A message as the model wrote it after the prompt, which may have opened the think block.

    A `reasoning_content` or content that a server has stripped gets the line breaks back that Qwen3 and R1 write
    around the tags.
    """
    content, reasoning = message.get("content") or "", message.get("reasoning_content")
    opened = prompt.rstrip().endswith(think.open)
    if reasoning:
        if think.close in content:
            raise ValueError("a message has reasoning_content and a trace in its content; expected one of them")
        trace = reasoning if reasoning != reasoning.strip() else f"\n{reasoning}\n"
        content = think.open + trace + think.close + (content if content[:1] == "\n" else f"\n\n{content}")
    if opened and content.startswith(think.open):
        content = content.removeprefix(think.open)
        if prompt != prompt.rstrip():  # the prompt holds the line break after its tag
            content = content.lstrip("\n")
    return content if eos and content.endswith(eos) else content + eos


# ---------------------------------------------------------------------- checking


def check_row(
    row: Mapping[str, Any],
    where: str,
    stops: Sequence[str] = (),
    think: ThinkFormat = QWEN3,
    one_sided: bool = False,
) -> None:
    """Raises UserError, naming file, row and field, where a row of text is no pair of pairs.

    Args:
        stops: The texts that may end a completion.
        one_sided: Whether a row may be without one of its pairs.
    """
    present = [branch for branch in BRANCHES if not one_sided or _is_there(row, branch)]
    if not present:
        raise UserError(f"{where}: expected a trace pair or an empty-trace pair, found neither")
    for branch in present:
        _check_pair(row, branch, where, stops, think)
    for name in ("trace_candidates", "empty_candidates", "anchor_traces"):
        try:
            conform(row.get(name), OPTIONAL_COLUMNS[name])
        except ValueError as error:
            raise UserError(f"{where}: field {name}: expected {STRUCTURE[name]}, found {error}") from error
    for branch in present:
        _check_candidates(row, branch, where, stops, think)
    for anchor in row.get("anchor_traces") or []:
        logprob = anchor.get("logprob")
        if not isinstance(anchor.get("trace"), str) or logprob is None or not math.isfinite(logprob):
            raise UserError(f"{where}: field anchor_traces: expected a trace and a finite logprob each, found {anchor}")


def _is_there(row: Mapping[str, Any], branch: Branch) -> bool:
    return any(row.get(f"{PREFIX[branch]}{side}") for side in ("chosen", "rejected"))


def _check_pair(row: Mapping[str, Any], branch: Branch, where: str, stops: Sequence[str], think: ThinkFormat) -> None:
    prompt, chosen, rejected = (PREFIX[branch] + name for name in ("prompt", "chosen", "rejected"))
    for name in (prompt, chosen, rejected):
        if not isinstance(text := row.get(name), str) or not text:
            raise UserError(f"{where}: field {name}: expected text, found {_describe(text)}")
    for name in (chosen, rejected):
        if problem := _completion_problem(row[prompt], row[name], stops, think):
            raise UserError(f"{where}: field {name}: {problem}")
        if branch == "empty" and (trace := _trace(row[prompt], row[name], think).strip()):
            raise UserError(f"{where}: field {name}: expected an answer without a trace, found {_describe(trace)}")
    if row[chosen] == row[rejected]:
        raise UserError(f"{where}: {chosen} equals {rejected}: a pair needs two different completions")


def without_stop(text: str, stops: Sequence[str]) -> str:
    """A completion without the stop token that it may end in."""
    return text.removesuffix(next((stop for stop in stops if text.endswith(stop)), ""))


def _completion_problem(prompt: str, completion: str, stops: Sequence[str], think: ThinkFormat) -> str | None:
    """What makes a completion unfit to be trained on. Think tags matter where a think block is opened only."""
    body = without_stop(completion, stops)
    if not body.strip():
        return "expected text before the EOS, found nothing but whitespace"
    opened, opens = prompt.rstrip().endswith(think.open), body.lstrip().startswith(think.open)
    if opened and opens:
        return f"opens a second think block: the prompt ends in {think.open} already"
    if opened or opens:
        _, closed, answer = body.partition(think.close)
        if not closed:
            return f"expected {think.close} after the trace, found an unfinished trace; leave it out, or sample longer"
        if not answer.strip():
            return f"expected an answer after {think.close}, found nothing"
    return None


def _trace(prompt: str, completion: str, think: ThinkFormat) -> str:
    """The trace of a completion, empty where no think block is opened."""
    opened = prompt.rstrip().endswith(think.open) or completion.lstrip().startswith(think.open)
    return split(completion.lstrip(), think).trace if opened else ""


def _check_candidates(
    row: Mapping[str, Any], branch: Branch, where: str, stops: Sequence[str], think: ThinkFormat
) -> None:
    """Where a row holds the candidates of a pair: neither side was cut off, and chosen scores above rejected."""
    prefix, column, scores = PREFIX[branch], f"{branch}_candidates", []
    for name in (f"{prefix}chosen", f"{prefix}rejected"):
        body = without_stop(row[name], stops)
        own = split(body, think)
        trace, answer = ("", body) if prefix else (own.trace, own.answer)
        matches = [
            candidate
            for candidate in row.get(column) or []
            if (candidate.get("trace") or "").strip() == trace.strip()
            and (candidate.get("answer") or "").strip() == answer.strip()
        ]
        if matches and all(candidate.get("finish_reason") == "length" for candidate in matches):
            raise UserError(f"{where}: field {name}: its candidate was cut off (finish_reason = length)")
        scores.append([c["score"] for c in matches if c.get("score") is not None])
    if all(scores) and not max(scores[0]) > min(scores[1]):
        raise UserError(
            f"{where}: {prefix}chosen does not score above {prefix}rejected ({max(scores[0])} and {min(scores[1])} in "
            f"{column}): a tie is no pair"
        )
