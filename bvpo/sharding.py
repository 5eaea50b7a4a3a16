"""A model's parameters divided over the ranks: FSDP2, by `--trainer.strategy fsdp2`.

Every rank holds a slice of each parameter, along its first dimension, with its gradient and its optimizer state. A
layer is gathered from all ranks when it is computed and given back afterwards, so all ranks take every pass together.

A model is built without memory, divided, and filled slice by slice from its safetensors: no rank ever holds all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from transformers import PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from bvpo.errors import UserError
from bvpo.policy import UNREADABLE, direct_logps, empty_model, load_policy, resolve_model
from bvpo.sharded_checkpoints import load_sharded_checkpoint, save_sharded_checkpoint
from bvpo.slices import local, local_rows

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, over all ranks, with checkpoints in safetensors.

    Lightning's own default divides each layer's products over the devices instead, and lets every rank see every row.

    Args:
        reshard_after_forward: Give a layer's parameters back between its forward and its backward pass: less memory, a
            third more communication.
        cpu_offload: Keep parameters, gradients and optimizer state in the host's memory.
        process_group_backend: By default NCCL on GPUs and gloo on CPUs.
        timeout: Seconds that a rank waits for the others.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: float = 1800.0,
    ) -> None:
        super().__init__(
            data_parallel_size=1,  # all ranks, see `setup_environment`
            tensor_parallel_size=1,
            process_group_backend=process_group_backend,
            timeout=timedelta(seconds=timeout),
        )
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def load(self, name: str, dtype: torch.dtype, prepare: Callable[[PreTrainedModel], None]) -> PreTrainedModel:
        """A model, divided over the ranks.

        Args:
            name: As of `load_policy`.
            dtype: Of the slices.
            prepare: Changes the modules before they are divided; their parameters are not there yet.

        Raises:
            UserError: The model cannot be loaded.
        """
        with init_empty_weights(include_buffers=False):
            model = empty_model(name, dtype)
        model.tie_weights()  # without memory every name has got a parameter of its own
        prepare(model)
        compute = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        shard(model, self.device_mesh["data_parallel"], compute, self.reshard_after_forward, self.cpu_offload)
        _give_memory(model, torch.device("cpu") if self.cpu_offload else self.root_device, self.root_device)
        _fill(model, name)
        return model

    def model_to_device(self) -> None:
        if not self.cpu_offload:
            super().model_to_device()

    # ------------------------------------------------------------------ checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return cast(dict[str, Any], optimizer.state_dict())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Raises UserError, on all ranks, where a disk does not take it; what stood there before remains."""
        save_sharded_checkpoint(checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Raises UserError where the checkpoint is broken, or of another number of ranks."""
        device = torch.device("cpu") if self.cpu_offload else self.root_device
        path = Path(self.broadcast(checkpoint_path))
        return load_sharded_checkpoint(path, self.device_mesh["data_parallel"], device)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)


StrategyRegistry.register("fsdp2", FSDP2, description="Parameters, gradients and optimizer state divided over ranks")


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    compute: torch.dtype | None = None,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Divide a model's parameters over the mesh: each decoder layer for itself, then the rest (embedding, norm, head).

    Gradients are averaged over ranks in fp32 at least. The log-probabilities of a batch become a forward pass of the
    root, which has the head's weight gathered while they are computed.

    Args:
        compute: What gathered parameters are cast to; None leaves them.
    """
    widest = torch.promote_types(model.dtype, torch.float32)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=widest),
        "offload_policy": offload,
    }
    for layer in _layers(model):
        fully_shard(layer, reshard_after_forward=reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=True, **options)
    cast(Any, model).completion_logps = MethodType(direct_logps, model)
    register_fsdp_forward_method(model, "completion_logps")


def _layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    kinds = set(model._no_split_modules or ())
    yield from (module for module in model.modules() if type(module).__name__ in kinds)


# ---------------------------------------------------------------------- weights


def _give_memory(model: nn.Module, device: torch.device, buffers: torch.device) -> None:
    """Parameters without memory get it; those that modules share (a tied head) stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                key = id(parameter)
                if key not in made:
                    empty = torch.empty_like(parameter, device=device)
                    made[key] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[key]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(buffers)


@torch.no_grad()
def _fill(model: PreTrainedModel, name: str) -> None:
    """Each parameter's own rows, and the buffers that are saved. Raises UserError where the files cannot be read."""
    tied = set(model.all_tied_weights_keys)  # filled through the name that they share
    wanted = {
        key.replace(".base_layer.", "."): tensor  # as it is called without LoRA adapters
        for key, tensor in model.state_dict(keep_vars=True).items()
        if "lora_" not in key and key not in tied
    }
    try:
        read = _weights(name, model.dtype, wanted)
        for key, tensor in wanted.items():
            if (own := local(tensor)).numel():
                own.copy_(read(key, local_rows(tensor)))
    except UserError:
        raise
    except UNREADABLE as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: the model's weights cannot be read: {cause}; was it copied completely?") from error


def _weights(name: str, dtype: torch.dtype, wanted: dict[str, Tensor]) -> Callable[[str, slice], Tensor]:
    """Rows of the files' tensors; of the whole model's, where the files do not have them by these names."""
    opened = [safe_open(file, "pt") for file in _safetensors(name)]
    files = {key: file for file in opened for key in file.keys()}  # noqa: SIM118
    if all(key in files and files[key].get_slice(key).get_shape() == list(wanted[key].shape) for key in wanted):

        def of_files(key: str, rows: slice) -> Tensor:
            part = files[key].get_slice(key)
            return cast(Tensor, part[rows] if wanted[key].ndim else part[...])

        return of_files
    rank_zero_warn(f"{name}: its files name the weights otherwise: every process reads them all to keep its slices")
    whole = load_policy(name, dtype).state_dict()
    return lambda key, rows: whole[key][rows] if whole[key].ndim else whole[key]


def _safetensors(name: str) -> list[str]:
    """A model's files on this machine, downloaded where they are not."""
    source = resolve_model(name)
    index = cached_file(source, INDEX, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        return cast(list[str], get_checkpoint_shard_files(source, index)[0])
    whole = cached_file(source, WHOLE, _raise_exceptions_for_missing_entries=False)
    return [] if whole is None else [whole]
