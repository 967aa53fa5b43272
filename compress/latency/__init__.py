"""Budgets of a device: tokens, widths and depth chosen together for measured milliseconds.

`programme` solves the abstract problem, `problem` builds it from a network, `amounts` has what its
options take by a cost table, `chain` joins them, with the stem if patches may leave there,
`losses` collects what each choice loses, `search` runs over the widths of the stream, `solve` is
the public face, and `cut` carries a solution out on unlabeled images.
"""
