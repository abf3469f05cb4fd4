"""Planted faults, each with the gate that must find it and the kernel that shows it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from toolchain import Source, package_source


@dataclass(frozen=True)
class Mutant:
    """One fault: in a file, a text that occurs there and what stands in its place (every time it occurs)."""

    name: str
    gate: str
    kernel: str
    before: str
    after: str
    file: str = "kernels.cuh"
    flags: tuple[str, ...] | None = None  # of nvcc, in place of the package's

    def source(self) -> Source:
        """Return the package's sources with the fault."""
        source = package_source()
        files = dict(source.files)
        if self.before:
            assert self.before in files[self.file], f"{self.name}: {self.file} has changed"
            files[self.file] = files[self.file].replace(self.before, self.after)
        return replace(source, files=tuple(files.items()))


_ADAMW, _AVERAGE, _FLOATS = "ps_adamw_bf16_bf16", "ps_adamw_f32_f16_average", "ps_adamw_f32_f32"
_NORM, _NORM_FLOATS, _DIGEST, _SUM = "ps_norm_bf16", "ps_norm_f32", "ps_digest_16", "ps_sum_tiles"
_NORM_BARRIER = "sums[run] = (sum[0] + sum[2]) + (sum[1] + sum[3]);\n    __syncthreads();"
_DIGEST_BARRIER = "    __syncthreads();\n    if (threadIdx.x < 2) {"
_INDEX = "(tile - shard.first_tile) * ADAMW_TILE"
_SUM_STEP = "        __syncthreads();\n        if (threadIdx.x < half)"

MUTANTS = [
    # Indices
    Mutant("int32 index of the update", "far", _ADAMW, _INDEX, "(int)((tile - shard.first_tile) * ADAMW_TILE)"),
    Mutant("uint32 index of the update", "far", _ADAMW, _INDEX, "(unsigned)((tile - shard.first_tile) * ADAMW_TILE)"),
    Mutant(
        "int32 number of elements",
        "far",
        _ADAMW,
        "const int64_t n = shard.numel,",
        "const int n = shard.numel; const int64_t",
    ),
    Mutant(
        "int32 index of the norm",
        "far",
        _NORM,
        "(tile - span.first_tile) * NORM_TILE",
        "(int)((tile - span.first_tile) * NORM_TILE)",
    ),
    Mutant(
        "int32 index of the digest",
        "far",
        _DIGEST,
        "x + (int64_t)(index - first_index)",
        "x + (int)(index - first_index)",
    ),
    Mutant("<= at the last vector", "ptx", _ADAMW, "if (i < n_vector)", "if (i <= n_vector)"),
    Mutant("<= at the last element", "ptx", _ADAMW, "i < end; i += THREADS", "i <= end; i += THREADS"),
    Mutant("<= at the last element, source", "sanitizer", _ADAMW, "i < end; i += THREADS", "i <= end; i += THREADS"),
    Mutant("<= in the norm", "ptx", _NORM, "if (i + k < n)", "if (i + k <= n)"),
    Mutant("<= in the digest", "ptx", _DIGEST, "index + k < end", "index + k <= end"),
    Mutant("vectors of the norm past the end", "ptx", _NORM, "aligned && i + VECTOR <= n", "aligned && i < n"),
    Mutant("the rest begins in the first tile", "ptx", _ADAMW, "(start > n_vector ? start : n_vector)", "n_vector"),
    Mutant("the wrong shard at a boundary", "standin", _ADAMW, "first_tile <= tile", "first_tile < tile"),
    Mutant(
        "partial sums by the span's tile",
        "ptx",
        _NORM,
        "partials[tile] = total",
        "partials[tile - span.first_tile] = total",
    ),
    # Alignment and vectors
    Mutant(
        "alignment of the gradient unchecked", "ptx", _ADAMW, "((uintptr_t)grad & (sizeof(Grads) - 1)) == 0", "true"
    ),
    Mutant(
        "alignment of the low precision unchecked", "ptx", _ADAMW, "((uintptr_t)low & (sizeof(Lows) - 1)) == 0", "true"
    ),
    Mutant("alignment of the float32 tensors unchecked", "ptx", _ADAMW, "(floats & (sizeof(Floats) - 1)) == 0", "true"),
    Mutant("alignment of the average left out", "ptx", _AVERAGE, "(AVERAGE ? (uintptr_t)average : 0)", "0"),
    Mutant("alignment in the norm unchecked", "ptx", _NORM, "((uintptr_t)x & (sizeof(Grads) - 1)) == 0", "true"),
    Mutant("alignment in the digest unchecked", "ptx", _DIGEST, "&& ((uintptr_t)from & (sizeof(Vector) - 1)) == 0", ""),
    Mutant("vector store where the gradient is aligned", "ptx", _ADAMW, "if (low_aligned)", "if (grad_aligned)"),
    Mutant(
        "scalar loads",
        "traffic",
        _ADAMW,
        "m[u] = *(const Floats*)(exp_avg + i);",
        "for (int k = 0; k < VECTOR; k++) m[u].v[k] = ((volatile float*)exp_avg)[i + k];",
    ),
    Mutant(
        "scalar loads, machine code",
        "machine code",
        _ADAMW,
        "m[u] = *(const Floats*)(exp_avg + i);",
        "for (int k = 0; k < VECTOR; k++) m[u].v[k] = ((volatile float*)exp_avg)[i + k];",
    ),
    Mutant("a plain vector store", "traffic", _ADAMW, "store_vector(out, low + i)", "*(Lows*)(low + i) = out"),
    Mutant(
        "eight elements in a row",
        "traffic",
        _FLOATS,
        "(u * THREADS + threadIdx.x) * VECTOR",
        "(threadIdx.x * GROUPS + u) * VECTOR",
    ),
    Mutant(
        "a second read of the weight",
        "traffic",
        _ADAMW,
        "*(Floats*)(exp_avg + i) = m[u];",
        "*(Floats*)(exp_avg + i) = m[u]; *(volatile float*)(weight + i);",
    ),
    Mutant(
        "arrays in local memory",
        "machine code",
        _ADAMW,
        "#pragma unroll\n    for (int u = 0",
        "#pragma unroll 1\n    for (int u = 0",
    ),
    Mutant("too many registers", "machine code", _ADAMW, "constexpr int GROUPS = 2;", "constexpr int GROUPS = 8;"),
    # Threads
    Mutant("no barrier in the norm", "standin", _NORM, _NORM_BARRIER, _NORM_BARRIER.replace("__syncthreads();", "")),
    Mutant("no barrier in the norm, PTX", "ptx", _NORM, _NORM_BARRIER, _NORM_BARRIER.replace("__syncthreads();", "")),
    Mutant(
        "no barrier in the digest", "ptx", _DIGEST, _DIGEST_BARRIER, _DIGEST_BARRIER.replace("__syncthreads();", "")
    ),
    Mutant("no barrier among the tiles", "ptx", _SUM, _SUM_STEP, _SUM_STEP.replace("__syncthreads();", "")),
    Mutant(
        "no barrier in the preparation", "standin", "ps_prepare", "__syncthreads();\n    if (is_last", "if (is_last"
    ),
    Mutant(
        "no barrier in the preparation, PTX", "ptx", "ps_prepare", "__syncthreads();\n    if (is_last", "if (is_last"
    ),
    Mutant(
        "a barrier for some of the threads",
        "ptx",
        _SUM,
        _SUM_STEP,
        "        if (threadIdx.x < half) __syncthreads();\n        if (threadIdx.x < half)",
    ),
    Mutant(
        "a shuffle for some of the lanes",
        "standin",
        _NORM,
        "if (threadIdx.x < NORM_RUNS) {",
        "if (threadIdx.x < NORM_RUNS / 2) {",
    ),
    Mutant(
        "a wrong offset of a shuffle",
        "standin",
        _NORM,
        "offset = WIDTH / 2; offset > 0",
        "offset = WIDTH / 2; offset > 1",
    ),
    Mutant(
        "a run that nobody writes", "ptx", _NORM, "if (lane == 0) sums[run]", "if (lane == 0 && run != 5) sums[run]"
    ),
    Mutant(
        "addition in place of atomicAdd",
        "ptx",
        _DIGEST,
        "atomicAdd((unsigned long long*)&out[threadIdx.x], (unsigned long long)total)",
        "out[threadIdx.x] += total",
    ),
    # Values
    Mutant(
        "every launch counts the step",
        "standin",
        "ps_prepare",
        "if (is_last && threadIdx.x == 0)",
        "if (threadIdx.x == 0)",
    ),
    Mutant("skip ignored", "standin", _ADAMW, "if (s.skip) return;", ""),
    Mutant(
        "the betas swapped", "standin", _ADAMW, "exp_avg = s.beta1 * exp_avg", "exp_avg = s.beta2 * exp_avg", "maths.h"
    ),
    Mutant(
        "the average of the old weight",
        "standin",
        _AVERAGE,
        "average = s.average_weight == 1.0f ? weight : moved",
        "average = moved",
        "maths.h",
    ),
    Mutant(
        "the warm-up one step late",
        "standin",
        "ps_prepare",
        "(double)(step + 1) / (double)path.warmup_steps",
        "(double)step / (double)path.warmup_steps",
        "maths.h",
    ),
    Mutant(
        "the decay one step early",
        "ptx",
        "ps_prepare",
        "path.decay_lrs[decayed_steps]",
        "path.decay_lrs[decayed_steps + 1]",
        "maths.h",
    ),
    Mutant("gradients scaled up to the norm", "standin", "ps_prepare", "if (clip > 1.0) clip = 1.0;", "", "maths.h"),
    Mutant(
        "squares in float32",
        "standin",
        _NORM_FLOATS,
        "(double)load(g.v[k]) * (double)load(g.v[k])",
        "(double)(load(g.v[k]) * load(g.v[k]))",
    ),
    Mutant(
        "one key for two blocks",
        "standin",
        _DIGEST,
        "mix((2 * block + lane + 1)",
        "mix((2 * (block / 2) + lane + 1)",
        "maths.h",
    ),
    Mutant("truncation to bfloat16", "rounding", _ADAMW, "cvt.rn.bf16.f32", "cvt.rz.bf16.f32"),
    Mutant(
        "an fma in the source",
        "rounding",
        _ADAMW,
        "s.beta1 * exp_avg + s.one_minus_beta1 * g",
        "fmaf(s.beta1, exp_avg, s.one_minus_beta1 * g)",
        "maths.h",
    ),
    Mutant(
        "an approximate root",
        "rounding",
        _ADAMW,
        "sqrtf(exp_avg_sq)",
        "__fsqrt_rn(exp_avg_sq) * __frsqrt_rn(1.0f)",
        "maths.h",
    ),
    Mutant("contraction to fma", "rounding", _ADAMW, "", "", flags=("-std=c++17", "-O3")),
    Mutant("fast maths", "rounding", _ADAMW, "", "", flags=("-std=c++17", "-O3", "-fmad=false", "--use_fast_math")),
]
