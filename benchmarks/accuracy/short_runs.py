"""Runs of the chain with a few epochs from a trained network, which several benchmarks compare."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vitrim.pipeline.recipe import Recipe, parse_recipe


@dataclass(frozen=True, kw_only=True)
class ShortRuns:
    """What all rows of a benchmark share.

    Attributes:
        data: The data set, as in a recipe.
        model: embedded, or a folder that vitrim saved.
        epochs: Of masks, and of predictors.
        finetune_epochs: Of fine-tuning.
        test_images: The images of top-1; 0: all.
        limit: The training images; 0: all.
        autocast: Type of the matrix products in trainings.
    """

    data: str
    model: str
    epochs: int
    finetune_epochs: int
    test_images: int
    limit: int
    autocast: str = "fp32"

    def head(self) -> dict[str, Any]:
        """The settings, for a result file; those of files without `autocast` had fp32."""
        fields = asdict(self)
        if self.autocast == "fp32":
            del fields["autocast"]
        return fields

    def short_recipe(
        self, benchmark: str, masks: dict[str, Any], seed: int, precision: str = "fp32"
    ) -> Recipe:
        """The recipe of a row.

        Args:
            benchmark: The name of the module.
            masks: Keys of `[masks]`, beside those that all rows have.
            seed: Of the training.
            precision: Of the artifact.
        """
        data: dict[str, Any] = {"name": self.data}
        if self.limit:
            data["limit"] = self.limit
        tables = {
            "name": benchmark.replace("_", "-"),
            "data": data,
            "model": {"checkpoint": self.model},
            "masks": {"epochs": self.epochs, "lr": 2e-3, "augmentation": "none", **masks},
            "finetune": {"epochs": self.finetune_epochs, "lr": 3e-3, "augmentation": "none"},
            "distill": {"alpha": 0.9},
            "train": {
                "batch_size": 64,
                "optimizer": "muon",
                "matmul_precision": "medium",
                "precision": self.autocast,
                "threads": 1,
                "seed": seed,
            },
            "export": {"precisions": [precision]},
            "bench": {"top1_images": self.test_images} if self.test_images else {},
        }
        return parse_recipe(tables, where=f"benchmarks.accuracy.{benchmark}")
