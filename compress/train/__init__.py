"""Training: the baseline, mask learning and fine-tuning, as tasks of one resumable loop.

- `loop`: `fit`, the training loop; `settings` are its arguments and results.
- `task`: the interface of a phase; `dense` and `mask_task` (with `mask_settings` and
  `graph_shrinking`) implement it.
- `held_zeros`: weights that stay zero; `magnitude_task`: rounds of pruning and training.
- `augment`, `optimizers`, `schedule`, `precision`, `evaluate`: the parts of a training step.
- `training_files`: checkpoints and history; `progress`: the progress line.
"""
