"""Vision Transformers as TVM programs of our own kernels, and their machine code.

The path of a network, from `build.build_network` on:

1. `coverage`: which networks the kernels cover; others use TVM's ONNX front end (`build`).
2. `network` walks the architecture and emits calls of kernels: `sublayers` (attention, FFN),
   `head` (pooling, classifier), through `emitter` (one method a kind of kernel) into `program`
   (a Relax function). Weights are numpy matrices until then: `matrices`, `packing`.
3. Kernels are TIR functions; each module has the parameters of its kernel (a frozen dataclass) and
   the function that emits it:

   - `dense` (linear layers), `attention`, `key_packing` (keys and values for attention),
   - `norm`, `head_norm` (qk_norm), `rope`, `positions` (of chosen tokens), `activations`,
   - `patches` (patch embedding), `row_kernels` (means, sums, slices),
   - `token_scores`, `token_choice` (selections by content, which `selection` emits),
     `bucket_choice` (how many patches an image keeps, for `bucket_network`),
   - `quantization` (rows to int8), `integer_dot` (products of int8).

   They are written in terms of `lanes` (vectors, rows in buffers), `loops` (tiles, threads,
   sweeps over a row) and `product` (the innermost loop).
4. `schedule`: the register tile of each shape. `tuner` measures tiles, `tuning_log` stores them.
5. `precision`: which rows are quantized. `calibration` finds static ranges on images.
6. `execution_plan` turns the lowered program into a static sequence of kernels, `network_source`
   writes it as C++, `objects` and `link` make the shared library. `weights` stores large weights
   of networks that need TVM's virtual machine.
7. `first_difference` locates where a compiled network differs from torch, `choices` reads which
   patches it selects.

The options, and the choice between our kernels and TVM's pipeline, are in
`export.runtimes.tvm_runtime`.
"""
