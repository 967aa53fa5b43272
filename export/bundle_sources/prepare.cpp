// The part of vitrim_model.h that is the same for every runtime: from a picture to the model's
// input, as in training, and the check of the processor.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "cpu_features.h"
#include "failure.h"
#include "resize.h"
#include "vitrim_model.h"

int vitrim_prepare(const uint8_t *pixels, int width, int height, int channels, float *input,
                   char *error, size_t error_size) {
    try {
        if (width < 1 || height < 1 || (channels != 1 && channels != 3))
            throw std::runtime_error("a picture has at least one pixel, and 1 or 3 channels");
        const size_t count = static_cast<size_t>(width) * height * channels;
        vitrim::Picture picture{width, height, channels,
                                std::vector<uint8_t>(pixels, pixels + count)};
        picture = vitrim::with_channels(picture, VITRIM_CHANNELS);
        if (!VITRIM_CENTER_CROP) {
            picture = vitrim::resize(picture, VITRIM_WIDTH, VITRIM_HEIGHT, VITRIM_INTERPOLATION,
                                     VITRIM_PILLOW);
        } else {
            // The shorter side becomes floor(size / crop ratio), the other one is scaled and
            // rounded down, as in timm and torchvision.
            const int64_t wanted_h =
                static_cast<int64_t>(std::floor(VITRIM_HEIGHT / VITRIM_CROP_RATIO));
            const int64_t wanted_w =
                static_cast<int64_t>(std::floor(VITRIM_WIDTH / VITRIM_CROP_RATIO));
            int scaled_w, scaled_h;
            if (wanted_h * width <= wanted_w * height) {
                scaled_w = static_cast<int>(wanted_w);
                scaled_h =
                    std::max<int>(VITRIM_HEIGHT, static_cast<int>(wanted_w * height / width));
            } else {
                scaled_w = std::max<int>(VITRIM_WIDTH, static_cast<int>(wanted_h * width / height));
                scaled_h = static_cast<int>(wanted_h);
            }
            picture =
                vitrim::resize(picture, scaled_w, scaled_h, VITRIM_INTERPOLATION, VITRIM_PILLOW);
            // nearbyint rounds halves to even, as Python does.
            const int left = static_cast<int>(std::nearbyint((scaled_w - VITRIM_WIDTH) / 2.0));
            const int top = static_cast<int>(std::nearbyint((scaled_h - VITRIM_HEIGHT) / 2.0));
            picture = vitrim::crop(picture, left, top, VITRIM_WIDTH, VITRIM_HEIGHT);
        }
        const size_t area = static_cast<size_t>(VITRIM_HEIGHT) * VITRIM_WIDTH;
        for (int c = 0; c < VITRIM_CHANNELS; ++c)
            for (int y = 0; y < VITRIM_HEIGHT; ++y)
                for (int x = 0; x < VITRIM_WIDTH; ++x) {
                    const size_t place = static_cast<size_t>(y) * VITRIM_WIDTH + x;
                    const size_t next =
                        VITRIM_CHANNELS_LAST ? place * VITRIM_CHANNELS + c : c * area + place;
                    input[next] =
                        static_cast<float>(picture.at(y, x, c)) * VITRIM_SCALE[c] + VITRIM_SHIFT[c];
                }
        return 0;
    } catch (const std::exception &caught) {
        return vitrim::fail(caught.what(), error, error_size);
    }
}

int vitrim_refused(char *error, size_t error_size) {
    char line[512];
    if (!vitrim::refuses_processor(VITRIM_TARGET, VITRIM_CPU_NEEDS, VITRIM_CPU_ASSUMES, line,
                                   sizeof line))
        return 0;
    return vitrim::fail(line, error, error_size);
}

int vitrim_classify(vitrim_model *model, const uint8_t *pixels, int width, int height, int channels,
                    float *outputs, char *error, size_t error_size) {
    std::vector<float> input(static_cast<size_t>(VITRIM_CHANNELS) * VITRIM_HEIGHT * VITRIM_WIDTH);
    const int failed =
        vitrim_prepare(pixels, width, height, channels, input.data(), error, error_size);
    return failed != 0 ? failed : vitrim_run(model, input.data(), outputs, error, error_size);
}
