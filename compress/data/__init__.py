"""Image data sets: loading by name or path, decoding, preprocessing and division into splits.

- `loading`: `open_dataset` and `open_sample`, for names (`named_datasets`) and paths.
- `image_folder`, `hf_datasets`, `tar_shards`, `idx`, `fashion_mnist`: the sources, whose images
  `decoding` decodes, all at once or one by one. `file_list` and `sealed_index` keep the lists of
  large sources.
- `streaming`: sources that are read while a model trains; `streams` orders their images, and
  `packed_images` has the copies of those that are read more often.
- `batch_loader`: the batches of an epoch, in worker processes, for one or several ranks.
- `preprocessing`: from an image to the input of a model, without torch.
- `splits`: the opened data set, and the rule that divides it.
- `embedded`: the data set and the baseline that the package contains; `build_quickstart` makes the
  former.
"""
