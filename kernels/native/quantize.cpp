// Codes of weights in groups, with the best of some ranges for each: what packing.quantize_grouped does, in one pass.
#include <math.h>
#include <omp.h>
#include <vector>
#include "simd.h"

namespace {

constexpr float TINY = 1e-30f;

struct Group {
  float scale, zero, largest;  // code

  __m512 codes(__m512 values) const {
    const __m512 code = _mm512_roundscale_ps(_mm512_mul_ps(values, _mm512_set1_ps(1 / scale)), _MM_FROUND_TO_NEAREST_INT);
    return _mm512_min_ps(_mm512_set1_ps(largest), _mm512_max_ps(_mm512_setzero_ps(), _mm512_add_ps(code, _mm512_set1_ps(zero))));
  }
};

// What each of 16 lanes multiplies the range of a group with; lanes left over repeat the last.
struct Ratios {
  float ratio[16], per_code[16];

  Ratios(const double* ratios, int64_t from, int64_t tried, float largest) {
    for (int64_t i = 0; i < 16; i++) {
      const double own = ratios[from + i < tried ? from + i : tried - 1];
      ratio[i] = (float)own, per_code[i] = (float)(own / largest);
    }
  }
};

// The ranges lie side by side in the lanes, and the values come one after another: no sum has to be taken over lanes.
Group best_of(const float* values, int64_t count, float largest, const std::vector<Ratios>& ratios) {
  __m512 low = _mm512_setzero_ps(), high = low;  // zero stays representable
  for (int64_t k = 0; k < count; k += 16) {
    low = _mm512_min_ps(low, _mm512_loadu_ps(values + k));
    high = _mm512_max_ps(high, _mm512_loadu_ps(values + k));
  }
  const float least = _mm512_reduce_min_ps(low), range = _mm512_reduce_max_ps(high) - least;
  Group best = {1, 0, largest};
  float least_error = INFINITY;
  for (const Ratios& own : ratios) {
    const __m512 wanted = _mm512_mul_ps(_mm512_set1_ps(range), _mm512_loadu_ps(own.per_code));
    const __m512 scale = widen_bf16(narrow_bf16(_mm512_max_ps(wanted, _mm512_set1_ps(TINY))));
    const __m512 start = _mm512_div_ps(_mm512_mul_ps(_mm512_set1_ps(-least), _mm512_loadu_ps(own.ratio)), scale);
    const __m512 zero = _mm512_min_ps(_mm512_roundscale_ps(start, _MM_FROUND_TO_NEAREST_INT), _mm512_set1_ps(largest));
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1), scale), rounder = _mm512_set1_ps(ROUNDER);
    const __m512 first = _mm512_sub_ps(rounder, zero), last = _mm512_add_ps(first, _mm512_set1_ps(largest));
    const auto squared = [&](float value, __m512 sum) {
      const __m512 all = _mm512_set1_ps(value), code = _mm512_fmadd_ps(all, inverse, rounder);
      const __m512 held = _mm512_sub_ps(_mm512_min_ps(last, _mm512_max_ps(first, code)), rounder);
      const __m512 off = _mm512_fmsub_ps(held, scale, all);
      return _mm512_fmadd_ps(off, off, sum);
    };
    __m512 even = _mm512_setzero_ps(), odd = even;  // two sums: one would wait for itself
    for (int64_t k = 0; k < count; k += 2) even = squared(values[k], even), odd = squared(values[k + 1], odd);
    const __m512 errors = _mm512_add_ps(even, odd);
    const float error = _mm512_reduce_min_ps(errors);
    if (error < least_error) {
      const __mmask16 lane = 1 << __builtin_ctz(_mm512_cmpeq_ps_mask(errors, _mm512_set1_ps(error)));
      best.scale = _mm512_mask_reduce_add_ps(lane, scale), best.zero = _mm512_mask_reduce_add_ps(lane, zero);
      least_error = error;
    }
  }
  return best;
}

template <int DTYPE>
void run(const void* weight, int64_t rows, int64_t in_features, int64_t group_size, int64_t bits, const double* ratios,
         int64_t tried, uint8_t* codes, uint8_t* upper_bits, uint16_t* scale, uint8_t* zero_point, int threads) {
  const int64_t groups = in_features / group_size;
  const float largest = (float)((1 << bits) - 1);
  std::vector<Ratios> shrunk;
  for (int64_t i = 0; i < tried; i += 16) shrunk.emplace_back(ratios, i, tried, largest);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    float* const values = (float*)scratch(group_size * 4);
    for (int64_t g = 0; g < groups; g++) {
      const int64_t at = row * in_features + g * group_size;
      for (int64_t k = 0; k < group_size; k += 16) _mm512_storeu_ps(values + k, load<DTYPE>(weight, at + k));
      const Group group = best_of(values, group_size, largest, shrunk);
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
