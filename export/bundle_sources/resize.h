// Pillow's resampling of 8-bit pictures, bit for bit (two passes, 22-bit fixed point).
//
// A model returns other logits for a picture that was resized differently. Every operation below
// rounds as Pillow's does: divisions are divisions, and the Hamming window has its constants in
// single precision. The horizontal pass comes first; from Pillow 13 on, the vertical one does where
// it removes more than twice as many rows as the other one removes columns
// (python-pillow/Pillow#9549).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace vitrim {

struct Picture {
    int width = 0, height = 0, channels = 0;
    std::vector<uint8_t> samples;  // rows from the top, channels interleaved
    uint8_t at(int y, int x, int c) const {
        return samples[(static_cast<size_t>(y) * width + x) * channels + c];
    }
};

struct Filter {
    double (*weight)(double);
    double support;
};

inline double pi() { return 3.14159265358979323846; }
inline double box(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }
inline double bilinear(double x) {
    x = std::fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}
inline double hamming(double x) {
    x = std::fabs(x);
    if (x == 0.0) return 1.0;
    if (x >= 1.0) return 0.0;
    x *= pi();
    return std::sin(x) / x * (0.54f + 0.46f * std::cos(x));
}
inline double bicubic(double x) {
    const double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}
inline double sinc(double x) {
    if (x == 0.0) return 1.0;
    x *= pi();
    return std::sin(x) / x;
}
inline double lanczos(double x) { return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

inline Filter filter_named(const std::string &name) {
    if (name == "box") return {box, 0.5};
    if (name == "bilinear") return {bilinear, 1.0};
    if (name == "hamming") return {hamming, 1.0};
    if (name == "bicubic") return {bicubic, 2.0};
    if (name == "lanczos") return {lanczos, 3.0};
    throw std::runtime_error("unknown interpolation " + name);
}

// For each output position: the first input position, and fixed-point weights.
struct Taps {
    std::vector<int> first;
    std::vector<std::vector<int>> weights;
};

constexpr int kBits = 32 - 8 - 2;

inline Taps taps(int in, int out, const Filter &filter) {
    const double scale = static_cast<double>(in) / out, stretch = std::max(scale, 1.0),
                 support = filter.support * stretch;
    Taps found;
    for (int position = 0; position < out; ++position) {
        const double center = (position + 0.5) * scale;
        const int low = std::max(0, static_cast<int>(center - support + 0.5));
        const int high = std::min(in, static_cast<int>(center + support + 0.5));
        std::vector<double> weights;
        double sum = 0.0;
        for (int x = low; x < high; ++x) {
            weights.push_back(filter.weight((x - center + 0.5) * (1.0 / stretch)));
            sum += weights.back();
        }
        std::vector<int> fixed;
        for (double weight : weights) {
            const double value = (sum != 0.0 ? weight / sum : weight) * (1 << kBits);
            fixed.push_back(static_cast<int>(value < 0 ? value - 0.5 : value + 0.5));
        }
        found.first.push_back(low);
        found.weights.push_back(fixed);
    }
    return found;
}

inline uint8_t clip(int sum) {
    return static_cast<uint8_t>(std::min(255, std::max(0, sum >> kBits)));
}

// Nearest neighbours: Pillow accumulates the step.
inline std::vector<int> nearest(int in, int out) {
    const double step = static_cast<double>(in) / out;
    double position = step * 0.5;
    std::vector<int> found;
    for (int index = 0; index < out; ++index, position += step)
        found.push_back(std::min(in - 1, static_cast<int>(position)));
    return found;
}

inline Picture across(const Picture &picture, int width, const Filter &filter) {
    const int channels = picture.channels;
    const Taps found = taps(picture.width, width, filter);
    Picture made{width, picture.height, channels,
                 std::vector<uint8_t>(static_cast<size_t>(width) * picture.height * channels)};
    for (int y = 0; y < picture.height; ++y)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < channels; ++c) {
                int sum = 1 << (kBits - 1);
                const std::vector<int> &weights = found.weights[x];
                for (size_t k = 0; k < weights.size(); ++k)
                    sum += picture.at(y, found.first[x] + static_cast<int>(k), c) * weights[k];
                made.samples[(static_cast<size_t>(y) * width + x) * channels + c] = clip(sum);
            }
    return made;
}

inline Picture down(const Picture &picture, int height, const Filter &filter) {
    const int channels = picture.channels, width = picture.width;
    const Taps found = taps(picture.height, height, filter);
    Picture made{width, height, channels,
                 std::vector<uint8_t>(static_cast<size_t>(width) * height * channels)};
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < channels; ++c) {
                int sum = 1 << (kBits - 1);
                const std::vector<int> &weights = found.weights[y];
                for (size_t k = 0; k < weights.size(); ++k)
                    sum += picture.at(found.first[y] + static_cast<int>(k), x, c) * weights[k];
                made.samples[(static_cast<size_t>(y) * width + x) * channels + c] = clip(sum);
            }
    return made;
}

// `pillow` is the major version whose order of the two passes is used.
inline Picture resize(const Picture &picture, int width, int height,
                      const std::string &interpolation, int pillow = 13) {
    if (picture.width == width && picture.height == height) return picture;
    if (interpolation == "nearest") {
        const std::vector<int> columns = nearest(picture.width, width),
                               rows = nearest(picture.height, height);
        Picture made{width, height, picture.channels, {}};
        for (int y : rows)
            for (int x : columns)
                for (int c = 0; c < picture.channels; ++c)
                    made.samples.push_back(picture.at(y, x, c));
        return made;
    }
    const Filter filter = filter_named(interpolation);
    if (picture.width == width) return down(picture, height, filter);
    if (picture.height == height) return across(picture, width, filter);
    const long lost_rows = static_cast<long>(picture.height) - height,
               lost_columns = static_cast<long>(picture.width) - width;
    if (pillow >= 13 && lost_rows > 0 && lost_rows > 2 * lost_columns)
        return across(down(picture, height, filter), width, filter);
    return down(across(picture, width, filter), height, filter);
}

inline Picture crop(const Picture &picture, int left, int top, int width, int height) {
    Picture made{width, height, picture.channels, {}};
    made.samples.reserve(static_cast<size_t>(width) * height * picture.channels);
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < picture.channels; ++c)
                made.samples.push_back(picture.at(top + y, left + x, c));
    return made;
}

// Grey to RGB repeats the sample; RGB to grey weighs as ITU-R 601 does, in Pillow's fixed point.
inline Picture with_channels(const Picture &picture, int channels) {
    if (picture.channels == channels) return picture;
    Picture made{picture.width, picture.height, channels, {}};
    made.samples.reserve(static_cast<size_t>(picture.width) * picture.height * channels);
    for (size_t pixel = 0; pixel < static_cast<size_t>(picture.width) * picture.height; ++pixel) {
        if (channels == 3) {
            made.samples.insert(made.samples.end(), 3, picture.samples[pixel]);
        } else {
            const uint8_t *rgb = &picture.samples[3 * pixel];
            made.samples.push_back(static_cast<uint8_t>(
                (rgb[0] * 19595 + rgb[1] * 38470 + rgb[2] * 7471 + 0x8000) >> 16));
        }
    }
    return made;
}

}  // namespace vitrim
