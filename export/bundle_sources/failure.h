// How a function of the C interface reports a failure: one line in the caller's buffer.
#pragma once

#include <cstring>
#include <string>

namespace vitrim {

inline int fail(const std::string &message, char *error, size_t error_size) {
    if (error != nullptr && error_size > 0) {
        std::strncpy(error, message.c_str(), error_size - 1);
        error[error_size - 1] = '\0';
    }
    return 1;
}

// Whether `patches` is one of `count` buckets, or 0.
inline bool is_bucket(int patches, const int *buckets, int count) {
    for (int place = 0; place < count; ++place) {
        if (buckets[place] == patches) return true;
    }
    return patches == 0;
}

inline int refuse_bucket(int patches, int count, char *error, size_t error_size) {
    const std::string why = count > 0 ? "; VITRIM_BUCKETS lists those that there are"
                                      : "; all pictures keep the same number";
    return fail("no bucket of " + std::to_string(patches) + " patches" + why, error, error_size);
}

}  // namespace vitrim
