// Products and unpacking of rows, written once for all CPUs. `Isa` brings the vectors:
//
//   Vec, kLanes                             floats of a register
//   kColumns                                rows of x that a tile of kTile rows is multiplied by at once
//   Load, Store, Zero, Set, Add, Mul, MulAdd, Sum
//   Convert(const T* values, Vec w[])       the next kBlock weights as floats
//   Expand(const T* values, mask, Vec w[])  the next popcount(mask) values where the mask has bits, zeros elsewhere;
//                                           returns how many. May read kBlock values.
//   Nibbles(const uint8_t*, n, int8_t*)     n int4 codes as int8
//
// Included by the file of each CPU alone; all is in an unnamed namespace, because two files' copies of one inline
// function, compiled for different CPUs, must not be taken for each other.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "path.h"

namespace lmmjax {
namespace {

inline float AsFloat(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Weights that one T holds.
template <class T>
constexpr int kPer = std::is_same_v<T, Int4s> ? 2 : 1;
// Whether T holds codes, which have scales.
template <class T>
constexpr bool kCodes = std::is_same_v<T, int8_t> || std::is_same_v<T, Int4s>;

// Converts int4 codes by way of int8: for CPUs that have no shorter one.
template <class Isa>
LMMJAX_INLINE void ConvertAsInt8(const Int4s* values, typename Isa::Vec w[]) {
  int8_t codes[kBlock];
  Isa::Nibbles(&values->bits, kBlock, codes);
  Isa::Convert(codes, w);
}

// The values of a row and, if only some weights are kept, which.
template <class T, bool kMasked>
struct Row {
  const T* values;
  const T* limit;  // what lies behind must not be read
  const uint8_t* mask;
};

// How many weights share a scale: all of a row (or there is none), whole blocks, or what has to be looked up.
enum class Sharing { kRow, kBlocks, kAny };

template <class Isa>
struct Rows {
  using Vec = typename Isa::Vec;
  static constexpr int kLanes = Isa::kLanes, kVecs = kBlock / kLanes;

  // Returns row `r` of a matrix whose values are T. int4 codes with a mask go to `scratch` as int8: a row's next value
  // may be the second of a byte.
  template <class T, bool kMasked>
  static Row<T, kMasked> At(const Matrix& m, int64_t r, Scratch scratch) {
    const uint8_t* mask = kMasked ? m.mask + r * m.blocks() * (kBlock / 8) : nullptr;
    if constexpr (kMasked && std::is_same_v<T, int8_t>) {
      if (m.kind == Values::kInt4) {
        Isa::Nibbles(static_cast<const uint8_t*>(m.values) + m.start(r) / 2, m.count(r), scratch.codes);
        return {scratch.codes, scratch.codes + m.padded() + kBlock, mask};
      }
    }
    const T* values = static_cast<const T*>(m.values);
    const T* row = values + m.start(r) / kPer<T>;
    // With a mask other rows' values may be read: they are masked. Without, they would be multiplied by x's zeros,
    // and these may be infinite.
    return {row, kMasked ? values + m.total : row + (m.inputs + kPer<T> - 1) / kPer<T>, mask};
  }

  // Calls `use(b, w)` with the weights of each block b, as they are without their scales.
  template <class T, bool kMasked, class Use>
  __attribute__((always_inline)) static inline void ForBlocks(Row<T, kMasked> row, int64_t blocks, Use use) {
    constexpr int kValues = kBlock / kPer<T>;
    for (int64_t b = 0; b < blocks; ++b) {
      T few[kValues];
      const T* values = row.limit - row.values < kValues ? Few(row.values, row.limit, few) : row.values;
      for (int64_t byte = 0; byte < int64_t{sizeof(few)}; byte += 64) Prefetch(row.values, byte);
      Vec w[kVecs];
      if constexpr (kMasked) {
        if (b % 8 == 0) Prefetch(row.mask, b * (kBlock / 8));
        uint64_t mask;
        std::memcpy(&mask, row.mask + b * (kBlock / 8), sizeof mask);
        row.values += Isa::Expand(values, mask, w);
      } else {
        Isa::Convert(values, w);
        row.values += kValues;
      }
      use(b, w);
    }
  }

  // Asks for what lies 1 KiB behind a byte of an array: left alone, a CPU stops at each page. Two narrow streams of a
  // bitmap in int8 are read 15 to 20% faster. Never faults, wherever that is.
  static void Prefetch(const void* array, int64_t byte) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(array) + byte + 1024));
  }

  // Returns a copy of the last values, zeros behind them; of int4 the codes of zeros.
  template <class T>
  __attribute__((noinline)) static const T* Few(const T* values, const T* limit, T few[]) {
    std::memset(static_cast<void*>(few), std::is_same_v<T, Int4s> ? 0x88 : 0, kBlock / kPer<T> * sizeof(T));
    if (limit > values) std::memcpy(static_cast<void*>(few), values, (limit - values) * sizeof(T));
    return few;
  }

  static Sharing SharingOf(const Matrix& m) {
    if (!m.scales || m.groups == 1) return Sharing::kRow;
    return m.group % kBlock == 0 ? Sharing::kBlocks : Sharing::kAny;
  }

  // Multiplies the weights of block `b` by scales that change within it.
  static void ScaleEach(const Matrix& m, const BFloat16* scales, int64_t b, Vec w[]) {
    float each[kBlock];
    for (int64_t k = 0; k < kBlock; ++k) {
      const int64_t group = (b * kBlock + k) / m.group;
      each[k] = group < m.groups ? AsFloat(scales[group]) : 0;
    }
    for (int i = 0; i < kVecs; ++i) w[i] = Isa::Mul(w[i], Isa::Load(each + i * kLanes));
  }

  // Returns a row times one row of x, without ever storing the weights.
  template <Sharing kSharing, class T, bool kMasked>
  static float Dot(const Matrix& m, Row<T, kMasked> row, const BFloat16* scales, const float* x) {
    // Several sums, for each waits for its last addition.
    Vec a = Isa::Zero(), b = Isa::Zero(), c = Isa::Zero(), d = Isa::Zero();
    ForBlocks(row, m.blocks(), [&](int64_t block, Vec* w) {
      const float* at = x + block * kBlock;
      if constexpr (kSharing == Sharing::kAny) ScaleEach(m, scales, block, w);
      if constexpr (kSharing == Sharing::kBlocks) {
        Vec part[2] = {Isa::Mul(w[0], Isa::Load(at)), Isa::Mul(w[1], Isa::Load(at + kLanes))};
        for (int i = 2; i < kVecs; ++i) part[i % 2] = Isa::MulAdd(w[i], Isa::Load(at + i * kLanes), part[i % 2]);
        const Vec scale = Isa::Set(AsFloat(scales[block * kBlock / m.group]));
        a = Isa::MulAdd(part[0], scale, a);
        b = Isa::MulAdd(part[1], scale, b);
      } else {
        for (int i = 0; i < kVecs; i += 4) {
          a = Isa::MulAdd(w[i], Isa::Load(at + i * kLanes), a);
          b = Isa::MulAdd(w[i + 1], Isa::Load(at + (i + 1) * kLanes), b);
          c = Isa::MulAdd(w[i + 2], Isa::Load(at + (i + 2) * kLanes), c);
          d = Isa::MulAdd(w[i + 3], Isa::Load(at + (i + 3) * kLanes), d);
        }
      }
    });
    const float sum = Isa::Sum(Isa::Add(Isa::Add(a, b), Isa::Add(c, d)));
    return kSharing == Sharing::kRow && scales ? sum * AsFloat(scales[0]) : sum;
  }

  // Writes a row's first `length` weights, times their scales.
  template <class T, bool kMasked>
  static void Dense(const Matrix& m, Row<T, kMasked> row, const BFloat16* scales, int64_t length, float* out) {
    const Sharing sharing = SharingOf(m);
    ForBlocks(row, m.blocks(), [&](int64_t block, Vec* w) {
      if (sharing == Sharing::kAny) {
        ScaleEach(m, scales, block, w);
      } else if (scales) {
        const Vec scale = Isa::Set(AsFloat(scales[block * kBlock / m.group]));
        for (int i = 0; i < kVecs; ++i) w[i] = Isa::Mul(w[i], scale);
      }
      float few[kBlock];
      const int64_t left = length - block * kBlock;
      float* to = left < kBlock ? few : out + block * kBlock;
      for (int i = 0; i < kVecs; ++i) Isa::Store(to + i * kLanes, w[i]);
      if (left < kBlock) std::memcpy(out + block * kBlock, few, left * sizeof(float));
    });
  }

  // Multiplies kTile dense rows by kColumns rows of x and keeps `rows` of the results.
  template <int kColumns>
  static void Tile(const Matrix& m, const float* w, const float* x, int64_t rows, float* y) {
    const int64_t length = m.padded();
    Vec sum[kTile][kColumns];
    for (auto& of_row : sum)
      for (Vec& one : of_row) one = Isa::Zero();
    for (int64_t k = 0; k < length; k += kLanes) {
      Vec at[kColumns];
      for (int c = 0; c < kColumns; ++c) at[c] = Isa::Load(x + c * length + k);
      for (int r = 0; r < kTile; ++r) {
        const Vec weight = Isa::Load(w + r * length + k);
        for (int c = 0; c < kColumns; ++c) sum[r][c] = Isa::MulAdd(weight, at[c], sum[r][c]);
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < kColumns; ++c) y[c * m.outputs + r] = Isa::Sum(sum[r][c]);
  }

  static const BFloat16* ScalesOf(const Matrix& m, int64_t r) { return m.scales ? m.scales + r * m.groups : nullptr; }

  template <class T, bool kMasked, Sharing kSharing>
  static void Dots(const Matrix& m, const float* x, int64_t first, int64_t last, float* y, Scratch s) {
    for (int64_t r = first; r < last; ++r) y[r] = Dot<kSharing>(m, At<T, kMasked>(m, r, s), ScalesOf(m, r), x);
  }

  template <class T, bool kMasked>
  static void Tiles(const Matrix& m, const float* x, int64_t count, int64_t first, int64_t last, float* y, Scratch s) {
    const int64_t length = m.padded();
    for (int64_t r = first; r < last; r += kTile) {
      const int64_t rows = last - r < kTile ? last - r : kTile;
      for (int64_t i = 0; i < rows; ++i)
        Dense(m, At<T, kMasked>(m, r + i, s), ScalesOf(m, r + i), length, s.rows + i * length);
      int64_t c = 0;
      for (; c + Isa::kColumns <= count; c += Isa::kColumns)
        Tile<Isa::kColumns>(m, s.rows, x + c * length, rows, y + c * m.outputs + r);
      for (; c < count; ++c) Tile<1>(m, s.rows, x + c * length, rows, y + c * m.outputs + r);
    }
  }

  template <class T, bool kMasked>
  static void ProductOf(const Matrix& m, const float* x, int64_t count, int64_t first, int64_t last, float* y,
                        Scratch s) {
    if (count > 1) return Tiles<T, kMasked>(m, x, count, first, last, y, s);
    if constexpr (kCodes<T>) {
      if (SharingOf(m) == Sharing::kBlocks) return Dots<T, kMasked, Sharing::kBlocks>(m, x, first, last, y, s);
      if (SharingOf(m) == Sharing::kAny) return Dots<T, kMasked, Sharing::kAny>(m, x, first, last, y, s);
    }
    Dots<T, kMasked, Sharing::kRow>(m, x, first, last, y, s);
  }

  template <class T, bool kMasked>
  static void UnpackOf(const Matrix& m, int64_t first, int64_t last, float* dense, Scratch s) {
    for (int64_t r = first; r < last; ++r)
      Dense(m, At<T, kMasked>(m, r, s), ScalesOf(m, r), m.inputs, dense + r * m.inputs);
  }

  // Calls `use` with a value of the type that the matrix holds, and with whether it has a mask.
  template <class Use>
  static void WithTypes(const Matrix& m, Use use) {
    const auto with_mask = [&](auto value) { m.mask ? use(value, std::true_type{}) : use(value, std::false_type{}); };
    switch (m.kind) {
      case Values::kFloat32: return with_mask(float{});
      case Values::kBFloat16: return with_mask(BFloat16{});
      case Values::kFloat16: return with_mask(Float16{});
      case Values::kInt8: return with_mask(int8_t{});
      default: return m.mask ? use(int8_t{}, std::true_type{}) : use(Int4s{}, std::false_type{});
    }
  }

  static void Product(const Matrix& m, const float* x, int64_t count, int64_t first, int64_t last, float* y,
                      Scratch s) {
    WithTypes(m, [&](auto value, auto masked) {
      ProductOf<decltype(value), masked()>(m, x, count, first, last, y, s);
    });
  }

  static void Unpack(const Matrix& m, int64_t first, int64_t last, float* dense, Scratch s) {
    WithTypes(m, [&](auto value, auto masked) { UnpackOf<decltype(value), masked()>(m, first, last, dense, s); });
  }
};

}  // namespace
}  // namespace lmmjax
