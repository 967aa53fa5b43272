// One ONNX model in one session of ONNX Runtime, with one fixed input.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "json.h"
#include "ort_api.h"

namespace vitrim {

// IEEE half precision, rounded to nearest even.
inline uint16_t half_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest >= 0x47800000u)
        return static_cast<uint16_t>(sign | (rest > 0x7f800000u ? 0x7e00u : 0x7c00u));
    if (rest < 0x38800000u) {
        // A subnormal half: scaled so that rounding to an integer rounds at the half's last bit.
        float magnitude;
        std::memcpy(&magnitude, &rest, sizeof magnitude);
        return static_cast<uint16_t>(
            sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 24))));
    }
    const uint32_t odd = rest >> 13 & 1u;
    return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + odd) >> 13));
}

inline float half_value(uint16_t bits) {
    const int exponent = bits >> 10 & 0x1f, fraction = bits & 0x3ff;
    const float sign = bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent
                       ? std::ldexp(1.0f + static_cast<float>(fraction) / 1024.0f, exponent - 15)
                       : std::ldexp(static_cast<float>(fraction), -24));
}

class Model {
  public:
    std::string input, type, path;
    std::vector<std::string> outputs;  // the logits first
    std::vector<int64_t> shape;

    // `profile_prefix`: where the runtime writes its trace; no trace by default.
    Model(const Ort &ort, void *env, const Json &job, const char *profile_prefix = nullptr)
        : ort_(ort) {
        path = job["model"].words("");
        if (!std::ifstream(path).good())
            throw std::runtime_error(path + ": no such file; give the path of an .onnx model");
        try {
            open(env, job, profile_prefix);
        } catch (...) {
            close();
            throw;
        }
    }
    Model(const Model &) = delete;
    Model &operator=(const Model &) = delete;
    ~Model() { close(); }

    size_t element_bytes() const {
        return type == "float64" ? 8 : type == "float32" ? 4 : type == "float16" ? 2 : 1;
    }
    size_t elements() const {
        size_t product = 1;
        for (const int64_t size : shape) product *= static_cast<size_t>(size);
        return product;
    }

    // Normally distributed values; uint8 values are centred at 128.
    std::vector<char> random_images(int64_t seed) const {
        std::mt19937_64 source(static_cast<uint64_t>(seed));
        std::normal_distribution<float> normal;
        std::vector<char> bytes(elements() * element_bytes());
        for (size_t i = 0; i < elements(); ++i) {
            const float value = normal(source);
            store(bytes.data(), i,
                  type == "uint8"
                      ? std::floor(std::min(255.0f, std::max(0.0f, value * 64.0f + 128.0f)))
                      : value);
        }
        return bytes;
    }

    // Stores one value in a buffer of the input's type.
    void store(char *buffer, size_t place, float value) const {
        char *at = buffer + place * element_bytes();
        if (type == "uint8") {
            *at = static_cast<char>(static_cast<uint8_t>(value));
        } else if (type == "float16") {
            const uint16_t bits = half_bits(value);
            std::memcpy(at, &bits, sizeof bits);
        } else if (type == "float64") {
            const double wide = static_cast<double>(value);
            std::memcpy(at, &wide, sizeof wide);
        } else {
            std::memcpy(at, &value, sizeof value);
        }
    }

    // Runs one inference of all outputs; `logits` receives a copy of the first where it is given.
    // With `kept` the image's scores choose its bucket, whatever the job forces, and `kept`
    // receives the number of patches.
    void infer(char *images, std::vector<float> *logits = nullptr, int64_t *kept = nullptr) const {
        const size_t forced = kept == nullptr ? optional_.size() : 0;
        std::vector<void *> in(1 + forced, nullptr);
        std::vector<void *> out(outputs.size() + (kept == nullptr ? 0 : 1), nullptr);
        try {
            std::vector<const char *> inputs = {input.c_str()}, names;
            ort_.call(CreateTensorWithDataAsOrtValue, static_cast<const void *>(memory_),
                      static_cast<void *>(images), elements() * element_bytes(), shape.data(),
                      shape.size(), element_, &in[0]);
            const int64_t no_sizes = 0;
            for (size_t number = 0; number < forced; ++number) {
                ort_.call(CreateTensorWithDataAsOrtValue, static_cast<const void *>(memory_),
                          static_cast<void *>(&optional_[number].second), sizeof(int64_t),
                          static_cast<const int64_t *>(&no_sizes), size_t{0},
                          static_cast<int>(kInt64), &in[1 + number]);
                inputs.push_back(optional_[number].first.c_str());
            }
            for (const std::string &name : outputs) names.push_back(name.c_str());
            if (kept != nullptr) names.push_back(kKept);
            ort_.call(Run, session_, static_cast<const void *>(nullptr),
                      static_cast<const char *const *>(inputs.data()),
                      static_cast<const void *const *>(in.data()), in.size(),
                      static_cast<const char *const *>(names.data()), names.size(), out.data());
            if (logits != nullptr) copy(out[0], *logits);
            if (kept != nullptr) {
                void *number = nullptr;
                ort_.call(GetTensorMutableData, out.back(), &number);
                *kept = *static_cast<const int64_t *>(number);
            }
        } catch (...) {
            release(in);
            release(out);
            throw;
        }
        release(in);
        release(out);
    }

    // Ends the trace and returns its file.
    std::string end_profiling() {
        void *allocator = nullptr;
        char *name = nullptr;
        ort_.call(GetAllocatorWithDefaultOptions, &allocator);
        ort_.call(SessionEndProfiling, session_, allocator, &name);
        const std::string file = name;
        ort_.call(AllocatorFree, allocator, static_cast<void *>(name));
        return file;
    }

  private:
    // The output of a model with buckets: how many patches an image kept.
    static constexpr const char *kKept = "kept";
    const Ort &ort_;
    void *options_ = nullptr, *session_ = nullptr, *memory_ = nullptr;
    int element_ = 0;
    // The runtime takes the numbers by address, and does not change them.
    mutable std::vector<std::pair<std::string, int64_t>> optional_;

    void release(const std::vector<void *> &values) const {
        for (void *value : values) ort_.release(ReleaseValue, value);
    }

    void close() {
        ort_.release(ReleaseSession, session_);
        ort_.release(ReleaseSessionOptions, options_);
        session_ = options_ = nullptr;
    }

    void open(void *env, const Json &job, const char *profile_prefix) {
        ort_.call(CreateSessionOptions, &options_);
        ort_.call(SetIntraOpNumThreads, options_, static_cast<int>(job["threads"].whole(1)));
        ort_.call(SetInterOpNumThreads, options_, 1);
        ort_.call(SetSessionLogSeverityLevel, options_, kLogErrors);
        ort_.call(job["arena"].flag(true) ? EnableCpuMemArena : DisableCpuMemArena, options_);
        const bool spinning = job["spinning"].flag(false);
        entry("session.intra_op.allow_spinning", spinning ? "1" : "0");
        // Threads may wait busily inside a call, but not after it, while another model is measured.
        if (spinning) entry("session.force_spinning_stop", "1");
        for (const auto &pair : job["session"].object)
            entry(pair.first.c_str(), pair.second.text.c_str());
        if (profile_prefix != nullptr) ort_.call(EnableProfiling, options_, profile_prefix);
        try {
            ort_.call(CreateSession, env, path.c_str(), static_cast<const void *>(options_),
                      &session_);
        } catch (const std::exception &error) {
            throw std::runtime_error(path.substr(path.rfind('/') + 1) + ": onnxruntime " +
                                     ort_.version + " cannot load it: " + error.what());
        }
        ort_.call(CreateCpuMemoryInfo, kArenaAllocator, kDefaultMemory, &memory_);
        describe_input(job);
        for (const auto &pair : job["inputs"].object)
            optional_.emplace_back(pair.first, pair.second.whole(0));
        std::vector<std::string> requested;
        for (const Json &entry : job["outputs"].list) requested.push_back(entry["name"].words(""));
        if (requested.empty() && !job["output"].words("").empty())
            requested.push_back(job["output"].words(""));
        choose_outputs(requested);
    }

    void entry(const char *key, const char *value) {
        ort_.call(AddSessionConfigEntry, options_, key, value);
    }

    void describe_input(const Json &job) {
        size_t count = 0;
        ort_.call(SessionGetInputCount, static_cast<const void *>(session_), &count);
        if (count != 1)
            throw std::runtime_error("the model has " + std::to_string(count) +
                                     " inputs; only image classifiers with one are measured");
        input = name(SessionGetInputName, 0);
        void *about = nullptr;
        const void *tensor = nullptr;
        ort_.call(SessionGetInputTypeInfo, static_cast<const void *>(session_), size_t{0}, &about);
        ort_.call(CastTypeInfoToTensorInfo, static_cast<const void *>(about), &tensor);
        if (tensor == nullptr)
            throw std::runtime_error("input '" + input +
                                     "' is not a tensor; only image classifiers are measured");
        ort_.call(GetTensorElementType, tensor, &element_);
        ort_.call(GetDimensionsCount, tensor, &count);
        shape.resize(count);
        ort_.call(GetDimensions, tensor, shape.data(), count);
        ort_.release(ReleaseTypeInfo, about);
        type = element_ == kFloat     ? "float32"
               : element_ == kFloat16 ? "float16"
               : element_ == kDouble  ? "float64"
               : element_ == kUint8   ? "uint8"
                                      : "";
        if (type.empty())
            throw std::runtime_error(
                "input '" + input +
                "' has an unsupported type; it can be float32, float16, float64 or uint8");
        const int64_t batch = job["batch"].whole(0);
        for (size_t place = 0; place < shape.size(); ++place) {
            const bool open = shape[place] < 1;
            if (open && place > 0) {
                throw std::runtime_error("input '" + input + "' leaves dimension " +
                                         std::to_string(place) +
                                         " open; export the model with fixed image sizes");
            }
            if (open) shape[place] = batch > 0 ? batch : 1;
            if (place == 0 && batch > 0 && shape[0] != batch) {
                throw std::runtime_error(
                    "input '" + input + "' has the fixed batch " + std::to_string(shape[0]) +
                    ", and batch " + std::to_string(batch) +
                    " was requested; export it with that batch, or with a free one");
            }
        }
    }

    void choose_outputs(const std::vector<std::string> &requested) {
        size_t count = 0;
        ort_.call(SessionGetOutputCount, static_cast<const void *>(session_), &count);
        std::vector<std::string> own;
        std::string all;
        for (size_t place = 0; place < count; ++place) {
            own.push_back(name(SessionGetOutputName, place));
            all += (all.empty() ? "" : ", ") + own.back();
        }
        outputs = requested;
        if (outputs.empty())
            outputs.push_back(std::find(own.begin(), own.end(), "logits") != own.end() ? "logits"
                                                                                       : own.at(0));
        for (const std::string &wanted : outputs) {
            if (std::find(own.begin(), own.end(), wanted) == own.end())
                throw std::runtime_error("the model has no output '" + wanted + "'; it has " + all);
        }
    }

    std::string name(Place which, size_t place) const {
        void *allocator = nullptr;
        char *text = nullptr;
        ort_.call(GetAllocatorWithDefaultOptions, &allocator);
        ort_.call(which, static_cast<const void *>(session_), place, allocator, &text);
        const std::string made = text;
        ort_.call(AllocatorFree, allocator, static_cast<void *>(text));
        return made;
    }

    void copy(void *value, std::vector<float> &logits) const {
        void *about = nullptr, *data = nullptr;
        size_t count = 0;
        int element = 0;
        ort_.call(GetTensorTypeAndShape, static_cast<const void *>(value), &about);
        ort_.call(GetTensorShapeElementCount, static_cast<const void *>(about), &count);
        ort_.call(GetTensorElementType, static_cast<const void *>(about), &element);
        ort_.release(ReleaseTensorTypeAndShapeInfo, about);
        ort_.call(GetTensorMutableData, value, &data);
        logits.resize(count);
        for (size_t i = 0; i < count; ++i) {
            if (element == kFloat)
                logits[i] = static_cast<const float *>(data)[i];
            else if (element == kFloat16)
                logits[i] = half_value(static_cast<const uint16_t *>(data)[i]);
            else if (element == kDouble)
                logits[i] = static_cast<float>(static_cast<const double *>(data)[i]);
            else
                throw std::runtime_error("the model's output is not of a floating-point type");
        }
    }
};

}  // namespace vitrim
