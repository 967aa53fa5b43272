"""Modules around a model that compute nothing: data parallelism, compilation, averages.

Known types are removed. Another module around a single one is removed too, but only `lift` may do
that, which compares outputs.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ...core.errors import UnsupportedModel
from .registry import has_converter, type_name

# Type -> the attribute with the module inside.
_INNER = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": (
        "_checkpoint_wrapped_module"
    ),
    "timm.utils.model_ema.ModelEmaV2": "module",
    "timm.utils.model_ema.ModelEmaV3": "module",
    "lightning.fabric.wrappers._FabricModule": "_original_module",
    "lightning_fabric.wrappers._FabricModule": "_original_module",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
}
_SHARDED = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def unwrapped(model: nn.Module, path: str = "") -> nn.Module:
    """The module inside of wrappers of known types, in any order and depth.

    Args:
        model: Any module.
        path: Where it is, for the message.

    Raises:
        UnsupportedModel: A wrapper has a forward hook, or contains parts of the weights only.
    """
    while True:
        kind = type_name(model)
        if kind == _SHARDED:
            raise UnsupportedModel(
                f"{path or 'model'}: its weights are sharded (FullyShardedDataParallel); gather "
                "them with FSDP.state_dict_type(...), and load them into the plain module"
            )
        name = _INNER.get(kind)
        if name is None:
            return model
        if any(vars(model).get(table) for table in _HOOKS):
            raise UnsupportedModel(
                f"{path or 'model'}: the {type(model).__name__} around it has a forward hook; "
                f"remove the hook, or give its .{name}"
            )
        model = getattr(model, name)


def innermost(model: nn.Module) -> nn.Module:
    """The module inside of any modules that contain a single one and no tensors.

    Whether those compute something is for the caller to compare.
    """
    while True:
        model = unwrapped(model)
        children = [child for child in model._modules.values() if child is not None]
        tensors = [
            *model._parameters.values(),
            *(each for each in model._buffers.values() if each is not None and each.numel() > 1),
        ]
        if has_converter("model", model) or len(children) != 1 or tensors:
            return model
        if isinstance(children[0], nn.ModuleList | nn.ModuleDict):
            return model
        model = children[0]


def unwrap_children(modules: Iterable[nn.Module]) -> None:
    """Replace the wrappers of known types inside of modules by what they contain, in place."""
    for module in modules:
        for name, child in module._modules.items():
            if child is not None and type_name(child) in _INNER:
                module._modules[name] = unwrapped(child, name)
