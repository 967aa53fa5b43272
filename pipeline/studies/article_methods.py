"""The Method section of a study's article: what its runs used, in words and equations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...bench.report import wording
from ..masks_section import SELECTING
from ..recipe import Recipe
from .expansion import Cell, cell
from .summary import Summary
from .table import Row

# Methods whose masks are binary before the cut, so that both networks can be compared.
_MASKED = ("learned", "vtp", "l1", "l2", "random")
_LIMITS = {
    "params": "parameters",
    "macs": "multiply-adds",
    "file_mb": "bytes of the file",
    "latency_ms": "estimated latency",
    "latency": "estimated latency",
}
_PENALTY = r"""Weights and mask scores $S$ are trained together~\cite{sanh2020,lagunas2021} to
minimise
\begin{equation}
  \min_{W, S}\; \mathcal{L}(W; M(S)) + \lambda\, c(M(S)), \qquad M(S) = \mathbf{1}[S \ge \tau],
  \label{eq:objective}
\end{equation}
where $c$ counts parameters; gradients pass the threshold by the straight-through
estimator~\cite{bengio2013}."""
_BUDGET = r"""
\begin{equation}
  \min_{W, M}\; \mathcal{L}(W; M) \quad \text{subject to} \quad c(M) \le B ,
  \label{eq:%s}
\end{equation}
where $c$ is what the budget limits (%s)."""
_CHOOSERS = {
    "patch-slimming": r"by their impact on the output (Patch Slimming~\cite{tang2022patch})",
    "class-attention": r"by the attention of the class token~\cite{liang2022}",
    "column-attention": "by the attention of all tokens times the norm of the value",
    "power-bert": r"by their ranks in the attention of other tokens (PoWER-BERT~\cite{goyal2020})",
    "scop": r"by gates between them and patches of another image (after SCOP~\cite{tang2020scop})",
    "radial": r"by the distance from the centre~\cite{haurum2023}",
    "random": "at random",
}
_SELECTORS = {
    "dynamicvit": r"by trained predictors (DynamicViT~\cite{rao2021})",
    "evit": r"by the attention of the class token, the others fused into one "
    r"(EViT~\cite{liang2022})",
    "dps": r"by predictors that learn the order of the impact on the output "
    r"(DPS~\cite{tang2022patch})",
    "class-attention": r"by the attention of the class token~\cite{liang2022}",
}


@dataclass(frozen=True)
class _Settings:
    """The values of recipe keys that a row has, varied or not."""

    row: Row
    base: dict[str, dict[str, Cell]]

    def __getitem__(self, key: str) -> Cell:
        if key in self.row:
            return self.row[key]
        table, _, name = key.partition(".")
        return cell(self.base.get(table, {}).get(name))

    @property
    def widths(self) -> str | None:
        """The method that removes units or sets weights to zero; None where all stay."""
        whole = 1.0 in (self["masks.params"], self["masks.macs"])
        return None if whole else str(self["masks.method"] or "learned")

    @property
    def penalised(self) -> bool:
        """Whether masks are learned under a penalty in place of a budget."""
        return self.widths == "learned" and self["masks.lambda"] is not None

    @property
    def tokens(self) -> str | None:
        """The method that drops patches."""
        found = self["masks.tokens"]
        return None if found is None else str(found)

    @property
    def selects(self) -> bool:
        """Whether patches are chosen for each image."""
        ratio = self["masks.token_ratio"]
        return self.tokens in SELECTING or (self.tokens == "class-attention" and ratio is not None)


def _settings(summary: Summary, base: Recipe | None) -> list[_Settings]:
    tables = {} if base is None else base.identity()
    return [_Settings(row, tables) for row in summary.rows]


def method_text(summary: Summary, base: Recipe | None) -> str:
    """The Method section, with the keys of `BIBTEX`.

    Args:
        summary: The study.
        base: The recipe of its first run.

    Returns:
        LaTeX: only of methods that occur in the recipes of the rows.
    """
    rows = _settings(summary, base)
    parts = (*_structured(rows), *_zeros(rows), *_patches(rows), *_trainings(summary, rows))
    return "\n".join(parts)


def objective_text(summary: Summary, base: Recipe | None) -> str:
    """The equations of learned masks alone, which main.tex of earlier versions takes."""
    rows = _settings(summary, base)
    return "\n".join((*_objective(rows), *_distilled(rows)))


def _structured(rows: Sequence[_Settings]) -> Iterator[str]:
    """Units that are removed, and how they are chosen."""
    methods = _in_order(row.widths for row in rows)
    removed = [method for method in methods if method != "magnitude"]
    if not removed:
        return
    yield (
        "Let $f_W$ be a network with weights $W$. Its units are embedding channels, heads, head "
        "widths and FFN units."
    )
    if set(removed) & set(_MASKED):
        yield (
            "Binary masks $M$ choose among them; the masked network and the one from which the "
            "masked units are removed give equal outputs."
        )
    yield "Sizes and times are those of the network without the removed units."
    yield from _objective(rows)
    if "vtp" in removed:
        yield (
            r"VTP~\cite{zhu2021vtp} trains a coefficient in $[0, 1]$ for each unit with a penalty "
            "on their sum, and keeps those above the threshold at which the budget is met."
        )
    if "closed-form" in removed:
        yield (
            "In closed form, widths are chosen and output projections refitted from unlabeled "
            r"images, without training~\cite{kwon2022}."
        )
    norms = [f"$\\ell_{name[1]}$" for name in removed if name in ("l1", "l2")]
    ranked = [rf"by the {' or '.join(norms)} norm of their weights~\cite{{li2017filters}}"]
    ranked = (ranked if norms else []) + ["at random"] * ("random" in removed)
    if ranked:
        yield f"Without training, units are ranked in each layer {' or '.join(ranked)}."


def _objective(rows: Sequence[_Settings]) -> Iterator[str]:
    """The objectives of learned masks."""
    penalised = any(row.penalised for row in rows)
    learned = [row for row in rows if row.widths == "learned" and not row.penalised]
    if penalised:
        yield _PENALTY
    if learned:
        limits = _in_order(
            text for row in learned for key, text in _LIMITS.items() if row[f"masks.{key}"]
        )
        label = "budget" if penalised else "objective"
        yield (
            "Learned masks meet a budget $B$,"
            + _BUDGET % (label, wording.listed(limits or ["a size"]))
            + " A unit is kept if the mean squared gradient of its gate~\\cite{molchanov2019} is "
            "worth its cost, at the one price at which the budget is met."
        )


def _zeros(rows: Sequence[_Settings]) -> Iterator[str]:
    """Weights that become zero."""
    found = [row for row in rows if row.widths == "magnitude"]
    if not found:
        return
    kinds = _in_order(str(row["masks.weight_granularity"] or "weight") for row in found)
    chosen = [r"single weights of the smallest magnitude~\cite{han2015}"] * ("weight" in kinds)
    lines = [f"{kind}s" for kind in kinds if kind != "weight"]
    if lines:
        chosen.append(
            f"whole {' or '.join(lines)} of matrices of the smallest mean "
            r"square~\cite{li2017filters}"
        )
    yield (
        f"By magnitude, {', or '.join(chosen)}, become zero and stay zero. Nothing is removed: "
        "parameters, multiply-adds and times are those of the dense network with zeros in it, "
        "except where a figure is named exact, of the network without what the zeros make dead."
    )
    rankings = {row["masks.weight_ranking"] for row in found} & {"random", "shuffled"}
    if rankings:
        moved = {"random": "", "shuffled": ", shuffled among matrices of equal size"}
        moved |= {"both": ", also shuffled among matrices of equal size"}
        kind = "both" if len(rankings) > 1 else str(*rankings)
        yield (
            "As controls, weights are drawn at random with the shares of the global threshold in "
            rf"each matrix{moved[kind]}~\cite{{frankle2021}}."
        )


def _patches(rows: Sequence[_Settings]) -> Iterator[str]:
    """Patches that leave the network, and how they are chosen."""
    static = _in_order(row.tokens for row in rows if not row.selects)
    dynamic = _in_order(row.tokens for row in rows if row.selects)
    if static:
        yield (
            "Patches leave the network on the way, the same for all images: what has left is "
            "neither query nor key from there on, and sizes and times are those without it."
        )
    choosers = [_CHOOSERS[name] for name in static if name in _CHOOSERS]
    if choosers:
        yield f"They are chosen {_alternatives(choosers)}."
    if "learned" in static:
        yield "The depths at which they leave are learned with the widths, under the same budget."
    if dynamic:
        yield ("Patches are also chosen" if static else "Patches are chosen") + (
            " for each image: between two blocks a constant number of them stays and the others "
            f"are dropped, {_alternatives([_SELECTORS[name] for name in dynamic])}."
        )


def _trainings(summary: Summary, rows: Sequence[_Settings]) -> Iterator[str]:
    """What trainings have in common."""
    rounds = any((row["masks.weight_rewind"] or 1.0) != 1.0 for row in rows)
    if rounds or any(row["finetune.rewind"] is not None for row in rows):
        yield r"Trainings behind a mask rewind the learning rate~\cite{renda2020}."
    yield from _distilled(rows)
    if summary.stopped:
        yield (
            "Runs that others of their size surpass stop during the fine-tuning "
            r"(ASHA~\cite{li2020asha})."
        )


def _distilled(rows: Sequence[_Settings]) -> Iterator[str]:
    taught = [row for row in rows if row["distill.enabled"] == "true"]
    if not taught:
        return
    text = r"The dense network teaches the pruned one~\cite{hinton2015}"
    # DynamicViT has a loss of its own, without this share.
    shared = any(row.tokens != "dynamicvit" for row in taught)
    share = r": a share $\alpha$ of the loss is the divergence of both outputs" if shared else ""
    yield f"{text}{share}."


def _alternatives(texts: Sequence[str]) -> str:
    """Texts in a list with `or`."""
    *first, last = dict.fromkeys(texts)
    return f"{', '.join(first)}, or {last}" if len(first) > 1 else " or ".join([*first, last])


def _in_order(values: Iterator[str | None]) -> list[str]:
    """The different values that are there, in their order."""
    return list(dict.fromkeys(value for value in values if value is not None))
