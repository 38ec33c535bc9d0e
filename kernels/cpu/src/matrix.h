// A weight matrix as it lies in memory, by output row; its laws stand in kernels/weights/__init__.py.
#pragma once

#include <cstdint>

// Into its caller always: a copy compiled for one CPU must not be taken by code for another.
#define LMMJAX_INLINE __attribute__((always_inline)) inline

namespace lmmjax {

// Inputs that kernels take at once: those of a mask's word.
constexpr int kBlock = 64;
// Output rows that are expanded together when there are several rows of x to multiply them by.
constexpr int kTile = 4;

enum class Values { kFloat32, kBFloat16, kFloat16, kInt8, kInt4 };

// Distinct types, so that templates can tell the two kinds of 16-bit floats apart.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// Two codes, each with 8 added; the first in the low nibble.
struct Int4s {
  uint8_t bits;
};

struct Matrix {
  Values kind;
  int64_t inputs, outputs;
  const uint8_t* mask;  // null: all weights are kept
  const void* values;
  int64_t total;           // values there are in all rows; of int4 codes, twice the bytes
  const int32_t* starts;   // null: each row holds `per_row` values, of int4 beginning at whole bytes
  int64_t per_row;
  const BFloat16* scales;  // null: values are floats
  int64_t group, groups;   // inputs that share a scale, scales of a row

  LMMJAX_INLINE int64_t blocks() const { return (inputs + kBlock - 1) / kBlock; }
  LMMJAX_INLINE int64_t padded() const { return blocks() * kBlock; }
  LMMJAX_INLINE int64_t stride() const { return kind == Values::kInt4 ? per_row + per_row % 2 : per_row; }
  LMMJAX_INLINE int64_t start(int64_t row) const { return starts ? starts[row] : row * stride(); }
  LMMJAX_INLINE int64_t count(int64_t row) const { return starts ? starts[row + 1] - starts[row] : per_row; }
};

}  // namespace lmmjax
