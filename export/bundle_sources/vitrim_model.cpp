// The C interface of vitrim_model.h on ONNX Runtime's C API. The runtime's library is opened by path: its symbols are versioned,
// and a program that links one release does not start with another.
#include "vitrim_model.h"

#include <dlfcn.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "onnxruntime_c_api.h"
#include "resize.h"

namespace {

int fail(const std::string &message, char *error, size_t error_size) {
    if (error != nullptr && error_size > 0) {
        std::strncpy(error, message.c_str(), error_size - 1);
        error[error_size - 1] = '\0';
    }
    return 1;
}

}  // namespace

struct vitrim_model {
    void *library = nullptr;
    const OrtApi *api = nullptr;
    OrtEnv *env = nullptr;
    OrtSessionOptions *options = nullptr;
    OrtSession *session = nullptr;
    OrtMemoryInfo *memory = nullptr;

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

vitrim_model *vitrim_open(const char *model_path, const char *runtime_library, int threads, char *error, size_t error_size) {
    auto *model = new vitrim_model;
    try {
        model->library = dlopen(runtime_library, RTLD_NOW | RTLD_LOCAL);
        if (model->library == nullptr) throw std::runtime_error(std::string("cannot open the runtime: ") + dlerror());
        using GetBase = const OrtApiBase *(*)();
        auto get_base = reinterpret_cast<GetBase>(dlsym(model->library, "OrtGetApiBase"));
        if (get_base == nullptr) throw std::runtime_error(std::string(runtime_library) + " is not ONNX Runtime");
        model->api = get_base()->GetApi(ORT_API_VERSION);
        if (model->api == nullptr) {
            throw std::runtime_error(std::string("ONNX Runtime ") + get_base()->GetVersionString() + " is older than the header this was built with");
        }
        const OrtApi *api = model->api;
        model->check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "vitrim", &model->env));
        model->check(api->CreateSessionOptions(&model->options));
        model->check(api->SetSessionGraphOptimizationLevel(model->options, ORT_ENABLE_ALL));
        model->check(api->SetIntraOpNumThreads(model->options, threads));
        model->check(api->SetInterOpNumThreads(model->options, 1));
        model->check(api->AddSessionConfigEntry(model->options, "session.intra_op.allow_spinning", "0"));
        for (int entry = 0; entry < VITRIM_SESSION_COUNT; ++entry) {
            model->check(api->AddSessionConfigEntry(model->options, VITRIM_SESSION[entry][0], VITRIM_SESSION[entry][1]));
        }
        model->check(api->CreateSession(model->env, model_path, model->options, &model->session));
        model->check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &model->memory));
        return model;
    } catch (const std::exception &caught) {
        fail(caught.what(), error, error_size);
        delete model;
        return nullptr;
    }
}

int vitrim_prepare(const uint8_t *pixels, int width, int height, int channels, float *input, char *error, size_t error_size) {
    try {
        if (width < 1 || height < 1 || (channels != 1 && channels != 3)) throw std::runtime_error("a picture has at least one pixel, and 1 or 3 channels");
        const size_t count = static_cast<size_t>(width) * height * channels;
        vitrim::Picture picture{width, height, channels, std::vector<uint8_t>(pixels, pixels + count)};
        picture = vitrim::with_channels(picture, VITRIM_CHANNELS);
        if (!VITRIM_CENTER_CROP) {
            picture = vitrim::resize(picture, VITRIM_WIDTH, VITRIM_HEIGHT, VITRIM_INTERPOLATION, VITRIM_PILLOW);
        } else {
            // The shorter side becomes floor(size / crop ratio), the other follows rounded down, as timm and torchvision do.
            const int64_t wanted_h = static_cast<int64_t>(std::floor(VITRIM_HEIGHT / VITRIM_CROP_RATIO));
            const int64_t wanted_w = static_cast<int64_t>(std::floor(VITRIM_WIDTH / VITRIM_CROP_RATIO));
            int scaled_w, scaled_h;
            if (wanted_h * width <= wanted_w * height) {
                scaled_w = static_cast<int>(wanted_w);
                scaled_h = std::max<int>(VITRIM_HEIGHT, static_cast<int>(wanted_w * height / width));
            } else {
                scaled_w = std::max<int>(VITRIM_WIDTH, static_cast<int>(wanted_h * width / height));
                scaled_h = static_cast<int>(wanted_h);
            }
            picture = vitrim::resize(picture, scaled_w, scaled_h, VITRIM_INTERPOLATION, VITRIM_PILLOW);
            // nearbyint rounds halves to even, as Python does.
            const int left = static_cast<int>(std::nearbyint((scaled_w - VITRIM_WIDTH) / 2.0));
            const int top = static_cast<int>(std::nearbyint((scaled_h - VITRIM_HEIGHT) / 2.0));
            picture = vitrim::crop(picture, left, top, VITRIM_WIDTH, VITRIM_HEIGHT);
        }
        size_t next = 0;
        for (int c = 0; c < VITRIM_CHANNELS; ++c)
            for (int y = 0; y < VITRIM_HEIGHT; ++y)
                for (int x = 0; x < VITRIM_WIDTH; ++x) input[next++] = static_cast<float>(picture.at(y, x, c)) * VITRIM_SCALE[c] + VITRIM_SHIFT[c];
        return 0;
    } catch (const std::exception &caught) {
        return fail(caught.what(), error, error_size);
    }
}

int vitrim_run(vitrim_model *model, const float *input, float *logits, char *error, size_t error_size) {
    OrtValue *in = nullptr;
    OrtValue *out = nullptr;
    int result = 0;
    try {
        const OrtApi *api = model->api;
        const int64_t in_shape[4] = {1, VITRIM_CHANNELS, VITRIM_HEIGHT, VITRIM_WIDTH};
        const int64_t out_shape[2] = {1, VITRIM_CLASSES};
        const size_t in_bytes = sizeof(float) * VITRIM_CHANNELS * VITRIM_HEIGHT * VITRIM_WIDTH;
        // Both tensors are the caller's own memory; nothing is copied.
        model->check(api->CreateTensorWithDataAsOrtValue(model->memory, const_cast<float *>(input), in_bytes, in_shape, 4, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &in));
        model->check(api->CreateTensorWithDataAsOrtValue(model->memory, logits, sizeof(float) * VITRIM_CLASSES, out_shape, 2, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &out));
        const char *const in_names[1] = {VITRIM_INPUT};
        const char *const out_names[1] = {VITRIM_OUTPUT};
        const OrtValue *const ins[1] = {in};
        model->check(api->Run(model->session, nullptr, in_names, ins, 1, out_names, 1, &out));
    } catch (const std::exception &caught) {
        result = fail(caught.what(), error, error_size);
    }
    if (in != nullptr) model->api->ReleaseValue(in);
    if (out != nullptr) model->api->ReleaseValue(out);
    return result;
}

int vitrim_classify(vitrim_model *model, const uint8_t *pixels, int width, int height, int channels, float *logits, char *error, size_t error_size) {
    std::vector<float> input(static_cast<size_t>(VITRIM_CHANNELS) * VITRIM_HEIGHT * VITRIM_WIDTH);
    const int failed = vitrim_prepare(pixels, width, height, channels, input.data(), error, error_size);
    return failed != 0 ? failed : vitrim_run(model, input.data(), logits, error, error_size);
}

void vitrim_close(vitrim_model *model) { delete model; }
