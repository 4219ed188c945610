// int8 activations; int8 weights, or weights of 4 to 6 bits in groups: in one call, rows quantized as they come, int32
// product, scales and bias at its end. At many rows, groups become int8 tiles strip by strip, on the way.
#include <unistd.h>
#include "product.h"

namespace {

#ifdef __AMX_INT8__
constexpr char EXCESS = 0;
constexpr int64_t FEW_ROWS = 4, FEW_ROWS_GROUPED = 8;  // that are multiplied without tiles
constexpr int64_t COLUMNS_GROUPED = 4;                 // side by side, at four rows or fewer
#else
constexpr char EXCESS = (char)128;  // of the activations that `multiply` takes
constexpr int64_t FEW_ROWS = 8, FEW_ROWS_GROUPED = 16;
constexpr int64_t COLUMNS_GROUPED = 2;  // each is read from three or four places: a Zen 4 takes 1.1 to 1.5 times as long with 4
#endif

// The codes of one row, by absmax / 127, 64 of them every `stride` bytes; its scale in float32. `excess` is flipped
// in their bits: 0, or 128 for unsigned ones. If they are `DEALT`, the even ones of each eight come before the odd ones.
template <int DTYPE, bool DEALT>
void quantize(const void* x, int64_t row, int64_t in_features, char* codes, int64_t stride, char excess, float* scale) {
  const int64_t at = row * in_features;
  const float largest = absmax<DTYPE>(x, at, in_features) * (1.0f / 127);
  *scale = largest < 1e-30f ? 1e-30f : largest + 0 * largest;  // a row of zeros; NaN where one is NaN or infinite
  const __m512 inverse = _mm512_set1_ps(1 / *scale);
  const __m512i excesses = _mm512_set1_epi8(excess);
  const auto deal = [](__m512i codes) {
    const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    return DEALT ? _mm512_shuffle_epi8(codes, _mm512_broadcast_i32x4(order)) : codes;
  };
  const auto code = [&](__m512 value) { return _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse)); };
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t k = 0;
  for (; k + 64 <= in_features; k += 64, codes += stride) {
    const __m512i a = code(load<DTYPE>(x, at + k)), b = code(load<DTYPE>(x, at + k + 16));
    const __m512i c = code(load<DTYPE>(x, at + k + 32)), d = code(load<DTYPE>(x, at + k + 48));
    const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    _mm512_store_si512(codes, _mm512_xor_si512(deal(_mm512_permutexvar_epi32(in_order, packed)), excesses));
  }
  if (k < in_features) {
    alignas(64) int8_t last[64] = {};
    for (int64_t j = 0; k + j < in_features; j += 16)
      _mm_store_si128((__m128i*)(last + j), _mm512_cvtsepi32_epi8(code(load<DTYPE>(x, at + k + j, lanes(in_features - k - j)))));
    _mm512_store_si512(codes, _mm512_xor_si512(deal(_mm512_load_si512(last)), excesses));
  }
}

template <bool DEALT>
void quantize(const Input& from, int64_t row, int64_t in_features, char* codes, int64_t stride, char excess, float* scale) {
  as_constant(from.dtype, [&](auto dtype) {
    quantize<decltype(dtype)::value, DEALT>(from.x, row, in_features, codes, stride, excess, scale);
  });
}

// Weights as strips of int8 tiles. A thread takes its `Strips` one after another; `start` are a strip's sums' first values.

struct Int8Weight {
  static constexpr int64_t few_rows = FEW_ROWS, few_columns = 4;
  static constexpr bool dealt = false;
  const char* tiles;
  const int32_t* starts;
  int64_t strip_bytes;
  const float* scale;  // of the tiles' codes, by output channel

  int64_t groups() const { return 0; }  // with sums of their own
  int64_t scratch_bytes() const { return 0; }
  const char* strip(int64_t s, const int32_t** start) const {
    *start = starts + s * STRIP;
    return tiles + s * strip_bytes;
  }

  struct Strips {  // which are ready as they are
    const Int8Weight& weight;

    Strips(const Int8Weight& weight, char*) : weight(weight) {}
    const char* take(int64_t s, const int32_t** start) { return weight.strip(s, start); }
    void prepare(int64_t, int64_t) {}
    void step() {}
  };
};

Int8Weight int8_weight(const Packed& packed) {
  const int64_t strip_bytes = ceil_div(packed.in_features, 64) * 2 * TILE;
  return {packed.codes(), (const int32_t*)packed.offset(), strip_bytes, (const float*)packed.scale()};
}

// Codes of more than four bits: four lines of the lowest ones, each two vectors of bytes, then a line for each upper bit.
// Byte i of that has the bits of the eight bytes i, in order.
template <int BITS>
struct UpperBits {
  __m512i lines[BITS];

  explicit UpperBits(const char* from) {
    for (int bit = 4; bit < BITS; bit++) lines[bit] = _mm512_loadu_si512(from + (bit - 4) * 64);
  }

  // The codes of the `vector`-th of the eight, whose lowest bits are the lowest of `codes`.
  inline __attribute__((always_inline)) __m512i over(__m512i codes, int vector) const {
    codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
#pragma GCC unroll 4
    for (int bit = 4; bit < BITS; bit++) {
      const __m512i moved =
          vector < bit ? _mm512_slli_epi16(lines[bit], bit - vector) : _mm512_srli_epi16(lines[bit], vector - bit);
      codes = _mm512_ternarylogic_epi64(codes, moved, _mm512_set1_epi8((char)(1 << bit)), 0xf8);  // | (moved & third)
    }
    return codes;
  }
};

// A weight in groups stands for scale * (code - zero_point), with a scale per group; the int8 tiles have one scale for all
// of a channel. Rounding to these adds about as much error as int8 weights have: squared, about a hundredth of what int4
// has already, a thirtieth of that of 5 bits, and a seventh of that of 6.
template <int BITS>
struct GroupedWeight {
  static constexpr int64_t few_rows = FEW_ROWS_GROUPED, few_columns = COLUMNS_GROUPED;
  static constexpr bool dealt = true;  // a line has the even codes of each eight in its low halves, the odd in its high
  static constexpr int64_t LINES = BITS == 4 ? 1 : 4;  // of codes; then come those of their upper bits
  static constexpr int64_t UPPER = BITS - 4, STEP = 8 * LINES, STEP_BYTES = 64 * (LINES + UPPER);
  const char* lines;          // [out_features / 16, in_features / STEP, STEP_BYTES]
  const void* group_scale;    // [out_features / 16, groups, 16] bfloat16
  const uint8_t* zero_point;  // the same
  int64_t in_features, group_size, strip_bytes;
  const float* scale;

  int64_t column_bytes() const { return in_features / STEP * STEP_BYTES; }
  int64_t groups() const { return in_features / group_size; }
  int64_t scratch_bytes() const { return 2 * (strip_bytes + STRIP * 4); }

  // One thread's strips, each unpacked while the one before is multiplied: tiles leave the vector units idle.
  class Strips {
   public:
    Strips(const GroupedWeight& weight, char* scratch) : w_(weight), scratch_(scratch) {}

    // The strip that was prepared; the first one was not.
    const char* take(int64_t s, const int32_t** start) {
      if (s != s_) prepare(s, 1);
      while (left_ > 0) unpack();
      *start = (const int32_t*)(own_ + w_.strip_bytes);
      return own_;
    }

    // From here on the s-th strip is unpacked, in so many steps.
    void prepare(int64_t s, int64_t steps) {
      own_ = own_ == scratch_ ? scratch_ + w_.scratch_bytes() / 2 : scratch_;
      s_ = s, left_ = 2 * w_.groups(), steps_ = steps, due_ = 0;
    }

    inline __attribute__((always_inline)) void step() {
      if (left_ <= 0) return;
      for (due_ += 2 * w_.groups(); due_ >= steps_; due_ -= steps_) unpack();
    }

   private:
    // One more group of one of the two columns.
    void unpack() {
      const int64_t groups = w_.groups(), half = left_ <= groups, g = 2 * groups - left_ - half * groups, column = 2 * s_ + half;
      if (g == 0) {
        line_ = w_.lines + column * w_.column_bytes(), to_ = own_ + half * w_.strip_bytes / 2;
        units_ = _mm512_div_ps(_mm512_set1_ps(256), _mm512_loadu_ps(w_.scale + column * 16));
        sum_ = _mm512_setzero_si512();
      }
      // In 16-bit lanes: 2^7 (code - zero_point) times 2^8 scale, of which mulhrs gives the rounded 2^-15th.
      const int64_t at = (column * groups + g) * 16;
      const __m512i mask = _mm512_set1_epi16(((1 << BITS) - 1) << 7);
      const __m512i factor = twice(_mm512_cvtps_epi32(_mm512_mul_ps(load<BFLOAT16>(w_.group_scale, at), units_)));
      const __m512i zero = _mm512_slli_epi16(twice(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w_.zero_point + at)))), 7);
      const auto code = [&](__m512i moved) {
        return _mm512_mulhrs_epi16(_mm512_sub_epi16(_mm512_and_si512(moved, mask), zero), factor);
      };
      const auto put = [&](__m512i even, __m512i odd) {
        put_line(_mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaa, code(even), _mm512_slli_epi16(code(odd), 8)));
      };
      for (const char* const end = line_ + w_.group_size / STEP * STEP_BYTES; line_ < end; line_ += STEP_BYTES) {
        for (int64_t own = 0; own < STEP_BYTES; own += 64) _mm_prefetch(line_ + AHEAD + own, _MM_HINT_T0);
        const UpperBits<BITS> upper(line_ + 64 * LINES);
#pragma GCC unroll 4
        for (int j = 0; j < LINES; j++) {
          const __m512i codes = _mm512_loadu_si512(line_ + 64 * j);
          if constexpr (BITS == 4) {
            put(_mm512_slli_epi16(codes, 7), _mm512_srli_epi16(codes, 1));
            put(_mm512_slli_epi16(codes, 3), _mm512_srli_epi16(codes, 5));
          } else {
            const __m512i even = upper.over(codes, 2 * j), odd = upper.over(_mm512_srli_epi16(codes, 4), 2 * j + 1);
            put(_mm512_slli_epi16(even, 7), _mm512_srli_epi16(even, 1));
            put(_mm512_slli_epi16(odd, 7), _mm512_srli_epi16(odd, 1));
          }
        }
      }
      left_--;
      if (g + 1 < groups) return;
      for (const char* const end = own_ + (half + 1) * w_.strip_bytes / 2; to_ < end;) put_line(_mm512_setzero_si512());
#ifndef __AMX_INT8__
      _mm512_storeu_si512(own_ + w_.strip_bytes + 64 * half, _mm512_sub_epi32(_mm512_setzero_si512(), sum_));
#endif
    }

    inline __attribute__((always_inline)) void put_line(__m512i codes) {
      _mm512_store_si512(to_, codes);
      to_ += 64;
#ifndef __AMX_INT8__
      sum_ = _mm512_dpbusd_epi32(sum_, _mm512_set1_epi8((char)128), codes);
#endif
    }

    const GroupedWeight& w_;
    char* const scratch_;
    char* own_ = nullptr;
    const char* line_ = nullptr;
    char* to_ = nullptr;
    __m512 units_;  // of the column that is unpacked
    __m512i sum_;
    int64_t s_ = -1, left_ = 0, steps_ = 1, due_ = 0;  // the strip; its groups that are left; what is due, in steps_-ths of one
  };

 private:
  static __m512i twice(__m512i lanes) { return _mm512_or_si512(lanes, _mm512_slli_epi32(lanes, 16)); }
};

constexpr int64_t GROUP = 128 << 10;      // bytes of codes that stay in the second-level cache beside the weights
constexpr int64_t FEW_WEIGHTS = 1 << 20;  // bytes of weights that do

// Each thread takes rows, when it can keep the weights close or the rows are many; else each takes output channels.
template <class Weight, int DTYPE>
void run_many(const Input& x, const Weight& weight, Epilogue e, int64_t rows, int64_t in_features, int threads) {
  const int64_t steps = ceil_div(in_features, 64), strips = ceil_div(e.out_features, STRIP);
  const int64_t blocks = ceil_div(rows, BLOCK_ROWS), block_bytes = 2 * steps * TILE;
  const bool ready = !weight.scratch_bytes(), many = blocks >= 32 * threads;
  const bool by_rows = ready && blocks >= 2 * threads && (strips * block_bytes <= FEW_WEIGHTS || many);
  const int64_t share = GROUP / block_bytes > 0 ? GROUP / block_bytes : 1, group = by_rows ? share : 4 * share;
  const int64_t held = by_rows ? group * threads : blocks;  // blocks of codes at a time
  const int64_t own_bytes = ceil_div(weight.scratch_bytes(), 64) * 64;
  char* const codes = scratch(held * block_bytes + threads * own_bytes + rows * 4);
  float* const row_scale = (float*)(codes + held * block_bytes + threads * own_bytes);
  e.row_scale = row_scale;
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t first = by_rows ? blocks * thread / team : 0, end = by_rows ? blocks * (thread + 1) / team : blocks;
    const int64_t pairs = strips / halves(e);
    const int64_t left = by_rows ? 0 : pairs * thread / team * halves(e);
    const int64_t right = by_rows ? strips : pairs * (thread + 1) / team * halves(e);
    char* const unpacked = codes + held * block_bytes + thread * own_bytes;
    char* const own = codes + (by_rows ? thread * group * block_bytes : 0);
    const auto quantize_rows = [&](int64_t from, int64_t to, int64_t origin) {
      for (int64_t r = from; r < to; r++)
        quantize<Weight::dealt>(x, r, in_features, own + (r - origin) / 16 * steps * TILE + r % 16 * 64, TILE, EXCESS,
                                row_scale + r);
    };
    Products<Int8, DTYPE> products(e, rows);
    typename Weight::Strips own_strips(weight, unpacked);
    if (!by_rows) {
      quantize_rows(rows * thread / team, rows * (thread + 1) / team, 0);
#pragma omp barrier
    }
    for (int64_t b = first; b < end; b += group) {
      const int64_t last = b + group < end ? b + group : end, origin = by_rows ? b : 0;
      if (by_rows) quantize_rows(b * BLOCK_ROWS, last * BLOCK_ROWS < rows ? last * BLOCK_ROWS : rows, b * BLOCK_ROWS);
      for (int64_t n = left; n < right; n++) {
        const int64_t s = strip_at(e, n, strips);
        products.channels(s * STRIP);
        const int32_t* start;
        const char* const strip = own_strips.take(s, &start);
        if (n + 1 < right || last < end)
          own_strips.prepare(strip_at(e, n + 1 < right ? n + 1 : left, strips), (last - b) * steps);
        for (int64_t i = b; i < last; i++) {
          const int64_t row = i * BLOCK_ROWS, count = rows - row < BLOCK_ROWS ? rows - row : BLOCK_ROWS;
          products.add(own + (i - origin) * block_bytes, row, count, strip, steps, start, [&] { own_strips.step(); });
        }
      }
      if (by_rows && e.norm.residual) {  // as long as they are in a cache
        products.finish();
        normalize<DTYPE>(e, b * BLOCK_ROWS, last * BLOCK_ROWS < rows ? last * BLOCK_ROWS : rows);
      }
    }
  }
  if (!by_rows) normalize_rows<DTYPE>(e, rows, threads);
}

// Few rows: weights are read once, and multiplied as they are. For ROWS rows of codes and STREAMS columns of 16 channels.
template <int ROWS, int STREAMS>
void few(const char* x, int64_t stride, const float*, const Int8Weight& w, int64_t column, int64_t apart,
         __m512 (*total)[ROWS]) {
  const char* line = w.tiles + column * w.strip_bytes / 2;
  __m512i sum[STREAMS][ROWS];
  for (int s = 0; s < STREAMS; s++)
    for (int r = 0; r < ROWS; r++) sum[s][r] = _mm512_loadu_si512(w.starts + (column + s * apart) * 16);
  for (int64_t k = 0; k < w.strip_bytes / 2; k += 64) {
    __m512i codes[STREAMS];
    for (int s = 0; s < STREAMS; s++) {
      const char* const own = line + s * apart * w.strip_bytes / 2 + k;
      _mm_prefetch(own + AHEAD, _MM_HINT_T0);
      codes[s] = _mm512_loadu_si512(own);
    }
    for (int r = 0; r < ROWS; r++) {
      const __m512i own = _mm512_set1_epi32(*(const int32_t*)(x + r * stride + k / 16));
      for (int s = 0; s < STREAMS; s++) sum[s][r] = dot(sum[s][r], own, codes[s]);
    }
  }
  for (int s = 0; s < STREAMS; s++)
    for (int r = 0; r < ROWS; r++) total[s][r] = _mm512_cvtepi32_ps(sum[s][r]);
}

// The sum over groups of scale * (sum of x * code - zero_point * sum of x), where x are codes too; `sums` are theirs.
template <int ROWS, int STREAMS, int BITS>
void few(const char* x, int64_t stride, const float* sums, const GroupedWeight<BITS>& w, int64_t column, int64_t apart,
         __m512 (*total)[ROWS]) {
  using Weight = GroupedWeight<BITS>;
  const int64_t groups = w.groups(), column_bytes = w.column_bytes(), later = 2 * AHEAD / w.group_size;
  const char* line = w.lines + column * column_bytes;
  for (int s = 0; s < STREAMS; s++)
    for (int r = 0; r < ROWS; r++) total[s][r] = _mm512_setzero_ps();
  for (int64_t g = 0, k = 0; g < groups; g++) {
    __m512i sum[STREAMS][ROWS];
    for (int s = 0; s < STREAMS; s++)
      for (int r = 0; r < ROWS; r++) sum[s][r] = _mm512_setzero_si512();
    for (const int64_t end = k + w.group_size; k < end; k += Weight::STEP, line += Weight::STEP_BYTES) {
      for (int s = 0; s < STREAMS; s++)
        for (int64_t own = 0; own < Weight::STEP_BYTES; own += 64)
          _mm_prefetch(line + s * apart * column_bytes + own + AHEAD, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int j = 0; j < Weight::LINES; j++) {
        __m512i low[STREAMS], high[STREAMS];
        for (int s = 0; s < STREAMS; s++) {
          const char* const own = line + s * apart * column_bytes;
          const UpperBits<BITS> upper(own + 64 * Weight::LINES);
          const __m512i codes = _mm512_loadu_si512(own + 64 * j);
          low[s] = upper.over(codes, 2 * j), high[s] = upper.over(_mm512_srli_epi16(codes, 4), 2 * j + 1);
        }
        for (int r = 0; r < ROWS; r++) {
          const int32_t* own = (const int32_t*)(x + r * stride + k + 8 * j);
          const __m512i even = _mm512_set1_epi32(own[0]), odd = _mm512_set1_epi32(own[1]);
          for (int s = 0; s < STREAMS; s++) sum[s][r] = dot(dot(sum[s][r], low[s], even), high[s], odd);
        }
      }
    }
    for (int s = 0; s < STREAMS; s++) {
      const int64_t at = ((column + s * apart) * groups + g) * 16;
      _mm_prefetch((const char*)w.group_scale + 2 * (at + later), _MM_HINT_T0);
      _mm_prefetch((const char*)w.zero_point + at + later, _MM_HINT_T0);
      const __m512 scale = load<BFLOAT16>(w.group_scale, at);
      const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w.zero_point + at))));
      for (int r = 0; r < ROWS; r++) {
        const __m512 offset = _mm512_set1_ps(sums[r * groups + g]);
        total[s][r] = _mm512_fmadd_ps(scale, _mm512_fnmadd_ps(zero, offset, _mm512_cvtepi32_ps(sum[s][r])), total[s][r]);
      }
    }
  }
}

template <class Weight, int DTYPE>
void run_few(const Input& x, const Weight& w, Epilogue e, int64_t rows, int64_t in_features, int threads) {
  const int64_t stride = ceil_div(in_features, 64) * 64, groups = w.groups(), size = groups ? in_features / groups : 0;
  const int64_t read = rows_read(rows);
  char* const codes = scratch(read * (stride + (groups + 1) * 4));
  float *const sums = (float*)(codes + read * stride), *const row_scale = sums + read * groups;
  memset(codes + rows * stride, 0, (read - rows) * stride);
  memset(sums + rows * groups, 0, (read - rows) * groups * 4);
  for (int64_t r = 0; r < rows; r++) {
    char* const own = codes + r * stride;
    quantize<Weight::dealt>(x, r, in_features, own, 64, w.dealt ? 0 : (char)128, row_scale + r);
    for (int64_t g = 0; g < groups; g++) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t k = g * size; k < (g + 1) * size; k += 16)
        sum = _mm512_add_epi32(sum, _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(own + k))));
      sums[r * groups + g] = (float)_mm512_reduce_add_epi32(sum);
    }
  }
  e.row_scale = row_scale;
  if (groups) e.scale = nullptr;  // each has its own
  const auto multiplied = [&](auto count, auto streams, int64_t row, int64_t column, int64_t apart, auto* total) {
    few<decltype(count)::value, decltype(streams)::value>(codes + row * stride, stride, sums + row * groups, w, column,
                                                          apart, total);
  };
  if (rows <= 2) return multiply_few<DTYPE, 2, Weight::few_columns>(e, rows, threads, multiplied);
  if (rows <= 4) return multiply_few<DTYPE, 4, Weight::few_columns>(e, rows, threads, multiplied);
  multiply_few<DTYPE, 8, 2>(e, rows, threads, multiplied);
}

#ifdef __AMX_INT8__

// The products of one thread with one panel, four columns of 16 output channels side by side. The last ones are scaled and
// stored while tiles take the next. Each thread quantizes all rows for itself: that takes less time than waiting for the
// other threads and fetching from their caches what they have just written.
template <int DTYPE>
class PanelProducts {
 public:
  PanelProducts(const Input& x, const Int8Weight& w, const Epilogue& e, int64_t rows, int64_t in_features)
      : e_(e), tiles_(w.tiles), rows_(rows), column_bytes_(w.strip_bytes / 2) {
    panel_ = scratch(column_bytes_ + rows * 4);
    float* const row_scale = (float*)(panel_ + column_bytes_);
    for (int64_t r = 0; r < rows; r++)
      quantize<false>(x, r, in_features, panel_ + r * 64, TILE, 0, row_scale + r);
    e_.row_scale = row_scale;
    product_begin();
  }

  ~PanelProducts() {
    store(count_);
    product_end();
  }

  // With STREAMS columns, 1 or 4, `apart` columns from each other: sums are in tiles 0 to 3, activations in 4.
  template <int STREAMS>
  void operator()(std::integral_constant<int, STREAMS>, int64_t column, int64_t apart) {
    const char* const own = tiles_ + column * column_bytes_;
    const int64_t next = apart * column_bytes_;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < column_bytes_; k += TILE) {
      for (int s = 0; s < STREAMS; s++)
        for (int64_t line = 0; line < TILE; line += 64) _mm_prefetch(own + s * next + k + AHEAD + line, _MM_HINT_T0);
      _tile_loadd(4, panel_ + k, 64);
      _tile_loadd(5, own + k, 64);
      _tile_dpbssd(0, 4, 5);
      if (STREAMS == 4) {
        _tile_loadd(6, own + next + k, 64);
        _tile_loadd(7, own + 2 * next + k, 64);
        _tile_loadd(5, own + 3 * next + k, 64);
        _tile_dpbssd(1, 4, 6);
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(3, 4, 5);
      }
      store((k + TILE) * count_ / column_bytes_);
    }
    turn_ = 1 - turn_;
    _tile_stored(0, sums_[turn_][0], 64);
    if (STREAMS == 4) {
      _tile_stored(1, sums_[turn_][1], 64);
      _tile_stored(2, sums_[turn_][2], 64);
      _tile_stored(3, sums_[turn_][3], 64);
    }
    stored_ = 0, count_ = STREAMS, column_ = column, apart_ = apart;
  }

 private:
  // The last columns, as many as that in all.
  inline __attribute__((always_inline)) void store(int64_t count) {
    for (; stored_ < count; stored_++)
      store_column<DTYPE>(e_, 0, rows_, rows_, column_ + stored_ * apart_, [&](int64_t r) {
        return _mm512_cvtepi32_ps(_mm512_load_si512(sums_[turn_][stored_][r]));
      });
  }

  Epilogue e_;
  const char* const tiles_;
  const int64_t rows_, column_bytes_;
  char* panel_;
  alignas(64) int32_t sums_[2][4][16][16];
  int turn_ = 0;
  int64_t stored_ = 0, count_ = 0, column_ = 0, apart_ = 0;  // of the last columns
};

template <int DTYPE>
void run_panel(const Input& x, const Int8Weight& w, const Epilogue& e, int64_t rows, int64_t in_features, int threads) {
  by_columns<4>(e, threads, [&] { return PanelProducts<DTYPE>(x, w, e, rows, in_features); });
}

#endif

template <class Weight, int DTYPE>
void run(const Input& x, const Weight& w, const Epilogue& e, int64_t rows, int64_t in_features, int threads) {
#ifdef __AMX_INT8__
  constexpr bool panel = !Weight::dealt;
#else
  constexpr bool panel = false;
#endif
  if (rows <= Weight::few_rows)
    run_few<Weight, DTYPE>(x, w, e, rows, in_features, threads);
  else if (!panel || rows > 16)
    return run_many<Weight, DTYPE>(x, w, e, rows, in_features, threads);
#ifdef __AMX_INT8__
  else if constexpr (panel)
    run_panel<DTYPE>(x, w, e, rows, in_features, threads);
#endif
  normalize_rows<DTYPE>(e, rows, threads);
}

constexpr int64_t BETWEEN = 256 << 10;  // bytes of what lies between two layers that stay in the second-level cache

// Two layers, one after the other: each thread takes rows through both, a group at a time, so that what lies between
// them neither leaves its caches nor waits for the other threads.
template <int BETWEEN_DTYPE, int DTYPE>
void run_pair(const Input& x, const Packed& first, const Packed& second, Epilogue e, Epilogue after, int64_t rows, int threads) {
  const Int8Weight weights[2] = {int8_weight(first), int8_weight(second)};
  const int64_t between = first.out_features, line = between * bytes_of(BETWEEN_DTYPE), blocks = ceil_div(rows, BLOCK_ROWS);
  const int64_t steps[2] = {ceil_div(first.in_features, 64), ceil_div(between, 64)};
  const int64_t most = BETWEEN / (BLOCK_ROWS * line), group = most > 1 ? most : 1;
  const int64_t codes_bytes = group * 2 * TILE * (steps[0] > steps[1] ? steps[0] : steps[1]);
  const int64_t own_bytes = ceil_div(codes_bytes + group * BLOCK_ROWS * line, 64) * 64;
  char* const shared = scratch(threads * own_bytes + rows * 4);
  float* const row_scale = (float*)(shared + threads * own_bytes);
  after.row_scale = row_scale;
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    char *const codes = shared + thread * own_bytes, *const middle = codes + codes_bytes;
    const auto multiplied = [&](auto dtype, int layer, const Input& from, int64_t origin, const Epilogue& to, int64_t of, int64_t row, int64_t end) {
      const Packed& packed = layer ? second : first;
      for (int64_t r = row; r < end; r++)
        quantize<false>(from, r - origin, packed.in_features, codes + (r - row) / 16 * steps[layer] * TILE + (r - row) % 16 * 64,
                        TILE, EXCESS, row_scale + r);
      Products<Int8, decltype(dtype)::value> products(to, of);
      for (int64_t s = 0; s < ceil_div(packed.out_features, STRIP); s++) {
        products.channels(s * STRIP);
        const int32_t* start;
        const char* const strip = weights[layer].strip(s, &start);
        for (int64_t r = row; r < end; r += BLOCK_ROWS)
          products.add(codes + (r - row) * steps[layer] * 64, layer ? r : r - row, end - r < BLOCK_ROWS ? end - r : BLOCK_ROWS, strip,
                       steps[layer], start, [] {});
      }
    };
    const int64_t first_block = blocks * thread / team, last_block = blocks * (thread + 1) / team;
    for (int64_t b = first_block; b < last_block; b += group) {
      const int64_t row = b * BLOCK_ROWS, to = (b + group < last_block ? b + group : last_block) * BLOCK_ROWS;
      const int64_t end = to < rows ? to : rows;
      Epilogue own = e;
      own.y = middle, own.row_scale = row_scale + row;
      multiplied(std::integral_constant<int, BETWEEN_DTYPE>(), 0, x, 0, own, end - row, row, end);
      multiplied(std::integral_constant<int, DTYPE>(), 1, {middle, BETWEEN_DTYPE}, row, after, rows, row, end);
      if (after.norm.residual) normalize<DTYPE>(after, row, end);
    }
  }
}

template <class Weight>
void run_as(const Call& call, const Operands& o, const Weight& weight, int64_t rows, int threads) {
  const Epilogue e = {nullptr, weight.scale, o.bias, call.bias_dtype, o.out, o.packed.out_features, 1, call.activation,
                      call.gated != 0, call.pieces, o.norm};
  threads = team_for(rows, o.packed.out_features, o.packed.in_features, threads);
  as_constant(call.dtype, [&](auto dtype) {
    run<Weight, decltype(dtype)::value>({o.x, call.x_dtype}, weight, e, rows, o.packed.in_features, threads);
  });
}

}  // namespace

extern "C" int autoplan_available() { return product_available(); }

// Of the second level, of one core.
extern "C" int64_t autoplan_cache_bytes() { return sysconf(_SC_LEVEL2_CACHE_SIZE); }

// out = activation(x [rows, in_features] times the weight, plus the bias if there is one), as Epilogue says; then, if there
// is a norm, what Norm says. The tensors are Operands. All return what `done` does.
extern "C" int autoplan_int8_dynamic(const Call* call, void* const* tensors, int64_t rows, int threads) {
  const Operands o = operands_of(*call, tensors);
  return done([&] { if (rows) run_as(*call, o, int8_weight(o.packed), rows, threads); });
}

// The same, with codes of 4 to 6 bits in groups of `group_size`, which divides in_features: a multiple of 16, or of 32 with
// more than 4 bits.
extern "C" int autoplan_grouped_dynamic(const Call* call, void* const* tensors, int64_t rows, int threads) {
  const Operands o = operands_of(*call, tensors);
  const Packed& packed = o.packed;
  const auto run = [&](auto bits) {
    const int64_t strip_bytes = ceil_div(packed.in_features, 64) * 2 * TILE;
    const GroupedWeight<decltype(bits)::value> weight = {packed.codes(), packed.scale(), (const uint8_t*)packed.offset(),
                                                         packed.in_features, packed.group_size, strip_bytes, packed.channel_scale()};
    run_as(*call, o, weight, rows, threads);
  };
  return done([&] {
    if (!rows) return;
    if (packed.bits == 4) return run(std::integral_constant<int, 4>());
    if (packed.bits == 5) return run(std::integral_constant<int, 5>());
    run(std::integral_constant<int, 6>());
  });
}

// The first layer with its activation, then the second one: both int8, dynamic. Each thread takes rows. What lies between
// them is in the first one's dtype; out is in that as well, or in float32. Tensors: x, both weights, the biases that there
// are, a norm if the second call has one, out.
extern "C" int autoplan_int8_pair(const Call calls[2], void* const* first, int64_t rows, int threads) {
  if (!rows) return 0;
  Tensors tensors(first);
  const Input input = {tensors.take(), calls[0].x_dtype};
  const Packed &packed = *(const Packed*)tensors.take(), &then = *(const Packed*)tensors.take();
  const Epilogue e = {nullptr, (const float*)packed.scale(), tensors.take(calls[0].has_bias), calls[0].bias_dtype, nullptr,
                      packed.out_features, 1, calls[0].activation, false, nullptr, {}};
  const void* bias = tensors.take(calls[1].has_bias);
  const Norm norm = norm_of(calls[1], tensors);
  const Epilogue after = {nullptr, (const float*)then.scale(), bias, calls[1].bias_dtype, tensors.take(), then.out_features, 1,
                          calls[1].activation, false, nullptr, norm};
  return done([&] {
    as_constant(calls[0].dtype, [&](auto dtype) {
      constexpr int between = decltype(dtype)::value;
      const auto run = calls[1].dtype == FLOAT32 ? run_pair<between, FLOAT32> : run_pair<between, between>;
      run(input, packed, then, e, after, rows, threads);
    });
  });
}
