// A data set (a folder of images.npy and labels.npy), in the layout and normalisation of a model.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.h"
#include "model.h"
#include "npy.h"

namespace vitrim {

class Dataset {
  public:
    std::vector<int64_t> labels;

    // `layout`: NCHW or NHWC; by default the last size is the channels where it alone could be.
    Dataset(const std::string &folder, const Model &model, const Json &preprocessing,
            const std::string &layout = "")
        : images_(folder + "/images.npy"), model_(model), bytes_(images_.type == "|u1") {
        Npy stored(folder + "/labels.npy");
        labels = stored.whole_numbers();
        if (labels.empty() || static_cast<int64_t>(labels.size()) != images_.shape[0])
            images_.fail("has different numbers of images and labels");
        std::vector<int64_t> wanted = model.shape;
        const std::vector<int64_t> own(images_.shape.begin() + 1, images_.shape.end());
        if (wanted.size() != 4)
            throw std::runtime_error("the model's input is not (batch, channels, height, width); "
                                     "its top-1 cannot be counted");
        const auto fits = [](int64_t size) { return size == 1 || size == 3; };
        model_channels_last_ =
            layout.empty() ? fits(wanted[3]) && !fits(wanted[1]) : layout == "NHWC";
        if (model_channels_last_) wanted = {wanted[0], wanted[3], wanted[1], wanted[2]};
        channels_ = static_cast<size_t>(wanted[1]);
        channels_last_ = (bytes_ || model_channels_last_) && own.size() == 3 &&
                         own[0] != wanted[1] && own[2] == wanted[1];
        std::vector<int64_t> arranged = own;
        if (own.size() == 2 && wanted[1] == 1) arranged = {1, own[0], own[1]};
        if (channels_last_) arranged = {own[2], own[0], own[1]};
        if (!std::equal(arranged.begin(), arranged.end(), wanted.begin() + 1, wanted.end())) {
            throw std::runtime_error(
                "the data set's images are " + written(arranged) + ", the model takes " +
                written(std::vector<int64_t>(wanted.begin() + 1, wanted.end())) +
                "; prepare them at that size");
        }
        if (!bytes_ && images_.type != "<f4") images_.fail("holds neither bytes nor float32");
        for (int64_t c = 0; c < wanted[1]; ++c) {
            if (!bytes_ || model.type == "uint8") break;
            const Json &mean = preprocessing["mean"], &std = preprocessing["std"];
            if (mean.list.empty() || std.list.empty()) {
                throw std::runtime_error(
                    "the data set holds bytes, and no mean and std are known to normalise them; "
                    "give prepared float32 images, or an artifact");
            }
            mean_.push_back(static_cast<float>(
                mean.list[std::min<size_t>(static_cast<size_t>(c), mean.list.size() - 1)].number));
            std_.push_back(static_cast<float>(
                std.list[std::min<size_t>(static_cast<size_t>(c), std.list.size() - 1)].number));
        }
    }

    // Images first..last; a fixed batch is padded with copies of the last, which are not counted.
    std::vector<char> batch(int64_t first, int64_t last) {
        const std::vector<char> raw = images_.rows(first, last);
        const size_t channels = channels_,
                     area = model_.elements() / (static_cast<size_t>(model_.shape[0]) * channels);
        const size_t image = channels * area, count = static_cast<size_t>(last - first);
        std::vector<char> made(model_.elements() * model_.element_bytes());
        for (size_t n = 0; n < static_cast<size_t>(model_.shape[0]); ++n) {
            const size_t from = std::min(n, count - 1) * image;
            for (size_t c = 0; c < channels; ++c) {
                for (size_t p = 0; p < area; ++p) {
                    const size_t place = from + (channels_last_ ? p * channels + c : c * area + p);
                    const size_t inside = model_channels_last_ ? p * channels + c : c * area + p;
                    model_.store(made.data(), n * image + inside, value(raw, place, c));
                }
            }
        }
        return made;
    }

  private:
    Npy images_;
    const Model &model_;
    bool bytes_, channels_last_ = false, model_channels_last_ = false;
    size_t channels_ = 1;
    std::vector<float> mean_, std_;

    float value(const std::vector<char> &raw, size_t place, size_t channel) const {
        if (bytes_) {
            const float byte = static_cast<float>(static_cast<uint8_t>(raw[place]));
            return mean_.empty() ? byte : (byte / 255.0f - mean_[channel]) / std_[channel];
        }
        float found;
        std::memcpy(&found, raw.data() + place * sizeof found, sizeof found);
        return found;
    }
};

}  // namespace vitrim
