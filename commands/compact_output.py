"""What `vitrim compact` prints and saves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.console import show, unit_count
from ..core.storage import replace_file, replace_folder
from .compact_options import Output

if TYPE_CHECKING:
    from rich.table import Table

    from ..compress.masks.mask import StructuredMask
    from ..compress.network.architecture import Architecture
    from ..compress.network.modules.model import CompactModel


def save_compact(
    small: CompactModel,
    mask: StructuredMask,
    output: Output,
    record: str | None = None,
    tokens: str | None = None,
) -> None:
    """Save a model in `--out`, if that is given.

    Args:
        small: The model.
        mask: What it keeps.
        output: The folder, and whether it may be replaced.
        record: The contents of trim.json, of a cut without training.
        tokens: The contents of tokens.json, of a choice of tokens.
    """
    from ..compress.network.files import MASK_FILE, MODEL, TOKENS_FILE, TRIM_FILE, save

    if output.out is None:
        return
    with replace_folder(output.out, MODEL, overwrite=output.overwrite) as temporary:
        save(small, temporary)
        mask.save(temporary / MASK_FILE)
        for name, text in ((TRIM_FILE, record), (TOKENS_FILE, tokens)):
            if text is not None:
                replace_file(temporary / name, text)
    show(f"saved: {output.out}")


def show_sizes(source: Architecture, small: Architecture) -> None:
    """Show parameters and multiply-adds before and after.

    Where tokens leave, both are counted as they are exported, with a last block that computes only
    what the head reads: what a choice of tokens saves there is no merit of it.
    """
    from ..compress.network.count import count_macs, count_params
    from ..compress.oneshot.choice import priced

    if small.selects or small.drops_tokens:
        source, small = priced(source), priced(small)

    for name, count in (("parameters", count_params), ("MACs", count_macs)):
        old, new = count(source), count(small)
        show(f"{name}: {unit_count(old)} -> {unit_count(new)} ({100 * new / old:.1f} %)")


def kept_table(source: CompactModel, small: CompactModel) -> Table:
    """The units that each sub-layer keeps, and its multiply-adds."""
    from rich.table import Table

    from ..pipeline.kept_units import kept_branches

    table = Table(show_edge=False, pad_edge=False)
    for column in ("module", "kind", "kept of total", "MACs"):
        table.add_column(column, justify="right" if column == "MACs" else "left", no_wrap=True)
    before, after = _branch_macs(source), _branch_macs(small)
    for entry in kept_branches(source.architecture, small.architecture):
        name = entry["branch"]
        dims = [f"{dimension} {kept}/{total}" for dimension, (kept, total) in entry["dims"].items()]
        macs = f"{unit_count(before[name])} -> {unit_count(after.get(name, 0))}"
        table.add_row(name, entry["kind"], "  ".join(dims), macs)
    return table


def _branch_macs(model: CompactModel) -> dict[str, int]:
    from ..compress.network.count import branch_macs, branch_tokens

    embed = model.architecture.embed
    return {
        branch.name: branch_macs(branch, embed, tokens, queries)
        for branch, tokens, queries in branch_tokens(model.architecture)
    }
