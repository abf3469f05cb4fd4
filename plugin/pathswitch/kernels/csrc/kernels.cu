// The kernels by name. PS_KERNEL(name, parameters, call) is all that the tests replace to run them on a CPU.
#include "kernels.cuh"

using namespace pathswitch;

#if !defined(PS_KERNEL)
#define PS_KERNEL(name, parameters, call) \
    extern "C" __global__ void __launch_bounds__(256) name parameters { call; }
#endif
#define PS_LIST(type) const __grid_constant__ type

PS_KERNEL(ps_prepare,
          (PS_LIST(Parameters) parameters, const PathDescriptor* path, Counters* counters, const GroupSettings* groups,
           const AverageSettings* averaging, PS_LIST(NormInput) input, StepScalars* out, int32_t is_last),
          (prepare(parameters, path, counters, groups, averaging, input, out, is_last)))

#define PS_ADAMW(name, G, L, AVERAGE)                                                     \
    PS_KERNEL(ps_adamw_##name, (PS_LIST(Shards) shards, const StepScalars* scalars), \
              (adamw_tile<G, L, AVERAGE>(shards, blockIdx.x, scalars)))
#define PS_ADAMW_LOW(name, G, L)        \
    PS_ADAMW(name, G, L, false)         \
    PS_ADAMW(name##_average, G, L, true)
#define PS_ADAMW_GRAD(name, G)             \
    PS_ADAMW_LOW(name##_none, G, none)     \
    PS_ADAMW_LOW(name##_f32, G, float)     \
    PS_ADAMW_LOW(name##_bf16, G, bf16)     \
    PS_ADAMW_LOW(name##_f16, G, f16)
PS_ADAMW_GRAD(f32, float)
PS_ADAMW_GRAD(bf16, bf16)
PS_ADAMW_GRAD(f16, f16)

#define PS_NORM(name, G)                                                          \
    PS_KERNEL(ps_norm_##name, (PS_LIST(Spans) spans, int64_t tiles_before, double* partials), \
              (norm_tile<G>(spans, tiles_before + blockIdx.x, partials)))
PS_NORM(f32, float)
PS_NORM(bf16, bf16)
PS_NORM(f16, f16)

PS_KERNEL(ps_sum_tiles, (const double* partials, int64_t n, double* out), (sum_tiles(partials, n, out)))

PS_KERNEL(ps_digest_32, (const uint32_t* x, int64_t n, uint64_t first_index, uint64_t* out),
          (digest_blocks(x, n, first_index, out)))
PS_KERNEL(ps_digest_16, (const uint16_t* x, int64_t n, uint64_t first_index, uint64_t* out),
          (digest_blocks(x, n, first_index, out)))
