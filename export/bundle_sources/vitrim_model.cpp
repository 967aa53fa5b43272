// The C interface of vitrim_model.h on ONNX Runtime's C API. The runtime's library is opened by
// path: its symbols are versioned, and a program that links one release does not start with
// another.
#include "vitrim_model.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "failure.h"
#include "onnxruntime_c_api.h"

struct vitrim_model {
    void *library = nullptr;
    const OrtApi *api = nullptr;
    OrtEnv *env = nullptr;
    OrtSessionOptions *options = nullptr;
    OrtSession *session = nullptr;
    OrtMemoryInfo *memory = nullptr;
    int64_t forced = 0;
    int kept = 0;

    void check(OrtStatus *status) const {
        if (status == nullptr) return;
        const std::string message = api->GetErrorMessage(status);
        api->ReleaseStatus(status);
        throw std::runtime_error(message);
    }

    ~vitrim_model() {
        if (api != nullptr) {
            if (memory != nullptr) api->ReleaseMemoryInfo(memory);
            if (session != nullptr) api->ReleaseSession(session);
            if (options != nullptr) api->ReleaseSessionOptions(options);
            if (env != nullptr) api->ReleaseEnv(env);
        }
        // The library stays open: the runtime's threads may outlive their session by a moment.
    }
};

vitrim_model *vitrim_open(const char *model_path, const char *runtime_library, int threads,
                          char *error, size_t error_size) {
    if (vitrim_refused(error, error_size) != 0) return nullptr;
    auto *model = new vitrim_model;
    try {
        model->library = dlopen(runtime_library, RTLD_NOW | RTLD_LOCAL);
        if (model->library == nullptr)
            throw std::runtime_error(std::string("cannot open the runtime: ") + dlerror());
        using GetBase = const OrtApiBase *(*)();
        auto get_base = reinterpret_cast<GetBase>(dlsym(model->library, "OrtGetApiBase"));
        if (get_base == nullptr)
            throw std::runtime_error(std::string(runtime_library) + " is not ONNX Runtime");
        model->api = get_base()->GetApi(ORT_API_VERSION);
        if (model->api == nullptr) {
            throw std::runtime_error(std::string("ONNX Runtime ") + get_base()->GetVersionString() +
                                     " is older than the header this was built with");
        }
        const OrtApi *api = model->api;
        model->check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "vitrim", &model->env));
        model->check(api->CreateSessionOptions(&model->options));
        model->check(api->SetSessionGraphOptimizationLevel(model->options, ORT_ENABLE_ALL));
        model->check(api->SetIntraOpNumThreads(model->options, threads));
        model->check(api->SetInterOpNumThreads(model->options, 1));
        model->check(
            api->AddSessionConfigEntry(model->options, "session.intra_op.allow_spinning", "0"));
        for (int entry = 0; entry < VITRIM_SESSION_COUNT; ++entry) {
            model->check(api->AddSessionConfigEntry(model->options, VITRIM_SESSION[entry][0],
                                                    VITRIM_SESSION[entry][1]));
        }
        model->check(api->CreateSession(model->env, model_path, model->options, &model->session));
        model->check(
            api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &model->memory));
        return model;
    } catch (const std::exception &caught) {
        vitrim::fail(caught.what(), error, error_size);
        delete model;
        return nullptr;
    }
}

int vitrim_run(vitrim_model *model, const float *input, float *outputs, char *error,
               size_t error_size) {
    constexpr bool kBuckets = VITRIM_BUCKET_COUNT > 0;
    constexpr size_t kInputs = kBuckets ? 2 : 1, kOutputs = VITRIM_OUTPUT_COUNT + kBuckets;
    OrtValue *ins[kInputs] = {};
    OrtValue *outs[kOutputs] = {};
    int result = 0;
    try {
        const OrtApi *api = model->api;
        const int64_t first[4] = {1, VITRIM_CHANNELS, VITRIM_HEIGHT, VITRIM_WIDTH};
        const int64_t last[4] = {1, VITRIM_HEIGHT, VITRIM_WIDTH, VITRIM_CHANNELS};
        const int64_t *in_shape = VITRIM_CHANNELS_LAST ? last : first;
        const size_t in_bytes = sizeof(float) * VITRIM_CHANNELS * VITRIM_HEIGHT * VITRIM_WIDTH;
        // All tensors are the caller's own memory; nothing is copied.
        model->check(api->CreateTensorWithDataAsOrtValue(
            model->memory, const_cast<float *>(input), in_bytes, in_shape, 4,
            ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &ins[0]));
        const char *in_names[kInputs] = {VITRIM_INPUT};
        const char *out_names[kOutputs];
        if (kBuckets) {
            // An optional number, and an output that the runtime allocates.
            in_names[kInputs - 1] = "bucket";
            out_names[kOutputs - 1] = "kept";
            model->check(api->CreateTensorWithDataAsOrtValue(
                model->memory, &model->forced, sizeof(int64_t), in_shape, 0,
                ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &ins[kInputs - 1]));
        }
        for (int number = 0; number < VITRIM_OUTPUT_COUNT; ++number) {
            const vitrim_output &output = VITRIM_OUTPUTS[number];
            const int64_t shape[3] = {1, output.sizes[0], output.sizes[1]};
            const size_t numbers = static_cast<size_t>(output.sizes[0]) *
                                   (output.dimensions > 1 ? output.sizes[1] : 1);
            model->check(api->CreateTensorWithDataAsOrtValue(
                model->memory, outputs + output.start, sizeof(float) * numbers, shape,
                1 + output.dimensions, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &outs[number]));
            out_names[number] = output.name;
        }
        model->check(
            api->Run(model->session, nullptr, in_names, ins, kInputs, out_names, kOutputs, outs));
        if (kBuckets) {
            void *kept = nullptr;
            model->check(api->GetTensorMutableData(outs[kOutputs - 1], &kept));
            model->kept = static_cast<int>(*static_cast<const int64_t *>(kept));
        }
    } catch (const std::exception &caught) {
        result = vitrim::fail(caught.what(), error, error_size);
    }
    for (OrtValue *in : ins) {
        if (in != nullptr) model->api->ReleaseValue(in);
    }
    for (OrtValue *out : outs) {
        if (out != nullptr) model->api->ReleaseValue(out);
    }
    return result;
}

int vitrim_force_bucket(vitrim_model *model, int patches, char *error, size_t error_size) {
    if (!vitrim::is_bucket(patches, VITRIM_BUCKETS, VITRIM_BUCKET_COUNT))
        return vitrim::refuse_bucket(patches, VITRIM_BUCKET_COUNT, error, error_size);
    model->forced = patches;
    return 0;
}

int vitrim_kept_patches(const vitrim_model *model) { return model->kept; }

void vitrim_close(vitrim_model *model) { delete model; }
