// Matrix products of panels of activations with strips of weights, on AMX tiles where the CPU has them, else on AVX-512.
//
// Both sides come in tiles of 16 x 64 bytes, contiguous, padded with zeros. A tile of activations holds 16 rows of 64
// bytes along in_features; one of weights holds 16 output channels: row r has bytes 4 r to 4 r + 3 of each channel, side
// by side (Intel, "Intel AMX", Software Developer's Manual volume 1, chapter 18). Four bytes are four int8 codes or two
// bfloat16 values.
//
//   panel  16 rows x all of in_features      steps tiles       block  32 rows = two panels
//   strip  32 output channels                2 x steps tiles
#pragma once
#include <math.h>
#include <omp.h>
#include <type_traits>
#include "simd.h"
#ifdef __AMX_INT8__
#include <sys/syscall.h>
#include <unistd.h>
#endif

constexpr int64_t TILE = 1024, BLOCK_ROWS = 32, STRIP = 32;

// Waking the other threads takes microseconds, in which one thread does about so many multiplications.
constexpr int64_t SMALL = 1 << 17;

static inline int team_for(int64_t rows, int64_t out_features, int64_t in_features, int threads) {
  return rows * out_features * in_features < SMALL ? 1 : threads;
}

// A weight as __init__.py packs it: its sizes, where its parts begin (bytes from here), and the parts.
struct Packed {
  int64_t out_features, in_features, group_size, bits, codes_at, scale_at, offset_at, channel_scale_at;

  const char* codes() const { return (const char*)this + codes_at; }
  const void* scale() const { return (const char*)this + scale_at; }  // float32, or bfloat16 for groups
  const void* offset() const { return (const char*)this + offset_at; }  // zero points, or where sums start
  const float* channel_scale() const { return (const float*)((const char*)this + channel_scale_at); }
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Int8 {  // signed by signed on AMX; VNNI wants unsigned activations, whose excess of 128 `start` takes off again
  static constexpr bool integer = true;
  static __m512i dot(__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); }
};

struct BFloat16 {
  static constexpr bool integer = false;
  static __m512i dot(__m512i sum, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)a, (__m512bh)b));
#else  // two exact products each, as bfloat16 is the upper half of a float32
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    __m512 s = _mm512_castsi512_ps(sum);
    s = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), s);
    s = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, upper)), _mm512_castsi512_ps(_mm512_and_si512(b, upper)), s);
    return _mm512_castps_si512(s);
#endif
  }
};

struct Float32 {  // on vector units only
  static __m512i dot(__m512i sum, __m512i a, __m512i b) {
    return _mm512_castps_si512(_mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _mm512_castsi512_ps(sum)));
  }
};

#ifdef __AMX_INT8__

// Linux hands out the tile registers on request, once per process.
static inline bool product_available() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0; }

static inline void product_begin() {  // per thread
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } tiles;
  // The compiler's intrinsic was seen to drop the stores to `tiles`; and what tiles will read has to be stored by now.
  asm volatile("ldtilecfg %0" ::"m"(tiles) : "memory");
}

static inline void product_end() { _tile_release(); }

#define DOT(sum, a, b)         \
  if (Kind::integer)           \
    _tile_dpbssd(sum, a, b);   \
  else                         \
    _tile_dpbf16ps(sum, a, b)

// out [32, 32] = block x strip; PANELS = 1 for the last rows. `meanwhile` is called at each step.
template <class Kind, int PANELS, class Meanwhile>
static inline void multiply(const char* block, const char* strip, int64_t steps, int64_t length, int32_t* out, Meanwhile meanwhile) {
  const char *lower = block + length * TILE, *right = strip + length * TILE;
  asm volatile("" ::: "memory");  // the intrinsics do not say that they read memory: what they read is stored by here
  _tile_zero(0);
  _tile_zero(1);
  if (PANELS == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps * TILE; k += TILE) {
    _tile_loadd(4, block + k, 64);
    _tile_loadd(6, strip + k, 64);
    _tile_loadd(7, right + k, 64);
    DOT(0, 4, 6);
    DOT(1, 4, 7);
    if (PANELS == 2) {
      _tile_loadd(5, lower + k, 64);
      DOT(2, 5, 6);
      DOT(3, 5, 7);
    }
    meanwhile();
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  if (PANELS == 2) {
    _tile_stored(2, out + 512, 128);
    _tile_stored(3, out + 528, 128);
  }
}

// `start` is for VNNI only. A panel has `length` steps, of which the first `steps` are multiplied.
template <class Kind, class Meanwhile>
static inline void multiply(const char* block, int64_t rows, const char* strip, int64_t steps, int64_t length, const int32_t*,
                            int32_t* out, Meanwhile meanwhile) {
  if (rows > 16)
    multiply<Kind, 2>(block, strip, steps, length, out, meanwhile);
  else
    multiply<Kind, 1>(block, strip, steps, length, out, meanwhile);
}

#else  // AVX-512

static inline bool product_available() { return true; }
static inline void product_begin() {}
static inline void product_end() {}

template <class Kind, int ROWS>
static inline void multiply_rows(const char* panel, const char* strip, int64_t steps, int64_t length, const int32_t* start,
                                 int32_t* out) {
  __m512i left[ROWS], right[ROWS];
  for (int r = 0; r < ROWS; r++) {
    left[r] = start ? _mm512_loadu_si512(start) : _mm512_setzero_si512();
    right[r] = start ? _mm512_loadu_si512(start + 16) : _mm512_setzero_si512();
  }
  for (int64_t k = 0; k < steps * TILE; k += TILE)
    for (int64_t line = 0; line < 16; line++) {
      const __m512i b0 = _mm512_load_si512(strip + k + 64 * line);
      const __m512i b1 = _mm512_load_si512(strip + length * TILE + k + 64 * line);
      for (int r = 0; r < ROWS; r++) {
        const __m512i a = _mm512_set1_epi32(*(const int32_t*)(panel + k + 64 * r + 4 * line));
        left[r] = Kind::dot(left[r], a, b0);
        right[r] = Kind::dot(right[r], a, b1);
      }
    }
  for (int r = 0; r < ROWS; r++) {
    _mm512_store_si512(out + 32 * r, left[r]);
    _mm512_store_si512(out + 32 * r + 16, right[r]);
  }
}

// out [32, 32] = start + block x strip, for the first `rows` rows; there is no `meanwhile`: the vector units are busy. Eight
// rows at a time, four or one: what comes after the last of them is multiplied as well where that is quicker.
template <class Kind, class Meanwhile>
static inline void multiply(const char* block, int64_t rows, const char* strip, int64_t steps, int64_t length, const int32_t* start,
                            int32_t* out, Meanwhile) {
  for (int64_t r = 0; r < rows;) {
    const char* panel = block + r / 16 * length * TILE + r % 16 * 64;
    const int64_t left = rows - r;
    if (left > 4) {
      multiply_rows<Kind, 8>(panel, strip, steps, length, start, out + 32 * r);
      r += 8;
    } else if (left > 1) {
      multiply_rows<Kind, 4>(panel, strip, steps, length, start, out + 32 * r);
      r += 4;
    } else {
      multiply_rows<Kind, 1>(panel, strip, steps, length, start, out + 32 * r);
      r += 1;
    }
  }
}

#endif

// What a weight is multiplied with: [rows, in_features].
struct Input {
  const void* x;
  int dtype;
};

// What a call asks for beside its tensors.
struct Call {
  int x_dtype, dtype, bias_dtype, activation, gated;  // dtypes: of x; of out; of the bias, if there is one
  int has_bias, has_norm;
  const int64_t* pieces;              // as Epilogue says
  float eps;                          // as Norm says
};

// The tensors of a call, one after another.
class Tensors {
 public:
  explicit Tensors(void* const* first) : next_(first) {}

  // The next, or null if it is not there.
  void* take(bool is_there = true) { return is_there ? *next_++ : nullptr; }

 private:
  void* const* next_;
};

// What comes after whole rows, if there is a residual: y = (y + residual - mean) / sqrt(variance + eps) * weight + bias,
// with the mean and the variance of each row (Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450).
struct Norm {
  const void *residual, *weight, *bias;  // [rows, out_features] and [out_features], in the dtype of y; null if there is none
  float eps;
};

static inline Norm norm_of(const Call& call, Tensors& tensors) {
  const bool there = call.has_norm;
  return {tensors.take(there), tensors.take(there), tensors.take(there), call.eps};
}

// Those of one layer, in the order in which a kernel takes them.
struct Operands {
  const void* x;
  const Packed& packed;
  const void* bias;  // or null
  Norm norm;
  void* out;
};

static inline Operands operands_of(const Call& call, void* const* first) {
  Tensors tensors(first);
  return {tensors.take(), *(const Packed*)tensors.take(), tensors.take(call.has_bias), norm_of(call, tensors), tensors.take()};
}

// What becomes of products: y = activation(product * row_scale * scale * unit + bias), in the dtype of y. If they are
// gated (Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202), y is half as wide: that of the first half of the
// channels, times the other half without the activation. Halves are multiples of STRIP.
struct Epilogue {
  const float* row_scale;  // [rows], or null for 1
  const float* scale;      // [out_features], or null for 1
  const void* bias;        // [out_features], or null
  int bias_dtype;
  void* y;  // [rows, out_features]; or, in pieces, [rows, size] for each of the sizes, one after another
  int64_t out_features;
  float unit;  // another factor of scale
  int activation;
  bool gated;
  const int64_t* pieces;  // sizes, multiples of STRIP that sum up to out_features; or null
  Norm norm;
};

static inline __m512 scale_of(const Epilogue& e, int64_t channel, __mmask16 mask) {
  const __m512 unit = _mm512_set1_ps(e.unit);
  return e.scale ? _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, e.scale + channel), unit) : unit;
}

// What is gated is dealt to threads by halves, so that both factors of an output are of one thread.
static inline int64_t halves(const Epilogue& e) { return e.gated ? 2 : 1; }

// The i-th strip to be multiplied: where they are gated, each is followed by the one that it is multiplied with.
static inline int64_t strip_at(const Epilogue& e, int64_t i, int64_t strips) {
  return e.gated ? i / 2 + i % 2 * (strips / 2) : i;
}

// Where a channel of the first row is stored, and the bytes from there to the next row.
struct Column {
  char* y;
  int64_t line;
  bool gated;  // whether what is stored there already is multiplied with this

  Column() = default;
  Column(const Epilogue& e, int64_t rows, int64_t channel, int64_t bytes) {
    int64_t first = 0, size = e.out_features / halves(e);
    gated = channel >= size && e.gated;
    if (gated) channel -= size;
    if (e.pieces)
      for (const int64_t* piece = e.pieces; channel >= first + (size = *piece); piece++) first += size;
    y = (char*)e.y + (rows * first + channel - first) * bytes, line = size * bytes;
  }
};

// Few rows need no tiles: what they wait for is memory. A core reads several streams at a time, each through pages of its
// own, faster than one (26 GB/s against 19, by two threads of a Xeon), and asks for them early. So STREAMS columns of 16
// output channels are multiplied side by side, `apart` columns from each other. `sums(count, streams, row, column,
// apart, total)` gives the products of `count` rows with them: total[streams][count], a vector each.
constexpr int64_t AHEAD = 2048;  // bytes

// `count` rows of 16 output channels, of which `product(r)` is what there is of the r-th.
template <int DTYPE, class Product>
static inline void store_column(const Epilogue& e, int64_t row, int64_t count, int64_t rows, int64_t column, const Product& product) {
  const int64_t channel = column * 16;
  const Column to(e, rows, channel, bytes_of(DTYPE));
  const __mmask16 mask = lanes(e.out_features - channel);
  const __m512 bias = e.bias ? load(e.bias_dtype, e.bias, channel, mask) : _mm512_setzero_ps();
  const __m512 scale = scale_of(e, channel, mask);
  for (int64_t r = 0; r < count; r++) {
    const __m512 row_scale = _mm512_set1_ps(e.row_scale ? e.row_scale[row + r] : 1);
    const __m512 y = _mm512_fmadd_ps(product(r), _mm512_mul_ps(row_scale, scale), bias);
    char* const own = to.y + (row + r) * to.line;
    store<DTYPE>(own, 0, mask, to.gated ? _mm512_mul_ps(y, load<DTYPE>(own, 0)) : activated(y, e.activation));
  }
}

// More than half of COUNT rows are as many as COUNT: to multiply what lies behind them takes less than the weight again.
template <int DTYPE, int COUNT, int STREAMS, class Sums>
static inline void multiply_columns(const Epilogue& e, int64_t row, int64_t rows, int64_t column, int64_t apart, const Sums& sums) {
  for (; 2 * (rows - row) > COUNT; row += COUNT) {
    __m512 total[STREAMS][COUNT];
    sums(std::integral_constant<int, COUNT>(), std::integral_constant<int, STREAMS>(), row, column, apart, total);
    for (int s = 0; s < STREAMS; s++)
      store_column<DTYPE>(e, row, std::min<int64_t>(COUNT, rows - row), rows, column + s * apart, [&](int64_t r) { return total[s][r]; });
  }
  if constexpr (COUNT > 1)
    if (row < rows) multiply_columns<DTYPE, COUNT / 2, STREAMS>(e, row, rows, column, apart, sums);
}

// The rows that multiply_columns reads, where it is given so many.
static inline int64_t rows_read(int64_t rows) {
  int64_t read = 1;
  while (read < rows) read *= 2;
  return read;
}

// Each thread takes output channels, STREAMS columns at a time: `begin()(streams, column, apart)`, begun once by each.
template <int STREAMS, class Begin>
static inline void by_columns(const Epilogue& e, int threads, const Begin& begin) {
  const int64_t columns = ceil_div(e.out_features, 16) / halves(e);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t first = columns * thread / team, end = columns * (thread + 1) / team, apart = (end - first) / STREAMS;
    auto&& multiplied = begin();
    for (int64_t half = 0; half < halves(e) * columns; half += columns) {
      for (int64_t c = first; c < first + apart; c++) multiplied(std::integral_constant<int, STREAMS>(), half + c, apart);
      for (int64_t c = first + apart * STREAMS; c < end; c++) multiplied(std::integral_constant<int, 1>(), half + c, 0);
    }
  }
}

// Weights are read once for COUNT rows or fewer.
template <int DTYPE, int COUNT, int STREAMS, class Sums>
static inline void multiply_few(const Epilogue& e, int64_t rows, int threads, const Sums& sums) {
  const auto multiplied = [&](auto streams, int64_t column, int64_t apart) {
    multiply_columns<DTYPE, COUNT, decltype(streams)::value>(e, 0, rows, column, apart, sums);
  };
  by_columns<STREAMS>(e, threads, [&]() -> const auto& { return multiplied; });
}

static inline float total(const __m512 (&of)[4]) {
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(of[0], of[1]), _mm512_add_ps(of[2], of[3])));
}

// The rows from `first` to `end`, whose products are in y: in place, in float32 between.
template <int DTYPE>
static inline void normalize(const Epilogue& e, int64_t first, int64_t end) {
  const int64_t n = e.out_features, whole = n / 64 * 64;
  float* const line = (float*)scratch<1>(ceil_div(n, 16) * 64);
  for (int64_t at = first * n; at < end * n; at += n) {
    __m512 sums[4] = {}, squares[4] = {};
    const auto sum = [&](int64_t c, __mmask16 mask, int lane) {
      const __m512 y = _mm512_add_ps(load<DTYPE>(e.y, at + c, mask), load<DTYPE>(e.norm.residual, at + c, mask));
      _mm512_store_ps(line + c, y);
      sums[lane] = _mm512_add_ps(sums[lane], y);
    };
    for (int64_t c = 0; c < whole; c += 64)
      for (int lane = 0; lane < 4; lane++) sum(c + 16 * lane, 0xffff, lane);
    for (int64_t c = whole; c < n; c += 16) sum(c, lanes(n - c), 0);
    const __m512 mean = _mm512_set1_ps(total(sums) / n);
    const auto square = [&](int64_t c, __mmask16 mask, int lane) {
      const __m512 y = _mm512_maskz_sub_ps(mask, _mm512_load_ps(line + c), mean);
      squares[lane] = _mm512_fmadd_ps(y, y, squares[lane]);
    };
    for (int64_t c = 0; c < whole; c += 64)
      for (int lane = 0; lane < 4; lane++) square(c + 16 * lane, 0xffff, lane);
    for (int64_t c = whole; c < n; c += 16) square(c, lanes(n - c), 0);
    const __m512 factor = _mm512_set1_ps(1 / sqrtf(total(squares) / n + e.norm.eps));
    for (int64_t c = 0; c < n; c += 16) {
      const __mmask16 mask = lanes(n - c);
      const __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(line + c), mean), factor);
      store<DTYPE>(e.y, at + c, mask, _mm512_fmadd_ps(y, load<DTYPE>(e.norm.weight, c, mask), load<DTYPE>(e.norm.bias, c, mask)));
    }
  }
}

// All rows, if that is asked for.
template <int DTYPE>
static inline void normalize_rows(const Epilogue& e, int64_t rows, int threads) {
  if (!e.norm.residual) return;
#pragma omp parallel num_threads(team_for(rows, e.out_features, 8, threads))
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    normalize<DTYPE>(e, rows * thread / team, rows * (thread + 1) / team);
  }
}

constexpr int64_t STREAMED = 512 << 10;  // bytes of output that leave nothing else in the second-level cache

// The products of one thread. Each is scaled and stored while the next one is multiplied: tiles and vectors are
// different units of a core. Large outputs go around the caches, where their lines would be read before being written:
// that pays even if they are read again at once.
template <class Kind, int DTYPE>
class Products {
 public:
  Products(const Epilogue& e, int64_t rows)
      : e_(e),
        rows_(rows),
        streams_(rows * e.out_features * bytes_of(DTYPE) >= STREAMED && e.out_features % STRIP == 0 &&
                 (uintptr_t)e.y % 64 == 0 && !e.norm.residual && !e.gated) {
    product_begin();
  }

  ~Products() {
    finish();
    product_end();
    if (streams_) _mm_sfence();
  }

  // Store what has been added.
  void finish() { finish(left_); }

  // From here on products are for the 32 output channels from `first`.
  void channels(int64_t first) {
    next_ = next_ == columns_ ? columns_ + 1 : columns_;  // the last product may not be finished yet
    next_->to = Column(e_, rows_, first, bytes_of(DTYPE));
    for (int64_t half = 0; half < 2; half++) {
      const int64_t n = first + 16 * half;
      const __mmask16 mask = n < e_.out_features ? lanes(e_.out_features - n) : 0;
      next_->mask[half] = mask;
      next_->scale[half] = scale_of(e_, n, mask);
      next_->bias[half] = e_.bias ? load(e_.bias_dtype, e_.bias, n, mask) : _mm512_setzero_ps();
    }
  }

  // `meanwhile` is called at each step, where there is time for more.
  template <class Meanwhile>
  void add(const char* block, int64_t row, int64_t rows, const char* strip, int64_t steps, const int32_t* start, Meanwhile meanwhile) {
    char* const y = next_->to.y + row * next_->to.line;
    if (!streams_)  // the lines that this will be written to
      for (int64_t r = 0; r < rows; r++) __builtin_prefetch(y + r * next_->to.line, 1, 3);
    const int64_t piece = ceil_div(left_, steps);
    multiply<Kind>(block, rows, strip, steps, steps, start, product_[turn_], [&] {
      finish(piece);
      meanwhile();
    });
    finish(left_);
    last_ = product_[turn_], turn_ = 1 - turn_;
    own_ = next_, y_ = y, left_ = rows;
    row_scale_ = e_.row_scale ? e_.row_scale + row : nullptr;
  }

 private:
  struct Columns {
    __m512 scale[2], bias[2];
    Column to;
    __mmask16 mask[2];
  };

  // The next rows of the last product, so many if there are.
  inline __attribute__((always_inline)) void finish(int64_t rows) {
    if (rows > left_) rows = left_;
    left_ -= rows;
    for (; rows > 0; rows--, last_ += STRIP, y_ += own_->to.line) {
      const __m512 row_scale = row_scale_ ? _mm512_set1_ps(*row_scale_++) : _mm512_set1_ps(1);
      const __m512 left = scaled(0, row_scale), right = scaled(1, row_scale);
      if (own_->to.gated) {
        store<DTYPE>(y_, 0, 0xffff, _mm512_mul_ps(left, load<DTYPE>(y_, 0)));
        store<DTYPE>(y_, 16, 0xffff, _mm512_mul_ps(right, load<DTYPE>(y_, 16)));
      } else if (!streams_) {
        store<DTYPE>(y_, 0, own_->mask[0], left);
        store<DTYPE>(y_, 16, own_->mask[1], right);
      } else {
        stream<DTYPE>(y_, left, right);
      }
    }
  }

  __m512 scaled(int half, __m512 row_scale) const {
    const __m512i raw = _mm512_load_si512(last_ + 16 * half);
    const __m512 value = Kind::integer ? _mm512_cvtepi32_ps(raw) : _mm512_castsi512_ps(raw);
    const __m512 y = _mm512_fmadd_ps(value, _mm512_mul_ps(row_scale, own_->scale[half]), own_->bias[half]);
    return own_->to.gated ? y : activated(y, e_.activation);
  }

  const Epilogue e_;
  const int64_t rows_;
  const bool streams_;
  Columns columns_[2], *next_ = columns_;
  alignas(64) int32_t product_[2][BLOCK_ROWS * STRIP];
  int turn_ = 0;
  // What is not finished of the last product:
  const int32_t* last_ = nullptr;
  const Columns* own_ = columns_;
  const float* row_scale_ = nullptr;
  char* y_ = nullptr;
  int64_t left_ = 0;  // rows
};
