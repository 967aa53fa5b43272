// This process: its memory, its CPUs and niceness, and its processor time.
#pragma once

#include <sched.h>
#include <sys/resource.h>
#include <time.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace vitrim {

struct Memory {
    int64_t now_bytes = -1, peak_bytes = -1;  // -1: unknown
};

inline Memory read_memory() {
    Memory found;
    std::ifstream status("/proc/self/status");
    for (std::string line; std::getline(status, line);) {
        if (line.rfind("VmRSS:", 0) == 0) found.now_bytes = std::atoll(line.c_str() + 6) * 1024;
        if (line.rfind("VmHWM:", 0) == 0) found.peak_bytes = std::atoll(line.c_str() + 6) * 1024;
    }
    rusage usage{};
    if (found.peak_bytes < 0 && getrusage(RUSAGE_SELF, &usage) == 0)
        found.peak_bytes = usage.ru_maxrss * 1024LL;
    return found;
}

// Resets the peak of resident memory; returns false where that is not permitted.
inline bool reset_peak() {
    std::ofstream stream("/proc/self/clear_refs");
    stream << "5" << std::flush;
    return stream.good();
}

inline void pin(const std::vector<int64_t> &cpus) {
    cpu_set_t set;
    CPU_ZERO(&set);
    std::string named;
    for (const int64_t cpu : cpus) {
        if (cpu < 0 || cpu >= CPU_SETSIZE)
            throw std::runtime_error("cannot pin to CPU " + std::to_string(cpu) +
                                     "; name CPUs that this machine has");
        CPU_SET(static_cast<size_t>(cpu), &set);
        named += (named.empty() ? "" : ", ") + std::to_string(cpu);
    }
    if (sched_setaffinity(0, sizeof set, &set) != 0) {
        throw std::runtime_error("cannot pin to the CPUs [" + named + "]: " + std::strerror(errno) +
                                 "; name CPUs that this machine has");
    }
}

// Raises the priority where that is permitted; other processes' work would be part of the samples.
inline int niceness(bool first) {
    if (first) setpriority(PRIO_PROCESS, 0, -20);
    return getpriority(PRIO_PROCESS, 0);
}

inline double wall_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

inline double cpu_s() {
    timespec spent{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
    return static_cast<double>(spent.tv_sec) + 1e-9 * static_cast<double>(spent.tv_nsec);
}

}  // namespace vitrim
