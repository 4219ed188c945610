// Loads, stores and small sums in AVX-512, for the three dtypes that activations come in. Arithmetic is in float32.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#include <new>
#include <type_traits>

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__) || !defined(__AVX512VNNI__)
#error "this CPU has no AVX-512 VNNI"
#endif

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// `work` of the dtype as a constant.
template <class Work>
static inline void as_constant(int dtype, const Work& work) {
  if (dtype == FLOAT32) return work(std::integral_constant<int, FLOAT32>());
  if (dtype == BFLOAT16) return work(std::integral_constant<int, BFLOAT16>());
  work(std::integral_constant<int, FLOAT16>());
}

constexpr int64_t bytes_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

// Which of 16 lanes hold something, when `left` elements are left.
static inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

static inline __m512 widen_bf16(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <int DTYPE>
static inline __m512 load(const void* from, int64_t at) {
  if (DTYPE == FLOAT32) return _mm512_loadu_ps((const float*)from + at);
  const __m256i half = _mm256_loadu_si256((const __m256i*)((const uint16_t*)from + at));
  return DTYPE == BFLOAT16 ? widen_bf16(half) : _mm512_cvtph_ps(half);
}

template <int DTYPE>
static inline __m512 load(const void* from, int64_t at, __mmask16 mask) {
  if (DTYPE == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float*)from + at);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)from + at);
  return DTYPE == BFLOAT16 ? widen_bf16(half) : _mm512_cvtph_ps(half);
}

static inline __m512 load(int dtype, const void* from, int64_t at, __mmask16 mask) {
  return dtype == FLOAT32    ? load<FLOAT32>(from, at, mask)
         : dtype == BFLOAT16 ? load<BFLOAT16>(from, at, mask)
                             : load<FLOAT16>(from, at, mask);
}

// Round to nearest even; a NaN stays one.
static inline __m256i narrow_bf16(__m512 value) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(value);
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000)), 16));
#endif
}

constexpr float ROUNDER = 3 << 22;  // a small float plus this has the nearest integer in its lowest bits

template <int DTYPE>
static inline __m256i narrow(__m512 value) {
  return DTYPE == BFLOAT16 ? narrow_bf16(value) : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}

template <int DTYPE>
static inline void store(void* to, int64_t at, __mmask16 mask, __m512 value) {
  if (DTYPE == FLOAT32)
    _mm512_mask_storeu_ps((float*)to + at, mask, value);
  else
    _mm256_mask_storeu_epi16((uint16_t*)to + at, mask, narrow<DTYPE>(value));
}

// 32 elements past the caches, to a multiple of 64 bytes.
template <int DTYPE>
static inline void stream(void* to, __m512 left, __m512 right) {
  if (DTYPE == FLOAT32) {
    _mm512_stream_ps((float*)to, left);
    _mm512_stream_ps((float*)to + 16, right);
  } else {
    const __m512i first = _mm512_castsi256_si512(narrow<DTYPE>(left));
    _mm512_stream_si512((__m512i*)to, _mm512_inserti64x4(first, narrow<DTYPE>(right), 1));
  }
}

template <int COUNT>
static inline __m512 polynomial(__m512 x, const float (&factors)[COUNT]) {  // the factor of the highest power first
  __m512 sum = _mm512_set1_ps(factors[0]);
#pragma GCC unroll 16
  for (int i = 1; i < COUNT; i++) sum = _mm512_fmadd_ps(sum, x, _mm512_set1_ps(factors[i]));
  return sum;
}

// To about 2e-7, relative; by Cody and Waite's reduction to +-ln 2 / 2 and a Taylor polynomial.
static inline __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(88), _mm512_max_ps(_mm512_set1_ps(-104), x));  // in this order a NaN goes through
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  constexpr float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  return _mm512_scalef_ps(polynomial(r, factors), n);
}

// The error function, to 2.2e-5, and exact from 3 on: x times a polynomial in x^2, which is fitted (in Lawson's way) where
// |x| < 3, and 1 there. Codes of 8 bits are a hundred times as rough.
static inline __m512 error_function(__m512 x) {
  constexpr float factors[] = {0.00755185972f, -0.0184362762f, 0.0230486873f,  -0.0389557827f, 0.0725854593f,
                               -0.111431187f,  0.157544318f,   -0.22870332f, 0.470129574f};
  x = _mm512_min_ps(_mm512_set1_ps(3), _mm512_max_ps(_mm512_set1_ps(-3), x));
  const __m512 u = _mm512_fmsub_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(2.0f / 9), _mm512_set1_ps(1));
  return _mm512_mul_ps(polynomial(u, factors), x);
}

// 1 / (1 + exp(-x)), to about 1e-7: the reciprocal is an estimate and a step of Newton's.
static inline __m512 sigmoid(__m512 x) {
  const __m512 sum = _mm512_add_ps(exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)), _mm512_set1_ps(1));
  const __m512 estimate = _mm512_rcp14_ps(sum);
  return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(sum, estimate, _mm512_set1_ps(2)));
}

enum Activation { NO_ACTIVATION = 0, RELU = 1, SILU = 2, GELU = 3, GELU_TANH = 4 };

static inline __m512 gelu(__m512 x) {
  const __m512 half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
  return _mm512_fmadd_ps(half, error_function(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678f))), half);
}

static __attribute__((noinline)) __m512 other_activation(__m512 x, int activation) {
  if (activation == RELU) return _mm512_max_ps(_mm512_setzero_ps(), x);
  if (activation == SILU) return _mm512_mul_ps(x, sigmoid(x));
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 z = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
  return _mm512_mul_ps(x, sigmoid(_mm512_mul_ps(z, _mm512_set1_ps(1.59576912f))));
}

// The one that most often follows a layer by itself is worth its code at every place: a sixth of its time.
static inline __attribute__((always_inline)) __m512 activated(__m512 x, int activation) {
  if (activation == NO_ACTIVATION) return x;
  return activation == GELU ? gelu(x) : other_activation(x, activation);
}

// sum + the products of four unsigned with four signed bytes. As an intrinsic, compilers were seen to copy every sum.
static inline __m512i dot(__m512i sum, __m512i u8, __m512i s8) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(s8));
  return sum;
}

// The largest magnitude of `count` elements, which are read here for the first time. Without their sign bit, floats
// compare as integers do.
template <int DTYPE>
static inline float absmax(const void* from, int64_t at, int64_t count) {
  constexpr int64_t step = 64 / bytes_of(DTYPE), ahead = 4096;  // bytes
  const char* p = (const char*)from + at * bytes_of(DTYPE);
  const __m512i magnitude = DTYPE == FLOAT32 ? _mm512_set1_epi32(0x7fffffff) : _mm512_set1_epi16(0x7fff);
  const auto larger = [&](__m512i a, __m512i b) {
    b = _mm512_and_si512(b, magnitude);
    return DTYPE == FLOAT32 ? _mm512_max_epu32(a, b) : _mm512_max_epu16(a, b);
  };
  __m512i best[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  int64_t i = 0;
  for (; i + 4 * step <= count; i += 4 * step, p += 256)
    for (int j = 0; j < 4; j++) {
      _mm_prefetch(p + 64 * j + ahead, _MM_HINT_T0);
      best[j] = larger(best[j], _mm512_loadu_si512(p + 64 * j));
    }
  for (; i + step <= count; i += step, p += 64) best[0] = larger(best[0], _mm512_loadu_si512(p));
  if (i < count)
    best[0] = larger(best[0], DTYPE == FLOAT32 ? _mm512_maskz_loadu_epi32((__mmask16)((1u << (count - i)) - 1), p)
                                               : _mm512_maskz_loadu_epi16((__mmask32)((1u << (count - i)) - 1), p));
  best[0] = larger(larger(best[0], best[1]), larger(best[2], best[3]));
  if (DTYPE == FLOAT32) {  // as integers to the end: a NaN is the largest of all, and must not get lost
    const uint32_t bits = _mm512_reduce_max_epu32(best[0]);
    float largest;
    memcpy(&largest, &bits, 4);
    return largest;
  }
  const __m256i halves = _mm256_max_epu16(_mm512_castsi512_si256(best[0]), _mm512_extracti64x4_epi64(best[0], 1));
  const uint16_t bits = (uint16_t)_mm512_reduce_max_epu32(_mm512_cvtepu16_epi32(halves));
  return _mm512_cvtss_f32(load<DTYPE>(&bits, 0, 1));
}

// Scratch memory of the calling thread, kept between calls: fresh pages cost more than the work done in them; but much
// memory only while it is needed. There is another one under another number. Throws std::bad_alloc.
constexpr int64_t MUCH = 64 << 20;  // bytes

template <int NUMBER = 0>
static inline char* scratch(int64_t bytes) {
  struct Buffer {
    char* at = nullptr;
    int64_t size = 0;
    ~Buffer() { free(at); }
  };
  static thread_local Buffer buffer;
  if (bytes > buffer.size || buffer.size > std::max(MUCH, 4 * bytes)) {
    free(buffer.at);
    buffer.size = 0;
    const int64_t size = (bytes + 4095) / 4096 * 4096;
    buffer.at = (char*)aligned_alloc(4096, size);
    if (!buffer.at) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.at;
}

// What C functions return: 0, or 1 where there was not enough memory.
template <class Work>
static inline int done(const Work& work) {
  try {
    work();
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
