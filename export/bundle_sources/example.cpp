// A picture in, labels out: vitrim_example RUNTIME_LIBRARY MODEL_FOLDER PICTURE [--logits] [--repeat N]
// PICTURE is a binary PGM (P5) or PPM (P6) of 8 bits. --repeat also tells the latency of N runs and the memory of this process.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "resize.h"
#include "vitrim_model.h"

static int number(std::istream &stream) {
    while (stream >> std::ws && stream.peek() == '#') stream.ignore(1 << 20, '\n');
    int value = 0;
    if (!(stream >> value) || value < 1 || value > 65535) throw std::runtime_error("not a PGM or PPM header");
    return value;
}

static vitrim::Picture read_picture(const char *path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw std::runtime_error("cannot be opened");
    char magic[2] = {0, 0};
    stream.read(magic, 2);
    if (magic[0] != 'P' || (magic[1] != '5' && magic[1] != '6')) throw std::runtime_error("not a binary PGM (P5) or PPM (P6)");
    vitrim::Picture picture;
    picture.channels = magic[1] == '5' ? 1 : 3;
    picture.width = number(stream);
    picture.height = number(stream);
    if (number(stream) != 255) throw std::runtime_error("has more or less than 8 bits a sample");
    stream.get();
    picture.samples.resize(static_cast<size_t>(picture.width) * picture.height * picture.channels);
    stream.read(reinterpret_cast<char *>(picture.samples.data()), static_cast<std::streamsize>(picture.samples.size()));
    if (static_cast<size_t>(stream.gcount()) != picture.samples.size()) throw std::runtime_error("ends before its last pixel");
    return picture;
}

// Of this program alone: getrusage would count what its parent held before it started us.
static long peak_rss_bytes() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.rfind("VmHWM:", 0) == 0) return std::atol(line.c_str() + 6) * 1024L;
    }
    return 0;
}

int main(int count, char **arguments) {
    if (count < 4) {
        std::fprintf(stderr, "usage: %s RUNTIME_LIBRARY MODEL_FOLDER PICTURE [--logits] [--repeat N]\n", arguments[0]);
        return 2;
    }
    bool show_logits = false;
    int repeat = 0;
    for (int i = 4; i < count; ++i) {
        if (std::strcmp(arguments[i], "--logits") == 0) show_logits = true;
        if (std::strcmp(arguments[i], "--repeat") == 0 && i + 1 < count) repeat = std::atoi(arguments[++i]);
    }
    vitrim::Picture picture;
    try {
        picture = read_picture(arguments[3]);
    } catch (const std::exception &caught) {
        std::fprintf(stderr, "%s: %s\n", arguments[3], caught.what());
        return 2;
    }
    char error[512] = "";
    const std::string path = std::string(arguments[2]) + "/" + VITRIM_MODEL_FILE;
    vitrim_model *model = vitrim_open(path.c_str(), arguments[1], 1, error, sizeof error);
    if (model == nullptr) {
        std::fprintf(stderr, "%s\n", error);
        return 3;
    }
    std::vector<float> logits(VITRIM_CLASSES);
    if (vitrim_classify(model, picture.samples.data(), picture.width, picture.height, picture.channels, logits.data(), error, sizeof error) != 0) {
        std::fprintf(stderr, "%s\n", error);
        vitrim_close(model);
        return 3;
    }
    const float top = *std::max_element(logits.begin(), logits.end());
    double sum = 0.0;
    for (float logit : logits) sum += std::exp(static_cast<double>(logit - top));
    std::vector<int> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
    for (size_t i = 0; i < std::min<size_t>(5, order.size()); ++i) {
        std::printf("%6.2f %%  %s\n", 100.0 * std::exp(static_cast<double>(logits[order[i]] - top)) / sum, VITRIM_LABELS[order[i]]);
    }
    if (show_logits) {
        std::printf("logits");
        for (float logit : logits) std::printf(" %.9g", static_cast<double>(logit));
        std::printf("\n");
    }
    if (repeat > 0) {
        std::vector<float> input(static_cast<size_t>(VITRIM_CHANNELS) * VITRIM_HEIGHT * VITRIM_WIDTH);
        vitrim_prepare(picture.samples.data(), picture.width, picture.height, picture.channels, input.data(), error, sizeof error);
        std::vector<double> latency_s;
        for (int i = 0; i < repeat + 10; ++i) {
            const auto before = std::chrono::steady_clock::now();
            if (vitrim_run(model, input.data(), logits.data(), error, sizeof error) != 0) return 3;
            const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - before;
            if (i >= 10) latency_s.push_back(passed.count());
        }
        std::sort(latency_s.begin(), latency_s.end());
        std::printf("p50_s %.9f peak_rss_bytes %ld\n", latency_s[latency_s.size() / 2], peak_rss_bytes());
    }
    vitrim_close(model);
    return 0;
}
