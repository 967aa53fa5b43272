// What a compiled network needs at run time, instead of a runtime library.
//
// Its kernels are called one after the other on memory that was planned at compile time. Plain
// C++17 on POSIX threads, without the C++ library and without TVM. The generated `network.cpp`
// includes it once, after its tables. The structures are those of DLPack and of TVM's calling
// convention.
#pragma once

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

namespace vitrim {

struct Tensor {  // DLTensor
    void *data;
    int32_t device_kind, device_number;
    int32_t dimensions;
    uint8_t type_code, type_bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct Value {  // TVMFFIAny
    int32_t kind;
    uint32_t padding;
    union {
        int64_t integer;
        void *pointer;
    };
};
static_assert(sizeof(Tensor) == 48 && sizeof(Value) == 16,
              "the calling convention of 64-bit machines");

constexpr int32_t kInteger = 1, kPointer = 4, kTensorPointer = 7, kTensorObject = 70,
                  kObjectHeaderBytes = 24, kCpu = 1;

enum class Place : uint8_t { images, logits, arena, constant };

struct Planned {  // a tensor's memory: the region, and the offset in bytes
    Place place;
    uint64_t offset;
};

struct Output {  // its name, and its place among the numbers of all outputs
    const char *name;
    int64_t start, numbers;
};

using Kernel = int (*)(void *self, const Value *arguments, int32_t count, Value *result);

struct Step {
    const char *name;
    Kernel kernel;
    int32_t first, count;  // its operands, as indices of tensors
};

struct Group {  // TVMParallelGroupEnv
    void *barrier;
    int32_t tasks;
};
using Task = int (*)(int number, Group *group, void *data);

// ---- threads: they spin while an inference runs, and sleep between inferences ------------------

constexpr int kMostThreads = 64, kCacheLine = 64;

struct alignas(kCacheLine) Counter {
    int value;
};

struct Pool {
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
    int workers = 0;       // started, besides the caller's own thread
    int threads = 1;       // used by a launch
    bool running = false;  // an inference runs
    Task task = nullptr;
    void *data = nullptr;
    Group group = {nullptr, 1};
    int failed = 0;
    alignas(kCacheLine) int launch = 0;   // number of the launch
    alignas(kCacheLine) int pending = 0;  // tasks that are not finished
    Counter barrier[kMostThreads] = {};
};

inline Pool pool;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Waits first by spinning, since the other threads are about to arrive; then by sleeping, since
// they may not have a processor.
struct SpinWait {
    int spins = 0;
    void wait() {
        if (++spins <= 4096) return pause();
        const timespec moment = {0, 20000};
        nanosleep(&moment, nullptr);
    }
};

inline void *work(void *argument) {
    const int number = static_cast<int>(reinterpret_cast<intptr_t>(argument));
    int seen = 0;
    for (;;) {
        for (SpinWait waiting; __atomic_load_n(&pool.launch, __ATOMIC_ACQUIRE) == seen;) {
            if (__atomic_load_n(&pool.running, __ATOMIC_ACQUIRE)) {
                waiting.wait();
                continue;
            }
            waiting = SpinWait();
            pthread_mutex_lock(&pool.lock);
            while (!__atomic_load_n(&pool.running, __ATOMIC_ACQUIRE) &&
                   __atomic_load_n(&pool.launch, __ATOMIC_ACQUIRE) == seen) {
                pthread_cond_wait(&pool.wake, &pool.lock);
            }
            pthread_mutex_unlock(&pool.lock);
        }
        seen = __atomic_load_n(&pool.launch, __ATOMIC_ACQUIRE);
        // Every worker acknowledges every launch, so that none can miss one and join the next.
        if (number < pool.group.tasks && pool.task(number, &pool.group, pool.data) != 0)
            __atomic_store_n(&pool.failed, 1, __ATOMIC_RELAXED);
        __atomic_fetch_sub(&pool.pending, 1, __ATOMIC_RELEASE);
    }
    return nullptr;
}

inline int set_threads(int threads) {
    if (threads < 1) threads = 1;
    if (threads > kMostThreads) threads = kMostThreads;
    while (pool.workers < threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, nullptr, work,
                           reinterpret_cast<void *>(static_cast<intptr_t>(pool.workers + 1))) != 0)
            break;
        pthread_detach(thread);
        ++pool.workers;
    }
    pool.threads = pool.workers + 1 < threads ? pool.workers + 1 : threads;
    return pool.threads;
}

inline int launch(Task task, void *data, int32_t tasks) {
    if (tasks <= 0 || tasks > pool.threads) tasks = pool.threads;
    for (Counter &counter : pool.barrier) counter.value = 0;
    pool.task = task;
    pool.data = data;
    pool.group = {pool.barrier, tasks};
    pool.failed = 0;
    if (tasks == 1) return task(0, &pool.group, data);
    __atomic_store_n(&pool.pending, pool.workers, __ATOMIC_RELAXED);
    __atomic_fetch_add(&pool.launch, 1, __ATOMIC_RELEASE);
    int failed = task(0, &pool.group, data);
    for (SpinWait waiting; __atomic_load_n(&pool.pending, __ATOMIC_ACQUIRE) != 0;) waiting.wait();
    return failed != 0 ? failed : pool.failed;
}

inline int barrier_wait(int number, Group *group) {
    Counter *counters = static_cast<Counter *>(group->barrier);
    const int round = __atomic_add_fetch(&counters[number].value, 1, __ATOMIC_ACQ_REL);
    for (int other = 0; other < group->tasks; ++other) {
        for (SpinWait waiting; __atomic_load_n(&counters[other].value, __ATOMIC_ACQUIRE) < round;)
            waiting.wait();
    }
    return 0;
}

inline void begin_inference() {
    if (pool.threads < 2) return;
    pthread_mutex_lock(&pool.lock);
    __atomic_store_n(&pool.running, true, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

inline void end_inference() { __atomic_store_n(&pool.running, false, __ATOMIC_RELEASE); }

// ---- what kernels call --------------------------------------------------------------------------

inline char failure[256];

inline void set_failure(const char *kind, const char *const *parts, int count) {
    size_t used = 0;
    auto add = [&](const char *text) {
        for (; text != nullptr && *text != '\0' && used + 1 < sizeof failure; ++text)
            failure[used++] = *text == '\n' ? ' ' : *text;
    };
    add(kind);
    add(": ");
    for (int i = 0; i < count; ++i) add(parts[i]);
    failure[used] = '\0';
}

inline void *workspace(int, int, uint64_t bytes, int, int) {
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}
inline int free_workspace(int, int, void *memory) {
    free(memory);
    return 0;
}
inline void raise(const char *kind, const char *message) { set_failure(kind, &message, 1); }

inline double now_s() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Kernels call these through pointers of their own, which exist only where they are needed.
#define VITRIM_CONTEXT(name) extern "C" __attribute__((weak)) void *name;
}  // namespace vitrim
VITRIM_CONTEXT(__TVMBackendAllocWorkspace)
VITRIM_CONTEXT(__TVMBackendFreeWorkspace)
VITRIM_CONTEXT(__TVMBackendParallelLaunch)
VITRIM_CONTEXT(__TVMBackendParallelBarrier)
VITRIM_CONTEXT(__TVMFFIErrorSetRaisedFromCStr)

// Hidden, so that a process that has loaded TVM keeps its own.
extern "C" __attribute__((visibility("hidden"))) void
TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
    vitrim::set_failure(kind, parts, count);
}
extern "C" __attribute__((visibility("hidden"))) void
TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) {
    vitrim::raise(kind, message);
}
