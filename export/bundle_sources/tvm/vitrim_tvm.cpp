// The C interface of vitrim_model.h on a compiled network, which is linked into this program
// (VITRIM_LINKED) or opened by path. Neither needs a runtime.
#include <stdexcept>
#include <string>

#include "failure.h"
#include "vitrim_model.h"

#ifdef VITRIM_LINKED
extern "C" int vitrim_network_run(const float *images, float *logits);
extern "C" int vitrim_network_threads(int threads);
extern "C" const char *vitrim_network_failure();
extern "C" int vitrim_network_force(int patches);
extern "C" int vitrim_network_kept();
#else
#include <dlfcn.h>
#endif

struct vitrim_model {
    int (*run)(const float *, float *) = nullptr;
    int (*threads)(int) = nullptr;
    const char *(*failure)() = nullptr;
    int (*force)(int) = nullptr;
    int (*kept)() = nullptr;
};

#ifndef VITRIM_LINKED
template <typename Function> static void find(void *library, const char *name, Function &function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr)
        throw std::runtime_error(std::string("this is no compiled network: it has no ") + name);
}
#endif

vitrim_model *vitrim_open(const char *model_path, const char *runtime_library, int threads,
                          char *error, size_t error_size) {
    (void)runtime_library;
    if (vitrim_refused(error, error_size) != 0) return nullptr;
    auto *model = new vitrim_model;
    try {
#ifdef VITRIM_LINKED
        (void)model_path;
        model->run = vitrim_network_run;
        model->threads = vitrim_network_threads;
        model->failure = vitrim_network_failure;
        model->force = vitrim_network_force;
        model->kept = vitrim_network_kept;
#else
        // The library stays open after vitrim_close: its threads live as long as the process.
        void *library = dlopen(model_path, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr)
            throw std::runtime_error(std::string("cannot open the model: ") + dlerror());
        find(library, "vitrim_network_run", model->run);
        find(library, "vitrim_network_threads", model->threads);
        find(library, "vitrim_network_failure", model->failure);
        if (VITRIM_BUCKET_COUNT > 0) {
            find(library, "vitrim_network_force", model->force);
            find(library, "vitrim_network_kept", model->kept);
        }
#endif
        model->threads(threads);
        return model;
    } catch (const std::exception &caught) {
        vitrim::fail(caught.what(), error, error_size);
        delete model;
        return nullptr;
    }
}

int vitrim_run(vitrim_model *model, const float *input, float *outputs, char *error,
               size_t error_size) {
    return model->run(input, outputs) == 0 ? 0 : vitrim::fail(model->failure(), error, error_size);
}

int vitrim_force_bucket(vitrim_model *model, int patches, char *error, size_t error_size) {
    if (!vitrim::is_bucket(patches, VITRIM_BUCKETS, VITRIM_BUCKET_COUNT) ||
        (VITRIM_BUCKET_COUNT > 0 && model->force(patches) != 0))
        return vitrim::refuse_bucket(patches, VITRIM_BUCKET_COUNT, error, error_size);
    return 0;
}

int vitrim_kept_patches(const vitrim_model *model) {
    return VITRIM_BUCKET_COUNT > 0 ? model->kept() : 0;
}

void vitrim_close(vitrim_model *model) { delete model; }
