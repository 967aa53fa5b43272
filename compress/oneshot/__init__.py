"""Pruning without training: from a few hundred unlabeled images, in closed form.

`stream` runs a network one step at a time over all calibration images. `sensitivity` weighs an
error of the residual stream by its effect on the features. `rotation` changes the basis inside
each head without changing the function. `error_curves` predicts the error of every width,
`allocation` chooses the widths for a budget, and `compensation` refits the remaining output
projections by least squares. `trim` runs all of it.
"""
