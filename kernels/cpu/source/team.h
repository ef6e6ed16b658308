// A team of threads that computes one phase after the other.
//
// The caller opens a phase and works on it; helpers join where they can. An item is taken from one word
// (how many are taken from the front, and how many are left) by compare-and-swap, so nobody waits for a
// thread that holds no item: helpers that sleep, or that the machine does not run, cost nothing, and one
// that comes late finds that its phase is over, or takes items of the next. What describes a phase is read
// only by who holds items of it, because until these are finished the phase cannot end.
//
// The caller goes forward from the first item, helpers go backward from the last: two threads read two runs
// of memory, which the processor reads ahead, instead of pieces of one by turns.
//
// Who waits looks for some microseconds, because what it waits for is near, and then sleeps: a thread that
// kept its core would take it from those it waits for.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#include "cores.h"

constexpr int LOOKS = 1000;  // some 30 microseconds

static inline void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Team {
   public:
    // With at most so many threads, the caller's among them, and as many as `cores` gives at each moment.
    Team(int threads, Cores cores) : threads_(threads), cores_(cores), asleep_(new Bell[threads]) {
        for (int thread = 1; thread < threads; thread++) helpers_.emplace_back([this, thread] { serve(thread); });
    }

    ~Team() {
        stopping_ = true;
        wake(threads_);
        for (auto& helper : helpers_) helper.join();
    }

    int threads() const { return threads_; }

    // From an item to what the thread computes next, if nobody else has it by then.
    static int step_of(int thread) { return thread == 0 ? 1 : -1; }

    // Calls f(item), or f(item, thread), once for each item; returns when all are done. One caller at a time.
    template <typename F>
    void share(int items, F f) {
        const int threads = std::min({cores_.begin(), threads_, items});
        if (threads <= 1) {
            call<F>(&f, 0, items, 0);
            return;
        }
        open({call<F>, &f}, items);
        wake(threads);
        work(0, 0);
        await_finished(items);
    }

    // The step is over.
    void rest() { cores_.end(); }

   private:
    struct Phase {
        void (*call)(void* work, int first, int end, int thread);
        void* work;
    };

    struct alignas(64) Bell {
        std::atomic<uint32_t> asleep{0};
    };

    static constexpr uint64_t LEFT = 0xffffffff;

    template <typename F>
    static void call(void* work, int first, int end, int thread) {
        F& f = *static_cast<F*>(work);
        const int step = step_of(thread);
        for (int item = step > 0 ? first : end - 1; first <= item && item < end; item += step)
            if constexpr (std::is_invocable_v<F, int, int>) f(item, thread);
            else f(item);
    }

    void open(const Phase& phase, int items) {
        phase_ = phase;
        finished_.store(0, std::memory_order_relaxed);
        word_.store(uint64_t(items), std::memory_order_seq_cst);
    }

    // Works on the open phase until no item of it is left, or the thread's core is wanted elsewhere.
    // `signs`: what `Cores::signs` was when it was last known to be free.
    void work(int thread, int64_t signs) {
        int done = 0;
        uint64_t word = word_.load(std::memory_order_acquire);
        while ((word & LEFT) != 0 && still_mine(thread, signs)) {
            // Few at a time towards the end, so that all end together.
            const int left = int(word & LEFT), count = std::max(1, left / (4 * threads_));
            const int front = int(word >> 32);
            const uint64_t next = word - count + (thread == 0 ? uint64_t(count) << 32 : 0);
            if (!word_.compare_exchange_weak(word, next, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
            const int first = thread == 0 ? front : front + left - count;
            phase_.call(phase_.work, first, first + count, thread);
            done += count;
            word = word_.load(std::memory_order_acquire);
        }
        if (done == 0) return;
        finished_.fetch_add(done, std::memory_order_release);
        if (thread != 0) finished_.notify_one();
    }

    bool still_mine(int thread, int64_t& signs) const {
        const int64_t now = cores_.signs();
        if (thread == 0 || now == signs) return true;
        signs = now;
        return thread < cores_.mine();
    }

    void await_finished(int items) {
        for (int looks = 0; looks < LOOKS; looks++) {
            if (finished_.load(std::memory_order_acquire) == items) return;
            pause_briefly();
        }
        for (int finished; (finished = finished_.load(std::memory_order_acquire)) != items;)
            finished_.wait(finished, std::memory_order_acquire);
    }

    void serve(int thread) {
        while (!stopping_.load(std::memory_order_relaxed)) {
            const int64_t signs = cores_.signs();
            if (thread < cores_.mine() && soon()) work(thread, signs);
            else sleep(thread);
        }
    }

    bool is_open() const { return (word_.load(std::memory_order_seq_cst) & LEFT) != 0; }

    // Looks for a while whether there is something to do.
    bool soon() const {
        for (int looks = 0; looks < LOOKS; looks++) {
            if (is_open()) return true;
            pause_briefly();
        }
        return false;
    }

    // Until it is woken. It says that it sleeps before it looks for the last time, and `wake` comes after a
    // phase is open: one of the two sees the other.
    void sleep(int thread) {
        auto& asleep = asleep_[thread].asleep;
        asleep.store(1, std::memory_order_seq_cst);
        const bool wanted = is_open() && thread < cores_.mine();
        if (!wanted && !stopping_) asleep.wait(1);
        asleep.store(0, std::memory_order_relaxed);
    }

    // The first so many threads.
    void wake(int threads) {
        for (int thread = 1; thread < threads; thread++) {
            auto& asleep = asleep_[thread].asleep;
            if (asleep.load(std::memory_order_seq_cst) && asleep.exchange(0)) asleep.notify_one();
        }
    }

    const int threads_;
    Cores cores_;
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<uint64_t> word_{0};  // items taken from the front << 32 | items left
    Phase phase_{};
    alignas(64) std::atomic<int> finished_{0};  // items of the phase
    std::unique_ptr<Bell[]> asleep_;
    std::vector<std::thread> helpers_;
};
