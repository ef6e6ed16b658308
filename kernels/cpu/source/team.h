// A team of threads that computes one step after the other.
//
// A step wakes the team once; inside it the threads meet at barriers, and share the items of each phase
// by taking the next one, so a thread that the machine holds up delays one item. Who waits looks a few
// microseconds, because the others are nearly done, and then sleeps: a waiting thread that kept its core
// would take it from another process that computes.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

static inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Sleeps until `word` differs from `seen`, after a short look.
static inline void await_change(const std::atomic<uint32_t>& word, uint32_t seen) {
    for (int looks = 0; looks < 500; looks++) {
        if (word.load(std::memory_order_acquire) != seen) return;
        pause_briefly();
    }
    word.wait(seen, std::memory_order_acquire);
}

class Team {
   public:
    explicit Team(int threads) : threads_(threads) {
        for (int index = 1; index < threads; index++) helpers_.emplace_back([this, index] { serve(index); });
    }

    ~Team() {
        stopping_ = true;
        wake();
        for (auto& helper : helpers_) helper.join();
    }

    int threads() const { return threads_; }

    // Calls work(index) once in every thread and returns when all have returned.
    void run(const std::function<void(int)>& work) {
        work_ = &work;
        wake();
        work(0);
        barrier();
    }

    // Every thread calls it at the same point of its work: for each item one of them calls f(item).
    // Returns when all items are done.
    template <typename F>
    void share(int items, F f) {
        for (int item; (item = next_item_.fetch_add(1, std::memory_order_relaxed)) < items;) f(item);
        barrier([this] { next_item_.store(0, std::memory_order_relaxed); });
    }

    void barrier() {
        barrier([] {});
    }

   private:
    // `last` is called by whoever arrives last, before the others go on.
    template <typename F>
    void barrier(F last) {
        if (threads_ == 1) return last();
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            last();
            round_.store(round + 1, std::memory_order_release);
            round_.notify_all();
        } else {
            await_change(round_, round);
        }
    }

    void serve(int index) {
        for (uint32_t seen = 0;; seen++) {
            await_change(runs_, seen);
            if (stopping_) return;
            (*work_)(index);
            barrier();
        }
    }

    void wake() {
        runs_.fetch_add(1, std::memory_order_release);
        runs_.notify_all();
    }

    const int threads_;
    const std::function<void(int)>* work_ = nullptr;
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<int> next_item_{0};
    alignas(64) std::atomic<uint32_t> runs_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> arrived_{0};
    std::vector<std::thread> helpers_;
};
