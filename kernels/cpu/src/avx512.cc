// Vectors of 16 floats: AVX-512 with VBMI2, whose vpexpandb and vpexpandw spread values over a mask in one instruction,
// and VBMI, whose vpmultishiftqb brings each nibble of a word into a lane of its own.
#include <immintrin.h>

#include "rows.h"

namespace lmmjax {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16, kColumns = 4;

  static Vec Zero() { return _mm512_setzero_ps(); }
  static Vec Set(float value) { return _mm512_set1_ps(value); }
  static Vec Load(const float* from) { return _mm512_loadu_ps(from); }
  static void Store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
  static Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec MulAdd(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static float Sum(Vec v) { return _mm512_reduce_add_ps(v); }

  static Vec FromInt8(__m128i v) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v)); }
  static Vec From16(__m256i v, BFloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }
  static Vec From16(__m256i v, Float16) { return _mm512_cvtph_ps(v); }
  static __m256i Half(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

  static void Convert(const float* values, Vec w[]) {
    for (int i = 0; i < 4; ++i) w[i] = Load(values + 16 * i);
  }
  template <class T>
  static void Convert(const T* values, Vec w[]) {
    for (int i = 0; i < 4; ++i) w[i] = From16(Half(values + 16 * i), T{});
  }
  static void Convert(const int8_t* values, Vec w[]) {
    for (int i = 0; i < 4; ++i) w[i] = FromInt8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16 * i)));
  }
  // By a table of 16 floats: a lookup reads the low nibble of a lane alone, so that nothing is masked or converted.
  static void Convert(const Int4s* values, Vec w[]) {
    const __m512 table = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
    for (int i = 0; i < 4; ++i) {
      int64_t of16;
      std::memcpy(&of16, values + 8 * i, sizeof of16);
      w[i] = _mm512_permutexvar_ps(_mm512_multishift_epi64_epi8(Nibble(), _mm512_set1_epi64(of16)), table);
    }
  }
  // Which bit of eight bytes each lane's low byte begins at: 0, 4, 8 ... 60.
  static __m512i Nibble() {
    return _mm512_set_epi32(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
  }

  static int64_t Expand(const float* values, uint64_t mask, Vec w[]) {
    int64_t at = 0;
    for (int i = 0; i < 4; ++i) {
      const __mmask16 part = static_cast<__mmask16>(mask >> 16 * i);
      w[i] = _mm512_maskz_expand_ps(part, Load(values + at));
      at += _mm_popcnt_u64(part);
    }
    return at;
  }
  template <class T>
  static int64_t Expand(const T* values, uint64_t mask, Vec w[]) {
    int64_t at = 0;
    for (int i = 0; i < 2; ++i) {
      const __mmask32 part = static_cast<__mmask32>(mask >> 32 * i);
      const __m512i spread = _mm512_maskz_expand_epi16(part, _mm512_loadu_si512(values + at));
      w[2 * i] = From16(_mm512_castsi512_si256(spread), T{});
      w[2 * i + 1] = From16(_mm512_extracti64x4_epi64(spread, 1), T{});
      at += _mm_popcnt_u64(part);
    }
    return at;
  }
  static int64_t Expand(const int8_t* values, uint64_t mask, Vec w[]) {
    const __m512i spread = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values));
    w[0] = FromInt8(_mm512_castsi512_si128(spread));
    w[1] = FromInt8(_mm512_extracti32x4_epi32(spread, 1));
    w[2] = FromInt8(_mm512_extracti32x4_epi32(spread, 2));
    w[3] = FromInt8(_mm512_extracti32x4_epi32(spread, 3));
    return _mm_popcnt_u64(mask);
  }

  static void Nibbles(const uint8_t* packed, int64_t n, int8_t* codes) {
    for (; n >= 64; n -= 64, packed += 32, codes += 64) {
      const __m512i pairs = _mm512_cvtepu8_epi16(Half(packed));
      const __m512i apart = _mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4));
      const __m512i low = _mm512_and_si512(apart, _mm512_set1_epi8(15));
      _mm512_storeu_si512(codes, _mm512_sub_epi8(low, _mm512_set1_epi8(8)));
    }
    for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<int8_t>((packed[i / 2] >> 4 * (i % 2) & 15) - 8);
  }
};

bool RunsHere() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}

}  // namespace

extern const Path kAvx512 = {"avx512", RunsHere, Rows<Avx512>::Product, Rows<Avx512>::Unpack};

}  // namespace lmmjax
