// The few loops of the CPU backend that compilers do not vectorise well by themselves, in each instruction set's words.
#pragma once
#include "maths.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pathswitch {

// Asks for what will be read soon; the processor by itself begins anew at each page. Any address may be asked for.
inline void prefetch(const void* now) { __builtin_prefetch((const char*)now + 2048); }

// The same for loops that wait for memory alone: a line of the 64 KiB behind those that are read now, of eight stretches
// in turn, as more reads are under way at once from several pages than from one after the other.
inline void prefetch_strands(const void* now) {
    const uintptr_t line = (uintptr_t)now / 64, next = line / 1024 * 1024 + 1024;
    __builtin_prefetch((const void*)((next + line % 8 * 128 + line / 8 % 128) * 64), 0, 2);
}

// Numbers as float64, WIDTH at a time.
#if defined(__AVX512F__)
constexpr int WIDTH = 8;
typedef __m512d Doubles;
inline __m256i load_halves(const void* x) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)); }
inline Doubles doubles_of_f32(const void* x) { return _mm512_cvtps_pd(_mm256_loadu_ps((const float*)x)); }
inline Doubles doubles_of_bf16(const void* x) {
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(load_halves(x), 16)));
}
inline Doubles doubles_of_f16(const void* x) {
    return _mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)));
}
#elif defined(__AVX2__)
constexpr int WIDTH = 4;
typedef __m256d Doubles;
inline __m128i load_halves(const void* x) { return _mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)x)); }
inline Doubles doubles_of_f32(const void* x) { return _mm256_cvtps_pd(_mm_loadu_ps((const float*)x)); }
inline Doubles doubles_of_bf16(const void* x) {
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(load_halves(x), 16)));
}
inline Doubles doubles_of_f16(const void* x) {
    return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)x)));
}
#else
constexpr int WIDTH = 2;
typedef double Doubles __attribute__((vector_size(16)));
inline Doubles doubles_of_f32(const void* x) { return Doubles{((const float*)x)[0], ((const float*)x)[1]}; }
inline Doubles doubles_of_bf16(const void* x) {
    return Doubles{from_bf16(((const uint16_t*)x)[0]), from_bf16(((const uint16_t*)x)[1])};
}
inline Doubles doubles_of_f16(const void* x) {
    return Doubles{from_f16(((const uint16_t*)x)[0]), from_f16(((const uint16_t*)x)[1])};
}
#endif

// Whole arrays of float16; compilers vectorise bfloat16's shifts by themselves.
inline void floats_of_f16(const uint16_t* x, float* out, int n) {
    int i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(x + i))));
#endif
    for (; i < n; i++) out[i] = from_f16(x[i]);
}
inline void f16_of_floats(const float* x, uint16_t* out, int n) {
    int i = 0;
#if defined(__AVX2__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i*)(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) out[i] = to_f16(x[i]);
}

// Numbers of 32 bits, COUNT at a time, and the 64-bit products of those in even places.
#if defined(__AVX512F__)
constexpr int COUNT = 16;
typedef __m512i Words;
inline Words load_words(const uint32_t* x) { return _mm512_loadu_si512(x); }
inline Words load_words(const uint16_t* x) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)); }
inline Words multiply_even(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words add_64(Words a, Words b) { return _mm512_add_epi64(a, b); }
inline Words odd_words(Words x) { return _mm512_srli_epi64(x, 32); }
#elif defined(__AVX2__)
constexpr int COUNT = 8;
typedef __m256i Words;
inline Words load_words(const uint32_t* x) { return _mm256_loadu_si256((const Words*)x); }
inline Words load_words(const uint16_t* x) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)); }
inline Words multiply_even(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words add_64(Words a, Words b) { return _mm256_add_epi64(a, b); }
inline Words odd_words(Words x) { return _mm256_srli_epi64(x, 32); }
#endif

}  // namespace pathswitch
