// Checks of team.h and cores.h that need threads of C++: tests/kernels/test_team.py builds and runs it.
// By hand, with -fsanitize=thread.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "team.h"

#define CHECK(condition)                                                    \
    if (!(condition)) {                                                     \
        std::printf("%s:%d: not %s\n", __FILE__, __LINE__, #condition);     \
        std::exit(1);                                                       \
    }

static void delay(std::mt19937& random) {
    const int kind = random() % 64;
    if (kind == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
    else if (kind < 8) std::this_thread::yield();
}

// Each item is done once, by its phase's end, whoever is held up; what earlier phases wrote can be read.
static void every_item_once(int threads, int phases, Cores cores) {
    Team team(threads, cores);
    std::vector<std::mt19937> random;
    for (int thread = 0; thread < threads; thread++) random.emplace_back(thread);
    std::vector<int> before(100), now(100);
    for (int phase = 0; phase < phases; phase++) {
        const int items = random[0]() % 100;
        std::fill(now.begin(), now.end(), 0);
        team.share(items, [&](int item, int thread) {
            CHECK(0 <= thread && thread < threads);
            delay(random[thread]);
            now[item] += before[item] + 1;
        });
        for (int item = 0; item < 100; item++) CHECK(now[item] == (item < items ? before[item] + 1 : 0));
        std::swap(before, now);
        if (phase % 50 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));  // helpers fall asleep
        if (phase % 7 == 0) team.rest();
    }
}

// Helpers that are never let in are not waited for.
static void alone_it_finishes() {
    CoreSlot slots[2]{};
    slots[1].busy_until = INT64_MAX;  // nonsense does not count
    Cores two(2, slots, 2, 0);
    CHECK(two.mine() == 2);
    slots[1].busy_until = steady_ns() + BUSY_NS / 2;
    CHECK(two.mine() == 1);
    Team team(4, two);
    for (int phase = 0; phase < 100; phase++) {
        int done = 0;  // one thread: no race
        slots[1].busy_until = steady_ns() + BUSY_NS / 2;
        team.share(20, [&](int, int thread) { CHECK(thread == 0); done++; });
        CHECK(done == 20);
    }
}

// Whoever computes has an equal share; together they have all cores, and no core twice if there are enough.
static void shares_add_up() {
    for (int workers = 1; workers <= 5; workers++)
        for (int cores = 1; cores <= 9; cores++)
            for (unsigned busy = 1; busy < 1u << workers; busy++) {
                std::vector<CoreSlot> slots(workers);
                int sum = 0, least = cores, most = 0, count = 0;
                for (int worker = 0; worker < workers; worker++)
                    if (busy >> worker & 1) Cores(cores, slots.data(), workers, worker).begin();
                for (int worker = 0; worker < workers; worker++) {
                    if (!(busy >> worker & 1)) continue;
                    const int mine = Cores(cores, slots.data(), workers, worker).mine();
                    sum += mine, count++, least = std::min(least, mine), most = std::max(most, mine);
                }
                CHECK(sum == std::max(cores, count));
                CHECK(least >= 1 && most - least <= 1);
            }
}

// A worker that ends while it is busy gives its cores away a moment later.
static void a_killed_worker_counts_for_a_moment() {
    CoreSlot slots[2]{};
    Cores killed(2, slots, 2, 0), other(2, slots, 2, 1);
    killed.begin();
    CHECK(other.mine() == 1);
    std::this_thread::sleep_for(std::chrono::nanoseconds(BUSY_NS + 1'000'000));
    CHECK(other.mine() == 2);
    killed.begin();
    killed.end();
    std::this_thread::sleep_for(std::chrono::nanoseconds(BETWEEN_NS + 1'000'000));
    CHECK(other.mine() == 2);
}

int main() {
    const auto all = [](int threads) { return Cores(threads, nullptr, 0, 0); };
    every_item_once(1, 100, all(1));
    every_item_once(2, 3000, all(2));
    every_item_once(8, 1000, all(8));
    std::vector<CoreSlot> slots(2);
    std::thread other([&] {
        every_item_once(4, 1000, Cores(4, slots.data(), 2, 1));
    });
    every_item_once(4, 1000, Cores(4, slots.data(), 2, 0));
    other.join();
    for (int round = 0; round < 200; round++) every_item_once(3, 1, all(3));  // they end at any moment
    alone_it_finishes();
    shares_add_up();
    a_killed_worker_counts_for_a_moment();
    std::puts("ok");
}
