#include "image_resize.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__) && defined(__GNUC__)
#define BVAE_AVX2
#include <immintrin.h>
#endif

namespace bvae {
namespace {

constexpr int kBits = 22;  // bits in the fraction of the weights
constexpr int32_t kHalf = 1 << (kBits - 1);

inline uint8_t to_byte(int32_t sum) {
  const int32_t v = sum >> kBits;
  return static_cast<uint8_t>(v < 0 ? 0 : (v > 255 ? 255 : v));
}

// The two loops below by AVX2 where the processor has it, and plainly. The sums are of integers: both give the same.

// A row of RGB pixels, shrunk. `weights` are for two results at a time: for each tap, four times the one's, four times
// the other's. Up to four bytes behind the results are overwritten.
void shrink_rgb(const uint8_t* row, const int32_t* first, const int32_t* weights, int size, int most, uint8_t* out) {
  for (int i = 0; i < size; ++i) {
    const uint8_t* pixel = row + 3 * static_cast<int64_t>(first[i]);
    const int32_t* weight = weights + static_cast<int64_t>(i / 2) * most * 8 + i % 2 * 4;
    int32_t r = kHalf, g = kHalf, b = kHalf;
    for (int k = 0; k < most; ++k, pixel += 3, weight += 8) {
      r += pixel[0] * *weight;
      g += pixel[1] * *weight;
      b += pixel[2] * *weight;
    }
    out[3 * i] = to_byte(r);
    out[3 * i + 1] = to_byte(g);
    out[3 * i + 2] = to_byte(b);
  }
}

void shrink_grey(const uint8_t* row, const int32_t* first, const int32_t* weights, int size, int most, uint8_t* out) {
  for (int i = 0; i < size; ++i, weights += most) {
    int32_t sum = kHalf;
    for (int k = 0; k < most; ++k) sum += row[first[i] + k] * weights[k];
    out[i] = to_byte(sum);
  }
}

// Bytes [begin, line) of a row of the result from `count` rows, `line` bytes each.
void shrink_columns(const uint8_t* rows, size_t line, const int32_t* weights, int count, size_t begin, uint8_t* out) {
  for (size_t i = begin; i < line; ++i) {
    int32_t sum = kHalf;
    for (size_t k = 0; k < static_cast<size_t>(count); ++k) sum += rows[k * line + i] * weights[k];
    out[i] = to_byte(sum);
  }
}

#ifdef BVAE_AVX2

// BVAE_CPU_CAPABILITY as in cpu.cpp.
bool use_avx2() {
  const char* wish = std::getenv("BVAE_CPU_CAPABILITY");
  return (wish == nullptr || std::strcmp(wish, "baseline") != 0) && __builtin_cpu_supports("avx2");
}
const bool kAvx2 = use_avx2();

#define BVAE_TARGET __attribute__((target("avx2")))

// Four bytes, of which the address need not be aligned.
inline int four(const uint8_t* p) {
  int v;
  std::memcpy(&v, p, 4);
  return v;
}

// Eight sums as bytes, in the lower half.
BVAE_TARGET inline __m128i to_bytes(__m256i sums) {
  const __m256i v = _mm256_srai_epi32(sums, kBits);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return _mm_packus_epi16(words, words);
}

BVAE_TARGET void shrink_rgb_avx2(const uint8_t* row, const int32_t* first, const int32_t* weights, int size, int most,
                                 uint8_t* out) {
  // Four lanes a pixel: the fourth is its neighbour's red, and its byte is overwritten.
  for (int i = 0; i < size; i += 2, out += 6) {
    const uint8_t* a = row + 3 * static_cast<int64_t>(first[i]);
    const uint8_t* b = row + 3 * static_cast<int64_t>(first[i + 1 < size ? i + 1 : i]);
    __m256i sums = _mm256_set1_epi32(kHalf);
    for (int k = 0; k < most; ++k, a += 3, b += 3, weights += 8) {
      const __m256i pixels = _mm256_cvtepu8_epi32(_mm_insert_epi32(_mm_cvtsi32_si128(four(a)), four(b), 1));
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights));
      sums = _mm256_add_epi32(sums, _mm256_mullo_epi32(pixels, w));
    }
    const __m128i bytes = to_bytes(sums);
    const int one = _mm_cvtsi128_si32(bytes), other = _mm_extract_epi32(bytes, 1);
    std::memcpy(out, &one, 4);
    std::memcpy(out + 3, &other, 4);
  }
}

BVAE_TARGET void shrink_columns_avx2(const uint8_t* rows, size_t line, const int32_t* weights, int count,
                                     uint8_t* out) {
  size_t i = 0;
  for (; i + 16 <= line; i += 16) {
    __m256i low = _mm256_set1_epi32(kHalf), high = low;
    for (size_t k = 0; k < static_cast<size_t>(count); ++k) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + k * line + i));
      const __m256i w = _mm256_set1_epi32(weights[k]);
      low = _mm256_add_epi32(low, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(bytes), w));
      high = _mm256_add_epi32(high, _mm256_mullo_epi32(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)), w));
    }
    const __m128i bytes = _mm_unpacklo_epi64(to_bytes(low), to_bytes(high));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), bytes);
  }
  shrink_columns(rows, line, weights, count, i, out);
}

#endif

}  // namespace

Taps::Taps(int length, int size, int most, const int32_t* first, const int32_t* weights)
    : length(length),
      size(size),
      most(most),
      first(first, first + size),
      count(static_cast<size_t>(size), 0),
      weights(weights, weights + static_cast<int64_t>(size) * most) {
  for (int i = 0; i < size; ++i) {
    for (int k = 0; k < most; ++k) {
      if (weights[static_cast<int64_t>(i) * most + k] != 0) count[static_cast<size_t>(i)] = k + 1;
    }
    if (first[i] < 0 || first[i] + static_cast<int64_t>(count[static_cast<size_t>(i)]) > length) {
      throw std::invalid_argument("taps outside of the image");
    }
  }
}

Resizer::Resizer(const Taps& horizontal, const Taps& vertical, int channels)
    : horizontal(horizontal),
      vertical(vertical),
      channels(channels),
      line_(static_cast<size_t>(horizontal.size) * static_cast<size_t>(channels)),
      shrunk_(line_ * static_cast<size_t>(vertical.length) + 4) {
  if (channels != 3) return;
  const size_t most = static_cast<size_t>(horizontal.most), size = static_cast<size_t>(horizontal.size);
  spread_.assign((size + 1) / 2 * most * 8, 0);
  for (size_t i = 0; i < size; ++i) {
    for (size_t k = 0; k < most; ++k) {
      int32_t* lanes = spread_.data() + (i / 2 * most + k) * 8 + i % 2 * 4;
      for (int lane = 0; lane < 4; ++lane) lanes[lane] = horizontal.weights[i * most + k];
    }
  }
}

void Resizer::add_row(const uint8_t* row) {
  uint8_t* to = shrunk_.data() + static_cast<size_t>(rows_++) * line_;
  if (channels == 3) {
#ifdef BVAE_AVX2
    const auto shrink = kAvx2 ? shrink_rgb_avx2 : shrink_rgb;
#else
    const auto shrink = shrink_rgb;
#endif
    shrink(row, horizontal.first.data(), spread_.data(), horizontal.size, horizontal.most, to);
  } else {
    shrink_grey(row, horizontal.first.data(), horizontal.weights.data(), horizontal.size, horizontal.most, to);
  }
}

void Resizer::finish(uint8_t* out) const {
  for (size_t j = 0; j < static_cast<size_t>(vertical.size); ++j, out += line_) {
    const uint8_t* rows = shrunk_.data() + static_cast<size_t>(vertical.first[j]) * line_;
    const int32_t* weights = vertical.weights.data() + j * static_cast<size_t>(vertical.most);
#ifdef BVAE_AVX2
    if (kAvx2) {
      shrink_columns_avx2(rows, line_, weights, vertical.count[j], out);
      continue;
    }
#endif
    shrink_columns(rows, line_, weights, vertical.count[j], 0, out);
  }
}

}  // namespace bvae
