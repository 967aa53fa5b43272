"""Image data sets: loading by name or path, decoding, preprocessing and division into splits.

- `loading`: `open_dataset` and `open_sample`, for names (`named_datasets`) and paths.
- `image_folder`, `hf_datasets`, `idx`, `fashion_mnist`: the sources; `decoding` decodes them.
- `preprocessing`: from an image to the input of a model, without torch.
- `splits`: the opened data set, and the rule that divides it.
- `embedded`: the data set and the baseline that the package contains; `build_quickstart` makes the
  former.
"""
