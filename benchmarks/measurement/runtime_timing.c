/* Times an ONNX model through ONNX Runtime's own C API, to compare with the Python runner's p50.
   Reads counts, one a line, from standard input; prints as many latencies in seconds, on one line.
   Arguments: the library, the model, threads, then the input's sizes. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include <onnxruntime_c_api.h>

static const OrtApi *api;

static void check(OrtStatus *status) {
    if (status) {
        fprintf(stderr, "%s\n", api->GetErrorMessage(status));
        exit(3);
    }
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

int main(int count, char **arguments) {
    if (count < 5) return 2;
    void *library = dlopen(arguments[1], RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 3;
    }
    const OrtApiBase *(*base)(void) = (const OrtApiBase *(*)(void))dlsym(library, "OrtGetApiBase");
    api = base()->GetApi(ORT_API_VERSION);
    OrtEnv *env;
    OrtSessionOptions *options;
    OrtSession *session;
    check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "timing", &env));
    check(api->CreateSessionOptions(&options));
    check(api->SetIntraOpNumThreads(options, atoi(arguments[3])));
    check(api->SetInterOpNumThreads(options, 1));
    check(api->AddSessionConfigEntry(options, "session.intra_op.allow_spinning", "0"));
    check(api->CreateSession(env, arguments[2], options, &session));
    OrtAllocator *allocator;
    check(api->GetAllocatorWithDefaultOptions(&allocator));
    char *input, *output;
    check(api->SessionGetInputName(session, 0, allocator, &input));
    check(api->SessionGetOutputName(session, 0, allocator, &output));
    int64_t shape[8];
    size_t rank = count - 4, size = 1;
    for (size_t i = 0; i < rank; i++) size *= shape[i] = atoll(arguments[4 + i]);
    float *image = malloc(size * sizeof *image);
    for (size_t i = 0; i < size; i++) image[i] = (float)(i * 2654435761u % 1000) / 500 - 1;
    OrtMemoryInfo *memory;
    check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    OrtValue *value;
    check(api->CreateTensorWithDataAsOrtValue(memory, image, size * sizeof *image, shape, rank,
                                              ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &value));
    int runs;
    while (scanf("%d", &runs) == 1) {
        for (int i = 0; i < runs; i++) {
            OrtValue *result = NULL;
            double start = now();
            check(api->Run(session, NULL, (const char *const *)&input,
                           (const OrtValue *const *)&value, 1, (const char *const *)&output, 1,
                           &result));
            printf("%.9f ", now() - start);
            api->ReleaseValue(result);
        }
        printf("\n");
        fflush(stdout);
    }
    return 0;
}
