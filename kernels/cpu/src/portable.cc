// Vectors of 4 floats in the compilers' own notation: NEON on ARM, SSE on x86, and whatever else there is.
#include "rows.h"

namespace lmmjax {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "masks are read as words, their first byte lowest");

float FromFloat16(Float16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = (value.bits & 0x7fffu) << 13;
  // Exponents of float32 begin 112 lower. Below float16's normal numbers the leading one is not implied: adding it and
  // subtracting it again as a number leaves the rest, without a float32 that is itself below the normal ones.
  const bool tiny = rest < 1u << 23, infinite = rest >= 31u << 23;
  const uint32_t bits = rest + ((tiny ? 113u : infinite ? 224u : 112u) << 23);
  float result;
  std::memcpy(&result, &bits, sizeof result);
  if (tiny) result -= 0x1p-14f;
  uint32_t signed_bits;
  std::memcpy(&signed_bits, &result, sizeof result);
  signed_bits |= sign;
  std::memcpy(&result, &signed_bits, sizeof result);
  return result;
}

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int kLanes = 4, kColumns = 2;

  static Vec Zero() { return Vec{}; }
  static Vec Set(float value) { return Vec{value, value, value, value}; }
  static Vec Load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static void Store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }
  static Vec Add(Vec a, Vec b) { return a + b; }
  static Vec Mul(Vec a, Vec b) { return a * b; }
  static Vec MulAdd(Vec a, Vec b, Vec c) { return a * b + c; }
  static float Sum(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }

  static float One(float value) { return value; }
  static float One(BFloat16 value) { return AsFloat(value); }
  static float One(Float16 value) { return FromFloat16(value); }
  static float One(int8_t value) { return value; }

  template <class T>
  static void Floats(const T* values, float* out) {
    for (int i = 0; i < kBlock; ++i) out[i] = One(values[i]);
  }
  static void LoadAll(const float* from, Vec w[]) {
    for (int i = 0; i < kBlock / kLanes; ++i) w[i] = Load(from + i * kLanes);
  }

  template <class T>
  static void Convert(const T* values, Vec w[]) {
    float floats[kBlock];
    Floats(values, floats);
    LoadAll(floats, w);
  }
  static void Convert(const Int4s* values, Vec w[]) { ConvertAsInt8<Portable>(values, w); }

  // Bit by bit that is set: compilers have no notation for a shuffle by a mask, and half of the bits are zeros.
  template <class T>
  static int64_t Expand(const T* values, uint64_t mask, Vec w[]) {
    float floats[kBlock], spread[kBlock] = {};
    Floats(values, floats);
    int64_t at = 0;
    for (; mask; mask &= mask - 1) spread[__builtin_ctzll(mask)] = floats[at++];
    LoadAll(spread, w);
    return at;
  }

  static void Nibbles(const uint8_t* packed, int64_t n, int8_t* codes) {
    for (int64_t i = 0; i < n / 2; ++i) {
      codes[2 * i] = static_cast<int8_t>((packed[i] & 15) - 8);
      codes[2 * i + 1] = static_cast<int8_t>((packed[i] >> 4) - 8);
    }
    if (n % 2) codes[n - 1] = static_cast<int8_t>((packed[n / 2] & 15) - 8);
  }
};

}  // namespace

extern const Path kPortable = {"portable", [] { return true; }, Rows<Portable>::Product, Rows<Portable>::Unpack};

}  // namespace lmmjax
