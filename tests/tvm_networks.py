"""Networks compiled by our kernels, on the processors that this machine can run."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from vitrim.compress.network.modules.model import CompactModel
from vitrim.export.parity import relative_error
from vitrim.targets.catalog import load_target
from vitrim.targets.detect import detect_host
from vitrim.targets.profile import TargetProfile

pytest.importorskip("tvm", reason="TVM is not installed: pip install 'vitrim[tvm]'")

from vitrim.export.tvm_kernels import calibration
from vitrim.export.tvm_kernels.build import TvmNetwork, tvm_target
from vitrim.export.tvm_kernels.execution_plan import execution_plan
from vitrim.export.tvm_kernels.program import compile_kernels, compiling
from vitrim.export.tvm_kernels.quantization import Range


def quickly(profile: TargetProfile) -> TargetProfile:
    """The profile with code that LLVM does not optimise, for tests of what kernels compute."""
    assert profile.tvm_target is not None
    return profile.model_copy(update={"tvm_target": {**profile.tvm_target, "opt-level": 0}})


HOST = quickly(detect_host())
X86 = ("x86-64-v4-vnni", "x86-64-v3", "x86-64")


@cache
def runnable() -> tuple[TargetProfile, ...]:
    """Profiles whose vector instructions this machine has, and one without any."""
    shipped = [quickly(load_target(name)) for name in X86]
    able = [
        profile
        for profile in shipped
        if HOST.architecture == "x86_64" and set(profile.features) <= set(HOST.features)
    ]
    plain = (
        {"kind": "llvm"} if HOST.architecture != "x86_64" else {"kind": "llvm", "mcpu": "x86-64"}
    )
    return (*able, quickly(HOST.model_copy(update={"features": (), "tvm_target": plain})))


@cache
def ranges_of(model: CompactModel) -> tuple[Range, ...]:
    """Static ranges of a network for eight images of noise, observed once and quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "detect_host", lambda: HOST)
        return calibration.find_ranges(model, noise(model, 8))


def noise(model: CompactModel, count: int, seed: int = 5) -> NDArray[np.float32]:
    """Images, of which the first are equal for any count."""
    return np.random.default_rng(seed).standard_normal(
        (count, *model.architecture.image), dtype=np.float32
    )


def outputs(built: TvmNetwork, images: torch.Tensor) -> np.ndarray[Any, Any]:
    import tvm
    from tvm import relax

    machine = relax.VirtualMachine(built.compile(), tvm.cpu())
    found: np.ndarray[Any, Any] = machine["main"](
        tvm.runtime.tensor(images.float().numpy())
    ).numpy()
    return found


def error_of(model: CompactModel, built: TvmNetwork, batch: int) -> float:
    images = torch.randn(
        batch,
        *model.architecture.image,
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float64,
    )
    with torch.no_grad():
        expected = model(images).numpy()
    return float(relative_error(expected, outputs(built, images)).max())


def compiled_kernels(kernels: dict[str, Any], profile: TargetProfile) -> Any:
    """TVM's module of kernels that belong to no network."""
    import tvm

    return compile_kernels(tvm.IRModule(kernels), tvm_target(profile))


def assert_lowered_as_by_all_passes(built: TvmNetwork) -> None:
    """The passes that are left out for speed would have changed no kernel of the network."""
    import tvm
    from tvm_ffi import structural_equal

    kernels = execution_plan(built).kernels

    def lowered(context: tvm.transform.PassContext) -> dict[str, tvm.tirx.PrimFunc]:
        found: dict[str, tvm.tirx.PrimFunc] = {}

        @tvm.instrument.pass_instrument
        class LastPass:
            def run_after_pass(self, module: tvm.IRModule, info: tvm.transform.PassInfo) -> None:
                if info.name == "tirx.LowerIntrin":
                    found.update({name.name_hint: body for name, body in module.functions.items()})

        context.override_instruments([LastPass()])
        with context:
            tvm.tirx.build(kernels, target=built.target)
        return found

    ours, all_passes = lowered(compiling()), lowered(tvm.transform.PassContext(opt_level=3))
    assert len(all_passes) >= len(kernels.functions)
    assert set(ours) == set(all_passes)
    different = [name for name in ours if not structural_equal(ours[name], all_passes[name])]
    assert not different
