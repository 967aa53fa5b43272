// Run one ONNX model in this process and report events: runner.py for a device without Python.
//
//     vitrim_runner libonnxruntime.so - < job and commands, one JSON object a line
//     vitrim_runner libonnxruntime.so '{"model": "model.onnx", "commands": [{"do": "warm"}]}'
//
// Job, commands and events are described in runner.py. A data set is a folder of images.npy and
// labels.npy here, and the CPU is the only provider.
#include <unistd.h>

#include <algorithm>
#include <iostream>
#include <iterator>
#include <map>

#include "cpu_features.h"
#include "dataset.h"
#include "process.h"

namespace vitrim {

constexpr const char *kCpu = "CPUExecutionProvider";

class Runner {
  public:
    Runner(const std::string &library, const Json &job, std::FILE *events)
        : job_(job), events_(events) {
        const std::string runtime = job["runtime"].words("onnxruntime");
        if (runtime != "onnxruntime")
            throw std::runtime_error("the native runner measures onnxruntime models, not " +
                                     runtime + "; put Python and that runtime on the device");
        for (const Json &provider : job["providers"].list) {
            if (provider.text != kCpu) {
                throw std::runtime_error("the native runner measures " + std::string(kCpu) +
                                         " only, not " + provider.text +
                                         "; put Python and onnxruntime on the device");
            }
        }
        std::vector<int64_t> cpus;
        for (const Json &cpu : job["pinning"].list) cpus.push_back(cpu.whole(-1));
        if (!cpus.empty()) pin(cpus);
        niceness_ = niceness(job["priority"].words("high") == "high");
        check_processor(job["cpu"], job["model"].words(""));
        ort_.reset(new Ort(library));
        ort_->call(CreateEnv, kLogErrors, "vitrim", &env_);
        floor_ = read_memory();
        const bool was_reset = reset_peak();
        // Without a reset the peak may be that of opening the runtime and not the model's.
        exact_ = was_reset || read_memory().peak_bytes == floor_.now_bytes;
        double start = wall_s();
        model_.reset(new Model(*ort_, env_, job));
        load_s_ = wall_s() - start;
        images_ = model_->random_images(job["seed"].whole(0));
        start = wall_s();
        model_->infer(images_.data());
        first_s_ = wall_s() - start;
    }

    void ready() {
        Line line;
        line.add("event", std::string("ready"))
            .add("runtime", std::string("onnxruntime"))
            .add("runtime_version", ort_->version);
        line.add("provider", std::string(kCpu))
            .raw("provider_nodes", "null")
            .add("input_shape", model_->shape)
            .add("input_type", model_->type);
        line.add("load_s", load_s_)
            .add("first_inference_s", first_s_)
            .raw("floor_rss_bytes", bytes(floor_.now_bytes))
            .add("peak_rss_exact", exact_);
        write(line.add("niceness", static_cast<int64_t>(niceness_))
                  .add("runner", std::string("native")));
    }

    void run(const std::string &action, const Json &command) {
        if (action == "warm")
            warm(command["limit_s"].real(10.0), command["tolerance"].real(0.03),
                 command["least_s"].real(0.2));
        else if (action == "run")
            samples(command["count"].whole(1), command["settle"].whole(2));
        else if (action == "memory")
            memory();
        else if (action == "score")
            score(command["dataset"].words(""), command["limit"].whole(INT64_MAX));
        else if (action == "profile")
            profile(command["count"].whole(10));
        else
            throw std::runtime_error("unknown command '" + action +
                                     "'; it can be warm, run, memory, score, profile or stop");
    }

  private:
    const Json &job_;
    std::FILE *events_;
    std::unique_ptr<Ort> ort_;
    void *env_ = nullptr;
    std::unique_ptr<Model> model_;
    std::vector<char> images_;
    Memory floor_;
    bool exact_ = true;
    int niceness_ = 0;
    double load_s_ = 0.0, first_s_ = 0.0;

    void write(const Line &line) {
        std::fprintf(events_, "%s\n", line.str().c_str());
        std::fflush(events_);
    }

    static std::string words(const Json &names) {
        std::string found;
        for (const Json &name : names.list) found += name.words("") + " ";
        return found;
    }

    static void check_processor(const Json &cpu, const std::string &path) {
        char line[512];
        if (refuses_processor(cpu["target"].words("its target").c_str(),
                              words(cpu["needs"]).c_str(), words(cpu["assumes"]).c_str(), line,
                              sizeof line)) {
            throw std::runtime_error(path.substr(path.rfind('/') + 1) + ": " + line);
        }
    }

    static std::string bytes(int64_t count) { return count < 0 ? "null" : std::to_string(count); }

    std::vector<double> timed(int64_t count) {
        std::vector<double> latency_s(static_cast<size_t>(std::max<int64_t>(0, count)));
        for (double &one : latency_s) {
            const double start = wall_s();
            model_->infer(images_.data());
            one = wall_s() - start;
        }
        return latency_s;
    }

    // Until the medians of two successive windows agree within `tolerance`, or the time limit.
    void warm(double limit_s, double tolerance, double least_s) {
        const double start = wall_s();
        const int64_t window = first_s_ < 0.5 ? 5 : 1;
        int64_t count = 0;
        bool stable = false;
        double middle = 0.0;
        for (double before = -1.0;; before = middle) {
            std::vector<double> found = timed(window);
            std::sort(found.begin(), found.end());
            middle = found[static_cast<size_t>(window / 2)];
            count += window;
            const double elapsed = wall_s() - start;
            stable = before >= 0.0 && elapsed >= least_s &&
                     std::fabs(middle - before) <= tolerance * before;
            if (stable || elapsed >= limit_s) break;
        }
        write(Line()
                  .add("event", std::string("warm"))
                  .add("count", count)
                  .add("stable", stable)
                  .add("p50_s", middle));
    }

    void samples(int64_t count, int64_t settle) {
        timed(settle);
        const double cpu_start = cpu_s(), wall_start = wall_s();
        const std::vector<double> latency_s = timed(count);
        const double spent_cpu_s = cpu_s() - cpu_start, spent_wall_s = wall_s() - wall_start;
        write(Line()
                  .add("event", std::string("samples"))
                  .add("latency_s", latency_s)
                  .add("cpu_s", spent_cpu_s)
                  .add("wall_s", spent_wall_s));
    }

    void memory() {
        const Memory found = read_memory();
        write(Line()
                  .add("event", std::string("memory"))
                  .raw("peak_rss_bytes", bytes(found.peak_bytes))
                  .raw("steady_rss_bytes", bytes(found.now_bytes)));
    }

    void score(const std::string &folder, int64_t limit) {
        Dataset dataset(folder, *model_, job_["preprocessing"], job_["input"]["layout"].words(""));
        const int64_t total = std::min<int64_t>(limit, static_cast<int64_t>(dataset.labels.size())),
                      batch = model_->shape[0];
        int64_t correct = 0;
        double last_report_s = wall_s();
        std::vector<float> outputs;
        // Of a model with buckets, (correct, total) by the number of patches that an image keeps.
        std::map<int64_t, std::pair<int64_t, int64_t>> buckets;
        for (const Json &count : job_["buckets"].list) buckets[count.whole(0)] = {0, 0};
        for (int64_t first = 0; first < total; first += batch) {
            const int64_t last = std::min(first + batch, total);
            std::vector<char> chunk = dataset.batch(first, last);
            int64_t kept = 0;
            model_->infer(chunk.data(), &outputs, buckets.empty() ? nullptr : &kept);
            if (!buckets.empty() && buckets.count(kept) == 0)
                throw std::runtime_error("image " + std::to_string(first) + " kept " +
                                         std::to_string(kept) + " patches, no bucket's");
            const size_t classes = outputs.size() / static_cast<size_t>(batch);
            for (int64_t image = first; image < last; ++image) {
                const float *row = outputs.data() + static_cast<size_t>(image - first) * classes;
                for (size_t k = 0; k < classes; ++k) {
                    if (!std::isfinite(row[k]))
                        throw std::runtime_error(
                            "the model returns NaN or infinite values for image " +
                            std::to_string(image));
                }
                const int64_t label = dataset.labels[static_cast<size_t>(image)];
                if (label < 0 || label >= static_cast<int64_t>(classes)) {
                    throw std::runtime_error("the data set has labels outside of the model's " +
                                             std::to_string(classes) +
                                             " classes; give the set it was trained on");
                }
                const bool right = std::max_element(row, row + classes) - row == label;
                correct += right;
                if (!buckets.empty()) {
                    buckets[kept].first += right;
                    ++buckets[kept].second;
                }
            }
            if (wall_s() - last_report_s > 1.0) {
                last_report_s = wall_s();
                write(Line()
                          .add("event", std::string("progress"))
                          .add("done", last)
                          .add("total", total));
            }
        }
        Line line;
        line.add("event", std::string("score")).add("correct", correct).add("total", total);
        std::string rows;
        for (const auto &found : buckets)
            rows += (rows.empty() ? "[" : ", [") + std::to_string(found.first) + ", " +
                    std::to_string(found.second.first) + ", " +
                    std::to_string(found.second.second) + "]";
        write(buckets.empty() ? line : line.raw("buckets", "[" + rows + "]"));
    }

    // One row for each operator, from a second session with the runtime's own profiler.
    void profile(int64_t count) {
        const std::string prefix = "vitrim-profile-" + std::to_string(getpid());
        Model second(*ort_, env_, job_, prefix.c_str());
        for (int64_t i = 0; i < count + 2; ++i) second.infer(images_.data());
        const std::string file = second.end_profiling();
        std::ifstream stream(file);
        const std::string text((std::istreambuf_iterator<char>(stream)),
                               std::istreambuf_iterator<char>());
        stream.close();
        std::remove(file.c_str());
        const std::string suffix = "_kernel_time";
        std::map<std::string, std::vector<Json>> found;
        for (const Json &event : parse(text).list) {
            const std::string name = event["name"].words("");
            if (event["cat"].words("") != "Node" || name.size() < suffix.size() ||
                name.compare(name.size() - suffix.size(), suffix.size(), suffix) != 0)
                continue;
            found[name.substr(0, name.size() - suffix.size())].push_back(event);
        }
        std::vector<std::pair<double, std::string>> rows;
        for (const auto &node : found) {
            // The first two runs are warm-up.
            const size_t kept = std::min(node.second.size(), static_cast<size_t>(count));
            const Json &args = node.second[node.second.size() - kept]["args"];
            // The median: an interruption may take longer than all calls of an operator.
            std::vector<double> spent;
            for (size_t i = node.second.size() - kept; i < node.second.size(); ++i)
                spent.push_back(node.second[i]["dur"].real(0.0));
            std::sort(spent.begin(), spent.end());
            const double middle = kept == 0 ? 0.0 : (spent[(kept - 1) / 2] + spent[kept / 2]) / 2.0;
            const double seconds =
                middle * static_cast<double>(kept) * 1e-6 / static_cast<double>(count);
            std::string shapes;
            for (const Json &entry : args["output_type_shape"].list) {
                for (const auto &pair : entry.object) {
                    std::vector<int64_t> sizes;
                    for (const Json &size : pair.second.list) sizes.push_back(size.whole(0));
                    shapes += (shapes.empty() ? "" : ", ") + written(sizes);
                }
            }
            Line row;
            row.add("node", node.first)
                .add("operator", args["op_name"].words("?"))
                .add("provider", args["provider"].words("?"));
            rows.emplace_back(seconds, row.raw("output_shapes", "[" + shapes + "]")
                                           .add("calls", static_cast<int64_t>(kept))
                                           .add("seconds", seconds)
                                           .str());
        }
        std::stable_sort(rows.begin(), rows.end(),
                         [](const auto &a, const auto &b) { return a.first > b.first; });
        std::string all;
        for (const auto &row : rows) all += (all.empty() ? "" : ", ") + row.second;
        write(Line()
                  .add("event", std::string("profile"))
                  .add("runs", count)
                  .raw("rows", "[" + all + "]"));
    }
};

static std::string one_line(const std::string &text) {
    std::string made;
    for (const char letter : text)
        made += letter == '\n' || letter == '\r' || letter == '\t' ? ' ' : letter;
    return made.size() <= 300 ? made : made.substr(0, 297) + "...";
}

}  // namespace vitrim

int main(int count, char **arguments) {
    // Standard output is reserved for events; what libraries print goes to standard error.
    std::FILE *events = fdopen(dup(1), "w");
    dup2(2, 1);
    try {
        if (count != 3)
            throw std::runtime_error("expected two arguments: the runtime's shared library, and "
                                     "the job as JSON, or - to read standard input");
        const std::string job_text = arguments[2];
        std::string line = job_text;
        if (job_text == "-") std::getline(std::cin, line);
        const vitrim::Json job = vitrim::parse(line);
        if (job["model"].words("").empty())
            throw std::runtime_error("the job is no JSON object with a model");
        vitrim::Runner runner(arguments[1], job, events);
        runner.ready();
        if (!job["commands"].is_null()) {
            for (const vitrim::Json &command : job["commands"].list) {
                if (command["do"].words("") == "stop") break;
                runner.run(command["do"].words(""), command);
            }
            return 0;
        }
        while (std::getline(std::cin, line)) {
            if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
            const vitrim::Json command = vitrim::parse(line);
            if (command["do"].words("") == "stop") break;
            runner.run(command["do"].words(""), command);
        }
    } catch (const std::bad_alloc &) {
        std::fprintf(
            events, "%s\n",
            vitrim::Line()
                .add("event", std::string("error"))
                .add("message",
                     std::string("this device is out of memory; measure a smaller model or batch"))
                .str()
                .c_str());
        std::fflush(events);
        return 3;
    } catch (const std::exception &error) {
        std::fprintf(events, "%s\n",
                     vitrim::Line()
                         .add("event", std::string("error"))
                         .add("message", vitrim::one_line(error.what()))
                         .str()
                         .c_str());
        std::fflush(events);
        return 3;
    }
    return 0;
}
