"""Methods that shorten the stream of a network in other ways than a mask, to compare with.

`matching` decides per image which tokens merge or leave, and merges by a product with an explicit
matrix. `merged` runs a network with it (ToMe, PPT). `hierarchical` pools neighbors between blocks
(HVT), which needs training.
"""
