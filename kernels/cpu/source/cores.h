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

    // How many this worker may compute on now.
    int mine() const {
        if (!slots_) return cores_;
        int busy = 1, before = 0;
        const int64_t now = steady_ns();
        for (int worker = 0; worker < workers_; worker++)
            if (worker != slot_ && computes(worker, now)) {
                busy++;
                before += worker < slot_;
            }
        return std::max(1, cores_ / busy + (before < cores_ % busy));
    }

    // This worker computes for the next `ns` nanoseconds at most, if it says nothing else before.
    void busy_for(int64_t ns) {
        if (slots_) slots_[slot_].busy_until.store(steady_ns() + ns, std::memory_order_relaxed);
    }

   private:
    bool computes(int worker, int64_t now) const {
        const int64_t left = slots_[worker].busy_until.load(std::memory_order_relaxed) - now;
        return left > 0 && left <= BUSY_NS;
    }

    const int cores_;
    CoreSlot* const slots_;
    const int workers_, slot_;
};
