// Products and unpacking of rows, written once for all CPUs. `Isa` brings the vectors:
//
//   Vec, kLanes                             floats of a register
//   kColumns                                rows of x that a tile of kTile rows is multiplied by at once
//   Load, Store, Zero, Set, Add, Mul, MulAdd, Sum
//   Convert(const T* values, Vec w[])       the next kBlock values as floats
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

template <class T>
struct Row {
  const T* next;
  const T* limit;  // what lies behind must not be read
  const uint8_t* mask;
};

template <class Isa>
struct Rows {
  using Vec = typename Isa::Vec;
  static constexpr int kLanes = Isa::kLanes, kVecs = kBlock / kLanes;

  // Returns row `r` of a matrix whose values are T; int4 codes go to `scratch` as int8.
  template <class T>
  static Row<T> At(const Matrix& w, int64_t r, Scratch scratch) {
    const uint8_t* mask = w.mask ? w.mask + r * w.blocks() * (kBlock / 8) : nullptr;
    if constexpr (std::is_same_v<T, int8_t>) {
      if (w.kind == Values::kInt4) {
        Isa::Nibbles(static_cast<const uint8_t*>(w.values) + w.start(r) / 2, w.count(r), scratch.codes);
        return {scratch.codes, scratch.codes + (mask ? w.padded() + kBlock : w.inputs), mask};
      }
    }
    const T* values = static_cast<const T*>(w.values);
    const T* row = values + w.start(r);
    // With a mask other rows' values may be read: they are masked. Without, they would be multiplied by x's zeros,
    // and these may be infinite.
    return {row, mask ? values + w.total : row + w.inputs, mask};
  }

  // Takes the weights of block `b`, without their scales, and moves on to the next.
  template <class T>
  static inline void Take(Row<T>& row, int64_t b, Vec w[]) {
    T few[kBlock];
    const T* values = row.limit - row.next < kBlock ? Few(row, few) : row.next;
    if (row.mask) {
      uint64_t mask;
      std::memcpy(&mask, row.mask + b * (kBlock / 8), sizeof mask);
      row.next += Isa::Expand(values, mask, w);
    } else {
      Isa::Convert(values, w);
      row.next += kBlock;
    }
  }

  // Returns a copy of the last values, zeros behind them.
  template <class T>
  __attribute__((noinline)) static const T* Few(const Row<T>& row, T few[]) {
    const int64_t left = row.limit > row.next ? row.limit - row.next : 0;
    std::memset(static_cast<void*>(few), 0, kBlock * sizeof(T));
    std::memcpy(static_cast<void*>(few), row.next, left * sizeof(T));
    return few;
  }

  // Multiplies the weights of block `b` by their scales.
  static inline void Scale(const Matrix& m, const BFloat16* scales, int64_t b, Vec w[]) {
    if (m.group % kBlock == 0 || m.groups == 1) {
      const Vec scale = Isa::Set(AsFloat(scales[m.groups == 1 ? 0 : b * kBlock / m.group]));
      for (int i = 0; i < kVecs; ++i) w[i] = Isa::Mul(w[i], scale);
      return;
    }
    float each[kBlock];
    for (int64_t k = 0; k < kBlock; ++k) {
      const int64_t group = (b * kBlock + k) / m.group;
      each[k] = group < m.groups ? AsFloat(scales[group]) : 0;
    }
    for (int i = 0; i < kVecs; ++i) w[i] = Isa::Mul(w[i], Isa::Load(each + i * kLanes));
  }

  // Returns a row times one row of x, without ever storing the weights.
  template <class T>
  static float Dot(const Matrix& m, Row<T> row, const BFloat16* scales, const float* x) {
    const bool in_groups = scales && m.groups > 1;
    const bool by_block = in_groups && m.group % kBlock == 0;
    // Several sums, for each waits for its last addition.
    Vec sum[4] = {Isa::Zero(), Isa::Zero(), Isa::Zero(), Isa::Zero()};
    for (int64_t b = 0; b < m.blocks(); ++b, x += kBlock) {
      Vec w[kVecs];
      Take(row, b, w);
      if (by_block) {
        Vec part[2] = {Isa::Zero(), Isa::Zero()};
        for (int i = 0; i < kVecs; ++i) part[i % 2] = Isa::MulAdd(w[i], Isa::Load(x + i * kLanes), part[i % 2]);
        const Vec scale = Isa::Set(AsFloat(scales[b * kBlock / m.group]));
        sum[b % 2] = Isa::MulAdd(Isa::Add(part[0], part[1]), scale, sum[b % 2]);
        continue;
      }
      if (in_groups) Scale(m, scales, b, w);
      for (int i = 0; i < kVecs; ++i) sum[i % 4] = Isa::MulAdd(w[i], Isa::Load(x + i * kLanes), sum[i % 4]);
    }
    const float total = Isa::Sum(Isa::Add(Isa::Add(sum[0], sum[1]), Isa::Add(sum[2], sum[3])));
    return scales && !in_groups ? total * AsFloat(scales[0]) : total;
  }

  // Writes a row's first `length` weights, times their scales.
  template <class T>
  static void Dense(const Matrix& m, Row<T> row, const BFloat16* scales, int64_t length, float* out) {
    for (int64_t b = 0; b < m.blocks(); ++b) {
      Vec w[kVecs];
      Take(row, b, w);
      if (scales) Scale(m, scales, b, w);
      float few[kBlock];
      const int64_t left = length - b * kBlock;
      float* to = left < kBlock ? few : out + b * kBlock;
      for (int i = 0; i < kVecs; ++i) Isa::Store(to + i * kLanes, w[i]);
      if (left < kBlock) std::memcpy(out + b * kBlock, few, left * sizeof(float));
    }
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

  template <class T>
  static void ProductOf(const Matrix& m, const float* x, int64_t count, int64_t first, int64_t last, float* y, Scratch s) {
    if (count == 1) {
      for (int64_t r = first; r < last; ++r) y[r] = Dot(m, At<T>(m, r, s), ScalesOf(m, r), x);
      return;
    }
    for (int64_t r = first; r < last; r += kTile) {
      const int64_t rows = last - r < kTile ? last - r : kTile, length = m.padded();
      for (int64_t i = 0; i < rows; ++i)
        Dense(m, At<T>(m, r + i, s), ScalesOf(m, r + i), length, s.rows + i * length);
      int64_t c = 0;
      for (; c + Isa::kColumns <= count; c += Isa::kColumns)
        Tile<Isa::kColumns>(m, s.rows, x + c * length, rows, y + c * m.outputs + r);
      for (; c < count; ++c) Tile<1>(m, s.rows, x + c * length, rows, y + c * m.outputs + r);
    }
  }

  template <class T>
  static void UnpackOf(const Matrix& m, int64_t first, int64_t last, float* dense, Scratch s) {
    for (int64_t r = first; r < last; ++r)
      Dense(m, At<T>(m, r, s), ScalesOf(m, r), m.inputs, dense + r * m.inputs);
  }

  static void Product(const Matrix& m, const float* x, int64_t count, int64_t first, int64_t last, float* y, Scratch s) {
    switch (m.kind) {
      case Values::kFloat32: return ProductOf<float>(m, x, count, first, last, y, s);
      case Values::kBFloat16: return ProductOf<BFloat16>(m, x, count, first, last, y, s);
      case Values::kFloat16: return ProductOf<Float16>(m, x, count, first, last, y, s);
      default: return ProductOf<int8_t>(m, x, count, first, last, y, s);
    }
  }

  static void Unpack(const Matrix& m, int64_t first, int64_t last, float* dense, Scratch s) {
    switch (m.kind) {
      case Values::kFloat32: return UnpackOf<float>(m, first, last, dense, s);
      case Values::kBFloat16: return UnpackOf<BFloat16>(m, first, last, dense, s);
      case Values::kFloat16: return UnpackOf<Float16>(m, first, last, dense, s);
      default: return UnpackOf<int8_t>(m, first, last, dense, s);
    }
  }
};

}  // namespace
}  // namespace lmmjax
