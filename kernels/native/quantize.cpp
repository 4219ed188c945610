// Codes of weights in groups, with the best of some ranges for each: what packing.quantize_grouped does, in one pass.
#include <math.h>
#include <omp.h>
#include "simd.h"

namespace {

constexpr float TINY = 1e-30f;

struct Group {
  float scale, zero, largest;  // code

  __m512 codes(__m512 values) const {
    const __m512 code = _mm512_roundscale_ps(_mm512_mul_ps(values, _mm512_set1_ps(1 / scale)), _MM_FROUND_TO_NEAREST_INT);
    return _mm512_min_ps(_mm512_set1_ps(largest), _mm512_max_ps(_mm512_setzero_ps(), _mm512_add_ps(code, _mm512_set1_ps(zero))));
  }

  float error(const float* values, int64_t count) const {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < count; k += 16) {
      const __m512 value = _mm512_loadu_ps(values + k), code = _mm512_sub_ps(codes(value), _mm512_set1_ps(zero));
      const __m512 off = _mm512_fmsub_ps(code, _mm512_set1_ps(scale), value);
      sum = _mm512_fmadd_ps(off, off, sum);
    }
    return _mm512_reduce_add_ps(sum);
  }
};

Group best_of(const float* values, int64_t count, float largest, const double* ratios, int64_t tried) {
  __m512 low = _mm512_setzero_ps(), high = low;  // zero stays representable
  for (int64_t k = 0; k < count; k += 16) {
    low = _mm512_min_ps(low, _mm512_loadu_ps(values + k));
    high = _mm512_max_ps(high, _mm512_loadu_ps(values + k));
  }
  const float least = _mm512_reduce_min_ps(low), range = _mm512_reduce_max_ps(high) - least;
  Group best = {1, 0, largest};
  float least_error = INFINITY;
  for (int64_t i = 0; i < tried; i++) {
    const float scale = rounded_bf16(fmaxf(range * (float)(ratios[i] / largest), TINY));
    const Group group = {scale, fminf(nearbyintf(-least * (float)ratios[i] / scale), largest), largest};
    const float error = group.error(values, count);
    if (error < least_error) best = group, least_error = error;
  }
  return best;
}

template <int DTYPE>
void run(const void* weight, int64_t rows, int64_t in_features, int64_t group_size, int64_t bits, const double* ratios,
         int64_t tried, uint8_t* codes, uint8_t* upper_bits, uint16_t* scale, uint8_t* zero_point, int threads) {
  const int64_t groups = in_features / group_size;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    float* const values = (float*)scratch(group_size * 4);
    for (int64_t g = 0; g < groups; g++) {
      const int64_t at = row * in_features + g * group_size;
      for (int64_t k = 0; k < group_size; k += 16) _mm512_storeu_ps(values + k, load<DTYPE>(weight, at + k));
      const Group group = best_of(values, group_size, (float)((1 << bits) - 1), ratios, tried);
      store<BFLOAT16>(scale, row * groups + g, 1, _mm512_set1_ps(group.scale));
      zero_point[row * groups + g] = (uint8_t)group.zero;
      for (int64_t k = 0; k < group_size; k += 16) {  // two codes a byte: the even one in the low half
        const __m512i own = _mm512_cvtps_epi32(group.codes(_mm512_loadu_ps(values + k)));
        for (int64_t bit = 4; bit < bits; bit++) {
          const __mmask16 set = _mm512_test_epi32_mask(own, _mm512_set1_epi32(1 << bit));
          memcpy(upper_bits + ((row * (bits - 4) + bit - 4) * in_features + g * group_size + k) / 8, &set, 2);
        }
        const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_and_si512(own, _mm512_set1_epi32(15)));
        const __m128i pairs = _mm_or_si128(bytes, _mm_srli_epi16(bytes, 4));
        _mm_storel_epi64((__m128i*)(codes + (at + k) / 2), _mm_cvtepi16_epi8(pairs));
      }
    }
  }
}

}  // namespace

// `group_size` is a multiple of 16 that divides in_features, `bits` 4 to 6; of the ranges times `ratios`, that of the
// least squared error is taken.
extern "C" void autoplan_quantize_grouped(const void* weight, int dtype, int64_t rows, int64_t in_features, int64_t group_size,
                                          int64_t bits, const double* ratios, int64_t tried, uint8_t* codes, uint8_t* upper_bits,
                                          uint16_t* scale, uint8_t* zero_point, int threads) {
  const auto run_as = dtype == FLOAT32 ? run<FLOAT32> : dtype == BFLOAT16 ? run<BFLOAT16> : run<FLOAT16>;
  run_as(weight, rows, in_features, group_size, bits, ratios, tried, codes, upper_bits, scale, zero_point, threads);
}
