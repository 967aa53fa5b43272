// The part of ONNX Runtime's C API that a runner calls; its shared library is opened at run time.
//
// The API is a table of functions that only grows at its end ("NO REORDERING, only append",
// onnxruntime_c_api.h), so the position of a function is the same in every release. With the
// positions listed here its headers are not needed; a test compares them with the header.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace vitrim {

enum Place : size_t {
    GetErrorMessage = 2,
    CreateEnv = 3,
    CreateSession = 7,
    Run = 9,
    CreateSessionOptions = 10,
    EnableProfiling = 14,
    EnableCpuMemArena = 18,
    DisableCpuMemArena = 19,
    SetSessionLogSeverityLevel = 22,
    SetIntraOpNumThreads = 24,
    SetInterOpNumThreads = 25,
    SessionGetInputCount = 30,
    SessionGetOutputCount = 31,
    SessionGetInputTypeInfo = 33,
    SessionGetInputName = 36,
    SessionGetOutputName = 37,
    CreateTensorWithDataAsOrtValue = 49,
    GetTensorMutableData = 51,
    CastTypeInfoToTensorInfo = 55,
    GetTensorElementType = 60,
    GetDimensionsCount = 61,
    GetDimensions = 62,
    GetTensorShapeElementCount = 64,
    GetTensorTypeAndShape = 65,
    CreateCpuMemoryInfo = 69,
    AllocatorFree = 76,
    GetAllocatorWithDefaultOptions = 78,
    ReleaseStatus = 93,
    ReleaseSession = 95,
    ReleaseValue = 96,
    ReleaseTypeInfo = 98,
    ReleaseTensorTypeAndShapeInfo = 99,
    ReleaseSessionOptions = 100,
    SessionEndProfiling = 110,
    AddSessionConfigEntry = 130,
};

// ONNX Runtime 1.8 is the oldest release with all of these; newer ones provide its API as well.
constexpr uint32_t kOldestApi = 8;

enum ElementType : int { kFloat = 1, kUint8 = 2, kInt64 = 7, kFloat16 = 10, kDouble = 11 };
constexpr int kLogErrors = 3, kArenaAllocator = 1, kDefaultMemory = 0;

class Ort {
  public:
    explicit Ort(const std::string &library) {
        void *opened = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (opened == nullptr) {
            throw std::runtime_error("the runtime is missing here: " + std::string(dlerror()) +
                                     "; put libonnxruntime.so for this device next to the runner");
        }
        using GetBase = const Base *(*)();
        const auto get_base = reinterpret_cast<GetBase>(dlsym(opened, "OrtGetApiBase"));
        if (get_base == nullptr)
            throw std::runtime_error(library + " is not ONNX Runtime; name its shared library");
        const Base *base = get_base();
        version = base->get_version_string();
        table_ = static_cast<void *const *>(base->get_api(kOldestApi));
        if (table_ == nullptr)
            throw std::runtime_error("ONNX Runtime " + version +
                                     " is older than 1.8; take a newer one");
    }

    std::string version;

    // Calls a function that returns a status; throws the message of a failure.
    template <typename... Arguments> void call(Place place, Arguments... arguments) const {
        using Function = void *(*)(Arguments...);
        if (void *status = reinterpret_cast<Function>(table_[place])(arguments...)) {
            using Message = const char *(*)(const void *);
            const std::string message = reinterpret_cast<Message>(table_[GetErrorMessage])(status);
            release(ReleaseStatus, status);
            throw std::runtime_error(message);
        }
    }

    void release(Place place, void *object) const {
        if (object != nullptr) reinterpret_cast<void (*)(void *)>(table_[place])(object);
    }

  private:
    struct Base {
        const void *(*get_api)(uint32_t version);
        const char *(*get_version_string)();
    };
    void *const *table_ = nullptr;
};

}  // namespace vitrim
