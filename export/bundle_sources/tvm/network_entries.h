// The entry points of a compiled network. Included once, at the end of the generated `network.cpp`,
// which defines the tables used here. One inference at a time.
#pragma once

#include "compiled_network.h"
#include "cpu_features.h"

namespace vitrim {

inline bool ready = false, chosen = false;
// Numbers of patches: what every image keeps (0: what its scores choose), and what the last kept.
inline int forced = 0, kept = 0;

// Why this processor cannot run the kernels, or null.
inline const char *refusal() {
    static char text[256];
    // Not a static of a computed value: its guard needs the C++ library, which a network does
    // without.
    static bool known = false, refused = false;
    if (!known) refused = refuses_processor(kTarget, kNeeds, "", text, sizeof text);
    known = true;
    return refused ? text : nullptr;
}

inline void *address(const Planned &planned, void *images, void *logits) {
    switch (planned.place) {
    case Place::images: return images;
    case Place::logits:
        return logits == nullptr ? nullptr : static_cast<char *>(logits) + planned.offset;
    case Place::arena: return arena + planned.offset;
    default: return const_cast<unsigned char *>(constants()) + planned.offset;
    }
}

inline void prepare() {
    if (ready) return;
    // Without a call of vitrim_network_threads (TVM's RPC server makes none), TVM's own environment
    // variable decides.
    if (const char *threads = getenv("TVM_NUM_THREADS"); threads != nullptr && !chosen)
        set_threads(atoi(threads));
    if (&__TVMBackendAllocWorkspace != nullptr)
        __TVMBackendAllocWorkspace = reinterpret_cast<void *>(workspace);
    if (&__TVMBackendFreeWorkspace != nullptr)
        __TVMBackendFreeWorkspace = reinterpret_cast<void *>(free_workspace);
    if (&__TVMBackendParallelLaunch != nullptr)
        __TVMBackendParallelLaunch = reinterpret_cast<void *>(launch);
    if (&__TVMBackendParallelBarrier != nullptr)
        __TVMBackendParallelBarrier = reinterpret_cast<void *>(barrier_wait);
    if (&__TVMFFIErrorSetRaisedFromCStr != nullptr)
        __TVMFFIErrorSetRaisedFromCStr = reinterpret_cast<void *>(TVMFFIErrorSetRaisedFromCStr);
    for (int i = 0; i < kOperands; ++i) {
        operands[i].kind = kTensorPointer;
        operands[i].padding = 0;
        operands[i].pointer = &tensors[numbers[i]];
    }
    for (int i = 0; i < kTensors; ++i) tensors[i].data = address(plan[i], nullptr, nullptr);
    ready = true;
}

// Called after each step with its number, its output and that output's size; later steps overwrite
// the output.
using Watcher = void (*)(int32_t number, const void *written, int64_t bytes);

inline void report_step(Watcher watcher, int number) {
    const Tensor &written = tensors[numbers[steps[number].first + steps[number].count - 1]];
    int64_t bytes = written.type_bits / 8;
    for (int i = 0; i < written.dimensions; ++i) bytes *= written.shape[i];
    watcher(number, written.data, bytes);
}

inline int run_steps(int first, int last, double *seconds, Watcher watcher) {
    int failed = 0;
    for (int i = first; i < last && failed == 0; ++i) {
        const double before = seconds != nullptr ? now_s() : 0.0;
        Value result = {0, 0, {0}};
        failed = steps[i].kernel(nullptr, operands + steps[i].first, steps[i].count, &result);
        if (seconds != nullptr) seconds[i] += now_s() - before;
        if (watcher != nullptr && failed == 0) report_step(watcher, i);
    }
    return failed;
}

// The place of the image's bucket, after the steps that all images have in common.
inline int bucket_place() {
    for (int i = 0; i < kBuckets; ++i) {
        if (bucket_patches[i] == forced) return i;
    }
    int32_t place = 0;
    memcpy(&place, arena + kBucketPlace, sizeof place);
    return place;
}

// seconds: the time of each step is added to its entry; watcher: called after each step. Both may
// be null.
inline int run(const float *images, float *logits, double *seconds, Watcher watcher = nullptr) {
    if (const char *reason = refusal()) {
        snprintf(failure, sizeof failure, "%s", reason);
        return -1;
    }
    prepare();
    // Kernels read whole vectors, from aligned addresses.
    void *from = const_cast<float *>(images);
    if (reinterpret_cast<uintptr_t>(images) % 64 != 0)
        from = memcpy(aligned_images, images, sizeof aligned_images);
    for (int i = 0; i < kTensors; ++i) {
        if (plan[i].place == Place::images) tensors[i].data = from;
        if (plan[i].place == Place::logits)
            tensors[i].data = address(plan[i], nullptr, aligned_logits);
    }
    failure[0] = '\0';
    begin_inference();
    int failed = run_steps(0, bucket_ends[0], seconds, watcher);
    if (kBuckets > 0 && failed == 0) {
        const int place = bucket_place();
        kept = bucket_patches[place];
        failed = run_steps(bucket_ends[place], bucket_ends[place + 1], seconds, watcher);
    }
    end_inference();
    if (failed == 0) memcpy(logits, aligned_logits, sizeof aligned_logits);
    return failed;
}

inline void *data_of(const Value &value) {
    if (value.kind == kInteger || value.kind == kPointer) return value.pointer;
    const auto *tensor = static_cast<const Tensor *>(value.pointer);
    if (value.kind == kTensorObject)
        tensor = reinterpret_cast<const Tensor *>(static_cast<const char *>(value.pointer) +
                                                  kObjectHeaderBytes);
    else if (value.kind != kTensorPointer)
        return nullptr;
    return tensor->device_kind == kCpu ? static_cast<char *>(tensor->data) + tensor->byte_offset
                                       : nullptr;
}

}  // namespace vitrim

#define VITRIM_ENTRY extern "C" __attribute__((visibility("default")))

// Images (batch, channels, height, width) -> logits (batch, classes), both float32; or all outputs
// one after the other, each from vitrim_network_output_start() on. Returns 0 on success; otherwise
// vitrim_network_failure() returns the reason.
VITRIM_ENTRY int vitrim_network_run(const float *images, float *logits) {
    return vitrim::run(images, logits, nullptr);
}
// The same; adds the seconds of each step to `seconds`, of length vitrim_network_steps().
VITRIM_ENTRY int vitrim_network_profile(const float *images, float *logits, double *seconds) {
    return vitrim::run(images, logits, seconds);
}
// The same; `watcher` is called with the output of each step.
VITRIM_ENTRY int vitrim_network_watch(const float *images, float *logits, vitrim::Watcher watcher) {
    return vitrim::run(images, logits, nullptr, watcher);
}
// Sets the threads of later inferences, at most as many as could be started; returns their number.
VITRIM_ENTRY int vitrim_network_threads(int threads) {
    vitrim::chosen = true;
    return vitrim::set_threads(threads);
}
VITRIM_ENTRY int vitrim_network_steps() { return vitrim::kSteps; }
VITRIM_ENTRY const char *vitrim_network_step(int number) { return vitrim::steps[number].name; }
VITRIM_ENTRY const char *vitrim_network_failure() { return vitrim::failure; }
// Why this processor cannot run the network, or null; it is refused by every run as well.
VITRIM_ENTRY const char *vitrim_network_refusal() { return vitrim::refusal(); }
// Number of values (not bytes) of all images of a batch, and of all its logits or other outputs.
VITRIM_ENTRY int64_t vitrim_network_image_numbers() {
    return sizeof vitrim::aligned_images / sizeof(float);
}
VITRIM_ENTRY int64_t vitrim_network_logit_numbers() {
    return sizeof vitrim::aligned_logits / sizeof(float);
}
// The outputs: their number, and the name, the first value and the number of values of each.
VITRIM_ENTRY int vitrim_network_outputs() { return vitrim::kOutputs; }
VITRIM_ENTRY const char *vitrim_network_output_name(int number) {
    return vitrim::outputs[number].name;
}
VITRIM_ENTRY int64_t vitrim_network_output_start(int number) {
    return vitrim::outputs[number].start;
}
VITRIM_ENTRY int64_t vitrim_network_output_numbers(int number) {
    return vitrim::outputs[number].numbers;
}
// How many patches each later image keeps: one of vitrim_network_bucket(), or 0 for what its scores
// choose. Returns 0 on success.
VITRIM_ENTRY int vitrim_network_force(int patches) {
    bool known = patches == 0;
    for (int i = 0; i < vitrim::kBuckets; ++i) known |= vitrim::bucket_patches[i] == patches;
    if (known) vitrim::forced = patches;
    return known ? 0 : -1;
}
// How many patches the last image kept; 0 before the first one and without buckets.
VITRIM_ENTRY int vitrim_network_kept() { return vitrim::kept; }
// The numbers of patches, increasing, and 0 behind them.
VITRIM_ENTRY int vitrim_network_bucket(int number) {
    return number >= 0 && number < vitrim::kBuckets ? vitrim::bucket_patches[number] : 0;
}
VITRIM_ENTRY int64_t vitrim_network_arena_bytes() { return sizeof vitrim::arena; }
// Whether vitrim_network_refusal() has a reason, as an integer in TVM's calling convention.
VITRIM_ENTRY int __tvm_ffi_vitrim_refused(void *, const vitrim::Value *, int32_t,
                                          vitrim::Value *result) {
    *result = {vitrim::kInteger, 0, {vitrim::refusal() != nullptr}};
    return 0;
}
// The run in TVM's calling convention, for its loaders and its RPC server: (images, logits) as
// tensors.
VITRIM_ENTRY int __tvm_ffi_vitrim_run(void *, const vitrim::Value *arguments, int32_t count,
                                      vitrim::Value *result) {
    void *images = count == 2 ? vitrim::data_of(arguments[0]) : nullptr,
         *logits = count == 2 ? vitrim::data_of(arguments[1]) : nullptr;
    *result = {0, 0, {0}};
    if (images == nullptr || logits == nullptr) return -1;
    return vitrim::run(static_cast<const float *>(images), static_cast<float *>(logits), nullptr);
}
