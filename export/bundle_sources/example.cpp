// A picture in, labels out:
// vitrim_example [RUNTIME_LIBRARY MODEL_FOLDER] PICTURE [--logits] [--outputs FOLDER] [--bucket N]
// [--repeat N] [--report] [--listen]
//
// The first two arguments are for programs whose model is not linked in. PICTURE is a binary PGM
// (P5) or PPM (P6) of 8 bits. --outputs writes every output to FOLDER/NAME.f32, float32 without a
// header, and prints its shape. --bucket keeps N patches, one of VITRIM_BUCKETS. --repeat also
// prints the latency of N runs and the memory of this process; --report the bytes on disk and in
// memory, one name and number per line; --listen reads one count per line from standard input and
// prints the seconds of that many runs.
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
    if (!(stream >> value) || value < 1 || value > 65535)
        throw std::runtime_error("not a PGM or PPM header");
    return value;
}

static vitrim::Picture read_picture(const char *path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw std::runtime_error("cannot be opened");
    char magic[2] = {0, 0};
    stream.read(magic, 2);
    if (magic[0] != 'P' || (magic[1] != '5' && magic[1] != '6'))
        throw std::runtime_error("not a binary PGM (P5) or PPM (P6)");
    vitrim::Picture picture;
    picture.channels = magic[1] == '5' ? 1 : 3;
    picture.width = number(stream);
    picture.height = number(stream);
    if (number(stream) != 255) throw std::runtime_error("has more or less than 8 bits a sample");
    stream.get();
    picture.samples.resize(static_cast<size_t>(picture.width) * picture.height * picture.channels);
    stream.read(reinterpret_cast<char *>(picture.samples.data()),
                static_cast<std::streamsize>(picture.samples.size()));
    if (static_cast<size_t>(stream.gcount()) != picture.samples.size())
        throw std::runtime_error("ends before its last pixel");
    return picture;
}

static long file_bytes(const std::string &path) {
    std::ifstream stream(path, std::ios::binary | std::ios::ate);
    return stream ? static_cast<long>(stream.tellg()) : 0;
}

// Under qemu's user emulation, times and memory are the emulator's, and are labelled so. Only x86
// counts interrupts of a local timer ("LOC").
static bool emulated() {
#ifdef __aarch64__
    std::ifstream interrupts("/proc/interrupts");
    for (std::string line; std::getline(interrupts, line);) {
        if (line.find("LOC:") != std::string::npos) return true;
    }
#endif
    return false;
}

// Of this program alone: getrusage would include what the parent process held before the fork.
static long peak_rss_bytes() {
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.rfind("VmHWM:", 0) == 0) return std::atol(line.c_str() + 6) * 1024L;
    }
    return 0;
}

// The seconds of `runs` inferences, one after the other.
static std::vector<double> timed(vitrim_model *model, const std::vector<float> &input,
                                 std::vector<float> &outputs, int runs) {
    std::vector<double> latency_s;
    latency_s.reserve(static_cast<size_t>(runs));
    char error[512] = "";
    for (int i = 0; i < runs; ++i) {
        const auto before = std::chrono::steady_clock::now();
        if (vitrim_run(model, input.data(), outputs.data(), error, sizeof error) != 0)
            throw std::runtime_error(error);
        const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - before;
        latency_s.push_back(passed.count());
    }
    return latency_s;
}

// The five most probable classes, and perhaps all logits.
static void print_classes(const std::vector<float> &outputs, bool show_logits) {
    const std::vector<float> logits(outputs.begin(), outputs.begin() + VITRIM_CLASSES);
    const float top = *std::max_element(logits.begin(), logits.end());
    double sum = 0.0;
    for (float logit : logits) sum += std::exp(static_cast<double>(logit - top));
    std::vector<int> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return logits[a] > logits[b]; });
    for (size_t i = 0; i < std::min<size_t>(5, order.size()); ++i) {
        std::printf("%6.2f %%  %s\n",
                    100.0 * std::exp(static_cast<double>(logits[order[i]] - top)) / sum,
                    VITRIM_LABELS[order[i]]);
    }
    if (!show_logits) return;
    std::printf("logits");
    for (float logit : logits) std::printf(" %.9g", static_cast<double>(logit));
    std::printf("\n");
}

static void write_outputs(const std::vector<float> &outputs, const std::string &folder) {
    for (const vitrim_output &output : VITRIM_OUTPUTS) {
        const size_t width = output.dimensions > 1 ? static_cast<size_t>(output.sizes[1]) : 1,
                     count = static_cast<size_t>(output.sizes[0]) * width;
        const std::string path = folder + "/" + output.name + ".f32";
        std::ofstream stream(path, std::ios::binary);
        stream.write(reinterpret_cast<const char *>(outputs.data() + output.start),
                     static_cast<std::streamsize>(sizeof(float) * count));
        if (!stream.flush()) throw std::runtime_error(path + " cannot be written");
        if (output.dimensions > 1)
            std::printf("%s %d %d\n", output.name, output.sizes[0], output.sizes[1]);
        else
            std::printf("%s %d\n", output.name, output.sizes[0]);
    }
}

#ifdef VITRIM_LINKED
constexpr int kPicture = 1;
constexpr const char *kUsage = "PICTURE";
#else
constexpr int kPicture = 3;
constexpr const char *kUsage = "RUNTIME_LIBRARY MODEL_FOLDER PICTURE";
#endif

int main(int count, char **arguments) {
    if (count <= kPicture) {
        std::fprintf(
            stderr,
            "usage: %s %s [--logits] [--outputs FOLDER] [--bucket N] [--repeat N] [--report] "
            "[--listen]\n",
            arguments[0], kUsage);
        return 2;
    }
    const char *picture_path = arguments[kPicture], *runtime = kPicture > 1 ? arguments[1] : "";
    bool show_logits = false, report = false, listen = false;
    const char *outputs_folder = nullptr;
    int repeat = 0, bucket = 0;
    for (int i = kPicture + 1; i < count; ++i) {
        if (std::strcmp(arguments[i], "--logits") == 0) show_logits = true;
        if (std::strcmp(arguments[i], "--report") == 0) report = true;
        if (std::strcmp(arguments[i], "--outputs") == 0 && i + 1 < count)
            outputs_folder = arguments[++i];
        if (std::strcmp(arguments[i], "--listen") == 0) listen = true;
        if (std::strcmp(arguments[i], "--bucket") == 0 && i + 1 < count)
            bucket = std::atoi(arguments[++i]);
        if (std::strcmp(arguments[i], "--repeat") == 0 && i + 1 < count)
            repeat = std::atoi(arguments[++i]);
    }
    vitrim::Picture picture;
    try {
        picture = read_picture(picture_path);
    } catch (const std::exception &caught) {
        std::fprintf(stderr, "%s: %s\n", picture_path, caught.what());
        return 2;
    }
    char error[512] = "";
    if (vitrim_refused(error, sizeof error) != 0) {
        std::fprintf(stderr, "%s\n", error);
        return 2;
    }
    const std::string path =
        kPicture > 1 ? std::string(arguments[2]) + "/" + VITRIM_MODEL_FILE : "";
    vitrim_model *model = vitrim_open(path.c_str(), runtime, 1, error, sizeof error);
    if (model == nullptr) {
        std::fprintf(stderr, "%s\n", error);
        return 3;
    }
    std::vector<float> outputs(VITRIM_OUTPUT_NUMBERS);
    if (vitrim_force_bucket(model, bucket, error, sizeof error) != 0 ||
        vitrim_classify(model, picture.samples.data(), picture.width, picture.height,
                        picture.channels, outputs.data(), error, sizeof error) != 0) {
        std::fprintf(stderr, "%s\n", error);
        vitrim_close(model);
        return 3;
    }
    if (VITRIM_CLASSES > 0) print_classes(outputs, show_logits);
    if (VITRIM_BUCKET_COUNT > 0) std::printf("kept_patches %d\n", vitrim_kept_patches(model));
    std::vector<float> input(static_cast<size_t>(VITRIM_CHANNELS) * VITRIM_HEIGHT * VITRIM_WIDTH);
    vitrim_prepare(picture.samples.data(), picture.width, picture.height, picture.channels,
                   input.data(), error, sizeof error);
    try {
        if (outputs_folder != nullptr) write_outputs(outputs, outputs_folder);
        if (repeat > 0) {
            timed(model, input, outputs, 10);
            std::vector<double> latency_s = timed(model, input, outputs, repeat);
            std::sort(latency_s.begin(), latency_s.end());
            const double p50_s = latency_s[latency_s.size() / 2];
            std::printf(emulated() ? "p50_s_emulated %.9f peak_rss_bytes_with_emulator %ld\n"
                                   : "p50_s %.9f peak_rss_bytes %ld\n",
                        p50_s, peak_rss_bytes());
        }
        for (int runs = 0; listen && std::scanf("%d", &runs) == 1 && runs > 0;) {
            for (double latency_s : timed(model, input, outputs, runs))
                std::printf("%.9f ", latency_s);
            std::printf("\n");
            std::fflush(stdout);
        }
    } catch (const std::exception &caught) {
        std::fprintf(stderr, "%s\n", caught.what());
        vitrim_close(model);
        return 3;
    }
    if (report) {
        std::printf("program_bytes %ld\nruntime_bytes %ld\nmodel_bytes %ld\n",
                    file_bytes(arguments[0]), file_bytes(runtime), file_bytes(path));
        std::printf(emulated() ? "peak_rss_bytes_with_emulator %ld\n" : "peak_rss_bytes %ld\n",
                    peak_rss_bytes());
    }
    vitrim_close(model);
    return 0;
}
