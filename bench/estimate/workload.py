"""A Vision Transformer as the list of operators that a runtime executes, with the arithmetic and
the numbers that each needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

OperatorKind = Literal["projection", "attention", "activation", "norm", "add"]


@dataclass(frozen=True)
class Operator:
    """One node: multiply-adds, numbers that it writes (scores, for attention), and weights that it
    reads.
    """

    name: str
    kind: OperatorKind
    macs: int = 0
    elements: int = 0
    weights: int = 0


@dataclass(frozen=True)
class Workload:
    """One inference of one image."""

    name: str
    operators: tuple[Operator, ...]

    @property
    def macs(self) -> int:
        """Multiply-adds of all operators."""
        return sum(operator.macs for operator in self.operators)

    @property
    def weights(self) -> int:
        """Numbers of weights that one inference reads."""
        return sum(operator.weights for operator in self.operators)


def projection(name: str, rows: int, inputs: int, outputs: int) -> Operator:
    """A matrix of weights (inputs x outputs) applied to `rows` tokens."""
    return Operator(
        name, "projection", rows * inputs * outputs, rows * outputs, inputs * outputs + outputs
    )


def attention(name: str, heads: int, asked: int, seen: int, qk: int, v: int) -> Operator:
    """Scores, softmax and weighted values of all heads: `asked` queries against `seen` keys."""
    return Operator(name, "attention", heads * asked * seen * (qk + v), heads * asked * seen)


def pointwise(name: str, kind: Literal["activation", "norm", "add"], elements: int) -> Operator:
    """An operator that touches each number once or twice and has no weights worth mentioning."""
    return Operator(name, kind, 0, elements)


@dataclass(frozen=True)
class PlainVit:
    """The sizes of an ordinary pre-norm ViT with a class token."""

    image: int
    patch: int
    embed: int
    depth: int
    heads: int
    ffn: int
    classes: int = 1000
    channels: int = 3

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.image // self.patch) ** 2 + 1

    def workload(self, name: str, *, last_queries: bool = False) -> Workload:
        """Its operators; with `last_queries` the last block computes the class token's row only, as
        vitrim's graphs do.
        """
        return Workload(name, tuple(self._operators(last_queries)))

    def _operators(self, last_queries: bool) -> Iterator[Operator]:
        n, d, width = self.tokens, self.embed, self.embed // self.heads
        yield projection("stem", n - 1, self.channels * self.patch**2, d)
        for block in range(self.depth):
            asked = 1 if last_queries and block == self.depth - 1 else n
            at = f"blocks.{block}"
            yield pointwise(f"{at}.attn.norm", "norm", n * d)
            yield projection(f"{at}.attn.q", asked, d, d)
            yield projection(f"{at}.attn.k", n, d, d)
            yield projection(f"{at}.attn.v", n, d, d)
            yield attention(f"{at}.attn", self.heads, asked, n, width, width)
            yield projection(f"{at}.attn.out", asked, d, d)
            yield pointwise(f"{at}.attn.add", "add", asked * d)
            yield pointwise(f"{at}.ffn.norm", "norm", asked * d)
            yield projection(f"{at}.ffn.fc1", asked, d, self.ffn)
            yield pointwise(f"{at}.ffn.act", "activation", asked * self.ffn)
            yield projection(f"{at}.ffn.out", asked, self.ffn, d)
            yield pointwise(f"{at}.ffn.add", "add", asked * d)
        yield pointwise("norm", "norm", d if last_queries else n * d)
        yield projection("head", 1, d, self.classes)
