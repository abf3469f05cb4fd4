// CUDA's words on a CPU: each thread of a block is a fiber, so that barriers and shuffles mean what they mean.
//
// Between barriers the fibers run in an order of choice (forward, reverse, or random), which shows a barrier that is
// missing. Shared memory is filled with ones before each block. Threads that wait for each other for ever, at different
// barriers or shuffles, end the launch with an error.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ static inline
// Internal linkage lets all shared variables stand in one section, between two symbols that the linker makes.
#define __shared__ static __attribute__((section("ps_shared")))
#define __launch_bounds__(...)
#define __is_empty(type) std::is_empty_v<type>

extern "C" char __start_ps_shared[] __attribute__((weak)), __stop_ps_shared[] __attribute__((weak));

namespace fibers {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr unsigned WARP = 32;

struct Index {
    unsigned x, y, z;
};
inline Index thread_index, block_index, block_size, grid_size;

enum State { READY, AT_BARRIER, AT_SHUFFLE, DONE };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    State state = DONE;
    int line = 0;  // where it waits
    uint64_t value = 0;
};

inline std::vector<Fiber> threads;
inline ucontext_t scheduler;
inline unsigned current;
inline const std::function<void()>* body;

inline void enter() {
    (*body)();
    threads[current].state = DONE;
    swapcontext(&threads[current].context, &scheduler);
}

inline void wait(State state, int line) {
    Fiber& me = threads[current];
    me.state = state;
    me.line = line;
    asm volatile("" ::: "memory");
    swapcontext(&me.context, &scheduler);
    asm volatile("" ::: "memory");
}

inline void barrier(int line) { wait(AT_BARRIER, line); }

// All lanes of the warp must come to this line, and come from it before any of them goes on to the next shuffle.
template <class T>
inline T shuffle_down(T value, unsigned offset, unsigned width, int line) {
    static_assert(sizeof(T) <= 8);
    const unsigned me = current, lane = me % WARP;
    memcpy(&threads[me].value, &value, sizeof(T));
    wait(AT_SHUFFLE, line);
    const unsigned source = lane % width + offset < width ? me + offset : me;
    T result;
    memcpy(&result, &threads[source].value, sizeof(T));
    wait(AT_SHUFFLE, -line);
    return result;
}

// Threads [first, end) go on if all that are not done wait in one state at one line; a shuffle wants the whole warp.
inline bool release(State state, unsigned first, unsigned end) {
    int line = 0;
    for (unsigned t = first; t < end; t++) {
        if (threads[t].state == DONE && state == AT_BARRIER) continue;
        if (threads[t].state != state || (line != 0 && threads[t].line != line)) return false;
        line = threads[t].line;
    }
    if (line == 0) return false;
    for (unsigned t = first; t < end; t++)
        if (threads[t].state == state) threads[t].state = READY;
    return true;
}

struct Order {
    int kind = 0;  // 0: forward, -1: reverse, other: the seed of a random order
    std::mt19937 random;

    void arrange(std::vector<unsigned>& order) {
        for (unsigned t = 0; t < order.size(); t++) order[t] = kind < 0 ? order.size() - 1 - t : t;
        if (kind > 0) std::shuffle(order.begin(), order.end(), random);
    }
};
inline Order thread_order;

// Run one block; returns what went wrong, or nothing.
inline std::string run_block(unsigned count) {
    if (threads.size() != count) threads = std::vector<Fiber>(count);
    if (__start_ps_shared) memset(__start_ps_shared, 0xff, __stop_ps_shared - __start_ps_shared);
    for (Fiber& fiber : threads) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK_BYTES;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
        fiber.state = READY;
    }
    std::vector<unsigned> order(count);
    for (;;) {
        bool moved = false;
        thread_order.arrange(order);
        for (unsigned t : order) {
            if (threads[t].state != READY) continue;
            moved = true;
            current = thread_index.x = t;
            swapcontext(&scheduler, &threads[t].context);
        }
        for (unsigned first = 0; first < count; first += WARP)
            moved |= release(AT_SHUFFLE, first, std::min(first + WARP, count));
        moved |= release(AT_BARRIER, 0, count);
        if (moved) continue;
        for (const Fiber& fiber : threads)
            if (fiber.state != DONE) {
                const std::string line = std::to_string(std::abs(fiber.line));
                threads.clear();  // nobody returns to their stacks
                return "threads wait for each other for ever at line " + line;
            }
        return "";
    }
}

inline std::string run_grid(unsigned grid, unsigned block, const std::function<void()>& kernel) {
    body = &kernel;
    grid_size = {grid, 1, 1};
    block_size = {block, 1, 1};
    for (unsigned b = 0; b < grid; b++) {
        block_index = {b, 0, 0};
        const std::string wrong = run_block(block);
        if (!wrong.empty()) return wrong;
    }
    return "";
}

}  // namespace fibers

#define threadIdx fibers::thread_index
#define blockIdx fibers::block_index
#define blockDim fibers::block_size
#define gridDim fibers::grid_size
#define __syncthreads() fibers::barrier(__LINE__)
#define __shfl_down_sync(mask, value, offset, width) fibers::shuffle_down(value, offset, width, __LINE__)

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    const unsigned long long before = *address;
    *address = before + value;
    return before;
}
