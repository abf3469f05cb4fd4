// The CPU backend: the functions of maths.h over tensor lists, on all threads, vectorised by the compiler.
#include "vectors.h"

using namespace pathswitch;

#define PS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t CHUNK = 16384;  // elements that one thread updates at a time; the result does not depend on it
static_assert(CHUNK == NORM_TILE, "a chunk of a norm is a tile");

enum Type : int32_t { NONE = -1, F32 = 0, BF16 = 1, F16 = 2 };

template <int TYPE>
inline float load(const void* data, int64_t i) {
    return TYPE == F32 ? ((const float*)data)[i] : from_bf16(((const uint16_t*)data)[i]);
}

template <int TYPE>
inline void store(float value, void* data, int64_t i) {
    if (TYPE == F32) ((float*)data)[i] = value;
    if (TYPE == BF16) ((uint16_t*)data)[i] = to_bf16(value);
}

template <int G, int L, bool AVERAGE>
void update_elements(const void* __restrict grad, float* __restrict weight, float* __restrict exp_avg,
                     float* __restrict exp_avg_sq, void* __restrict low, float* __restrict average, int64_t n,
                     const StepScalars& s) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float w = weight[i], m = exp_avg[i], v = exp_avg_sq[i];
        adamw(load<G>(grad, i), w, m, v, s);
        weight[i] = w;
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        if (AVERAGE) {
            float a = average[i];
            update_average(a, w, s);
            average[i] = a;
        }
        store<L>(w, low, i);
    }
}

constexpr int64_t type_bytes(int type) { return type == NONE ? 0 : type == F32 ? 4 : 2; }

// float16 passes through float32 a little at a time, in the first cache.
template <int G, int L, bool AVERAGE>
void update(const Shard& shard, int64_t start, int64_t end, const StepScalars s) {
    constexpr bool STAGED = G == F16 || L == F16;
    constexpr int GRAD = G == F16 ? F32 : G, LOW = L == F16 ? F32 : L;
    const int64_t step = STAGED ? 1024 : end - start;
    float grads[STAGED ? 1024 : 1], lows[STAGED ? 1024 : 1];
    for (int64_t i = start; i < end; i += step) {
        const int64_t n = i + step < end ? step : end - i;
        const void* grad = (const char*)shard.grad + i * type_bytes(G);
        void* low = (char*)shard.low + i * type_bytes(L);
        if (G == F16) floats_of_f16((const uint16_t*)grad, grads, (int)n);
        update_elements<GRAD, LOW, AVERAGE>(G == F16 ? grads : grad, shard.weight + i, shard.exp_avg + i,
                                            shard.exp_avg_sq + i, L == F16 ? lows : low,
                                            AVERAGE ? shard.average + i : nullptr, n, s);
        if (L == F16) f16_of_floats(lows, (uint16_t*)low, (int)n);
    }
}

typedef void (*Update)(const Shard&, int64_t, int64_t, const StepScalars);

template <int G, int L>
Update choose(bool average) {
    return average ? update<G, L, true> : update<G, L, false>;
}

template <int G>
Update choose(int low, bool average) {
    switch (low) {
        case NONE: return choose<G, NONE>(average);
        case F32: return choose<G, F32>(average);
        case BF16: return choose<G, BF16>(average);
        default: return choose<G, F16>(average);
    }
}

// Halves an array by adding its upper half to its lower one, until one number is left.
template <int N>
inline double sum_by_halves(double* x) {
#pragma GCC unroll 8
    for (int half = N / 2; half > 0; half /= 2)
        for (int c = 0; c < half; c++) x[c] = x[c] + x[c + half];
    return x[0];
}

template <int TYPE>
inline Doubles load_doubles(const void* data, int64_t i) {
    if (TYPE == F32) return doubles_of_f32((const float*)data + i);
    const uint16_t* halves = (const uint16_t*)data + i;
    return TYPE == BF16 ? doubles_of_bf16(halves) : doubles_of_f16(halves);
}

template <int TYPE>
double norm_run(const void* data, int64_t start, int64_t end) {
    Doubles sum[NORM_COLUMNS / WIDTH] = {};
    double columns[NORM_COLUMNS] = {};
    if (start + NORM_ROWS * NORM_COLUMNS <= end) {
        for (int row = 0; row < NORM_ROWS; row++) {
            const int64_t first = start + row * NORM_COLUMNS;
            for (int64_t line = 0; line < NORM_COLUMNS * type_bytes(TYPE); line += 64) {
                const char* now = (const char*)data + first * type_bytes(TYPE) + line;
                TYPE == F32 ? prefetch_strands(now) : prefetch(now);
            }
#pragma GCC unroll 16
            for (int c = 0; c < NORM_COLUMNS / WIDTH; c++) {
                const Doubles x = load_doubles<TYPE>(data, first + c * WIDTH);
                sum[c] = sum[c] + x * x;
            }
        }
        memcpy(columns, sum, sizeof columns);
    } else {
        for (int64_t i = start; i < end; i++) {
            const double x = TYPE == F16 ? (double)from_f16(((const uint16_t*)data)[i]) : (double)load<TYPE>(data, i);
            double& column = columns[(i - start) % NORM_COLUMNS];
            column = column + x * x;
        }
    }
    return sum_by_halves<NORM_COLUMNS>(columns);
}

template <int TYPE>
double norm_tile(const Span& span, int64_t start) {
    double sums[NORM_RUNS] = {};
    for (int run = 0; run < NORM_RUNS; run++) {
        const int64_t first = start + run * NORM_ROWS * NORM_COLUMNS;
        if (first < span.numel) sums[run] = norm_run<TYPE>(span.data, first, span.numel);
    }
    return sum_by_halves<NORM_RUNS>(sums);
}

struct ColumnKeys {
    alignas(64) uint32_t lanes[2][DIGEST_COLUMNS];
    ColumnKeys() {
        for (int lane = 0; lane < 2; lane++)
            for (int column = 0; column < DIGEST_COLUMNS; column++) lanes[lane][column] = column_key(column, lane);
    }
};
const ColumnKeys KEYS;

// The sum of bits * column key over n elements from a block's column `first` on, in two lanes.
template <class T>
void digest_columns(const T* __restrict x, int first, int n, uint64_t* sum) {
    sum[0] = sum[1] = 0;
    int c = 0;
#if defined(__AVX2__)
    Words products[2] = {}, odd_products[2] = {};
    for (; c + COUNT <= n; c += COUNT) {
        prefetch_strands(x + c);
        const Words bits = load_words(x + c), odd = odd_words(bits);
        for (int lane = 0; lane < 2; lane++) {
            const Words keys = load_words(KEYS.lanes[lane] + first + c);
            products[lane] = add_64(products[lane], multiply_even(bits, keys));
            odd_products[lane] = add_64(odd_products[lane], multiply_even(odd, odd_words(keys)));
        }
    }
    for (int lane = 0; lane < 2; lane++) {
        uint64_t parts[COUNT / 2];
        const Words both = add_64(products[lane], odd_products[lane]);
        memcpy(parts, &both, sizeof(Words));
        for (uint64_t part : parts) sum[lane] += part;
    }
#endif
    for (; c < n; c++)
        for (int lane = 0; lane < 2; lane++) sum[lane] += (uint64_t)x[c] * KEYS.lanes[lane][first + c];
}

template <class T>
void digest(const T* x, int64_t n, uint64_t first_index, uint64_t* out, int n_threads) {
    const int64_t head = (int64_t)(first_index % DIGEST_COLUMNS), n_blocks = (head + n + DIGEST_COLUMNS - 1) / DIGEST_COLUMNS;
    uint64_t sum0 = 0, sum1 = 0;
#pragma omp parallel for schedule(static) num_threads(n_threads) reduction(+ : sum0, sum1) if (n > CHUNK)
    for (int64_t b = 0; b < n_blocks; b++) {
        const int64_t start = b == 0 ? 0 : b * DIGEST_COLUMNS - head;
        const int64_t end = (b + 1) * DIGEST_COLUMNS - head < n ? (b + 1) * DIGEST_COLUMNS - head : n;
        uint64_t sum[2];
        digest_columns(x + start, b == 0 ? (int)head : 0, (int)(end - start), sum);
        const uint64_t block = first_index / DIGEST_COLUMNS + (uint64_t)b;
        sum0 += sum[0] * block_key(block, 0);
        sum1 += sum[1] * block_key(block, 1);
    }
    out[0] += sum0;
    out[1] += sum1;
}

}  // namespace

PS_EXPORT void ps_prepare(const Parameter* parameters, int64_t count, const PathDescriptor* path, Counters* counters,
                          const GroupSettings* groups, const AverageSettings* averaging, const NormInput* input,
                          StepScalars* out) {
    if (must_skip(*input)) {
        for (int64_t i = 0; i < count; i++) out[i].skip = 1;
        counters->skipped_steps++;
        return;
    }
    const double lr = path_lr(*path, counters->step);
    for (int64_t i = 0; i < count; i++) {
        const int64_t adam_step = (int64_t)*parameters[i].step + 1;
        out[i] = step_scalars(groups[parameters[i].group], *averaging, *input, lr, adam_step);
        *parameters[i].step = (float)adam_step;
    }
    counters->step++;
}

// The tiles of the shards' first_tile have 16384 elements here.
PS_EXPORT void ps_adamw(const Shard* shards, int64_t count, int64_t n_tiles, int32_t grad_type, int32_t low_type,
                        int32_t average, const StepScalars* scalars, int32_t n_threads) {
    const Update update = grad_type == F32    ? choose<F32>(low_type, average)
                          : grad_type == BF16 ? choose<BF16>(low_type, average)
                                              : choose<F16>(low_type, average);
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_tiles > 1)
    for (int64_t tile = 0; tile < n_tiles; tile++) {
        int64_t s = 0;
        for (int64_t high = count - 1; s < high;) {
            const int64_t middle = (s + high + 1) / 2;
            if (shards[middle].first_tile <= tile)
                s = middle;
            else
                high = middle - 1;
        }
        const Shard& shard = shards[s];
        const int64_t start = (tile - shard.first_tile) * CHUNK;
        const int64_t end = start + CHUNK < shard.numel ? start + CHUNK : shard.numel;
        if (!scalars[shard.scalars].skip) update(shard, start, end, scalars[shard.scalars]);
    }
}

PS_EXPORT void ps_norm(const Span* spans, int64_t count, int32_t type, double* partials, int32_t n_threads) {
    for (int64_t s = 0; s < count; s++) {
        const Span& span = spans[s];
        const int64_t n_tiles = (span.numel + NORM_TILE - 1) / NORM_TILE;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_tiles > 1)
        for (int64_t tile = 0; tile < n_tiles; tile++) {
            const int64_t start = tile * NORM_TILE;
            partials[span.first_tile + tile] = type == F32    ? norm_tile<F32>(span, start)
                                               : type == BF16 ? norm_tile<BF16>(span, start)
                                                              : norm_tile<F16>(span, start);
        }
    }
}

PS_EXPORT void ps_sum_tiles(const double* partials, int64_t n, double* out) {
    double sums[NORM_LANES] = {};
    for (int64_t i = 0; i < n; i++) sums[i % NORM_LANES] = sums[i % NORM_LANES] + partials[i];
    *out = sum_by_halves<NORM_LANES>(sums);
}

PS_EXPORT void ps_digest(const void* x, int64_t n, int32_t element_bytes, uint64_t first_index, uint64_t* out,
                         int32_t n_threads) {
    if (element_bytes == 4)
        digest((const uint32_t*)x, n, first_index, out, n_threads);
    else
        digest((const uint16_t*)x, n, first_index, out, n_threads);
}
