"""Modules inside of wrappers: lifted, cut, saved and exported like the module itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import relative_error, tiny_vit
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel
from vitrim import StructuredMask, compact, export, lift, load, masked, resized, save
from vitrim.core.errors import InputError, UnsupportedModel

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Inside(nn.Module):
    """A wrapper of a training script."""

    def __init__(self, network: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.network(images * self.factor)
        return result


class Attributes(nn.DataParallel[nn.Module]):
    """The usual subclass, which forwards attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def compiled(model: nn.Module) -> nn.Module:
    result: nn.Module = torch.compile(model)  # type: ignore[assignment]
    return result


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compiled": compiled,
    "AveragedModel": AveragedModel,
    "compiled DataParallel": lambda model: compiled(nn.DataParallel(model)),
    "AveragedModel of a compiled model": lambda model: AveragedModel(compiled(model)),
    "checkpointing": checkpoint_wrapper,
    "a module of its own": Inside,
    "a subclass": Attributes,
    "all": lambda model: compiled(Inside(nn.DataParallel(compiled(Inside(model))))),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_vit()


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("lifted", [False, True], ids=["timm", "lifted"])
def test_every_function_takes_a_wrapped_model(
    model: nn.Module, kind: str, lifted: bool, tmp_path: Path
) -> None:
    source = lift(model) if lifted else model
    wrapped = WRAPPERS[kind](copy.deepcopy(source)).eval()
    with torch.no_grad():
        wanted = model(IMAGES)
        assert relative_error(lift(wrapped)(IMAGES), wanted) < 1e-5
        assert relative_error(load(save(wrapped, tmp_path / "saved")).eval()(IMAGES), wanted) < 1e-5
        for mask in (
            StructuredMask.random(wrapped, 0.5, seed=0),
            StructuredMask.from_saliency(wrapped, "l2", keep_ratio=0.5),
            StructuredMask.everything(wrapped),
        ):
            small, dense = compact(wrapped, mask).eval(), masked(wrapped, mask).eval()
            assert relative_error(small(IMAGES), dense(IMAGES)) < 1e-5
            assert relative_error(small(IMAGES), compact(model, mask).eval()(IMAGES)) < 1e-5
        assert resized(wrapped, 24)(torch.zeros(1, 3, 24, 24)).shape == (1, 5)


@pytest.mark.parametrize("kind", ["compiled DataParallel", "all"])
def test_a_wrapped_model_is_exported(model: nn.Module, kind: str, tmp_path: Path) -> None:
    artifact = export(WRAPPERS[kind](copy.deepcopy(model)), tmp_path / "artifact")
    plain = export(model, tmp_path / "plain")
    assert artifact.manifest.form == plain.manifest.form


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(model: nn.Module) -> None:
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
    assert relative_error(lift(wrapped.eval())(IMAGES), model(IMAGES)) < 1e-5


def test_wrapped_blocks(model: nn.Module) -> None:
    other: Any = copy.deepcopy(model)
    other.blocks[0] = compiled(other.blocks[0])
    other.blocks[1] = checkpoint_wrapper(other.blocks[1])
    kinds = [type(block) for block in other.blocks]
    assert relative_error(lift(other)(IMAGES), model(IMAGES)) < 1e-5
    assert [type(block) for block in other.blocks] == kinds, "the source is left unchanged"


def test_a_wrapper_that_computes_is_refused(model: nn.Module) -> None:
    with pytest.raises(UnsupportedModel):
        lift(Inside(model, 2.0).eval())


def test_a_hook_on_a_wrapper_is_not_lost(model: nn.Module) -> None:
    wrapped = nn.DataParallel(model)
    wrapped.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(UnsupportedModel, match="the DataParallel around it has a forward hook"):
        lift(wrapped)


def test_a_module_with_other_parts_names_the_supported_one(model: nn.Module) -> None:
    class Trainer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.loss = model, nn.Linear(2, 2)

    with pytest.raises(UnsupportedModel, match=r"give its attribute 'network'"):
        lift(Trainer())
    with pytest.raises(InputError, match="a TorchScript module has no rule"):
        lift(nn.DataParallel(torch.jit.trace(model, IMAGES)))
