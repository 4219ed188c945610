// int8 weights and activations in one call: rows quantized as they come, int32 product, scales and bias at its end.
#include <omp.h>
#include "product.h"

namespace {

// The codes of one row, by absmax / 127, into its place in a panel; its scale in float32.
template <int DTYPE>
void quantize(const void* x, int64_t row, int64_t in_features, char* codes, float* scale) {
  const int64_t at = row * in_features;
  const float largest = absmax<DTYPE>(x, at, in_features) * (1.0f / 127);
  *scale = largest < 1e-30f ? 1e-30f : largest;  // a row of zeros; a NaN goes through
  const __m512 inverse = _mm512_set1_ps(1 / *scale);
#ifdef __AMX_INT8__
  const __m512i excess = _mm512_setzero_si512();
#else
  const __m512i excess = _mm512_set1_epi8((char)128);
#endif
  const auto code = [&](__m512 value) { return _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse)); };
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t k = 0;
  for (; k + 64 <= in_features; k += 64, codes += TILE) {
    const __m512i a = code(load<DTYPE>(x, at + k)), b = code(load<DTYPE>(x, at + k + 16));
    const __m512i c = code(load<DTYPE>(x, at + k + 32)), d = code(load<DTYPE>(x, at + k + 48));
    const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    _mm512_store_si512(codes, _mm512_xor_si512(_mm512_permutexvar_epi32(in_order, packed), excess));
  }
  if (k < in_features) {
    alignas(64) int8_t last[64] = {};
    for (int64_t j = 0; k + j < in_features; j += 16)
      _mm_store_si128((__m128i*)(last + j), _mm512_cvtsepi32_epi8(code(load<DTYPE>(x, at + k + j, lanes(in_features - k - j)))));
    _mm512_store_si512(codes, _mm512_xor_si512(_mm512_load_si512(last), excess));
  }
}

constexpr int64_t GROUP = 128 << 10;      // bytes of codes that stay in the second-level cache beside the weights
constexpr int64_t FEW_WEIGHTS = 1 << 20;  // bytes of weights that do

// Each thread takes rows, when it can keep the weights close or the rows are many; else each takes output channels.
template <int DTYPE>
void run(const void* x, const char* weight, const int32_t* start, Epilogue e, int64_t rows, int64_t in_features,
         int threads) {
  const int64_t steps = ceil_div(in_features, 64), strips = ceil_div(e.out_features, STRIP);
  const int64_t blocks = ceil_div(rows, BLOCK_ROWS), block_bytes = 2 * steps * TILE;
  const bool by_rows = blocks >= 2 * threads && (strips * block_bytes <= FEW_WEIGHTS || blocks >= 32 * threads);
  const int64_t share = GROUP / block_bytes > 0 ? GROUP / block_bytes : 1, group = by_rows ? share : 4 * share;
  const int64_t held = by_rows ? group * threads : blocks;  // blocks of codes at a time
  char* const codes = scratch(held * block_bytes + rows * 4);
  float* const row_scale = (float*)(codes + held * block_bytes);
  e.row_scale = row_scale;
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t first = by_rows ? blocks * thread / team : 0, end = by_rows ? blocks * (thread + 1) / team : blocks;
    const int64_t left = by_rows ? 0 : strips * thread / team, right = by_rows ? strips : strips * (thread + 1) / team;
    char* const own = codes + (by_rows ? thread * group * block_bytes : 0);
    const auto quantize_rows = [&](int64_t from, int64_t to, int64_t origin) {
      for (int64_t r = from; r < to; r++)
        quantize<DTYPE>(x, r, in_features, own + (r - origin) / 16 * steps * TILE + r % 16 * 64, row_scale + r);
    };
    Products<Int8, DTYPE> products(e, rows);
    if (!by_rows) {
      quantize_rows(rows * thread / team, rows * (thread + 1) / team, 0);
#pragma omp barrier
    }
    for (int64_t b = first; b < end; b += group) {
      const int64_t last = b + group < end ? b + group : end, origin = by_rows ? b : 0;
      if (by_rows) quantize_rows(b * BLOCK_ROWS, last * BLOCK_ROWS < rows ? last * BLOCK_ROWS : rows, b * BLOCK_ROWS);
      for (int64_t s = left; s < right; s++) {
        products.channels(s * STRIP);
        for (int64_t i = b; i < last; i++) {
          const int64_t row = i * BLOCK_ROWS, count = rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS;
          products.add(own + (i - origin) * block_bytes, row, count, weight + s * block_bytes, steps, start + s * STRIP);
        }
      }
    }
  }
}

}  // namespace

extern "C" int autoplan_available() { return product_available(); }

// out = activation(x [rows, in_features] times the weight, plus the bias or null), as Epilogue says.
extern "C" void autoplan_int8_dynamic(const void* x, const Packed* packed, const void* bias, void* out, int64_t rows,
                                      int dtype, int bias_dtype, int activation, const int64_t* pieces, int threads) {
  const Epilogue e = {nullptr, packed->scale(), bias, bias_dtype, out, packed->out_features, 1, activation, pieces};
  const auto run_as = dtype == FLOAT32 ? run<FLOAT32> : dtype == BFLOAT16 ? run<BFLOAT16> : run<FLOAT16>;
  threads = team_for(rows, packed->out_features, packed->in_features, threads);
  run_as(x, packed->codes(), (const int32_t*)packed->offset(), e, rows, packed->in_features, threads);
}
