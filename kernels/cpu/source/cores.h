// Which cores of a machine its workers compute on, as they tell each other in shared memory.
//
// Each worker has one slot: the time until which it counts as computing. It renews that at every phase of
// its steps, so one that is killed or stopped counts for BUSY_NS at most. The cores are shared equally among
// those who compute: nobody ever gets less than that, and an idle worker's cores are the others' until it
// begins. Two workers that look at different moments may both count on a core for as long as a phase takes.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

constexpr int64_t BUSY_NS = 200'000'000;  // longer than a phase
constexpr int64_t RENEW_NS = 1'000'000;    // others read the slot all the time: it changes no more often
constexpr int64_t BETWEEN_NS = 3'000'000;  // what is between two steps is part of computing

struct alignas(64) CoreSlot {
    std::atomic<int64_t> busy_until;  // nanoseconds of the steady clock, which is one for all processes
};
static_assert(sizeof(CoreSlot) == 64, "a cache line, as services/launch/cores.py makes them");

static inline int64_t steady_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class Cores {
   public:
    // `slots` null: a worker that shares with nobody has all cores.
    Cores(int cores, CoreSlot* slots, int workers, int slot) : cores_(cores), slots_(slots), workers_(workers), slot_(slot) {}

    // A phase begins: this worker counts as computing. How many cores it may compute on.
    int begin() {
        if (!slots_) return cores_;
        const int64_t now = steady_ns();
        if (now >= renew_at_) say(now + BUSY_NS, now + RENEW_NS);
        return mine(now);
    }

    // The step is over: this worker comes back in a moment, or is idle.
    void end() {
        if (slots_) say(steady_ns() + BETWEEN_NS, 0);
    }

    int mine() const { return slots_ ? mine(steady_ns()) : cores_; }

    // Changes when another worker begins: as long as it is the same, `mine` is not less than it was.
    int64_t signs() const {
        int64_t sum = 0;
        for (int worker = 0; worker < workers_; worker++)
            if (worker != slot_) sum += slots_[worker].busy_until.load(std::memory_order_relaxed);
        return sum;
    }

   private:
    int mine(int64_t now) const {
        int busy = 1, before = 0;
        for (int worker = 0; worker < workers_; worker++)
            if (worker != slot_ && computes(worker, now)) {
                busy++;
                before += worker < slot_;
            }
        return std::max(1, cores_ / busy + (before < cores_ % busy));
    }

    void say(int64_t busy_until, int64_t renew_at) {
        slots_[slot_].busy_until.store(busy_until, std::memory_order_relaxed);
        renew_at_ = renew_at;
    }

    bool computes(int worker, int64_t now) const {
        const int64_t left = slots_[worker].busy_until.load(std::memory_order_relaxed) - now;
        return left > 0 && left <= BUSY_NS;
    }

    const int cores_;
    CoreSlot* const slots_;
    const int workers_, slot_;
    int64_t renew_at_ = 0;
};
