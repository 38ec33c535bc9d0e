// Shares a matrix's rows over XLA's threads.
#pragma once

#include <cstdint>
#include <functional>

#include "path.h"
#include "xla/ffi/api/ffi.h"

namespace lmmjax {

// Rows [first, last).
struct Share {
  int64_t first, last;
};
using Work = std::function<void(Share, Scratch)>;

// Calls `work` for all rows, each once, on this thread and on those of the pool that have time.
void ForAllRows(xla::ffi::ThreadPool& pool, const Matrix& matrix, int64_t rows_of_x, Work work);

}  // namespace lmmjax
