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

}  // namespace vitrim
