// Vectors of 8 floats: AVX2, FMA and F16C. Values are spread over a byte of the mask by a table of shuffles.
#include <immintrin.h>

#include "rows.h"

namespace lmmjax {
namespace {

// For each byte of a mask and each of its bits: which of the next values belongs there; 0x80, a shuffle's zero: none.
struct Shuffles {
  alignas(64) uint8_t of_bytes[256][8];
  alignas(64) uint8_t of_words[256][16];  // the same for values of two bytes

  constexpr Shuffles() : of_bytes(), of_words() {
    for (int byte = 0; byte < 256; ++byte) {
      uint8_t next = 0;
      for (int i = 0; i < 8; ++i) {
        const bool kept = byte >> i & 1;
        of_bytes[byte][i] = kept ? next : 0x80;
        of_words[byte][2 * i] = kept ? 2 * next : 0x80;
        of_words[byte][2 * i + 1] = kept ? 2 * next + 1 : 0x80;
        next += kept;
      }
    }
  }
};
constexpr Shuffles kShuffles;

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8, kColumns = 2;

  static Vec Zero() { return _mm256_setzero_ps(); }
  static Vec Set(float value) { return _mm256_set1_ps(value); }
  static Vec Load(const float* from) { return _mm256_loadu_ps(from); }
  static void Store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
  static Vec Add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec Mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec MulAdd(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static float Sum(Vec v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  static Vec FromInt8(__m128i v) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)); }
  static Vec From16(__m128i v, BFloat16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static Vec From16(__m128i v, Float16) { return _mm256_cvtph_ps(v); }
  static __m128i Bytes8(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
  static __m128i Bytes16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

  static void Convert(const float* values, Vec w[]) {
    for (int i = 0; i < 8; ++i) w[i] = Load(values + 8 * i);
  }
  template <class T>
  static void Convert(const T* values, Vec w[]) {
    for (int i = 0; i < 8; ++i) w[i] = From16(Bytes16(values + 8 * i), T{});
  }
  static void Convert(const int8_t* values, Vec w[]) {
    for (int i = 0; i < 8; ++i) w[i] = FromInt8(Bytes8(values + 8 * i));
  }

  static void Convert(const Int4s* values, Vec w[]) { ConvertAsInt8<Avx2>(values, w); }

  // Returns the values of one byte of the mask.
  static Vec Spread(const float* values, uint64_t byte) {
    const __m256i shuffle = _mm256_cvtepi8_epi32(Bytes8(kShuffles.of_bytes[byte]));
    const __m256 moved = _mm256_permutevar8x32_ps(Load(values), shuffle);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(shuffle, 31)), moved);
  }
  template <class T>
  static Vec Spread(const T* values, uint64_t byte) {
    return From16(_mm_shuffle_epi8(Bytes16(values), Bytes16(kShuffles.of_words[byte])), T{});
  }
  static Vec Spread(const int8_t* values, uint64_t byte) {
    return FromInt8(_mm_shuffle_epi8(Bytes8(values), Bytes8(kShuffles.of_bytes[byte])));
  }

  template <class T>
  static int64_t Expand(const T* values, uint64_t mask, Vec w[]) {
    int64_t at = 0;
    for (int i = 0; i < 8; ++i) {
      const uint64_t byte = mask >> 8 * i & 255;
      w[i] = Spread(values + at, byte);
      at += _mm_popcnt_u64(byte);
    }
    return at;
  }

  static void Nibbles(const uint8_t* packed, int64_t n, int8_t* codes) {
    const __m128i low = _mm_set1_epi8(15), offset = _mm_set1_epi8(8);
    for (; n >= 32; n -= 32, packed += 16, codes += 32) {
      const __m128i pairs = Bytes16(packed);
      const __m128i first = _mm_and_si128(pairs, low), second = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
      __m128i* to = reinterpret_cast<__m128i*>(codes);
      _mm_storeu_si128(to, _mm_sub_epi8(_mm_unpacklo_epi8(first, second), offset));
      _mm_storeu_si128(to + 1, _mm_sub_epi8(_mm_unpackhi_epi8(first, second), offset));
    }
    for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<int8_t>((packed[i / 2] >> 4 * (i % 2) & 15) - 8);
  }
};

bool RunsHere() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("popcnt");
}

}  // namespace

extern const Path kAvx2 = {"avx2", RunsHere, Rows<Avx2>::Product, Rows<Avx2>::Unpack};

}  // namespace lmmjax
