// int8 and int4 weights, float activations: dequantized on the way. Few rows read the weights once, in float32; many
// rows multiply in bfloat16, on strips of weights that are dequantized once and used for all rows.
#include <omp.h>
#include "product.h"

namespace {

// How a kind of weight is decoded. A line is 64 bytes: LINE_K codes along in_features of each of 16 output channels.
// `codes(line, j)` are the channels' j-th, as floats; `unit` times these floats is what they stand for;
// their scales are of dtype SCALE.

struct Int8Weight {
  static constexpr int LINE_K = 4, SCALE = FLOAT32;
  static constexpr float unit = 1.0f / (1 << 24);
  static __m512 codes(__m512i line, int j) {  // each byte moved to the top of its lane: 2^24 times the code
    const __m512i top = _mm512_set1_epi32((int)0xff000000);
    return _mm512_cvtepi32_ps(j == 3 ? _mm512_and_si512(line, top)
                                     : _mm512_and_si512(_mm512_slli_epi32(line, 24 - 8 * j), top));
  }
};

struct Int4Weight {
  static constexpr int LINE_K = 8, SCALE = BFLOAT16;
  static constexpr float unit = 1;
  static __m512 codes(__m512i line, int j) {
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(line, 4 * j), values);  // looks at the lowest four bits only
  }
};

struct Weight {
  const char* lines;           // [out_features / 16, in_features / LINE_K, 64], padded
  const void* scale;           // [out_features / 16, groups, 16]: beside each other what one pass over lines needs
  const uint8_t* zero_point;   // the same, or null for zeros
  int64_t in_features, group_size;  // padded; group_size = in_features without groups

  int64_t groups() const { return in_features / group_size; }
  template <class Kind>
  __m512 scales(int64_t channel, int64_t g) const {
    const __m512 scales = load<Kind::SCALE>(scale, (channel / 16 * groups() + g) * 16);
    return _mm512_mul_ps(scales, _mm512_set1_ps(Kind::unit));
  }
  __m512 zeros(int64_t channel, int64_t g) const {
    const __m128i codes = _mm_loadu_si128((const __m128i*)(zero_point + (channel / 16 * groups() + g) * 16));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
  }
};

// For ROWS rows and STREAMS times 16 channels: sum over groups of scale * (sum of x * code - zero_point * sum of x).
template <class Kind, int ROWS, int STREAMS>
void few(const float* x, int64_t stride, const float* group_sums, const Weight& w, int64_t channel, int64_t apart,
         __m512 (*total)[ROWS]) {
  const int64_t groups = w.groups(), column_bytes = w.in_features / Kind::LINE_K * 64;
  const char* line = w.lines + channel / 16 * column_bytes;
  for (int s = 0; s < STREAMS; s++)
    for (int r = 0; r < ROWS; r++) total[s][r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    __m512 even[STREAMS][ROWS], odd[STREAMS][ROWS];
    for (int s = 0; s < STREAMS; s++)
      for (int r = 0; r < ROWS; r++) even[s][r] = odd[s][r] = _mm512_setzero_ps();
    const int64_t end = (g + 1) * w.group_size;
    for (int64_t k = g * w.group_size; k < end; k += Kind::LINE_K, line += 64) {
      for (int s = 0; s < STREAMS; s++) {
        const char* const own = line + s * apart * column_bytes;
        _mm_prefetch(own + AHEAD, _MM_HINT_T0);
        const __m512i codes = _mm512_loadu_si512(own);
#pragma GCC unroll 8
        for (int j = 0; j < Kind::LINE_K; j += 2) {
          const __m512 first = Kind::codes(codes, j), second = Kind::codes(codes, j + 1);
          for (int r = 0; r < ROWS; r++) {
            even[s][r] = _mm512_fmadd_ps(first, _mm512_set1_ps(x[r * stride + k + j]), even[s][r]);
            odd[s][r] = _mm512_fmadd_ps(second, _mm512_set1_ps(x[r * stride + k + j + 1]), odd[s][r]);
          }
        }
      }
    }
    for (int s = 0; s < STREAMS; s++) {
      const int64_t own = channel + s * apart * 16;
      const __m512 scale = w.scales<Kind>(own, g);
      for (int r = 0; r < ROWS; r++) {
        __m512 sum = _mm512_add_ps(even[s][r], odd[s][r]);
        if (w.zero_point) sum = _mm512_fnmadd_ps(w.zeros(own, g), _mm512_set1_ps(group_sums[r * groups + g]), sum);
        total[s][r] = _mm512_fmadd_ps(scale, sum, total[s][r]);
      }
    }
  }
}

template <class Kind, int DTYPE>
void run_few(const Input& x, const Weight& w, const Epilogue& e, int64_t rows, int64_t in_features, int threads) {
  const int64_t groups = w.groups();
  const int64_t read = rows_read(rows);
  float* const values = (float*)scratch(read * (w.in_features + groups) * 4);  // x in float32, and its sums per group
  float* const sums = values + read * w.in_features;
  memset(values + rows * w.in_features, 0, (read - rows) * w.in_features * 4);
  memset(sums + rows * groups, 0, (read - rows) * groups * 4);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t k = 0; k < w.in_features; k += 16)
      _mm512_storeu_ps(values + r * w.in_features + k,
                       k < in_features ? load(x.dtype, x.x, r * in_features + k, lanes(in_features - k)) : _mm512_setzero_ps());
    if (w.zero_point)
      for (int64_t g = 0; g < groups; g++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = g * w.group_size; k < (g + 1) * w.group_size; k += 16)
          sum = _mm512_add_ps(sum, _mm512_loadu_ps(values + r * w.in_features + k));
        sums[r * groups + g] = _mm512_reduce_add_ps(sum);
      }
  }
  const auto multiplied = [&](auto count, auto streams, int64_t row, int64_t column, int64_t apart, auto* total) {
    few<Kind, decltype(count)::value, decltype(streams)::value>(values + row * w.in_features, w.in_features,
                                                                sums + row * groups, w, column * 16, apart, total);
  };
  if (rows <= 2) return multiply_few<DTYPE, 2, 4>(e, rows, threads, multiplied);
  multiply_few<DTYPE, 4, 1>(e, rows, threads, multiplied);  // which have enough to do with each line
}

// In each lane the first value as bfloat16, then the second. Halfway they are rounded up, which takes less than to even.
static inline __m512i pairs_bf16(__m512 first, __m512 second) {
  const auto rounded = [](__m512 value) { return _mm512_add_epi32(_mm512_castps_si512(value), _mm512_set1_epi32(0x8000)); };
  const __m512i low = _mm512_srli_epi32(rounded(first), 16), upper = _mm512_set1_epi32((int)0xffff0000);
  return _mm512_ternarylogic_epi32(low, rounded(second), upper, 0xf8);  // low | (second & upper)
}

// bfloat16 tiles [in_features / 32, 16, 64] of 16 channels: pairs along in_features, side by side.
template <class Kind>
void dequantize(const Weight& w, int64_t channel, char* tiles) {
  const char* line = w.lines + channel / 16 * (w.in_features / Kind::LINE_K) * 64;
  for (int64_t g = 0; g * w.group_size < w.in_features; g++) {
    const __m512 scale = w.scales<Kind>(channel, g);
    const __m512 offset = w.zero_point ? _mm512_mul_ps(w.zeros(channel, g), scale) : _mm512_setzero_ps();
    for (int64_t k = 0; k < w.group_size; k += Kind::LINE_K, line += 64) {
      const __m512i codes = _mm512_loadu_si512(line);
#pragma GCC unroll 8
      for (int j = 0; j < Kind::LINE_K; j += 2, tiles += 64) {
        __m512 first = Kind::codes(codes, j), second = Kind::codes(codes, j + 1);
        if (w.zero_point) first = _mm512_fmsub_ps(first, scale, offset), second = _mm512_fmsub_ps(second, scale, offset);
        _mm512_store_si512(tiles, pairs_bf16(first, second));
      }
    }
  }
  for (int64_t k = w.in_features; k % 32; k += 2, tiles += 64)  // zeros times what is in scratch could be NaN
    _mm512_store_si512(tiles, _mm512_setzero_si512());
}

constexpr int64_t GROUP = 2 << 20;  // bytes of activations between which weights are dequantized anew

template <class Kind, int DTYPE>
void run_many(const Input& x, const Weight& w, const Epilogue& e, int64_t rows, int64_t in_features, int threads) {
  const int64_t steps = ceil_div(w.in_features, 32), strips = ceil_div(e.out_features, STRIP);
  const int64_t blocks = ceil_div(rows, BLOCK_ROWS), block_bytes = 2 * steps * TILE;
  const int64_t group = GROUP / block_bytes > 4 ? GROUP / block_bytes : 4;
  const int64_t held = group < blocks ? group : blocks;
  char* const panels = scratch((held + threads) * block_bytes);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    char* const strip = panels + (held + thread) * block_bytes;
    Products<BFloat16, DTYPE> products(e, rows);
    for (int64_t b = 0; b < blocks; b += group) {
      const int64_t last = b + group < blocks ? b + group : blocks, origin = b * BLOCK_ROWS;
#pragma omp for schedule(static)
      for (int64_t r = origin; r < (last * BLOCK_ROWS < rows ? last * BLOCK_ROWS : rows); r++) {
        char* to = panels + (r - origin) / 16 * steps * TILE + r % 16 * 64;
        for (int64_t k = 0; k < steps * 32; k += 32, to += TILE)
          for (int64_t half = 0; half < 32; half += 16) {
            const int64_t left = in_features - k - half;
            const __m512 v = left > 0 ? load(x.dtype, x.x, r * in_features + k + half, lanes(left)) : _mm512_setzero_ps();
            _mm256_store_si256((__m256i*)(to + 2 * half), narrow_bf16(v));
          }
      }
      const int64_t pairs = strips / halves(e);
      for (int64_t n = pairs * thread / team * halves(e); n < pairs * (thread + 1) / team * halves(e); n++) {
        const int64_t s = strip_at(e, n, strips);
        dequantize<Kind>(w, s * STRIP, strip);
        dequantize<Kind>(w, s * STRIP + 16, strip + steps * TILE);
        products.channels(s * STRIP);
        for (int64_t i = b; i < last; i++) {
          const int64_t row = i * BLOCK_ROWS, count = rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS;
          products.add(panels + (i - b) * block_bytes, row, count, strip, steps, nullptr, [] {});
        }
      }
#pragma omp barrier
    }
  }
}

#ifdef __AMX_INT8__
constexpr int64_t FEW_ROWS = 6;
#else
constexpr int64_t FEW_ROWS = 8;
#endif

template <class Kind, int DTYPE>
void run(const Input& x, const Weight& w, Epilogue e, int64_t rows, int64_t in_features, int threads) {
  if (rows <= FEW_ROWS) {
    run_few<Kind, DTYPE>(x, w, e, rows, in_features, threads);
  } else {
    if (!w.zero_point) e.scale = (const float*)w.scale, e.unit = Kind::unit;
    run_many<Kind, DTYPE>(x, w, e, rows, in_features, threads);
  }
  normalize_rows<DTYPE>(e, rows, threads);
}

template <class Kind>
void run_as(const Call& call, const Operands& o, const Weight& w, int64_t rows, int threads) {
  const Epilogue e = {nullptr, nullptr, o.bias, call.bias_dtype, o.out, o.packed.out_features, 1, call.activation,
                      call.gated != 0, call.pieces, o.norm};
  threads = team_for(rows, o.packed.out_features, o.packed.in_features, threads);
  as_constant(call.dtype, [&](auto dtype) {
    run<Kind, decltype(dtype)::value>({o.x, call.x_dtype}, w, e, rows, o.packed.in_features, threads);
  });
}

}  // namespace

// As autoplan_int8_dynamic.
extern "C" int autoplan_int8_weight(const Call* call, void* const* tensors, int64_t rows, int threads) {
  const Operands o = operands_of(*call, tensors);
  const int64_t padded = ceil_div(o.packed.in_features, 64) * 64;
  const Weight w = {o.packed.codes(), o.packed.scale(), nullptr, padded, padded};
  return done([&] { if (rows) run_as<Int8Weight>(*call, o, w, rows, threads); });
}

// The same, in groups of `group_size`, a multiple of 16 that divides in_features.
extern "C" int autoplan_int4_weight(const Call* call, void* const* tensors, int64_t rows, int threads) {
  const Operands o = operands_of(*call, tensors);
  const Weight w = {o.packed.codes(), o.packed.scale(), (const uint8_t*)o.packed.offset(), o.packed.in_features, o.packed.group_size};
  return done([&] { if (rows) run_as<Int4Weight>(*call, o, w, rows, threads); });
}
