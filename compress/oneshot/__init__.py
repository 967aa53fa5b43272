"""Pruning without training: from a few hundred unlabeled images, in closed form.

`stream` runs a network one step at a time over all calibration images. `sensitivity` weighs an
error of the residual stream by its effect on the features. `rotation` changes the basis inside
each head without changing the function, `stream_rotation` that of the residual stream.
`error_curves` predicts the error of every width, `absorption` that of removed sub-layers, and
`prediction` gathers both in one pass, whose parts `saved_state` keeps. `budgets` defines costs,
`allocation` and `choice` the widths for a budget. `compensation` refits the remaining output
projections by least squares, and `report` compares the result with the prediction. `trim` runs all
of it. `probe` measures features by labels.
"""
