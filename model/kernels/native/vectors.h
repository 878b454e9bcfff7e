// Vectors of float32 as wide as the processor's, and loops over its threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace crucible {

namespace ffi = xla::ffi;

constexpr int64_t kGrain = 1 << 17;  // multiplications that are worth a thread

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float* from) {
  Floats to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

inline void store(float* to, Floats from) { std::memcpy(to, &from, sizeof from); }

inline Floats all(float x) { return x - Floats{}; }

// a + x * y with one rounding
inline Floats fma(Floats x, Floats y, Floats a) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)a);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)a);
#else
  Floats sum;
  for (int i = 0; i < kLanes; i++) sum[i] = __builtin_fmaf(x[i], y[i], a[i]);
  return sum;
#endif
}

inline Floats load(const uint16_t* half) {  // float16
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)half));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)half));
#else
  Floats wide;
  for (int i = 0; i < kLanes; i++) {
    uint32_t sign = (half[i] & 0x8000u) << 16, rest = half[i] & 0x7fffu;
    uint32_t bits = rest << 13;
    float number;
    std::memcpy(&number, &bits, 4);
    number *= 0x1p112f;  // moves the exponent; exact, also for subnormals
    std::memcpy(&bits, &number, 4);
    bits |= sign;
    std::memcpy(&number, &bits, 4);
    wide[i] = number;
  }
  return wide;
#endif
}

template <int distance, int... i>
inline Floats add_pairs(Floats x, Floats y, std::integer_sequence<int, i...>) {
  Floats lower = __builtin_shufflevector(x, y, (i & distance ? kLanes + i - distance : i)...);
  Floats upper = __builtin_shufflevector(x, y, (i & distance ? kLanes + i : i + distance)...);
  return lower + upper;
}

// The sum of each of kLanes vectors, as one vector; halves are added first. The vectors are used up.
template <int distance = kLanes / 2>
inline Floats totals(Floats (&x)[kLanes]) {
  for (int i = 0; i < distance; i++)
    x[i] = add_pairs<distance>(x[i], x[i + distance], std::make_integer_sequence<int, kLanes>());
  if constexpr (distance > 1)
    return totals<distance / 2>(x);
  else
    return x[0];
}

// The sum of a vector's numbers, halves added first.
inline float total(Floats x) {
  float parts[kLanes];
  store(parts, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

inline Floats larger(Floats x, Floats y) { return x > y ? x : y; }

inline float largest(Floats x) {
  float parts[kLanes];
  store(parts, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] = std::max(parts[i], parts[i + half]);
  return parts[0];
}

// e to the x, for x up to 88; relative error under 1e-6; 0 below -87, also for minus infinity.
inline Floats exponential(Floats x) {
  typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
  Floats in = larger(x, all(-88.0f));
  Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  Floats shifted = fma(in, all(1.44269504088896341f), magic);
  Floats n = shifted - magic;
  Floats r = fma(n, all(-0.693359375f), in);
  r = fma(n, all(2.12194440e-4f), r);
  Floats p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = ((bits - 0x4b400000) + 127) << 23;
  Floats power;
  std::memcpy(&power, &bits, sizeof power);
  return x > all(-87.0f) ? p * power : Floats{};
}

// Calls task(0) to task(count - 1), which this thread shares with those of XLA that come to help. `cost` is the
// number of multiplications of one.
struct Work {
  std::atomic<int64_t> next{0}, done{0};
  int64_t count, grain;
};

template <typename F>
void in_parallel(ffi::ThreadPool& pool, int64_t count, int64_t cost, F task) {
  int64_t threads = std::min<int64_t>(pool.num_threads(), std::max<int64_t>(1, count * cost / kGrain));
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) task(i);
    return;
  }
  auto work = std::make_shared<Work>();
  work->count = count;
  work->grain = std::max<int64_t>(1, count / (threads * 4));
  // A thread that comes late finds no work left and touches nothing of this call.
  auto help = [work, task] {
    for (;;) {
      int64_t begin = work->next.fetch_add(work->grain);
      if (begin >= work->count) return;
      int64_t end = std::min(begin + work->grain, work->count);
      for (int64_t i = begin; i < end; i++) task(i);
      work->done.fetch_add(end - begin, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < threads; i++) pool.Schedule(decltype(help)(help));
  help();
  while (work->done.load(std::memory_order_acquire) < count) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

}  // namespace crucible
