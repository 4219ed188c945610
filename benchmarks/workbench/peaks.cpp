// What a CPU with AVX-512 can do at most: products on registers alone, and reading memory. See floor.py.

#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kRounds = 20;                     // the best of so many counts: others are at work on a machine, too
constexpr int64_t kSteps = 1'000'000;           // of a round on vector registers: some milliseconds
constexpr int64_t kTileSteps = 200'000;         // of one on tiles
constexpr int64_t kBuffer = int64_t{1} << 30;   // bytes: more than any cache holds
constexpr int64_t kHugePage = 2 << 20;          // bytes

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The most of `work` a second that all threads do together in a round, where `run(thread)` does `work` each.
template <typename Run>
double most(int threads, int rounds, double work, Run run) {
  double best = 0;
  for (int round = 0; round < rounds; ++round) {
    double begun = 0, ended = 0;
    int team = 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp master
      begun = seconds(), team = omp_get_num_threads();
#pragma omp barrier
      run(omp_get_thread_num());
#pragma omp barrier
#pragma omp master
      ended = seconds();
    }
    best = std::max(best, work * team / (ended - begun));
  }
  return best;
}

[[maybe_unused]] void sixteen_rows_in_each_tile() {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("ldtilecfg %0" ::"m"(config));
}

// Sixteen independent sums, so that no product waits for another's.
template <typename Sum, typename Step>
void sixteen_sums(Sum zero, Step step) {
  Sum sums[16];
  for (auto& sum : sums) sum = zero;
  for (int64_t k = 0; k < kSteps; ++k) {
#pragma GCC unroll 16
    for (auto& sum : sums) {
      sum = step(sum);
      asm volatile("" : "+v"(sum));
    }
  }
}

double float32_operations(int threads) {
  const __m512 one = _mm512_set1_ps(1);
  return most(threads, kRounds, 2.0 * 16 * 16 * kSteps, [&](int) {
    sixteen_sums(one, [&](__m512 sum) { return _mm512_fmadd_ps(one, one, sum); });
  });
}

double bfloat16_operations(int threads) {
#if defined(__AMX_BF16__)
  return most(threads, kRounds, 2.0 * 16 * 16 * 32 * 4 * kTileSteps, [](int) {
    sixteen_rows_in_each_tile();
    for (int64_t k = 0; k < kTileSteps; ++k) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
  });
#elif defined(__AVX512BF16__)
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  return most(threads, kRounds, 2.0 * 32 * 16 * kSteps, [&](int) {
    sixteen_sums(_mm512_setzero_ps(), [&](__m512 sum) { return _mm512_dpbf16_ps(sum, ones, ones); });
  });
#else
  return float32_operations(threads);
#endif
}

double int8_operations(int threads) {
#if defined(__AMX_INT8__)
  return most(threads, kRounds, 2.0 * 16 * 16 * 64 * 4 * kTileSteps, [](int) {
    sixteen_rows_in_each_tile();
    for (int64_t k = 0; k < kTileSteps; ++k) {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
  });
#else
  const __m512i ones = _mm512_set1_epi8(1);
  return most(threads, kRounds, 2.0 * 64 * 16 * kSteps, [&](int) {
    sixteen_sums(_mm512_setzero_si512(), [&](__m512i sum) {
      asm("vpdpbusd %1, %1, %0" : "+v"(sum) : "v"(ones));  // the compiler copies every sum of the intrinsic's
      return sum;
    });
  });
#endif
}

constexpr int64_t kStreams = 4, kAhead = 2048;  // that a thread reads side by side, and bytes fetched ahead

}  // namespace

// Operations a second on `threads` threads, two a product: of float32 (0), bfloat16 (1), int8 (2).
extern "C" double operations(int kind, int threads) {
  return kind == 0 ? float32_operations(threads) : kind == 1 ? bfloat16_operations(threads) : int8_operations(threads);
}

// Bytes a second from memory, each thread reading a part that it wrote, in pages of 2 MiB where the system grants them;
// not a number where there is no memory for it.
extern "C" double bandwidth(int threads) {
  char* buffer = static_cast<char*>(std::aligned_alloc(kHugePage, kBuffer));
  if (!buffer) return std::nan("");
  madvise(buffer, kBuffer, MADV_HUGEPAGE);
  const int64_t stream = kBuffer / threads / kStreams / 4096 * 4096, share = kStreams * stream;
  most(threads, 1, 0, [&](int thread) { std::memset(buffer + thread * share, 1, share); });
  const double best = most(threads, 8, static_cast<double>(share), [&](int thread) {
    const char* from = buffer + thread * share;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t at = 0; at < stream; at += 64) {
      for (int64_t line = at; line < share; line += stream) {
        _mm_prefetch(from + line + kAhead, _MM_HINT_T0);
        sum = _mm512_xor_si512(sum, _mm512_load_si512(from + line));
      }
    }
    asm volatile("" ::"v"(sum));
  });
  std::free(buffer);
  return best;
}
