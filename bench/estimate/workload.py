"""A Vision Transformer as the list of operators that a runtime executes, with their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

OperatorKind = Literal["projection", "attention", "activation", "norm", "add"]


@dataclass(frozen=True)
class Operator:
    """One node of the graph.

    Attributes:
        name: Name of the node.
        kind: The kind of operator, which has a cost of its own.
        macs: Multiply-adds.
        elements: Numbers that it writes; for attention the scores.
        weights: Weights that it reads.
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
        """Weights that one inference reads."""
        return sum(operator.weights for operator in self.operators)


def projection(name: str, rows: int, inputs: int, outputs: int) -> Operator:
    """Return a matrix of weights (inputs x outputs) applied to `rows` tokens.

    Args:
        name: Name of the node.
        rows: Number of tokens.
        inputs: Width of a token.
        outputs: Width of the result.
    """
    return Operator(
        name, "projection", rows * inputs * outputs, rows * outputs, inputs * outputs + outputs
    )


def attention(name: str, heads: int, queries: int, keys: int, qk: int, v: int) -> Operator:
    """Return the scores, softmax and weighted values of all heads as one operator.

    Args:
        name: Name of the node.
        heads: Number of heads.
        queries: Tokens with a query.
        keys: Tokens with a key and a value.
        qk: Width of a query and a key.
        v: Width of a value.
    """
    return Operator(name, "attention", heads * queries * keys * (qk + v), heads * queries * keys)


def pointwise(name: str, kind: Literal["activation", "norm", "add"], elements: int) -> Operator:
    """Return an operator that reads each number once or twice and has hardly any weights."""
    return Operator(name, kind, 0, elements)


@dataclass(frozen=True)
class PlainVit:
    """The sizes of a plain pre-norm ViT with a class token."""

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
        """Number of patches and the class token."""
        return (self.image // self.patch) ** 2 + 1

    def workload(self, name: str, *, last_queries: bool = False) -> Workload:
        """Return its operators.

        With `last_queries` the last block computes only the class token's row, as vitrim's graphs
        do.
        """
        return Workload(name, tuple(self._operators(last_queries)))

    def _operators(self, last_queries: bool) -> Iterator[Operator]:
        n, d, width = self.tokens, self.embed, self.embed // self.heads
        yield projection("stem", n - 1, self.channels * self.patch**2, d)
        for block in range(self.depth):
            rows = 1 if last_queries and block == self.depth - 1 else n
            at = f"blocks.{block}"
            yield pointwise(f"{at}.attn.norm", "norm", n * d)
            yield projection(f"{at}.attn.q", rows, d, d)
            yield projection(f"{at}.attn.k", n, d, d)
            yield projection(f"{at}.attn.v", n, d, d)
            yield attention(f"{at}.attn", self.heads, rows, n, width, width)
            yield projection(f"{at}.attn.out", rows, d, d)
            yield pointwise(f"{at}.attn.add", "add", rows * d)
            yield pointwise(f"{at}.ffn.norm", "norm", rows * d)
            yield projection(f"{at}.ffn.fc1", rows, d, self.ffn)
            yield pointwise(f"{at}.ffn.act", "activation", rows * self.ffn)
            yield projection(f"{at}.ffn.out", rows, self.ffn, d)
            yield pointwise(f"{at}.ffn.add", "add", rows * d)
        yield pointwise("norm", "norm", d if last_queries else n * d)
        yield projection("head", 1, d, self.classes)
