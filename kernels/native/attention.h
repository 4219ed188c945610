// Attention, as attention.cpp has it and as attention_rows.cpp does.
#pragma once
#include "product.h"

struct Strides {  // elements; the features of a row lie side by side
  int64_t batch, head, row;
};

// What a call asks for: q [batch, heads, rows, features], k and v [batch, key_heads, keys, features], out like q. Each
// head of k and v serves heads / key_heads heads of q, one after another. Causal: row i is given the keys up to i.
struct Attention {
  int64_t batch, heads, key_heads, rows, keys, features;
  Strides q, k, v, out, mask;
  int dtype;       // float32 or bfloat16
  int has_mask, mask_dtype;  // what is added to scores [batch, heads, rows, keys], if there is a mask
  int causal;
  float scale;
};

constexpr int NO_MASK = -1;
constexpr float LOG2_E = 1.44269504f;

// 2^x for x <= 0, to 8e-5, relative, which bfloat16 does not show, or to 8e-8; 0 below 2^-126, since numbers that small take
// a processor a hundred times as long. That of a NaN is one.
template <int DTYPE>
static inline __m512 power_of_two(__m512 x) {
  const __m512 rounder = _mm512_set1_ps(ROUNDER);
  const __mmask16 large = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  const __m512 n = _mm512_add_ps(x, rounder), r = _mm512_sub_ps(x, _mm512_sub_ps(n, rounder));
  constexpr float few[] = {0.05517166f, 0.24261112f, 0.69326099f, 0.99992807f};  // fitted, in Lawson's way
  constexpr float many[] = {0.00132765f, 0.00967554f, 0.05550713f, 0.2402212f, 0.69314697f, 1.00000007f};
  const __m512i power = _mm512_castps_si512(DTYPE == FLOAT32 ? polynomial(r, many) : polynomial(r, few));
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(large, power, _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}

// `units` shared out among threads: each has an `Attending`, by the dtypes of the call and of its mask, run its own. Returns
// what `done` does.
template <template <int, int> class Attending>
static inline int attend(const Attention& call, int64_t units, const void* q, const void* k, const void* v, const void* mask,
                         void* out, int threads) {
  int failed = 0;
  const auto run = [&](auto dtype, auto mask_dtype) {
#pragma omp parallel num_threads(team_for(call.batch * call.heads * call.rows, call.keys, call.features, threads)) reduction(| : failed)
    {
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      failed = done([&] {
        Attending<decltype(dtype)::value, decltype(mask_dtype)::value> own(call, q, k, v, mask, out);
        own.run(units * thread / team, units * (thread + 1) / team);
      });
    }
  };
  const auto masked = [&](auto mask_dtype) {
    if (call.dtype == FLOAT32) run(std::integral_constant<int, FLOAT32>(), mask_dtype);
    else run(std::integral_constant<int, BFLOAT16>(), mask_dtype);
  };
  if (mask) as_constant(call.mask_dtype, masked);
  else masked(std::integral_constant<int, NO_MASK>());
  return failed;
}

// For few rows: where they lie, and not in tiles. Returns what `done` does.
int attend_rows(const Attention& call, const void* q, const void* k, const void* v, const void* mask, void* out, int threads);
