// Fork and join. Threads are started per call: a pool would not survive a fork, and work below the threshold,
// where starting them would show, runs on the caller's thread.
#pragma once

#include <algorithm>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace pumice {

struct Run {
    int threads;
    int isa;
};

// Calls body(begin, end) over [0, items), split evenly; `work` is the elements of one item.
template <class Body>
void parallel_for(int64_t items, int64_t work, int threads, const Body& body) {
    constexpr int64_t kWorkPerThread = 1 << 17;
    int64_t useful = items * work / kWorkPerThread;
    int64_t count = std::max<int64_t>(1, std::min<int64_t>({threads, items, useful}));
    std::vector<std::thread> others;
    int64_t done = 0;
    try {
        others.reserve(count - 1);
        for (int64_t t = 0; t + 1 < count; ++t) {
            int64_t end = items * (t + 1) / count;
            others.emplace_back(body, done, end);
            done = end;
        }
    } catch (const std::system_error&) {  // no more threads to be had: the caller does the rest
    }
    body(done, items);
    for (auto& other : others) other.join();
}

}  // namespace pumice
