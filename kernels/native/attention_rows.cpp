// Attention of few rows, as when a language model writes: keys and values are read where they lie, once for all heads and
// rows that share them, which takes less time than packing them into tiles. Everything is in float32.
#include "attention.h"

namespace {

constexpr int64_t AT_ONCE = 64;  // keys whose values stay in the first-level cache while all queries take them

// Lane i of what it returns is the sum of the lanes of a[i].
static inline __m512 sums_of(__m512 (&a)[16]) {
  for (int i = 0; i < 16; i += 2) a[i / 2] = _mm512_add_ps(_mm512_unpacklo_ps(a[i], a[i + 1]), _mm512_unpackhi_ps(a[i], a[i + 1]));
  for (int i = 0; i < 8; i += 2) {
    const __m512d left = _mm512_castps_pd(a[i]), right = _mm512_castps_pd(a[i + 1]);
    a[i / 2] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(left, right)), _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));
  }
  for (int i = 0; i < 4; i += 2)
    a[i / 2] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 1], 0x44), _mm512_shuffle_f32x4(a[i], a[i + 1], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88), _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
}

template <int DTYPE, int MASK>
class AttendingRows {
 public:
  AttendingRows(const Attention& call, const void* q, const void* k, const void* v, const void* mask, void* out)
      : call_(call), q_((const char*)q), k_((const char*)k), v_((const char*)v), mask_((const char*)mask), out_((char*)out),
        group_(call.heads / call.key_heads), width_(ceil_div(call.features, 16) * 16), length_(ceil_div(call.keys, 16) * 16) {
    queries_ = (float*)scratch(group_ * call.rows * (2 * width_ + length_) * 4);
    sums_ = queries_ + group_ * call.rows * width_, scores_ = sums_ + group_ * call.rows * width_;
  }

  // Of all heads of all samples, those from `first` to `end`.
  void run(int64_t first, int64_t end) {
    for (int64_t head = first, next; head < end; head = next) {
      next = std::min(end, (head / group_ + 1) * group_);
      batch_ = head / call_.heads, head_ = head % call_.heads, count_ = (next - head) * call_.rows;
      multiply_keys();
      for (int64_t i = 0; i < count_; i++) softmax(i);
      multiply_values();
      for (int64_t i = 0; i < count_; i++)
        for (int64_t f = 0; f < call_.features; f += 16)
          store<DTYPE>(at(out_, call_.out, i), f, lanes(call_.features - f), _mm512_load_ps(sums_ + i * width_ + f));
    }
  }

 private:
  static constexpr int64_t BYTES = bytes_of(DTYPE);

  // Of the `i`-th query of those that share keys: the rows of a head, then those of the next.
  template <class Char>
  Char* at(Char* from, const Strides& strides, int64_t i, int64_t bytes = BYTES) const {
    const int64_t head = head_ + i / call_.rows, row = i % call_.rows;
    return from + (batch_ * strides.batch + head * strides.head + row * strides.row) * bytes;
  }

  const char* of_key_head(const char* from, const Strides& strides) const {
    return from + (batch_ * strides.batch + head_ / group_ * strides.head) * BYTES;
  }

  void multiply_keys() {
    for (int64_t i = 0; i < count_; i++)
      for (int64_t f = 0; f < width_; f += 16)
        _mm512_store_ps(queries_ + i * width_ + f, load<DTYPE>(at(q_, call_.q, i), f, lanes(call_.features - f)));
    const char* const k = of_key_head(k_, call_.k);
    for (int64_t key = 0; key < call_.keys; key += 16)
      in_blocks([&](auto block, int64_t i) { multiply_keys<decltype(block)::value>(k, key, i); });
  }

  // 16 keys, from `key` on, with `BLOCK` queries, from the `i`-th on.
  template <int64_t BLOCK>
  void multiply_keys(const char* k, int64_t key, int64_t i) {
    constexpr int64_t KEYS = 16 / BLOCK;
    const int64_t line = call_.k.row * BYTES, last = call_.keys - 1;
    for (int64_t own = key; own < key + 16; own += KEYS) {
      __m512 sums[16] = {};  // of each query with each key: those of one query side by side
      for (int64_t f = 0; f < width_; f += 16) {
        const __mmask16 mask = lanes(call_.features - f);
        __m512 query[BLOCK];
#pragma GCC unroll 4
        for (int64_t b = 0; b < BLOCK; b++) query[b] = _mm512_load_ps(queries_ + (i + b) * width_ + f);
#pragma GCC unroll 16
        for (int64_t j = 0; j < KEYS; j++) {
          const __m512 values = load<DTYPE>(k + std::min(own + j, last) * line, f, mask);
#pragma GCC unroll 4
          for (int64_t b = 0; b < BLOCK; b++) sums[b * KEYS + j] = _mm512_fmadd_ps(query[b], values, sums[b * KEYS + j]);
        }
      }
      alignas(64) float found[16];
      _mm512_store_ps(found, sums_of(sums));
      for (int64_t b = 0; b < BLOCK; b++) memcpy(scores_ + (i + b) * length_ + own, found + b * KEYS, KEYS * 4);
    }
  }

  // The scores of a query become the weights of values.
  void softmax(int64_t i) {
    float* const scores = scores_ + i * length_;
    const int64_t reach = call_.causal ? std::min(call_.keys, i % call_.rows + 1) : call_.keys;
    const char* const mask = at(mask_, call_.mask, i, bytes_of(MASK));
    const __m512 least = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(call_.scale);
    __m512 largest = least;
    for (int64_t key = 0; key < length_; key += 16) {
      const __mmask16 counts = key < reach ? lanes(reach - key) : 0;
      __m512 score = _mm512_mul_ps(_mm512_load_ps(scores + key), scale);
      if constexpr (MASK != NO_MASK) score = _mm512_add_ps(score, load<MASK>(mask, key, counts));
      score = _mm512_mask_mov_ps(least, counts, score);
      _mm512_store_ps(scores + key, score);
      largest = _mm512_max_ps(score, largest);  // in this order a NaN is not the largest
    }
    const float most = _mm512_reduce_max_ps(largest);
    const __m512 origin = _mm512_set1_ps(most == -INFINITY ? 0 : most), unit = _mm512_set1_ps(LOG2_E);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t key = 0; key < length_; key += 16) {
      const __m512 score = _mm512_sub_ps(_mm512_load_ps(scores + key), origin);
      const __m512 weight = power_of_two<FLOAT32>(_mm512_mul_ps(score, unit));
      _mm512_store_ps(scores + key, weight);
      sum = _mm512_add_ps(sum, weight);
    }
    const float total = _mm512_reduce_add_ps(sum);  // the largest weight is 1, if there are any
    const __m512 share = _mm512_set1_ps(total < 0.5f ? 0 : 1 / total);
    for (int64_t key = 0; key < length_; key += 16)
      _mm512_store_ps(scores + key, _mm512_mul_ps(_mm512_load_ps(scores + key), share));
  }

  void multiply_values() {
    const char* const v = of_key_head(v_, call_.v);
    for (int64_t key = 0; key < call_.keys; key += AT_ONCE) {
      in_blocks([&](auto block, int64_t i) {
        constexpr int64_t BLOCK = decltype(block)::value;
        int64_t f = 0;
        for (; f + 64 <= width_; f += 64) multiply_values<BLOCK, 4>(v, key, i, f);
        for (; f < width_; f += 16) multiply_values<BLOCK, 1>(v, key, i, f);
      });
    }
  }

  // `COUNT` vectors of features, from `f` on, with `BLOCK` queries, from the `i`-th on, at AT_ONCE keys.
  template <int64_t BLOCK, int64_t COUNT>
  void multiply_values(const char* v, int64_t key, int64_t i, int64_t f) {
    const int64_t end = std::min(key + AT_ONCE, call_.keys), line = call_.v.row * BYTES;
    const __mmask16 last = lanes(call_.features - f - 16 * (COUNT - 1));
    constexpr int64_t TURNS = BLOCK * COUNT < 8 ? 8 / (BLOCK * COUNT) : 1;  // so many sums each: one would wait for itself
    __m512 sums[TURNS][BLOCK][COUNT] = {};
    const auto add = [&](int64_t own, __m512(&to)[BLOCK][COUNT]) {
      __m512 values[COUNT];
#pragma GCC unroll 4
      for (int64_t c = 0; c < COUNT; c++) values[c] = load<DTYPE>(v + own * line, f + 16 * c, c + 1 < COUNT ? 0xffff : last);
#pragma GCC unroll 4
      for (int64_t b = 0; b < BLOCK; b++) {
        const __m512 weight = _mm512_set1_ps(scores_[(i + b) * length_ + own]);
#pragma GCC unroll 4
        for (int64_t c = 0; c < COUNT; c++) to[b][c] = _mm512_fmadd_ps(weight, values[c], to[b][c]);
      }
    };
    int64_t own = key;
    for (; own + TURNS <= end; own += TURNS)
#pragma GCC unroll 8
      for (int64_t t = 0; t < TURNS; t++) add(own + t, sums[t]);
    for (; own < end; own++) add(own, sums[0]);
#pragma GCC unroll 4
    for (int64_t b = 0; b < BLOCK; b++)
#pragma GCC unroll 4
      for (int64_t c = 0; c < COUNT; c++) {
        float* const to = sums_ + (i + b) * width_ + f + 16 * c;
        __m512 sum = key ? _mm512_load_ps(to) : _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int64_t t = 0; t < TURNS; t++) sum = _mm512_add_ps(sum, sums[t][b][c]);
        _mm512_store_ps(to, sum);
      }
  }

  // `work` of all queries, four at a time: what is loaded of keys and values serves them all.
  template <class Work>
  void in_blocks(const Work& work) const {
    int64_t i = 0;
    for (; i + 4 <= count_; i += 4) work(std::integral_constant<int64_t, 4>(), i);
    if (i + 2 <= count_) work(std::integral_constant<int64_t, 2>(), i), i += 2;
    if (i < count_) work(std::integral_constant<int64_t, 1>(), i);
  }

  const Attention& call_;
  const char *const q_, *const k_, *const v_, *const mask_;
  char* const out_;
  const int64_t group_, width_, length_;       // heads that share keys; features and keys, to whole vectors
  int64_t batch_ = 0, head_ = 0, count_ = 0;  // of the queries at work: where they begin, how many there are
  float *queries_, *sums_, *scores_;
};

}  // namespace

int attend_rows(const Attention& call, const void* q, const void* k, const void* v, const void* mask, void* out, int threads) {
  return attend<AttendingRows>(call, call.batch * call.heads, q, k, v, mask, out, threads);
}
