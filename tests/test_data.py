"""Rows → ids → batches: what is trained on, in which order, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from bvpo.batches import collate
from bvpo.data import Microbatches, PairData, PairLoader
from bvpo.errors import UserError
from bvpo.order import InOrder, Microbatch, StepSampler
from bvpo.pairs import TEXT_COLUMNS, encode_prompt, load_rows, prompt_key, tokenize_row, tokenize_rows
from tests.conftest import EOS, make_rows, write_rows


def test_a_row_gives_one_prompt_with_four_completions(tokenizer: PreTrainedTokenizerFast) -> None:
    row = make_rows(1)[0]
    tokenized = tokenize_row(row, tokenizer)
    for name in TEXT_COLUMNS:
        assert tokenizer.decode(tokenized[name], clean_up_tokenization_spaces=False) == row[name]
    for name in ("chosen", "rejected", "empty_chosen", "empty_rejected"):
        assert tokenized[name].count(tokenizer.eos_token_id) == 1 and tokenized[name][-1] == tokenizer.eos_token_id
    assert tokenized["prompt_key"] == prompt_key("p0")


def test_bos_comes_exactly_once(tokenizer: PreTrainedTokenizerFast) -> None:
    from tokenizers.processors import TemplateProcessing

    adding = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="w0", eos_token=EOS)
    bos = adding.bos_token_id
    assert encode_prompt(adding, "w1") == adding.convert_tokens_to_ids(["w1"])  # this one adds none
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"w0 $A {EOS}", special_tokens=[("w0", bos), (EOS, adding.eos_token_id)]
    )
    try:
        assert encode_prompt(adding, "w1") == [bos, *adding.convert_tokens_to_ids(["w1"])]
        assert encode_prompt(adding, "w0w1")[:2] != [bos, bos]
    finally:
        adding.backend_tokenizer.post_processor = None  # the tokenizer is shared


def test_masks_come_from_lengths(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [tokenize_row(row, tokenizer) for row in make_rows(3)]
    batch = collate(rows, pad_token_id=int(tokenizer.eos_token_id)).trace
    assert batch.input_ids.shape[0] == 6 and batch.pairs == batch.step_pairs == 3
    for index in range(6):
        row, side = rows[index % 3], "chosen" if index < 3 else "rejected"
        ids = batch.input_ids[index]
        assert ids[batch.attention_mask[index].bool()].tolist() == row["prompt"] + row[side]
        assert ids[batch.completion_mask[index]].tolist() == row[side]  # the final EOS included, padding not


def test_an_epoch_takes_every_row_once_whatever_the_split() -> None:
    orders = []
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4), (1, 8)):
        sampler = StepSampler(30, batch_size, accumulate, seed=3)
        microbatches = list(sampler)
        assert len(microbatches) == len(sampler)
        assert sum(m.closes_step for m in microbatches) == sampler.steps == 4
        steps: list[list[int]] = [[]]
        for microbatch in microbatches:
            steps[-1] += microbatch.rows
            if microbatch.closes_step:
                assert microbatch.step_pairs == (len(steps[-1]), len(steps[-1]))
                steps.append([])
        orders.append([sorted(step) for step in steps[:-1]])
        assert Counter(row for step in steps for row in step) == Counter(range(30))
    assert all(order == orders[0] for order in orders)


def test_ranks_share_an_optimizer_batch_without_overlap() -> None:
    ranks = [list(StepSampler(32, 2, 2, rank=rank, ranks=2)) for rank in range(2)]
    together = [sorted(a.rows + b.rows) for a, b in zip(*ranks, strict=True)]
    one = [sorted(m.rows) for m in StepSampler(32, 4, 2)]
    assert together == one  # a cross-rank microbatch is one rank's microbatch of twice the rows


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = StepSampler(30, 4, seed=seed)
        sampler.epoch = epoch
        return [row for m in sampler for row in m.rows]

    assert order(0, 0) == order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0)


def test_bucketing_sorts_inside_an_optimizer_batch_only() -> None:
    lengths = [(7 * row) % 31 for row in range(32)]
    plain, bucketed = StepSampler(32, 2, 4), StepSampler(32, 2, 4, lengths=lengths)
    for start in range(0, 16, 4):
        rows = [[row for m in list(s)[start : start + 4] for row in m.rows] for s in (plain, bucketed)]
        assert sorted(rows[0]) == sorted(rows[1])
        assert [lengths[row] for row in rows[1]] == sorted(lengths[row] for row in rows[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_its_state_was_taken(tokenizer: PreTrainedTokenizerFast, workers: int) -> None:
    rows = datasets.Dataset.from_list([tokenize_row(row, tokenizer) for row in make_rows(10)])

    def loader() -> PairLoader:
        return PairLoader(Microbatches(rows, 0), StepSampler(10, 2, 2), workers)

    first = loader()
    whole = [batch.prompts.tolist() for _ in range(2) for batch in first]
    cut, state = loader(), {}
    for number, _ in enumerate(cut):
        if number == 2:
            state = cut.state_dict()
            break
    rest = loader()
    rest.load_state_dict(state)
    assert [batch.prompts.tolist() for _ in range(2) for batch in rest] == whole[3:]


def test_parquet_jsonl_and_the_built_in_set_are_read_alike(tmp_path: Path) -> None:
    rows = make_rows(5)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    jsonl = load_rows(str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert load_rows(str(tmp_path / "rows.parquet")).to_list() == jsonl.to_list() == rows
    assert set(TEXT_COLUMNS) <= set(load_rows("builtin:tiny_reasoner").column_names)


def test_a_bad_row_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = make_rows(5)
    rows[3]["empty_rejected"] = rows[3]["empty_chosen"]
    with pytest.raises(UserError, match=r"here\.jsonl, row 4: empty_chosen equals empty_rejected"):
        tokenize_rows(datasets.Dataset.from_list(rows), tokenizer, "here.jsonl")


def test_overlong_rows_are_refused_or_dropped_and_counted(llama_folder: Path, tmp_path: Path) -> None:
    rows = [*make_rows(6), {**make_rows(1, seed=1)[0], "chosen": "w1 " * 200 + EOS}]
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match="row 7: longest sequence has 4"):
        PairData(source, tokenizer=str(llama_folder), max_length=100).setup()
    data = PairData(source, tokenizer=str(llama_folder), max_length=100, on_overlong="drop")
    with pytest.warns(UserWarning, match="dropped 1 of 7 rows longer than 100 tokens"):
        data.setup()
    assert len(data.rows["train"]) == 6
    with pytest.raises(UserError, match="all 7 rows are longer"):
        PairData(source, tokenizer=str(llama_folder), max_length=3, on_overlong="drop").setup()


def test_microbatches_look_rows_up(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = datasets.Dataset.from_list([tokenize_row(row, tokenizer) for row in make_rows(4)])
    batch = Microbatches(rows, 0)[Microbatch([2, 0], step_pairs=(8, 8), closes_step=False)]
    assert batch.prompts.tolist() == [prompt_key("p2"), prompt_key("p0")]
    assert (batch.trace.step_pairs, batch.empty.step_pairs, batch.closes_step) == (8, 8, False)
    assert torch.equal(batch.trace.lengths > batch.trace.prompt_lengths, torch.ones(4, dtype=torch.bool))


def test_rows_of_a_prompt_are_drawn_together() -> None:
    """Groups of four in every microbatch, all of them once an epoch, in another order than as single rows."""
    sampler = StepSampler(40, batch_size=8, accumulate=2, seed=1, together=4)
    rows = [microbatch.rows for microbatch in sampler]
    groups = [row[first : first + 4] for row in rows for first in range(0, len(row), 4)]
    assert all(group == list(range(group[0], group[0] + 4)) and group[0] % 4 == 0 for group in groups)
    assert sorted(group[0] for group in groups) == list(range(0, 40, 4)) != [group[0] for group in groups]
    assert [m.rows for m in StepSampler(40, 8, 2, seed=1)] == [
        m.rows for m in StepSampler(40, 8, 2, seed=1, together=1)
    ]
    with pytest.raises(UserError, match="multiple of rows_together"):
        PairData(batch_size=6, rows_together=4)


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_of_a_prompt_stand_in_one_microbatch_sorted_by_length_too(ranks: int) -> None:
    """Groups of two are sorted by their longer row; each rank's microbatches hold whole groups, none of them twice."""
    lengths = [(7 * row) % 31 for row in range(40)]
    own = [list(StepSampler(40, 4, 2, rank=rank, ranks=ranks, lengths=lengths, together=2)) for rank in range(ranks)]
    rows = [microbatch.rows for mine in own for microbatch in mine]
    groups = [(first, second) for batch in rows for first, second in zip(batch[::2], batch[1::2], strict=True)]
    assert sorted(groups) == [(row, row + 1) for row in range(0, 40, 2)]
    step = [max(lengths[a], lengths[a + 1]) for batches in zip(*own, strict=True) for m in batches for a in m.rows[::2]]
    for start in range(0, 20, 4 * ranks):  # an optimizer batch: its first microbatch has its shorter groups
        longest = step[start : start + 4 * ranks]
        assert sorted(longest[: 2 * ranks]) + sorted(longest[2 * ranks :]) == sorted(longest)


def two_of_a_prompt(count: int) -> list[dict[str, Any]]:
    return [{**row, "prompt_id": f"p{index // 2}"} for index, row in enumerate(make_rows(count))]


def test_a_group_that_loses_a_row_is_left_out_whole(llama_folder: Path, tmp_path: Path) -> None:
    """Rows 2 and 5 of twelve are bad, row 9 is too long: three groups of two leave, and no microbatch mixes prompts."""
    rows = two_of_a_prompt(12)
    for index in (1, 4):
        rows[index]["chosen"] = "<think> w1" + EOS
    rows[8]["chosen"] = "<think> " + "w1 " * 99 + "</think> w1" + EOS
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    options: dict[str, Any] = {"on_bad_row": "drop", "max_length": 100, "on_overlong": "drop"}
    data = PairData(source, source, 2, tokenizer=str(llama_folder), rows_together=2, **options)
    with pytest.warns(UserWarning, match="dropped 3 more of 12 rows: of rows_together = 2 rows of a prompt one was"):
        data.setup()
    keys = data.rows["train"]["prompt_key"][:]
    assert keys == [prompt_key(f"p{group}") for group in (1, 3, 5) for _ in range(2)]
    assert all(len({keys[row] for row in microbatch.rows}) == 1 for microbatch in data.sampler())
    assert len(data.rows["validation"]) == 9  # those are not drawn


def test_groups_of_several_prompts_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    rows = two_of_a_prompt(8)
    rows[3]["prompt_id"] = "another"
    source = str(write_rows(tmp_path / "rows.jsonl", rows))
    with pytest.raises(UserError, match=r"rows 3 to 4 are drawn as one by rows_together = 2 and have several prompts"):
        PairData(source, batch_size=2, tokenizer=str(llama_folder), rows_together=2).setup()
    source = str(write_rows(tmp_path / "odd.jsonl", two_of_a_prompt(7)))
    with pytest.raises(UserError, match=r"has 7 rows, no multiple of rows_together = 2: let each prompt have 2"):
        PairData(source, batch_size=2, tokenizer=str(llama_folder), rows_together=2).setup()


@pytest.mark.parametrize("workers", [0, 2])
def test_every_validation_pass_begins_at_the_first_row(llama_folder: Path, pairs_file: Path, workers: int) -> None:
    """Also behind a pass that took some of the batches only, as limit_val_batches and a sanity check do."""
    data = PairData(str(pairs_file), str(pairs_file), 4, tokenizer=str(llama_folder), workers=workers)
    data.setup()
    (loader,) = data.val_dataloader()
    first = [next(iter(loader)).prompts.tolist() for _ in range(3)]
    assert first == [[prompt_key(f"p{row}") for row in range(4)]] * 3
    whole = [key for batch in loader for key in batch.prompts.tolist()]
    assert whole == [prompt_key(f"p{row}") for row in range(32)] and len(loader) == 8


def test_ranks_share_validation_rows() -> None:
    own = [list(InOrder(11, 2, [(True, True)] * 11, rank, ranks=2)) for rank in range(2)]
    assert [m.rows for m in own[0]] == [[0, 2], [4, 6], [8, 10]] and [m.rows for m in own[1]] == [[1, 3], [5, 7], [9]]
    assert {len(batches) for batches in own} == {len(InOrder(11, 2, [], 0, ranks=2))} == {3}


@pytest.mark.parametrize(
    ("option", "least"),
    [("batch_size", 1), ("accumulate", 1), ("max_tokens", 1), ("max_length", 1), ("rows_together", 1), ("workers", 0)],
)
def test_options_out_of_their_range_are_refused(option: str, least: int) -> None:
    with pytest.raises(UserError, match=f"{option} must be ≥ {least}, got {least - 1}"):
        PairData(**{option: least - 1})
    PairData(**{option: least})
