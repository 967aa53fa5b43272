"""Structured masks: which units of a Vision Transformer stay, and how that is chosen.

- `mask`: `StructuredMask`, the value, its constructors and its file; `mask_checks` validates it.
- `groups`: the dimensions of a network, the sites where each occurs, and the tied units.
- `saliency`: one-shot scores; computed in `magnitude` (weights) and `gate_saliency` (gradients),
  turned into a mask by `ranking`.
- `weight_mask`: `WeightMask`, which single weights stay; `weight_choice` chooses them.
- `gates`, `budget`: trainable masks, and the solver that holds them at a budget.
- `masked`, `masked_network`, `masked_parameters`: the full-size network computed with a mask.
"""
