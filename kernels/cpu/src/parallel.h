// Shares the rows of matrices over XLA's threads.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "path.h"
#include "xla/ffi/api/ffi.h"

namespace lmmjax {

// Rows [first, last) of the i-th matrix.
struct Share {
  int64_t matrix, first, last;
};
using Work = std::function<void(Share, Scratch)>;

// Calls `work` for all rows of all matrices, each once, on this thread and on those of the pool that have time.
void ForAllRows(xla::ffi::ThreadPool& pool, const std::vector<Matrix>& matrices, int64_t rows_of_x, Work work);

}  // namespace lmmjax
