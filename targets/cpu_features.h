// Whether this processor has the instruction sets that an artifact's manifest states. Bundles,
// compiled networks and the native runner share this file, and check before they load a model.
// C++17, nothing of the C++ library.
//
// Lists are words separated by spaces, with Linux's names (/proc/cpuinfo); of `a|b` one suffices.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace vitrim {

#if defined(__x86_64__)

#define VITRIM_KNOWS_CPU 1
enum Register { kEax, kEbx, kEcx, kEdx };
// Which registers the operating system must save for an instruction set, as bits of XCR0.
constexpr uint32_t kNoState = 0, kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;

struct CpuFeature {
    const char *name;
    uint32_t leaf, subleaf;
    Register where;
    int bit;
    uint32_t state;
};

constexpr CpuFeature kCpuFeatures[] = {
    {"pni", 1, 0, kEcx, 0, kNoState},      {"ssse3", 1, 0, kEcx, 9, kNoState},
    {"fma", 1, 0, kEcx, 12, kYmm},         {"cx16", 1, 0, kEcx, 13, kNoState},
    {"sse4_1", 1, 0, kEcx, 19, kNoState},  {"sse4_2", 1, 0, kEcx, 20, kNoState},
    {"movbe", 1, 0, kEcx, 22, kNoState},   {"popcnt", 1, 0, kEcx, 23, kNoState},
    {"avx", 1, 0, kEcx, 28, kYmm},         {"f16c", 1, 0, kEcx, 29, kYmm},
    {"bmi1", 7, 0, kEbx, 3, kNoState},     {"avx2", 7, 0, kEbx, 5, kYmm},
    {"bmi2", 7, 0, kEbx, 8, kNoState},     {"avx512f", 7, 0, kEbx, 16, kZmm},
    {"avx512dq", 7, 0, kEbx, 17, kZmm},    {"avx512cd", 7, 0, kEbx, 28, kZmm},
    {"avx512bw", 7, 0, kEbx, 30, kZmm},    {"avx512vl", 7, 0, kEbx, 31, kZmm},
    {"avx512_vnni", 7, 0, kEcx, 11, kZmm}, {"avx512_fp16", 7, 0, kEdx, 23, kZmm},
    {"amx_int8", 7, 0, kEdx, 25, kTiles},  {"avx_vnni", 7, 1, kEax, 4, kYmm},
    {"avx512_bf16", 7, 1, kEax, 5, kZmm},  {"abm", 0x80000001, 0, kEcx, 5, kNoState},
};

inline bool has_feature(const CpuFeature &feature) {
    uint32_t found[4] = {0, 0, 0, 0};
    if (!__get_cpuid_count(feature.leaf, feature.subleaf, &found[kEax], &found[kEbx], &found[kEcx],
                           &found[kEdx]))
        return false;
    if (!(found[feature.where] >> feature.bit & 1u)) return false;
    if (feature.state == kNoState) return true;
    uint32_t one[4] = {0, 0, 0, 0};
    __get_cpuid(1, &one[kEax], &one[kEbx], &one[kEcx], &one[kEdx]);
    if (!(one[kEcx] >> 27 & 1u)) return false;  // OSXSAVE
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & feature.state) == feature.state;
}

constexpr const char *kTargets[][2] = {
    {"x86-64-v4-vnni", "avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni"},
    {"x86-64-v3", "avx2 fma f16c bmi1 bmi2 abm movbe"},
    {"x86-64", ""},
};

#elif defined(__aarch64__) && defined(__linux__)

#define VITRIM_KNOWS_CPU 1
struct CpuFeature {
    const char *name;
    unsigned long type;
    int bit;
};

constexpr unsigned long kFirst = 16, kSecond = 26;  // AT_HWCAP, AT_HWCAP2
constexpr CpuFeature kCpuFeatures[] = {
    {"asimd", kFirst, 1},    {"asimdhp", kFirst, 10}, {"asimdrdm", kFirst, 12},
    {"asimddp", kFirst, 20}, {"sve", kFirst, 22},     {"sve2", kSecond, 1},
    {"i8mm", kSecond, 13},   {"bf16", kSecond, 14},
};

inline bool has_feature(const CpuFeature &feature) {
    return getauxval(feature.type) >> feature.bit & 1u;
}

constexpr const char *kTargets[][2] = {{"rpi5", "asimddp asimdhp"}, {"rpi4", ""}};

#endif

#ifdef VITRIM_KNOWS_CPU

inline bool has_feature(const char *name, size_t length) {
    for (const CpuFeature &feature : kCpuFeatures) {
        if (strlen(feature.name) == length && memcmp(feature.name, name, length) == 0)
            return has_feature(feature);
    }
    return false;
}

// The first word of which this processor has nothing, and its length; 0 if it has something of all.
inline size_t missing_feature(const char *words, const char **missing) {
    while (*(words += strspn(words, " ")) != '\0') {
        const size_t length = strcspn(words, " ");
        bool found = false;
        for (size_t first = 0; first < length;) {
            const size_t size = strcspn(words + first, "| ");
            found = found || has_feature(words + first, size);
            first += size + 1;
        }
        if (!found) {
            *missing = words;
            return length;
        }
        words += length;
    }
    return 0;
}

inline const char *fitting_target() {
    const char *unused = nullptr;
    for (const auto &target : kTargets) {
        if (missing_feature(target[1], &unused) == 0) return target[0];
    }
    return "host";
}

#endif

// Whether a model cannot run on this processor; then `text` holds one line.
inline bool refuses_processor(const char *target, const char *needs, const char *assumes,
                              char *text, size_t size) {
#ifdef VITRIM_KNOWS_CPU
    const char *name = nullptr;
    if (const size_t length = missing_feature(needs, &name)) {
        snprintf(text, size,
                 "the model's code for %s uses %.*s, which this processor does not have; export it "
                 "for --target %s",
                 target, static_cast<int>(length), name, fitting_target());
        return true;
    }
    if (const size_t length = missing_feature(assumes, &name)) {
        snprintf(text, size,
                 "the model's eight-bit weights for %s assume %.*s, which this processor does not "
                 "have: its products would saturate and "
                 "the outputs be wrong; export it for --target %s",
                 target, static_cast<int>(length), name, fitting_target());
        return true;
    }
#else
    (void)target, (void)needs, (void)assumes, (void)text, (void)size;
#endif
    return false;
}

}  // namespace vitrim
