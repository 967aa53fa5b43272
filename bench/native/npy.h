// numpy's .npy files (format 1 to 3, little-endian, C order): images and labels of a data set.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace vitrim {

class Npy {
  public:
    std::string type;  // numpy's name: <f4, |u1, <i8
    std::vector<int64_t> shape;

    explicit Npy(const std::string &path) : path_(path), stream_(path, std::ios::binary) {
        char magic[8] = {};
        stream_.read(magic, 8);
        if (!stream_ || std::memcmp(magic, "\x93NUMPY", 6) != 0) fail("is not an .npy file");
        const int width = magic[6] == 1 ? 2 : 4;
        unsigned char length[4] = {};
        stream_.read(reinterpret_cast<char *>(length), width);
        uint32_t size = 0;
        for (int i = 0; i < width; ++i) size |= static_cast<uint32_t>(length[i]) << (8 * i);
        if (!stream_ || size > 65536) fail("has a broken header");
        std::string header(size, '\0');
        stream_.read(&header[0], size);
        const size_t type_at = header.find("'descr': '"), shape_at = header.find("'shape': (");
        if (!stream_ || type_at == std::string::npos || shape_at == std::string::npos ||
            header.find("'fortran_order': False") == std::string::npos) {
            fail("has a header that this runner does not read");
        }
        type = header.substr(type_at + 10, header.find('\'', type_at + 10) - type_at - 10);
        const char *at = header.c_str() + shape_at + 10;
        for (;;) {
            char *end = nullptr;
            const long long value = std::strtoll(at, &end, 10);
            if (end == at) break;
            if (value < 0) fail("has a negative dimension");
            shape.push_back(value);
            at = *end == ',' ? end + 1 : end;
        }
        if (shape.empty()) fail("contains no list");
        start_ = stream_.tellg();
    }

    size_t item_bytes() const {
        return type.size() == 3 ? static_cast<size_t>(std::atoi(type.c_str() + 2)) : 0;
    }

    // Returns rows first..last (exclusive) as they are stored.
    std::vector<char> rows(int64_t first, int64_t last) {
        size_t row = item_bytes();
        if (row == 0 || (type[0] != '<' && type[0] != '|'))
            fail("contains numbers of a type that this runner does not read");
        for (size_t i = 1; i < shape.size(); ++i) row *= static_cast<size_t>(shape[i]);
        std::vector<char> bytes(row * static_cast<size_t>(last - first));
        stream_.clear();
        stream_.seekg(start_ + static_cast<std::streamoff>(row * static_cast<size_t>(first)));
        stream_.read(bytes.data(), static_cast<std::streamsize>(bytes.size()));
        if (static_cast<size_t>(stream_.gcount()) != bytes.size()) fail("is truncated");
        return bytes;
    }

    // Returns all integers of a one-dimensional array.
    std::vector<int64_t> whole_numbers() {
        if (shape.size() != 1 || (type[1] != 'i' && type[1] != 'u'))
            fail("does not contain one integer for each image");
        const std::vector<char> bytes = rows(0, shape[0]);
        const size_t width = item_bytes();
        std::vector<int64_t> values;
        for (size_t at = 0; at + width <= bytes.size(); at += width) {
            uint64_t value = 0;
            for (size_t i = 0; i < width; ++i)
                value |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[at + i]))
                         << (8 * i);
            if (type[1] == 'i' && width < 8 && (value >> (8 * width - 1)) != 0)
                value |= ~uint64_t{0} << (8 * width);
            values.push_back(static_cast<int64_t>(value));
        }
        return values;
    }

    [[noreturn]] void fail(const std::string &why) const {
        throw std::runtime_error(path_.substr(path_.rfind('/') + 1) + ": " + why +
                                 "; give a data set of `images` and `labels`");
    }

  private:
    std::string path_;
    std::ifstream stream_;
    std::streamoff start_ = 0;
};

}  // namespace vitrim
