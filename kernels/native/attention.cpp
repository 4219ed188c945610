// Attention in bfloat16 (Vaswani et al., "Attention Is All You Need", arXiv:1706.03762): of each head, for blocks of 32
// rows, softmax(q k^T * scale + mask) v. All scores of a block are in a core's caches at once; sums are in float32, and
// what v is multiplied with is rounded to bfloat16. Rows that the mask leaves nothing of become zero.
//
// What one unit of a core stores, another waits for until it is in the cache. So three blocks are on their way at a time,
// and what a stage reads was stored two stages ago.
#include <utility>
#include "product.h"

struct Strides {  // elements; the features of a row lie side by side
  int64_t batch, head, row;
};

// What a call asks for: q [batch, heads, rows, features], k and v [batch, key_heads, keys, features], out like q. Each
// head of k and v serves heads / key_heads heads of q, one after another. Causal: row i is given the keys up to i.
struct Attention {
  int64_t batch, heads, key_heads, rows, keys, features;
  Strides q, k, v, out, mask;
  int mask_dtype;  // of what is added to scores [batch, heads, rows, keys], if there is a mask
  int causal;
  float scale;
};

namespace {

constexpr int64_t WIDTH = 32;  // bfloat16 values in a line of a tile
constexpr float LOG2_E = 1.44269504f;

static inline __m512i load_line(const uint16_t* from, int64_t left) {
  return left >= WIDTH ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((__mmask32)((1u << left) - 1), from);
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

// 16 rows, of which `count` there are, as a panel of activations.
static inline void pack_panel(const uint16_t* from, int64_t line, int64_t count, int64_t features, char* panel) {
  for (int64_t f = 0; f < features; f += WIDTH, panel += TILE)
    for (int64_t r = 0; r < 16; r++)
      _mm512_store_si512(panel + 64 * r, r < count ? load_line(from + r * line + f, features - f) : _mm512_setzero_si512());
}

// 16 keys, of which `count` there are, as 16 channels of weights.
static inline void pack_keys(const uint16_t* from, int64_t line, int64_t count, int64_t features, char* column) {
  for (int64_t f = 0; f < features; f += WIDTH, column += TILE) {
    __m512i lines[16];
    for (int64_t r = 0; r < 16; r++)
      lines[r] = r < count ? load_line(from + r * line + f, features - f) : _mm512_setzero_si512();
    transpose(lines);
    for (int64_t r = 0; r < 16; r++) _mm512_store_si512(column + 64 * r, lines[r]);
  }
}

// `keys` rows of 16 features, of which `count` there are, as 16 channels of weights.
static inline void pack_values(const uint16_t* from, int64_t line, int64_t keys, int64_t count, char* column) {
  const __mmask16 mask = count > 0 ? lanes(count) : 0;
  for (int64_t k = 0; k < ceil_div(keys, WIDTH) * WIDTH; k += 2, column += 64) {
    const __m256i even = k < keys ? _mm256_maskz_loadu_epi16(mask, from + k * line) : _mm256_setzero_si256();
    const __m256i odd = k + 1 < keys ? _mm256_maskz_loadu_epi16(mask, from + (k + 1) * line) : _mm256_setzero_si256();
    const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    _mm512_store_si512(column, pairs);
  }
}

// 2^x for x <= 0, to 8e-5, relative, which bfloat16 does not show; 0 below 2^-126. That of a NaN is one. What is added and
// taken off again rounds to an integer, which is then in the lowest bits.
static inline __m512 power_of_two(__m512 x) {
  const __m512 rounder = _mm512_set1_ps(12582912);  // 1.5 * 2^23
  const __mmask16 large = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126), _CMP_NLT_UQ);
  const __m512 n = _mm512_add_ps(x, rounder);
  constexpr float factors[] = {0.05517166f, 0.24261112f, 0.69326099f, 0.99992807f};  // fitted, in Lawson's way
  const __m512i power = _mm512_castps_si512(polynomial(_mm512_sub_ps(x, _mm512_sub_ps(n, rounder)), factors));
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(large, power, _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}

static inline __m512i narrow_both(__m512 left, __m512 right) {
#ifdef __AVX512BF16__
  return (__m512i)_mm512_cvtne2ps_pbh(right, left);
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_bf16(left)), narrow_bf16(right), 1);
#endif
}

constexpr int NO_MASK = -1;
constexpr int64_t ROWS = 8;  // a loop over keys for each row would end so often that its end is not foreseen

// The scores of 8 rows, [strips][32 rows][32 keys] from `scores` on, become the weights of values, not yet divided by
// their sums, in lines of 32 that are TILE apart. Of row i only the first `reach(i)` keys count, no fewer than of the row
// before. Rows of the mask are `mask_line` bytes apart.
template <int MASK, class Reach>
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
          score[half] = _mm512_fmadd_ps(added, unit, _mm512_mul_ps(score[half], factor));
        }
        if (!whole) score[half] = _mm512_mask_mov_ps(least, counts, score[half]);
        if (MASK != NO_MASK || !whole) _mm512_store_ps(at + 16 * half, score[half]);
      }
      of[i] = _mm512_max_ps(_mm512_max_ps(score[0], score[1]), of[i]);  // in this order a NaN is not the largest
    }
  }
  const __m512 own = MASK == NO_MASK ? factor : _mm512_set1_ps(1);
  __m512 origin[ROWS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; i++) {
    const float most = _mm512_reduce_max_ps(of[i]);
    origin[i] = _mm512_mul_ps(_mm512_set1_ps(most == -INFINITY ? 0 : most), own);
    of[i] = _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < strips; s++)
#pragma GCC unroll 8
    for (int64_t i = 0; i < ROWS; i++) {
      const float* const at = scores + (s * BLOCK_ROWS + i) * STRIP;
      const __m512 left = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(at), own, origin[i]));
      const __m512 right = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(at + 16), own, origin[i]));
      of[i] = _mm512_add_ps(of[i], _mm512_add_ps(left, right));
      _mm512_store_si512(weights + s * TILE + 64 * i, narrow_both(left, right));
    }
#pragma GCC unroll 8
  for (int64_t i = 0; i < ROWS; i++) sums[i] = _mm512_reduce_add_ps(of[i]);
}

// 32 rows of a head of one sample, on their way.
struct Block {
  int64_t row, rows, strips;  // the first row; how many; how many strips of 32 keys some of them are given
  const char *mask, *values;  // values: packed
  uint16_t* out;
  float* scores;
  alignas(64) float sums[BLOCK_ROWS];
};

// What a thread works on at a time: packed keys, and packed values twice; scores twice, and products; packed rows, of
// queries and of weights.
static inline int64_t attention_bytes(int64_t keys, int64_t features) {
  const int64_t steps = ceil_div(features, WIDTH), strips = ceil_div(keys, STRIP);
  return 3 * strips * steps * 2 * TILE + (2 * strips + steps) * BLOCK_ROWS * STRIP * 4 + (strips + steps) * 2 * TILE;
}

// One thread's share: blocks `first` to `end` of all, those of one head after another.
template <int MASK>
class Attending {
 public:
  Attending(const Attention& call, const void* q, const void* k, const void* v, const void* mask, void* out)
      : call_(call), q_((const uint16_t*)q), k_((const uint16_t*)k), v_((const uint16_t*)v), mask_((const char*)mask),
        out_((uint16_t*)out), steps_(ceil_div(call.features, WIDTH)), strips_(ceil_div(call.keys, STRIP)) {
    const int64_t own = strips_ * STRIP * steps_ * WIDTH * 2, block = BLOCK_ROWS * STRIP * 4;  // bytes
    char* at = scratch<2>(attention_bytes(call.keys, call.features));
    const auto take = [&](int64_t bytes) { return std::exchange(at, at + bytes); };
    keys_ = take(own), values_[0] = take(own), values_[1] = take(own);
    queries_ = take(steps_ * 2 * TILE), weights_ = take(strips_ * 2 * TILE);
    scores_[0] = (float*)take(strips_ * block), scores_[1] = (float*)take(strips_ * block), products_ = (float*)take(steps_ * block);
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
  void score(Block& b, int64_t i) {
    const int64_t blocks = ceil_div(call_.rows, BLOCK_ROWS), head = i / blocks % call_.heads, batch = i / blocks / call_.heads;
    const int64_t key_head = head / (call_.heads / call_.key_heads);
    if (batch * call_.key_heads + key_head != packed_) {
      packed_ = batch * call_.key_heads + key_head;
      pack(k_ + batch * call_.k.batch + key_head * call_.k.head, v_ + batch * call_.v.batch + key_head * call_.v.head);
    }
    b.row = i % blocks * BLOCK_ROWS;
    b.rows = std::min(BLOCK_ROWS, call_.rows - b.row);
    b.strips = ceil_div(reach(b, b.rows - 1), STRIP);
    b.mask = mask_ + (batch * call_.mask.batch + head * call_.mask.head + b.row * call_.mask.row) * bytes_of(MASK);
    b.values = values_[turn_];
    b.out = out_ + batch * call_.out.batch + head * call_.out.head + b.row * call_.out.row;
    b.scores = scores_[i % 2];
    const uint16_t* const q = q_ + batch * call_.q.batch + head * call_.q.head + b.row * call_.q.row;
    pack_panel(q, call_.q.row, b.rows, call_.features, queries_);
    if (b.rows > 16) pack_panel(q + 16 * call_.q.row, call_.q.row, b.rows - 16, call_.features, queries_ + steps_ * TILE);
    for (int64_t s = 0; s < b.strips; s++)
      product(queries_, b.rows, keys_ + s * 2 * steps_ * TILE, steps_, steps_, b.scores + s * BLOCK_ROWS * STRIP);
  }

  void pack(const uint16_t* k, const uint16_t* v) {
    turn_ = 1 - turn_;
    for (int64_t n = 0; n < strips_ * STRIP; n += 16)
      pack_keys(k + n * call_.k.row, call_.k.row, call_.keys - n, call_.features, keys_ + n * steps_ * 64);
    for (int64_t f = 0; f < steps_ * WIDTH; f += 16)
      pack_values(v + f, call_.v.row, call_.keys, call_.features - f, values_[turn_] + f * strips_ * 64);
  }

  void weigh(Block& b) {
    const int64_t mask_line = call_.mask.row * bytes_of(MASK);
    for (int64_t r = 0; r < b.rows; r += ROWS)
      softmax<MASK>(b.scores + r * STRIP, b.strips, [&](int64_t i) { return reach(b, r + i); }, call_.scale, b.mask + r * mask_line,
                    mask_line, weights_ + r / 16 * strips_ * TILE + r % 16 * 64, b.sums + r);
  }

  void multiply_values(const Block& b) {
    for (int64_t s = 0; s < steps_; s++)
      product(weights_, b.rows, b.values + s * 2 * strips_ * TILE, b.strips, strips_, products_ + s * BLOCK_ROWS * STRIP);
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
        store<BFLOAT16>(b.out + r * call_.out.row, f, lanes(call_.features - f), y);
      }
    }
  }

  // How many keys a row of a block is given.
  int64_t reach(const Block& b, int64_t r) const { return call_.causal ? std::min(call_.keys, b.row + r + 1) : call_.keys; }

  static void product(const char* block, int64_t rows, const char* strip, int64_t steps, int64_t length, float* to) {
    multiply<BFloat16>(block, rows, strip, steps, length, nullptr, (int32_t*)to, [] {});
  }

  const Attention& call_;
  const uint16_t *const q_, *const k_, *const v_;
  const char* const mask_;
  uint16_t* const out_;
  const int64_t steps_, strips_;  // of 32 features, and of 32 keys
  int64_t packed_ = -1, turn_ = 0;  // the head whose keys are packed, and where its values are
  char *keys_, *values_[2], *queries_, *weights_;
  float *scores_[2], *products_;
  Block blocks_[3];
};

}  // namespace

// Whether it runs on AMX tiles.
extern "C" int autoplan_attends_in_tiles() {
#ifdef __AMX_BF16__
  return 1;
#else
  return 0;
#endif
}

// How many bytes a thread works on at a time. They should stay in its second-level cache.
extern "C" int64_t autoplan_attention_bytes(int64_t keys, int64_t features) { return attention_bytes(keys, features); }

// Returns what `done` does.
extern "C" int autoplan_attention(const Attention* call, const void* q, const void* k, const void* v, const void* mask, void* out,
                                  int threads) {
  const int64_t blocks = ceil_div(call->rows, BLOCK_ROWS) * call->heads * call->batch;
  threads = team_for(call->batch * call->heads * call->rows, call->keys, call->features, threads);
  const auto run = [&](auto mask_dtype) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      failed = done([&] {
        Attending<decltype(mask_dtype)::value>(*call, q, k, v, mask, out).run(blocks * thread / team, blocks * (thread + 1) / team);
      });
    }
    return failed;
  };
  if (!mask) return run(std::integral_constant<int, NO_MASK>());
  int failed = 0;
  as_constant(call->mask_dtype, [&](auto dtype) { failed = run(dtype); });
  return failed;
}
