"""Static token masks: which patches stay how deep, chosen from some hundred unlabeled images.

`counts` defines schedules and their cost, and `allocation` chooses counts for a budget. `streaming`
runs a network with the tokens kept so far and computes its attention maps. `attention_scores` and
`knockoff` score tokens from the first block up, `impact` from the last block down (eq. 6 of Patch
Slimming). `choose` is the one interface of all of them, so that methods can be compared at equal
counts. `patch_slimming` is Algorithm 1 of that source, which also determines the counts and
refits blocks. `block_studies` has measurements of single blocks.
"""
