// Attention (Vaswani et al., "Attention Is All You Need", arXiv:1706.03762): of each head, for blocks of 32 rows,
// softmax(q k^T * scale + mask) v. All scores of a block are in a core's caches at once; products are of bfloat16, or of
// float32 (on AMX tiles two of bfloat16 each); sums are in float32. Rows that the mask leaves nothing of become zero.
//
// What one unit of a core stores, another waits for until it is in the cache. So three blocks are on their way at a time,
// and what a stage reads was stored two stages ago.
#include <utility>
#include "attention.h"

namespace {

constexpr int64_t WIDTH = 32;  // bfloat16 values in a line of a tile

#ifdef __AMX_INT8__
constexpr bool SPLITS = true;
#else
constexpr bool SPLITS = false;
#endif

// Tiles for each one of bfloat16. Of float32 values, vector units take two. On AMX tiles a value is the sum of two bfloat16
// ones and of 2^-17 of it, which is left out: (a + b)(c + d) = ac + ad + bc, and bd, which is left out. So the rows of one
// side have tiles of a, a, b in turn, and the columns of the other c, d, c (Henry, Tang and Heinecke, "Leveraging the
// bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", arXiv:1904.06376).
constexpr int64_t parts_of(int dtype) { return dtype != FLOAT32 ? 1 : SPLITS ? 3 : 2; }

template <int DTYPE>
using KindOf = std::conditional_t<DTYPE == FLOAT32 && !SPLITS, Float32, BFloat16>;

static inline __m512i narrow_both(__m512 left, __m512 right) {
#ifdef __AVX512BF16__
  return (__m512i)_mm512_cvtne2ps_pbh(right, left);
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_bf16(left)), narrow_bf16(right), 1);
#endif
}

// 32 values: as bfloat16, and what that leaves of them; or the first half and the other.
struct Line {
  __m512i value, rest;
};

static inline Line split(__m512 left, __m512 right) {
  if (!SPLITS) return {_mm512_castps_si512(left), _mm512_castps_si512(right)};
  const __m512i value = narrow_both(left, right);
  left = _mm512_sub_ps(left, widen_bf16(_mm512_castsi512_si256(value)));
  right = _mm512_sub_ps(right, widen_bf16(_mm512_extracti64x4_epi64(value, 1)));
  return {value, narrow_both(left, right)};
}

template <int DTYPE>
static inline Line load_line(const char* from, int64_t left) {  // `left` may be 0 or less
  if constexpr (DTYPE == FLOAT32) {
    const __mmask16 first = left > 0 ? lanes(left) : 0, second = left > 16 ? lanes(left - 16) : 0;
    return split(_mm512_maskz_loadu_ps(first, from), _mm512_maskz_loadu_ps(second, from + 64));
  } else {
    const __mmask32 mask = left >= WIDTH ? 0xffffffff : left > 0 ? (__mmask32)((1u << left) - 1) : 0;
    return {_mm512_maskz_loadu_epi16(mask, from), _mm512_setzero_si512()};
  }
}

template <int DTYPE>
static inline void store_row(char* line, const Line& own) {  // of a tile of rows
  _mm512_store_si512(line, own.value);
  if constexpr (DTYPE == FLOAT32) {
    if (SPLITS) _mm512_store_si512(line + TILE, own.value);
    _mm512_store_si512(line + (parts_of(DTYPE) - 1) * TILE, own.rest);
  }
}

static inline void transpose(__m512i (&a)[16]) {  // of 16 x 16 elements of 32 bits
  __m512i b[16];
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
  }
}

// 16 rows, of which `count` there are, as a panel of activations. Rows are `line` bytes apart.
template <int DTYPE>
static inline void pack_panel(const char* from, int64_t line, int64_t count, int64_t features, char* panel) {
  for (int64_t f = 0; f < features; f += WIDTH, from += WIDTH * bytes_of(DTYPE), panel += parts_of(DTYPE) * TILE)
    for (int64_t r = 0; r < 16; r++)
      store_row<DTYPE>(panel + 64 * r, load_line<DTYPE>(from + r * line, r < count ? features - f : 0));
}

static inline void store_column(char* column, __m512i (&lines)[16]) {
  transpose(lines);
  for (int64_t r = 0; r < 16; r++) _mm512_store_si512(column + 64 * r, lines[r]);
}

// 16 keys, of which `count` there are, as 16 channels of weights.
template <int DTYPE>
static inline void pack_keys(const char* from, int64_t line, int64_t count, int64_t features, char* column) {
  for (int64_t f = 0; f < features; f += WIDTH, from += WIDTH * bytes_of(DTYPE), column += parts_of(DTYPE) * TILE) {
    __m512i values[16], rests[16];
    for (int64_t r = 0; r < 16; r++) {
      const Line own = load_line<DTYPE>(from + r * line, r < count ? features - f : 0);
      values[r] = own.value, rests[r] = own.rest;
    }
    store_column(column, values);
    if constexpr (DTYPE == FLOAT32) {
      if (SPLITS) memcpy(column + 2 * TILE, column, TILE);
      store_column(column + TILE, rests);
    }
  }
}

// `keys` rows of 16 features, of which `count` there are, as 16 channels of weights.
template <int DTYPE>
static inline void pack_values(const char* from, int64_t line, int64_t keys, int64_t count, char* column) {
  const auto interleaved = [](__m512i rows) {  // of two rows of 16, one after the other: pairs
    const __m512i even = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(rows));
    return _mm512_or_si512(even, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rows, 1)), 16));
  };
  const __mmask16 mask = count > 0 ? lanes(count) : 0;
  for (int64_t k = 0; k < ceil_div(keys, WIDTH) * WIDTH; k += 2) {
    const __mmask16 first = k < keys ? mask : 0, second = k + 1 < keys ? mask : 0;
    const char* const at = from + k * line;
    char* const tiles = column + k / WIDTH * parts_of(DTYPE) * TILE;
    char* const to = tiles + k % WIDTH * 32;
    if constexpr (DTYPE == FLOAT32) {
      const Line own = split(_mm512_maskz_loadu_ps(first, at), _mm512_maskz_loadu_ps(second, at + line));
      if (!SPLITS) {
        _mm512_store_si512(tiles + k % WIDTH * 64, own.value);
        _mm512_store_si512(tiles + k % WIDTH * 64 + 64, own.rest);
        continue;
      }
      _mm512_store_si512(to, interleaved(own.value));
      _mm512_store_si512(to + TILE, interleaved(own.rest));
      _mm512_store_si512(to + 2 * TILE, interleaved(own.value));
    } else {
      const __m512i even = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(first, at));
      _mm512_store_si512(to, interleaved(_mm512_inserti64x4(even, _mm256_maskz_loadu_epi16(second, at + line), 1)));
    }
  }
}

constexpr int64_t ROWS = 8;  // a loop over keys for each row would end so often that its end is not foreseen

// The scores of 8 rows, [strips][32 rows][32 keys] from `scores` on, become the weights of values, not yet divided by
// their sums, in tiles of rows. Of row i only the first `reach(i)` keys count, no fewer than of the row
// before. Rows of the mask are `mask_line` bytes apart.
template <int DTYPE, int MASK, class Reach>
static inline void softmax(float* scores, int64_t strips, Reach reach, float scale, const char* mask, int64_t mask_line,
                           char* weights, float* sums) {
  const __m512 least = _mm512_set1_ps(-INFINITY), factor = _mm512_set1_ps(scale * LOG2_E), unit = _mm512_set1_ps(LOG2_E);
  __m512 of[ROWS];  // the largest scores, by lanes; then what is taken off each; then the sums, by lanes
  for (auto& largest : of) largest = least;
  for (int64_t s = 0; s < strips; s++) {
    const bool whole = (s + 1) * STRIP <= reach(0);
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; i++) {
      float* const at = scores + (s * BLOCK_ROWS + i) * STRIP;
      __m512 score[2] = {_mm512_load_ps(at), _mm512_load_ps(at + 16)};
      for (int64_t half = 0; half < 2; half++) {
        const int64_t key = s * STRIP + 16 * half, left = reach(i) - key;
        const __mmask16 counts = whole ? 0xffff : left > 0 ? lanes(left) : 0;
        if constexpr (MASK != NO_MASK) {
          const __m512 added = load<MASK>(mask + i * mask_line, key, counts);
          score[half] = _mm512_fmadd_ps(score[half], _mm512_set1_ps(scale), added);
        }
        if (!whole) score[half] = _mm512_mask_mov_ps(least, counts, score[half]);
        if (MASK != NO_MASK || !whole) _mm512_store_ps(at + 16 * half, score[half]);
      }
      of[i] = _mm512_max_ps(_mm512_max_ps(score[0], score[1]), of[i]);  // in this order a NaN is not the largest
    }
  }
  __m512 origin[ROWS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; i++) {
    const float most = _mm512_reduce_max_ps(of[i]);
    origin[i] = _mm512_set1_ps(most == -INFINITY ? 0 : MASK == NO_MASK ? most * scale * LOG2_E : most);
    of[i] = _mm512_setzero_ps();
  }
  const auto exponent = [&](const float* score, int64_t i) {  // masked ones may be the least floats: times LOG2_E, no more
    if constexpr (MASK == NO_MASK) return _mm512_fmsub_ps(_mm512_load_ps(score), factor, origin[i]);
    else return _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(score), origin[i]), unit);
  };
  for (int64_t s = 0; s < strips; s++)
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; i++) {
      const float* const at = scores + (s * BLOCK_ROWS + i) * STRIP;
      const __m512 left = power_of_two<DTYPE>(exponent(at, i));
      const __m512 right = power_of_two<DTYPE>(exponent(at + 16, i));
      of[i] = _mm512_add_ps(of[i], _mm512_add_ps(left, right));
      char* const line = weights + s * parts_of(DTYPE) * TILE + 64 * i;
      if constexpr (DTYPE == FLOAT32)
        store_row<DTYPE>(line, split(left, right));
      else
        _mm512_store_si512(line, narrow_both(left, right));
    }
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; i++) sums[i] = _mm512_reduce_add_ps(of[i]);
}

// 32 rows of a head of one sample, on their way.
struct Block {
  int64_t row, rows, strips;  // the first row; how many; how many strips of 32 keys some of them are given
  const char *mask, *values;  // values: packed
  char* out;
  float* scores;
  alignas(64) float sums[BLOCK_ROWS];
};

// What a thread works on at a time: packed keys, and packed values twice; packed rows of queries and of weights; scores
// twice, and products.
struct Room {
  int64_t keys, queries, weights, scores, products;  // bytes

  Room(int64_t count, int64_t features, int64_t parts) {
    const int64_t steps = ceil_div(features, WIDTH), strips = ceil_div(count, STRIP), block = BLOCK_ROWS * STRIP * 4;
    keys = strips * steps * 2 * TILE * parts, queries = steps * 2 * TILE * parts, weights = strips * 2 * TILE * parts;
    scores = strips * block, products = steps * block;
  }

  int64_t bytes() const { return 3 * keys + queries + weights + 2 * scores + products; }
};

// One thread's share: blocks `first` to `end` of all, those of one head after another.
template <int DTYPE, int MASK>
class Attending {
 public:
  Attending(const Attention& call, const void* q, const void* k, const void* v, const void* mask, void* out)
      : call_(call), q_((const char*)q), k_((const char*)k), v_((const char*)v), mask_((const char*)mask), out_((char*)out),
        steps_(ceil_div(call.features, WIDTH)), strips_(ceil_div(call.keys, STRIP)) {
    const Room room(call.keys, call.features, PARTS);
    char* at = scratch<2>(room.bytes());
    const auto take = [&](int64_t bytes) { return std::exchange(at, at + bytes); };
    keys_ = take(room.keys), values_[0] = take(room.keys), values_[1] = take(room.keys);
    queries_ = take(room.queries), weights_ = take(room.weights);
    scores_[0] = (float*)take(room.scores), scores_[1] = (float*)take(room.scores), products_ = (float*)take(room.products);
  }

  void run(int64_t first, int64_t end) {
    product_begin();
    for (int64_t i = first; i < end + 2; i++) {
      if (i < end) score(blocks_[i % 3], i);
      if (i > first && i <= end) weigh(blocks_[(i - 1) % 3]);
      if (i > first + 1) store_out(blocks_[(i - 2) % 3]);
      if (i > first && i <= end) multiply_values(blocks_[(i - 1) % 3]);
    }
    product_end();
  }

 private:
  static constexpr int64_t PARTS = parts_of(DTYPE), BYTES = bytes_of(DTYPE), PANEL = PARTS * TILE;  // of 16 rows, a step

  void score(Block& b, int64_t i) {
    const int64_t blocks = ceil_div(call_.rows, BLOCK_ROWS), head = i / blocks % call_.heads, batch = i / blocks / call_.heads;
    const int64_t key_head = head / (call_.heads / call_.key_heads);
    if (batch * call_.key_heads + key_head != packed_) {
      packed_ = batch * call_.key_heads + key_head;
      pack(at(k_, call_.k, batch, key_head, 0), at(v_, call_.v, batch, key_head, 0));
    }
    b.row = i % blocks * BLOCK_ROWS;
    b.rows = std::min(BLOCK_ROWS, call_.rows - b.row);
    b.strips = ceil_div(reach(b, b.rows - 1), STRIP);
    b.mask = mask_ + (batch * call_.mask.batch + head * call_.mask.head + b.row * call_.mask.row) * bytes_of(MASK);
    b.values = values_[turn_];
    b.out = out_ + (batch * call_.out.batch + head * call_.out.head + b.row * call_.out.row) * BYTES;
    b.scores = scores_[i % 2];
    const char* const q = at(q_, call_.q, batch, head, b.row);
    const int64_t line = call_.q.row * BYTES;
    pack_panel<DTYPE>(q, line, b.rows, call_.features, queries_);
    if (b.rows > 16) pack_panel<DTYPE>(q + 16 * line, line, b.rows - 16, call_.features, queries_ + steps_ * PANEL);
    for (int64_t s = 0; s < b.strips; s++)
      product(queries_, b.rows, keys_ + s * 2 * steps_ * PANEL, steps_, steps_, b.scores + s * BLOCK_ROWS * STRIP);
  }

  void pack(const char* k, const char* v) {
    const int64_t k_line = call_.k.row * BYTES, v_line = call_.v.row * BYTES;
    turn_ = 1 - turn_;
    for (int64_t n = 0; n < strips_ * STRIP; n += 16)
      pack_keys<DTYPE>(k + n * k_line, k_line, call_.keys - n, call_.features, keys_ + n / 16 * steps_ * PANEL);
    for (int64_t f = 0; f < steps_ * WIDTH; f += 16)
      pack_values<DTYPE>(v + f * BYTES, v_line, call_.keys, call_.features - f, values_[turn_] + f / 16 * strips_ * PANEL);
  }

  void weigh(Block& b) {
    const int64_t mask_line = call_.mask.row * bytes_of(MASK);
    for (int64_t r = 0; r < b.rows; r += ROWS)
      softmax<DTYPE, MASK>(b.scores + r * STRIP, b.strips, [&](int64_t i) { return reach(b, r + i); }, call_.scale,
                           b.mask + r * mask_line, mask_line, weights_ + r / 16 * strips_ * PANEL + r % 16 * 64, b.sums + r);
  }

  void multiply_values(const Block& b) {
    for (int64_t s = 0; s < steps_; s++)
      product(weights_, b.rows, b.values + s * 2 * strips_ * PANEL, b.strips, strips_, products_ + s * BLOCK_ROWS * STRIP);
  }

  void store_out(Block& b) {
    for (int64_t r = 0; r < BLOCK_ROWS; r += 16) {
      const __m512 sums = _mm512_load_ps(b.sums + r);  // of keys whose largest weight is 1, if there are any
      const __mmask16 some = _mm512_cmp_ps_mask(sums, _mm512_set1_ps(0.5), _CMP_NLT_UQ);
      _mm512_store_ps(b.sums + r, _mm512_maskz_div_ps(some, _mm512_set1_ps(1), sums));
    }
    for (int64_t f = 0; f < call_.features; f += 16) {
      const float* const from = products_ + f / STRIP * BLOCK_ROWS * STRIP + f % STRIP;
      for (int64_t r = 0; r < b.rows; r++) {
        const __m512 y = _mm512_mul_ps(_mm512_load_ps(from + r * STRIP), _mm512_set1_ps(b.sums[r]));
        store<DTYPE>(b.out + r * call_.out.row * BYTES, f, lanes(call_.features - f), y);
      }
    }
  }

  // How many keys a row of a block is given.
  int64_t reach(const Block& b, int64_t r) const { return call_.causal ? std::min(call_.keys, b.row + r + 1) : call_.keys; }

  static const char* at(const char* from, const Strides& strides, int64_t batch, int64_t head, int64_t row) {
    return from + (batch * strides.batch + head * strides.head + row * strides.row) * BYTES;
  }

  static void product(const char* block, int64_t rows, const char* strip, int64_t steps, int64_t length, float* to) {
    multiply<KindOf<DTYPE>>(block, rows, strip, steps * PARTS, length * PARTS, nullptr, (int32_t*)to, [] {});
  }

  const Attention& call_;
  const char *const q_, *const k_, *const v_, *const mask_;
  char* const out_;
  const int64_t steps_, strips_;  // of 32 features, and of 32 keys
  int64_t packed_ = -1, turn_ = 0;  // the head whose keys are packed, and where its values are
  char *keys_, *values_[2], *queries_, *weights_;
  float *scores_[2], *products_;
  Block blocks_[3];
};

}  // namespace

// How many bytes a thread works on at a time. They should stay in its second-level cache.
extern "C" int64_t autoplan_attention_bytes(int64_t keys, int64_t features, int dtype) {
  return Room(keys, features, parts_of(dtype)).bytes();
}

// Whether so few rows, of so many heads that share keys, are attended where they lie: tiles would hold little else than zeros.
extern "C" int autoplan_attends_rows(int64_t rows, int64_t sharing, int dtype) {
  return rows == 1 || (dtype == FLOAT32 && rows <= 8 && rows * sharing <= 16);
}

// Of no keys: as of keys that the mask leaves nothing of.
static void write_zeros(const Attention& call, char* out) {
  const int64_t bytes = bytes_of(call.dtype);
  for (int64_t i = 0; i < call.batch * call.heads * call.rows; i++) {
    const int64_t row = i % call.rows, head = i / call.rows % call.heads, batch = i / call.rows / call.heads;
    memset(out + (batch * call.out.batch + head * call.out.head + row * call.out.row) * bytes, 0, call.features * bytes);
  }
}

// Tensors: q, k, v, the mask if there is one, out. Returns what `done` does.
extern "C" int autoplan_attention(const Attention* call, void* const* first, int64_t, int threads) {
  Tensors tensors(first);
  const void *q = tensors.take(), *k = tensors.take(), *v = tensors.take(), *mask = tensors.take(call->has_mask);
  void* out = tensors.take();
  if (!call->keys) return write_zeros(*call, (char*)out), 0;
  if (autoplan_attends_rows(call->rows, call->heads / call->key_heads, call->dtype))
    return attend_rows(*call, q, k, v, mask, out, threads);
  const int64_t blocks = ceil_div(call->rows, BLOCK_ROWS) * call->heads * call->batch;
  return attend<Attending>(*call, blocks, q, k, v, mask, out, threads);
}
