// The CUDA kernels. A tensor list is passed by value, in the kernel's parameters: a captured graph needs no other memory.
#pragma once
#include "maths.h"

namespace pathswitch {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};
struct none {};

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T v[N];
};

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ float load(bf16 x) { return from_bf16(x.bits); }
__device__ __forceinline__ void store(float x, float& out) { out = x; }
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float load(f16 x) {
    float out;
    asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
    return out;
}
__device__ __forceinline__ void store(float x, bf16& out) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x)); }
__device__ __forceinline__ void store(float x, f16& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x)); }
#else
__device__ __forceinline__ float load(f16 x) { return from_f16(x.bits); }
__device__ __forceinline__ void store(float x, bf16& out) { out.bits = to_bf16(x); }
__device__ __forceinline__ void store(float x, f16& out) { out.bits = to_f16(x); }
#endif
__device__ __forceinline__ void store(float, none&) {}

// In one instruction: of an assignment of equal elements the compiler makes one store per element, together with those
// that it finds in the branch beside it.
template <class T>
__device__ __forceinline__ void store_vector(const Pack<T, 4>& from, T* to) {
    uint64_t word;
    memcpy(&word, &from, sizeof(word));
    *(uint64_t*)to = word;
}
__device__ __forceinline__ void store_vector(const Pack<float, 4>& from, float* to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000  // from there on the compiler's other half does it by itself
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(from.v[0]), "f"(from.v[1]), "f"(from.v[2]),
                 "f"(from.v[3]));
#else
    *(Pack<float, 4>*)to = from;
#endif
}

constexpr int MAX_SPANS = 128, MAX_SHARDS = 48, MAX_PARAMETERS = 128;
struct Spans {
    int64_t count;
    Span items[MAX_SPANS];
};
struct Shards {
    int64_t count;
    Shard items[MAX_SHARDS];
};
struct Parameters {
    int64_t count;
    Parameter items[MAX_PARAMETERS];
};

// The piece that this block's tile lies in: the last one whose first tile is not behind it.
template <class List>
__device__ __forceinline__ int find(const List& list, int64_t tile) {
    int low = 0, high = (int)list.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (list.items[middle].first_tile <= tile)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

constexpr int THREADS = 256;
constexpr int VECTOR = 4;   // consecutive elements of a thread: 128 bits of a float32 tensor
constexpr int GROUPS = 2;   // such vectors of a thread, a block's width apart
constexpr int ADAMW_TILE = THREADS * VECTOR * GROUPS;

// One thread computes a parameter's scalars; the launch that has the last parameters also counts the step.
__device__ __forceinline__ void prepare(const Parameters& parameters, const PathDescriptor* path, Counters* counters,
                                        const GroupSettings* groups, const AverageSettings* averaging,
                                        const NormInput& input, StepScalars* out, int32_t is_last) {
    const int64_t step = counters->step;
    const bool skip = must_skip(input);
    const double lr = path_lr(*path, step);
    for (int64_t i = threadIdx.x; i < parameters.count; i += blockDim.x) {
        if (skip) {
            out[i].skip = 1;
            continue;
        }
        const Parameter& parameter = parameters.items[i];
        const int64_t adam_step = (int64_t)*parameter.step + 1;
        out[i] = step_scalars(groups[parameter.group], *averaging, input, lr, adam_step);
        *parameter.step = (float)adam_step;
    }
    __syncthreads();
    if (is_last && threadIdx.x == 0) {
        if (skip)
            counters->skipped_steps = counters->skipped_steps + 1;
        else
            counters->step = step + 1;
    }
}

// Gradients G, low-precision weights L (or none), running average or not: one pass over memory.
template <class G, class L, bool AVERAGE>
__device__ __forceinline__ void adamw_tile(const Shards& shards, int64_t tile, const StepScalars* scalars) {
    constexpr bool HAS_LOW = !__is_empty(L);
    typedef Pack<float, VECTOR> Floats;
    typedef Pack<G, VECTOR> Grads;
    typedef Pack<L, VECTOR> Lows;
    const Shard& shard = shards.items[find(shards, tile)];
    const StepScalars s = scalars[shard.scalars];
    if (s.skip) return;
    const int64_t n = shard.numel, start = (tile - shard.first_tile) * ADAMW_TILE;
    const G* grad = (const G*)shard.grad;
    L* low = (L*)shard.low;
    float *weight = shard.weight, *exp_avg = shard.exp_avg, *exp_avg_sq = shard.exp_avg_sq, *average = shard.average;
    const bool grad_aligned = ((uintptr_t)grad & (sizeof(Grads) - 1)) == 0;
    const bool low_aligned = !HAS_LOW || ((uintptr_t)low & (sizeof(Lows) - 1)) == 0;
    const uintptr_t floats =
        (uintptr_t)weight | (uintptr_t)exp_avg | (uintptr_t)exp_avg_sq | (AVERAGE ? (uintptr_t)average : 0);
    const bool aligned = (floats & (sizeof(Floats) - 1)) == 0;
    // Elements of this shard that are updated four at a time; the others one by one below.
    const int64_t n_vector = aligned ? n - n % VECTOR : 0;

    Floats w[GROUPS], m[GROUPS], v[GROUPS], a[GROUPS];
    Grads g[GROUPS];
#pragma unroll
    for (int u = 0; u < GROUPS; u++) {
        const int64_t i = start + (int64_t)(u * THREADS + threadIdx.x) * VECTOR;
        if (i < n_vector) {
            if (grad_aligned) {
                g[u] = *(const Grads*)(grad + i);
            } else {
#pragma unroll
                for (int k = 0; k < VECTOR; k++) g[u].v[k] = grad[i + k];
            }
            w[u] = *(const Floats*)(weight + i);
            m[u] = *(const Floats*)(exp_avg + i);
            v[u] = *(const Floats*)(exp_avg_sq + i);
            if constexpr (AVERAGE) a[u] = *(const Floats*)(average + i);
        }
    }
#pragma unroll
    for (int u = 0; u < GROUPS; u++) {
        const int64_t i = start + (int64_t)(u * THREADS + threadIdx.x) * VECTOR;
        if (i < n_vector) {
#pragma unroll
            for (int k = 0; k < VECTOR; k++) {
                adamw(load(g[u].v[k]), w[u].v[k], m[u].v[k], v[u].v[k], s);
                if constexpr (AVERAGE) update_average(a[u].v[k], w[u].v[k], s);
            }
            *(Floats*)(weight + i) = w[u];
            *(Floats*)(exp_avg + i) = m[u];
            *(Floats*)(exp_avg_sq + i) = v[u];
            if constexpr (AVERAGE) *(Floats*)(average + i) = a[u];
            if constexpr (HAS_LOW) {
                Lows out;
#pragma unroll
                for (int k = 0; k < VECTOR; k++) store(w[u].v[k], out.v[k]);
                if (low_aligned) {
                    store_vector(out, low + i);
                } else {
#pragma unroll
                    for (int k = 0; k < VECTOR; k++) low[i + k] = out.v[k];
                }
            }
        }
    }
    const int64_t end = start + ADAMW_TILE < n ? start + ADAMW_TILE : n;
#pragma unroll 1
    for (int64_t i = (start > n_vector ? start : n_vector) + threadIdx.x; i < end; i += THREADS) {
        float w1 = weight[i], m1 = exp_avg[i], v1 = exp_avg_sq[i];
        adamw(load(grad[i]), w1, m1, v1, s);
        weight[i] = w1;
        exp_avg[i] = m1;
        exp_avg_sq[i] = v1;
        if constexpr (AVERAGE) {
            float a1 = average[i];
            update_average(a1, w1, s);
            average[i] = a1;
        }
        if constexpr (HAS_LOW) store(w1, low[i]);
    }
}

// Eight threads share a run: a thread has four of its 32 columns and reads them row by row.
template <class G>
__device__ __forceinline__ void norm_tile(const Spans& spans, int64_t tile, double* partials) {
    constexpr int WIDTH = NORM_COLUMNS / VECTOR;
    typedef Pack<G, VECTOR> Grads;
    __shared__ double sums[NORM_RUNS];
    const Span& span = spans.items[find(spans, tile)];
    const G* x = (const G*)span.data;
    const int64_t n = span.numel;
    const int run = threadIdx.x / WIDTH, lane = threadIdx.x % WIDTH;
    int64_t i = (tile - span.first_tile) * NORM_TILE + (int64_t)run * (NORM_COLUMNS * NORM_ROWS) + lane * VECTOR;
    double sum[VECTOR] = {0.0, 0.0, 0.0, 0.0};
    const bool aligned = ((uintptr_t)x & (sizeof(Grads) - 1)) == 0;
#pragma unroll 4
    for (int row = 0; row < NORM_ROWS; row++, i += NORM_COLUMNS) {
        if (aligned && i + VECTOR <= n) {
            const Grads g = *(const Grads*)(x + i);
#pragma unroll
            for (int k = 0; k < VECTOR; k++) sum[k] = sum[k] + (double)load(g.v[k]) * (double)load(g.v[k]);
        } else {
#pragma unroll
            for (int k = 0; k < VECTOR; k++)
                if (i + k < n) sum[k] = sum[k] + (double)load(x[i + k]) * (double)load(x[i + k]);
        }
    }
    // Columns c and c + 16, then 8, then 4 lie in other threads; 2 and 1 in this one.
#pragma unroll
    for (int offset = WIDTH / 2; offset > 0; offset /= 2)
#pragma unroll
        for (int k = 0; k < VECTOR; k++) sum[k] = sum[k] + __shfl_down_sync(0xffffffffu, sum[k], offset, WIDTH);
    if (lane == 0) sums[run] = (sum[0] + sum[2]) + (sum[1] + sum[3]);
    __syncthreads();
    if (threadIdx.x < NORM_RUNS) {
        double total = sums[threadIdx.x];
#pragma unroll
        for (int offset = NORM_RUNS / 2; offset > 0; offset /= 2)
            total = total + __shfl_down_sync(0xffffffffu, total, offset, NORM_RUNS);
        if (threadIdx.x == 0) partials[tile] = total;
    }
}

// One block: the sum of all tiles.
__device__ __forceinline__ void sum_tiles(const double* partials, int64_t n, double* out) {
    __shared__ double sums[NORM_LANES];
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += NORM_LANES) sum = sum + partials[i];
    sums[threadIdx.x] = sum;
#pragma unroll 1
    for (int half = NORM_LANES / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] = sums[threadIdx.x] + sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) *out = sums[0];
}

// Elements `first_index` on of a tensor of 32-bit or 16-bit numbers; a block goes over blocks of 1024 elements.
template <class T>
__device__ __forceinline__ void digest_blocks(const T* x, int64_t n, uint64_t first_index, uint64_t* out) {
    typedef Pack<T, VECTOR> Vector;
    __shared__ uint64_t sums[THREADS / 32][2];
    const uint64_t column = threadIdx.x * VECTOR;
    uint32_t keys[2][VECTOR];
    uint64_t sum[2] = {0, 0};
#pragma unroll
    for (int k = 0; k < VECTOR; k++) {
        keys[0][k] = column_key(column + k, 0);
        keys[1][k] = column_key(column + k, 1);
    }
    const uint64_t end = first_index + (uint64_t)n, last_block = n ? (end - 1) / DIGEST_COLUMNS : 0;
    for (uint64_t block = first_index / DIGEST_COLUMNS + blockIdx.x; n && block <= last_block; block += gridDim.x) {
        const uint64_t index = block * DIGEST_COLUMNS + column;
        const T* from = x + (int64_t)(index - first_index);
        uint64_t part[2] = {0, 0};
        if (index >= first_index && index + VECTOR <= end && ((uintptr_t)from & (sizeof(Vector) - 1)) == 0) {
            const Vector values = *(const Vector*)from;
#pragma unroll
            for (int k = 0; k < VECTOR; k++) {
                part[0] += (uint64_t)values.v[k] * keys[0][k];
                part[1] += (uint64_t)values.v[k] * keys[1][k];
            }
        } else {
#pragma unroll
            for (int k = 0; k < VECTOR; k++)
                if (index + k >= first_index && index + k < end) {
                    part[0] += (uint64_t)from[k] * keys[0][k];
                    part[1] += (uint64_t)from[k] * keys[1][k];
                }
        }
        sum[0] += part[0] * block_key(block, 0);
        sum[1] += part[1] * block_key(block, 1);
    }
#pragma unroll
    for (int lane = 0; lane < 2; lane++) {
        for (int offset = 16; offset > 0; offset /= 2) sum[lane] += __shfl_down_sync(0xffffffffu, sum[lane], offset, 32);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32][lane] = sum[lane];
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        uint64_t total = 0;
        for (int warp = 0; warp < THREADS / 32; warp++) total += sums[warp][threadIdx.x];
        atomicAdd((unsigned long long*)&out[threadIdx.x], (unsigned long long)total);
    }
}

}  // namespace pathswitch
