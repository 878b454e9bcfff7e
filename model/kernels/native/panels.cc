// Products of float32 rows with packed weights on a CPU: y = x w, where w is widened in registers as it is read.
//
// A weight [I, O] lies in panels of 32 outputs: panel, input, output. Values have 4, 8 or 16 bits. Two inputs of 4 bits
// share a byte, the first in its low half; their bits are an index into a table of 16 numbers. 16 bits are a bfloat16.
// Each block of inputs of an output has a scale and, if there are offsets, an offset: w = value * scale + offset.
//
// An output is the sum of its products in the order of the inputs, each added with one rounding. So its bits depend
// neither on the number of rows nor on the number of threads.

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace {

using namespace crucible;

constexpr int kWidth = 32;        // outputs of a panel
constexpr int kVectors = kWidth / kLanes;
constexpr int kRows = kLanes == 16 ? 8 : 2;  // rows whose sums fit the registers
constexpr int64_t kChunk = 512;   // inputs that are widened at once for many rows
constexpr int64_t kManyRows = 12; // from here on a panel is widened once for all rows

struct Bits8 {
  static constexpr int64_t kPairBytes = 2 * kWidth;
  static void pair(const uint8_t* from, const float*, Floats (&first)[kVectors], Floats (&second)[kVectors]) {
    for (int v = 0; v < kVectors; v++) {
      first[v] = wide(from + v * kLanes);
      second[v] = wide(from + kWidth + v * kLanes);
    }
  }
  static Floats wide(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    Floats to;
    for (int i = 0; i < kLanes; i++) to[i] = (int8_t)from[i];
    return to;
#endif
  }
};

struct Bits4 {
  static constexpr int64_t kPairBytes = kWidth;
  static void pair(const uint8_t* from, const float* table, Floats (&first)[kVectors], Floats (&second)[kVectors]) {
    for (int v = 0; v < kVectors; v++) {
      const uint8_t* at = from + v * kLanes;
#if defined(__AVX512F__)
      __m512 levels = _mm512_loadu_ps(table);
      __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
      first[v] = (Floats)_mm512_permutexvar_ps(index, levels);  // reads the low 4 bits of an index
      second[v] = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), levels);
#elif defined(__AVX2__)
      __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
      __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at));
      auto look = [&](__m256i i) {  // blendv reads the sign bit, to which bit 3 is moved
        __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
        return (Floats)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), upper);
      };
      first[v] = look(index);
      second[v] = look(_mm256_srli_epi32(index, 4));
#else
      for (int i = 0; i < kLanes; i++) first[v][i] = table[at[i] & 15], second[v][i] = table[at[i] >> 4];
#endif
    }
  }
};

struct Bits16 {
  static constexpr int64_t kPairBytes = 4 * kWidth;
  static void pair(const uint8_t* from, const float*, Floats (&first)[kVectors], Floats (&second)[kVectors]) {
    for (int v = 0; v < kVectors; v++) {
      first[v] = wide(from + 2 * v * kLanes);
      second[v] = wide(from + 2 * kWidth + 2 * v * kLanes);
    }
  }
  static Floats wide(const uint8_t* from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
    Floats to;
    for (int i = 0; i < kLanes; i++) {
      uint16_t half;
      std::memcpy(&half, from + 2 * i, 2);
      uint32_t bits = (uint32_t)half << 16;
      float number;
      std::memcpy(&number, &bits, 4);
      to[i] = number;
    }
    return to;
#endif
  }
};

template <typename Scale>
struct Weight {
  const uint8_t* values;
  const Scale* scales;   // null: none
  const Scale* offsets;  // null: none
  const float* table;
  int64_t inputs, outputs, block;
};

struct Scaling {
  Floats scale[kVectors], offset[kVectors];
};

template <typename Scale>
inline Scaling scaling_of(const Weight<Scale>& w, int64_t panel, int64_t input) {
  Scaling s;
  int64_t at = (panel * (w.inputs / w.block) + input / w.block) * kWidth;
  for (int v = 0; v < kVectors; v++) {
    s.scale[v] = load(w.scales + at + v * kLanes);
    s.offset[v] = w.offsets ? load(w.offsets + at + v * kLanes) : Floats{};
  }
  return s;
}

// The numbers of inputs from `input` to `end` of a panel, handed over two inputs at a time.
template <typename Format, typename Scale, typename Take>
inline void widen(const Weight<Scale>& w, int64_t panel, int64_t input, int64_t end, Take take) {
  const uint8_t* from = w.values + (panel * w.inputs + input) / 2 * Format::kPairBytes;
  while (input < end) {
    int64_t stop = w.scales ? std::min(end, (input / w.block + 1) * w.block) : end;
    Scaling s;
    if (w.scales) s = scaling_of(w, panel, input);
    for (; input < stop; input += 2, from += Format::kPairBytes) {
      Floats first[kVectors], second[kVectors];
      Format::pair(from, w.table, first, second);
      if (w.scales) {
        for (int v = 0; v < kVectors; v++) {
          first[v] = fma(first[v], s.scale[v], s.offset[v]);
          second[v] = fma(second[v], s.scale[v], s.offset[v]);
        }
      }
      take(input, first, second);
    }
  }
}

// A few rows times a panel, which is widened as it is read.
template <int rows, typename Format, typename Scale>
inline void rows_by_panel(const Weight<Scale>& w, int64_t panel, const float* x, float* y) {
  Floats sum[rows][kVectors] = {};
  widen<Format>(w, panel, 0, w.inputs, [&](int64_t i, Floats(&first)[kVectors], Floats(&second)[kVectors]) {
    for (int r = 0; r < rows; r++) {
      const float* at = x + r * w.inputs + i;
      for (int v = 0; v < kVectors; v++) sum[r][v] = fma(all(at[0]), first[v], sum[r][v]);
      for (int v = 0; v < kVectors; v++) sum[r][v] = fma(all(at[1]), second[v], sum[r][v]);
    }
  });
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < kVectors; v++) store(y + r * w.outputs + panel * kWidth + v * kLanes, sum[r][v]);
}

// Rows times inputs `begin` to `end` of a panel that is widened already.
template <int rows>
inline void rows_by_wide(const float* wide, int64_t begin, int64_t end, int64_t inputs, int64_t outputs, const float* x,
                    float* y) {
  Floats sum[rows][kVectors];
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < kVectors; v++) sum[r][v] = begin ? load(y + r * outputs + v * kLanes) : Floats{};
  for (int64_t i = begin; i < end; i++, wide += kWidth) {
    Floats w[kVectors];
    for (int v = 0; v < kVectors; v++) w[v] = load(wide + v * kLanes);
    for (int r = 0; r < rows; r++)
      for (int v = 0; v < kVectors; v++) sum[r][v] = fma(all(x[r * inputs + i]), w[v], sum[r][v]);
  }
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < kVectors; v++) store(y + r * outputs + v * kLanes, sum[r][v]);
}

// Calls f with the number of rows as a constant, for all rows, the most at once.
template <int most, typename F>
inline void in_row_groups(int64_t rows, F f) {
  int64_t row = 0;
  for (; row + most <= rows; row += most) f(std::integral_constant<int, most>(), row);
  if constexpr (most > 1)
    if (row < rows) in_row_groups<most / 2>(rows - row, [&](auto n, int64_t more) { f(n, row + more); });
}

template <typename Format, typename Scale>
void panel_product(const Weight<Scale>& w, int64_t panel, int64_t rows, const float* x, float* y) {
  if (rows < kManyRows) {
    in_row_groups<kRows>(rows, [&](auto n, int64_t row) {
      rows_by_panel<n, Format>(w, panel, x + row * w.inputs, y + row * w.outputs);
    });
    return;
  }
  alignas(64) float wide[kChunk * kWidth];
  for (int64_t begin = 0; begin < w.inputs; begin += kChunk) {
    int64_t end = std::min(begin + kChunk, w.inputs);
    widen<Format>(w, panel, begin, end, [&](int64_t i, Floats(&first)[kVectors], Floats(&second)[kVectors]) {
      for (int v = 0; v < kVectors; v++) {
        store(wide + (i - begin) * kWidth + v * kLanes, first[v]);
        store(wide + (i - begin + 1) * kWidth + v * kLanes, second[v]);
      }
    });
    in_row_groups<kRows>(rows, [&](auto n, int64_t row) {
      rows_by_wide<n>(wide, begin, end, w.inputs, w.outputs, x + row * w.inputs, y + row * w.outputs + panel * kWidth);
    });
  }
}

template <typename Format, typename Scale>
void product(ffi::ThreadPool& pool, Weight<Scale> w, int64_t rows, const float* x, float* y) {
  in_parallel(pool, w.outputs / kWidth, rows * w.inputs * kWidth,
              [=](int64_t panel) { panel_product<Format>(w, panel, rows, x, y); });
}

template <typename Scale>
ffi::Error product_of_bits(ffi::ThreadPool& pool, int64_t bits, Weight<Scale> w, int64_t rows, const float* x, float* y) {
  if (bits == 4) product<Bits4>(pool, w, rows, x, y);
  else if (bits == 8) product<Bits8>(pool, w, rows, x, y);
  else if (bits == 16) product<Bits16>(pool, w, rows, x, y);
  else return ffi::Error::InvalidArgument("values have 4, 8 or 16 bits");
  return ffi::Error::Success();
}

// x [M, I] float32; values [P, bytes] uint8; scales and offsets [P, N, 32] float32 or float16, or of no elements;
// table [16] float32; y [M, P * 32] float32
ffi::Error panels(ffi::ThreadPool pool, int64_t bits, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> values,
                  ffi::AnyBuffer scales, ffi::AnyBuffer offsets, ffi::Buffer<ffi::F32> table,
                  ffi::ResultBuffer<ffi::F32> y) {
  int64_t rows = x.dimensions()[0], inputs = x.dimensions()[1], outputs = y->dimensions()[1];
  int64_t panels = outputs / kWidth, blocks = scales.element_count() / std::max<int64_t>(1, outputs);
  if (outputs % kWidth || inputs % 2 || (int64_t)values.element_count() != panels * inputs * kWidth * bits / 8)
    return ffi::Error::InvalidArgument("the values do not fit rows and outputs");
  if (scales.element_count() && (blocks < 1 || inputs % blocks || inputs / blocks % 2))
    return ffi::Error::InvalidArgument("the scales do not fit rows and outputs");
  if (offsets.element_count() && offsets.element_count() != scales.element_count())
    return ffi::Error::InvalidArgument("the offsets do not fit the scales");
  int64_t block = blocks ? inputs / blocks : inputs;
  auto weight = [&]<typename Scale>(Scale*) {
    return Weight<Scale>{values.typed_data(),
                         scales.element_count() ? (const Scale*)scales.untyped_data() : nullptr,
                         offsets.element_count() ? (const Scale*)offsets.untyped_data() : nullptr,
                         table.typed_data(), inputs, outputs, block};
  };
  if (scales.element_type() == ffi::F16)
    return product_of_bits(pool, bits, weight((uint16_t*)nullptr), rows, x.typed_data(), y->typed_data());
  return product_of_bits(pool, bits, weight((float*)nullptr), rows, x.typed_data(), y->typed_data());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(crucible_panels, panels,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<int64_t>("bits")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
