// The update of one parameter, the scalars of one step and the digest of one element, as pure functions.
//
// Every backend compiles these: the CUDA kernels (nvcc, NVRTC), the kernels' execution on a CPU in the tests, and the
// CPU backend. Only operations that IEEE 754 rounds correctly occur (+ - * / sqrt), and none is contracted to an fma
// (nvcc -fmad=false, g++ -ffp-contract=off), so all give the same bits, and so does reference.py.
#pragma once

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#else
#include <math.h>
#include <stdint.h>
#include <string.h>
#endif

#if defined(__CUDACC__)
#define PS_INLINE __host__ __device__ __forceinline__
#else
#define PS_INLINE inline __attribute__((always_inline))
#endif

namespace pathswitch {

// A path's LR as a function of the step, in 64 bytes of device memory: writing them anew switches the path.
struct PathDescriptor {
    double max_lr, init_lr, final_lr;
    int64_t warmup_steps, fork_step, decay_steps;
    const double* decay_lrs;  // the LR of each of the decay_steps, as the schedule gives it
    int64_t reserved;
};

struct Counters {
    int64_t step;           // updates done on the path: the next update uses lr(step)
    int64_t skipped_steps;  // updates left out, for gradients that are not finite
};

// What the parameters of one group have in common.
struct GroupSettings {
    double lr_multiple, beta1, beta2, eps, weight_decay;
    double max_norm;  // gradients are clipped to this norm; 0: they are not
    int64_t norm;     // which of the sums of squares is this group's
    int64_t reserved;
};

// The running average of the weights: constant weight, or one per step from start_step on (0 outside of them).
struct AverageSettings {
    const double* weights;
    int64_t start_step, n_weights;
    double weight;
};

// What one update needs besides its four numbers; written by prepare, read by every thread.
struct StepScalars {
    double lr;
    float grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, shrinkage, step_size, inv_sqrt_correction2;
    float average_weight;
    int32_t skip;
    int32_t reserved[3];
};

// A contiguous piece of a tensor list; first_tile counts the tiles of all pieces before it.
struct Span {
    const void* data;
    int64_t numel, first_tile;
};

// The same for one update: grad and low may start at any element, the float32 tensors at a multiple of 4 bytes.
struct Shard {
    const void* grad;
    float *weight, *exp_avg, *exp_avg_sq;
    void* low;       // the weight in the precision of the model; null if it has none of its own
    float* average;  // null if none is kept
    int64_t numel, first_tile, scalars;
};

struct Parameter {
    float* step;  // updates done, as torch counts them
    int64_t group;
};

struct NormInput {
    const double* sums_of_squares;  // one per norm, summed over all ranks; null: gradients are neither clipped nor checked
    int64_t n_norms;
    const float* inv_scale;  // 1 / loss scale; null: 1
    const float* found_inf;  // not 0: somebody has found gradients that are not finite; may be null
};

PS_INLINE double power(double base, int64_t exponent) {
    double result = 1.0;
    for (; exponent > 0; exponent >>= 1) {
        if (exponent & 1) result = result * base;
        base = base * base;
    }
    return result;
}

PS_INLINE double path_lr(const PathDescriptor& path, int64_t step) {
    if (step < path.fork_step) {
        if (step >= path.warmup_steps - 1) return path.max_lr;
        return path.init_lr + (path.max_lr - path.init_lr) * (double)(step + 1) / (double)path.warmup_steps;
    }
    const int64_t decayed_steps = step - path.fork_step;
    return decayed_steps < path.decay_steps ? path.decay_lrs[decayed_steps] : path.final_lr;
}

PS_INLINE double average_weight(const AverageSettings& average, int64_t updates_done) {
    const int64_t index = updates_done - average.start_step;
    if (index < 0) return 0.0;
    if (average.weights == nullptr) return average.weight;
    return index < average.n_weights ? average.weights[index] : 0.0;
}

PS_INLINE bool is_finite(double value) { return value - value == 0.0; }

PS_INLINE double scale_back(const NormInput& input) { return input.inv_scale ? (double)*input.inv_scale : 1.0; }

PS_INLINE bool must_skip(const NormInput& input) {
    if (input.found_inf && *input.found_inf != 0.0f) return true;
    if (!input.sums_of_squares) return false;
    for (int64_t i = 0; i < input.n_norms; i++)
        if (!is_finite(sqrt(input.sums_of_squares[i]) * scale_back(input))) return true;
    return false;
}

// The scalars of the update number `adam_step` (from 1 on) of a parameter in a group.
PS_INLINE StepScalars step_scalars(const GroupSettings& group, const AverageSettings& average, const NormInput& input,
                                   double path_lr, int64_t adam_step) {
    StepScalars out = {};
    const double inv_scale = scale_back(input);
    double clip = 1.0;
    if (input.sums_of_squares && group.max_norm > 0.0) {
        const double norm = sqrt(input.sums_of_squares[group.norm]) * inv_scale;
        clip = group.max_norm / (norm + 1e-6);
        if (clip > 1.0) clip = 1.0;
    }
    out.lr = group.lr_multiple * path_lr;
    out.grad_scale = (float)(clip * inv_scale);
    out.beta1 = (float)group.beta1;
    out.one_minus_beta1 = (float)(1.0 - group.beta1);
    out.beta2 = (float)group.beta2;
    out.one_minus_beta2 = (float)(1.0 - group.beta2);
    out.eps = (float)group.eps;
    out.shrinkage = (float)(out.lr * group.weight_decay);
    out.step_size = (float)(out.lr / (1.0 - power(group.beta1, adam_step)));
    out.inv_sqrt_correction2 = (float)(1.0 / sqrt(1.0 - power(group.beta2, adam_step)));
    out.average_weight = (float)average_weight(average, adam_step - 1);
    return out;
}

// One parameter: AdamW (Loshchilov and Hutter, arXiv 1711.05101) with decoupled weight decay.
PS_INLINE void adamw(float gradient, float& weight, float& exp_avg, float& exp_avg_sq, const StepScalars& s) {
    const float g = gradient * s.grad_scale;
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * g;
    exp_avg_sq = s.beta2 * exp_avg_sq + (s.one_minus_beta2 * g) * g;
    const float denominator = sqrtf(exp_avg_sq) * s.inv_sqrt_correction2 + s.eps;
    // One rounding at the weight's own magnitude, not two.
    weight = weight - (s.shrinkage * weight + s.step_size * (exp_avg / denominator));
}

PS_INLINE void update_average(float& average, float weight, const StepScalars& s) {
    const float moved = average + s.average_weight * (weight - average);
    average = s.average_weight == 1.0f ? weight : moved;
}

PS_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

PS_INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

PS_INLINE float from_bf16(uint16_t half) { return float_of((uint32_t)half << 16); }

PS_INLINE uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (uint16_t)rounded;
}

PS_INLINE float from_f16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, magnitude = (uint32_t)(half & 0x7fffu) << 13;
    // 2^112 moves the exponent's bias from 15 to 127, and makes subnormal halves normal floats, exactly.
    const float scaled = float_of(magnitude) * 5.192296858534828e33f;
    const uint32_t special = magnitude | 0x7f800000u;
    return float_of(sign | (magnitude >= 0x0f800000u ? special : bits_of(scaled)));
}

PS_INLINE uint16_t to_f16(float value) {
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 puts the last bit of a subnormal half at a float's last bit: the addition rounds.
    const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7fffu : half;
    return (uint16_t)(sign | half);
}

// The norm's order of summation is part of its definition: a run of 16 rows of 32 squares, added row by row and then
// over the columns by halves; 32 runs are a tile, added by halves; tiles are added in 256 columns, then by halves.
constexpr int NORM_COLUMNS = 32, NORM_ROWS = 16, NORM_RUNS = 32, NORM_LANES = 256;
constexpr int NORM_TILE = NORM_COLUMNS * NORM_ROWS * NORM_RUNS;

// The digest of a tensor: the sum over its elements of bits * key(index), modulo 2^64, in two lanes. It does not depend
// on how a tensor is cut or in which order the pieces are added. A key is a column's, of 32 bits, so that the product is
// exact and no change of one element gets lost in it, times a block's, which is odd.
constexpr int DIGEST_COLUMNS = 1024;

PS_INLINE uint64_t mix(uint64_t z) {  // the finalizer of SplitMix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

PS_INLINE uint32_t column_key(uint64_t column, int lane) {
    return (uint32_t)(mix((2 * column + lane + 1) * 0x9e3779b97f4a7c15ull) >> 32);
}

PS_INLINE uint64_t block_key(uint64_t block, int lane) {
    return mix((2 * block + lane + 1) * 0xd1342543de82ef95ull) | 1;
}

}  // namespace pathswitch
