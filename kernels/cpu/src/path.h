// The ways to run a kernel on one kind of CPU, and the choice of one when the program runs.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace lmmjax {

// What a thread writes between reading weights and multiplying them; made by `parallel.cc`, so that the files that
// are compiled for a certain CPU need nothing of the standard library, whose functions the linker may share.
struct Scratch {
  float* rows;    // kTile rows of padded() floats
  int8_t* codes;  // of a row with a mask, int4 codes as int8: padded() + kBlock of them
};

struct Path {
  const char* name;
  bool (*runs_here)();
  // y[m * outputs + r] = sum over k of x[m * padded + k] * weight(r, k), for r in [first, last); x is 0 behind inputs.
  void (*product)(const Matrix&, const float* x, int64_t rows_of_x, int64_t first, int64_t last, float* y, Scratch);
  // dense[r * inputs + k] = weight(r, k), for r in [first, last).
  void (*unpack)(const Matrix&, int64_t first, int64_t last, float* dense, Scratch);
};

extern const Path kAvx512, kAvx2, kPortable;

// The path that was chosen, or else the fastest that this CPU runs.
const Path& path();

}  // namespace lmmjax
