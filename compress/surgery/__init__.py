"""Surgery: models without the units that a mask removes, equal to the masked model.

- `compactor`: `compact`, which slices every tensor as `plan` and `plan_attention` decide.
- `folding`: constants of removed sub-layers become biases.
- `rounding`: kept counts become multiples that a target computes fast, within a budget.
- `dead_weight`, `dead_attention`, `dead_ffn`, `dead_predictor`, `dead_channels`, `kept_indices`:
  units that can be removed from an already pruned model without changing its output.
- `stream_form`: index lists or zero-filled matrices at the residual stream, whichever is cheaper.
- `image_size`: `resized`, the same network for another image size.
- `explain`: what a cut does to every tensor.
"""
