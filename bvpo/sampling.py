"""The options of `python -m bvpo.sample`."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bvpo.decoding import Decoding
from bvpo.engines import Engine, TransformersEngine
from bvpo.errors import UserError
from bvpo.pairing import BestWorst, PairSource
from bvpo.rewards import Reward
from bvpo.traces import ThinkFormat

Stage = Literal["all", "generate", "score", "anchors", "pairs"]


@dataclass(frozen=True)
class Sampling:
    """What is sampled, how it is scored and where it goes.

    Args:
        policy: The model that answers: a Hub id, a folder, or `builtin:tiny_reasoner`.
        prompts: A JSONL or Parquet file, a Hub data set id, or `builtin:tasks`.
        output: The file of rows, .jsonl or .parquet. Responses and scores are kept beside it, in `OUTPUT.work`.
        samples: Responses to a prompt in each mode.
        temperature: Of the responses. Anchor traces are drawn at it too.
        top_p: Only the most probable tokens that sum to at least this are drawn from. Below 1 some traces are never
            drawn, and a marginal anchor misses them.
        max_new_tokens: Longer responses are cut, and enter no pair.
        seed: Of all responses.
        reward: What scores the answers: a reward model's Hub id or folder, `builtin:tasks`, `math`, or a class path.
        pairs: What makes a pair of the responses.
        anchor_traces: Further traces of each prompt that gives a row, drawn independently of its pairs, for the
            marginal anchor.
        backend: What generates.
        think: How the model marks its traces: a name or the fields of a format, as in `data.think`.
        limit: The first so many prompts; null takes all.
        reference: The prompts' column with the right answer, where it has a name of its own.
        max_prompt_tokens: Longer prompts are left out, as are those that leave too few positions to answer in.
        one_sided: Also keep rows that have a pair in one mode only.
        stage: `generate`, `score`, `anchors` or `pairs` alone. `pairs` generates nothing: it joins what shards wrote.
        shard: `i/n`: answer and score the i-th of n parts of the prompts, into the same folder.
    """

    policy: str
    prompts: str
    output: str
    samples: int = 5
    temperature: float = 0.8
    top_p: float = 1.0
    max_new_tokens: int = 4096
    seed: int = 0
    reward: Reward | str = "builtin:tasks"
    pairs: PairSource = field(default_factory=BestWorst)
    anchor_traces: int = 0
    backend: Engine = field(default_factory=TransformersEngine)
    think: str | ThinkFormat = "qwen3"
    limit: int | None = None
    reference: str | None = None
    max_prompt_tokens: int | None = None
    one_sided: bool = False
    stage: Stage = "all"
    shard: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("anchor_traces", 0), ("max_new_tokens", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be ≥ {least}, got {value}")
        if Path(self.output).suffix not in (".jsonl", ".parquet"):
            raise UserError(f"output {self.output}: give a file that ends in .jsonl or .parquet")
        if Path(self.output).is_dir():
            raise UserError(f"output {self.output}: is a folder; give a file that ends in .jsonl or .parquet")
        with suppress(OSError):  # there is no such file, and prompts may have another kind of name
            if Path(self.output).samefile(self.prompts):
                raise UserError(
                    f"output {self.output}: would overwrite the prompts, which are read from it; give another"
                )
        _ = self.decoding, self.part
        if self.shard is not None and self.stage == "pairs":
            raise UserError("the rows are made from all shards together: give stage pairs without a shard")

    @property
    def decoding(self) -> Decoding:
        try:
            return Decoding(self.temperature, self.top_p, self.max_new_tokens)
        except ValueError as error:
            raise UserError(str(error)) from error

    @property
    def work(self) -> Path:
        """The folder of what is kept between starts."""
        return Path(f"{self.output}.work")

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many parts, from 0."""
        given = re.fullmatch("([1-9][0-9]*)/([1-9][0-9]*)", self.shard or "1/1")
        if given is None or int(given[1]) > int(given[2]):
            raise UserError(f"shard {self.shard!r}: expected i/n with 1 ≤ i ≤ n, such as 2/8")
        return int(given[1]) - 1, int(given[2])
