"""Log-probabilities of a batch in one packed row: what padding gives, without computing the padding.

Shapes: S sequences, N tokens of the row, M completion tokens, D numbers of a hidden state.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import sliding_window_causal_mask_function

from bvpo import attention_kernels as kernels
from bvpo.attention import FLASH, FLEX, FUNCTIONS, NAME, PackedMask, computing
from bvpo.batches import SequenceBatch
from bvpo.errors import UserError
from bvpo.head import Head, head_logps
from bvpo.packing import Block, PackedBatch, pack

BatchLogps = Callable[[PreTrainedModel, SequenceBatch], Tensor]
Kernel = Literal["auto", "flex"]
PROBE = ((5, 4), (3, 6), (5, 7), (3, 1))  # tokens of prompt and completion: two chosen sequences, two rejected ones
# A row for a kernel alone, of several of its tiles (of 64 to 128 tokens), and a window shorter than any sequence of it
ROW = (Block(0, 300, 0, 0), Block(1, 200, 250, 0), Block(2, 70, 0, 2), Block(3, 1, 65, 2))
WINDOW = 33
FAULTS = (  # what a model raises that is not made for packing, and a kernel that cannot be built or run
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def packed_logps(model: PreTrainedModel, batch: SequenceBatch, share_prompts: bool = True) -> Tensor:
    """(S,) log π(completion | prompt) of the batch's sequences, in nats; fp32, or float64 where the model is.

    The model must have passed `use_packed_attention`.

    Args:
        share_prompts: Whether a prompt that several sequences have is computed once.

    Raises:
        UserError: A prompt is empty.
    """
    packed = pack(batch, share_prompts)
    hidden = _hidden_states(model, packed).index_select(0, packed.sources)  # (M, D)
    logps = head_logps(hidden, Head.of(model), packed.targets)
    return torch.stack([completion.sum() for completion in logps.split(packed.counts)])


def _hidden_states(model: PreTrainedModel, packed: PackedBatch) -> Tensor:
    """(N, D) of the row's tokens."""
    assert is_packed(model)
    with computing(packed):  # a mask must be given, or transformers takes every jump in the positions for a new text
        outputs = model.get_decoder()(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=torch.ones_like(packed.input_ids),
            use_cache=False,
        )
    return cast(Tensor, outputs.last_hidden_state[0])


def is_packed(model: nn.Module) -> bool:
    """Whether the model has passed `use_packed_attention`."""
    config = getattr(model, "config", None)
    return config is not None and config.get_text_config()._attn_implementation in FUNCTIONS


def use_packed_attention(model: PreTrainedModel, logps: BatchLogps | None = None) -> str | None:
    """Give the model the attention that packed rows need, unless its log-probabilities would be others by packing.

    The model itself is asked: two pairs of random tokens are computed packed, and one sequence after the other.

    Args:
        logps: Computes packed log-probabilities; by default `packed_logps`. A sharded model has to be asked its way.

    Returns:
        None where packing is right; otherwise why it is not, and the model is as it was.
    """
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        return "its output layer is no linear layer"
    if not model._can_set_attn_implementation():
        return "its attention does not go through the interface of transformers"
    return _switch(model, NAME, model.config._attn_implementation, logps or packed_logps)


def use_attention_kernel(
    model: PreTrainedModel, kernel: Kernel = "auto", logps: BatchLogps | None = None
) -> str | None:
    """Give a model that packs the kernel for whole rows, on the device that it now is on, unless it is wrong there.

    To be called where the model is trained: on that device, under that autocast. The kernel is asked, and the model
    with it, as above. Without this, and in layers that it does not take, rows are attended sequence by sequence.

    Args:
        kernel: `auto` is FlashAttention, where torch has it for the device; `flex` is FlexAttention.
        logps: As of `use_packed_attention`.

    Returns:
        None where all is right; otherwise why rows are still attended sequence by sequence.

    Raises:
        UserError: `flex` on a CPU.
    """
    device = _device(model)
    if kernel == "flex" and not kernels.flex_runs_on(device):
        raise UserError(
            f"packing flex: FlexAttention trains on CUDA GPUs only, and the model is on {device.type}. Set "
            "--model.packing auto, which is right on every device"
        )
    if not is_packed(model) or (kernel == "auto" and not kernels.flash_runs_on(device)):
        return None
    return _switch(model, {"auto": FLASH, "flex": FLEX}[kernel], NAME, logps or packed_logps)


# ---------------------------------------------------------------------- asking


@torch.enable_grad()
def sees_ahead(model: PreTrainedModel) -> bool:
    """Whether a token's logits depend on later tokens, as those of a bidirectional encoder do: whether they have a
    gradient there. A model that cannot be asked is not said to: what uses it says what is wrong.
    """
    training, embeddings = model.training, list[Tensor]()
    model.eval()

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[0].clone()  # which the model may change in place

    try:
        ids = _probe(model).input_ids[:1]
        half = ids.shape[1] // 2
        with model.get_input_embeddings().register_forward_hook(keep):
            logits = model(input_ids=ids, use_cache=False).logits[0, :half]
        (gradient,) = torch.autograd.grad(logits.float().square().mean(), embeddings[0])
        norms = gradient.reshape(ids.shape[1], -1).float().norm(dim=-1)
        return bool(norms[half:].max() > 1e-4 * norms[:half].max())  # exactly 0 where a mask hides them
    except FAULTS:
        return False
    finally:
        model.train(training)


def _switch(model: PreTrainedModel, name: str, otherwise: str, logps: BatchLogps) -> str | None:
    """Set the attention; where it is wrong, set the other one and say why."""
    training = model.training
    model.eval()
    try:
        batch = _probe(model)
        expected, dtype = _plain_logps(model, batch)
        fault = _wrong_kernel(model, name)  # outside the model first: an error inside upsets a sharded one
        if fault is None:
            model.set_attn_implementation(name)
            fault = _wrong_values(model, logps, batch, expected, dtype) or _wrong_influence(model, logps, batch)
    except FAULTS as raised:
        fault = f"{type(raised).__name__}: {raised}".splitlines()[0]
    model.train(training)
    if fault is not None:
        model.set_attn_implementation(otherwise)
    return fault


def _probe(model: PreTrainedModel) -> SequenceBatch:
    """Two pairs of random tokens; chosen and rejected have one prompt."""
    prompts, completions = torch.tensor(PROBE).T
    lengths = prompts + completions
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (len(PROBE), int(lengths.max())), generator=generator)
    ids[2:, : int(prompts.max())] = ids[:2, : int(prompts.max())]
    return SequenceBatch(ids.to(_device(model)), prompts, lengths, step_pairs=2)


def _device(model: PreTrainedModel) -> torch.device:
    """Where the model computes; a sharded one may keep its parameters in the host's memory."""
    return next(model.buffers(), next(model.parameters())).device


def _tolerance(dtype: torch.dtype) -> float:
    """Of a relative error; in half precision dozens of roundings of 2⁻⁹ each."""
    return 1e-4 if dtype.itemsize > 2 else 2e-2


@torch.no_grad()
def _plain_logps(model: PreTrainedModel, batch: SequenceBatch) -> tuple[Tensor, torch.dtype]:
    """(S,) of one sequence after the other, from the model's own logits, and the precision of these: not always that of
    its parameters."""
    logps = []
    for ids, prompt, length in zip(batch.input_ids, batch.prompt_lengths.tolist(), batch.lengths.tolist(), strict=True):
        logits = model(input_ids=ids[None, :length], use_cache=False).logits[0, prompt - 1 : -1]
        own = logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32))
        logps.append(own.gather(1, ids[prompt:length, None]).sum())
    return torch.stack(logps), logits.dtype


@torch.enable_grad()
def _wrong_kernel(model: PreTrainedModel, name: str) -> str | None:
    """In the model's shapes and precision, on random numbers, against attention sequence by sequence: values and
    gradients; also with a window, as that of the model is longer than the probe."""
    if name == NAME:
        return None
    text, device = model.config.get_text_config(), _device(model)
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    dtype = kernels.computing_dtype(model.dtype, device)
    length, generator = sum(block.length for block in ROW), torch.Generator().manual_seed(0)
    states = [  # queries, keys, values, and what the backward pass begins with
        torch.randn(shape, generator=generator).to(device, dtype)
        for shape in ((1, heads, length, size), *2 * [(1, key_heads, length, size)], (1, length, heads, size))
    ]

    def results(name: str, dtype: torch.dtype, mask: PackedMask) -> list[Tensor]:
        """The output and the gradients."""
        query, key, value, above = (own.to(dtype).detach().requires_grad_() for own in states)
        out, _ = FUNCTIONS[name](model, query, key, value, mask)
        return [out.detach(), *torch.autograd.grad(out, (query, key, value), above.detach())]

    for window in (None, WINDOW):
        rule = None if window is None else sliding_window_causal_mask_function(window)
        mask = PackedMask(ROW, rule, window, device)
        with torch.autocast(device.type, enabled=False):
            found, exact = results(name, dtype, mask), results(NAME, torch.promote_types(dtype, torch.float32), mask)
        errors = [(own - other).norm() / other.norm() for own, other in zip(found, exact, strict=True)]
        error = float(torch.stack(errors).max())
        if not error <= _tolerance(dtype):  # it may be no number
            return f"attention is off by {error:.1%}" + (f" with a window of {window} tokens" if window else "")
    return None


@torch.no_grad()
def _wrong_values(
    model: PreTrainedModel, logps: BatchLogps, batch: SequenceBatch, expected: Tensor, dtype: torch.dtype
) -> str | None:
    error = float((logps(model, batch) - expected).abs().max() / expected.abs().mean())
    return None if error <= _tolerance(dtype) else f"packed log-probabilities are off by {error:.1%}"


@torch.enable_grad()
def _wrong_influence(model: PreTrainedModel, logps: BatchLogps, batch: SequenceBatch) -> str | None:
    """A log-probability must have a gradient at its own sequence's embeddings, and exactly 0 at all others: a leak that
    is smaller than bf16's rounding shows here."""
    embeddings: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[0]

    with model.get_input_embeddings().register_forward_hook(keep):
        values = logps(model, batch)
    packed = pack(batch)
    starts = [0, *accumulate(block.length for block in packed.blocks)]
    for number, block in enumerate(packed.blocks):
        own = torch.zeros(starts[-1], dtype=torch.bool, device=embeddings[0].device)
        own[starts[number] : starts[number + 1] - 1] = True  # nothing follows the last token
        own[starts[block.owner] : starts[block.owner] + block.prefix] = True
        (gradient,) = torch.autograd.grad(values[block.sequence], embeddings[0], retain_graph=True)
        if not torch.equal(gradient[0].ne(0).any(-1), own):
            return "in a packed row, its sequences see each other"
    return None
