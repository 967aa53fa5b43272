"""A compact network for TVM: our own kernels where they cover it."""

from __future__ import annotations

from pathlib import Path

from ....compress.vit.model import CompactModel
from ....targets.profile import TargetProfile
from ...forms import Form, write_network
from .built import Built
from .coverage import reason_against
from .default import default_network
from .targets import tvm_target


def build_network(compact: CompactModel, profile: TargetProfile, *, batch: int = 1, threads: int = 1, log: Path | None = None) -> Built:
    """The network ready for `Built.compile`. log: JSON lines that the tuner wrote."""
    target = tvm_target(profile)
    reason = reason_against(compact.architecture)
    if reason is None and target.kind.name == "llvm":
        from .lanes import Lanes
        from .network import write_program
        from .program import lowering
        from .schedule import default_schedule

        schedule = default_schedule(profile.vector, threads)
        module = write_program(compact, Lanes.of(profile.vector), schedule, batch)
        return Built(module, target, lowering(), "kernels", threads)
    form = Form(rows="batch", attention="split", residual="add", norm="layer", activation="gelu", stem="matrix", last_queries=True)
    return default_network(write_network(compact, form, batch=batch), profile, threads=threads)
