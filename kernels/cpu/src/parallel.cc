#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

namespace lmmjax {
namespace {

// What a product costs, in weights, below which it stays on its thread. In a chain of int8 products on an EPYC 7003,
// one of 576 inputs and 192 outputs took 10 us on two cores and 15 on one; of 576 outputs 18 and 29.
constexpr int64_t kAlone = 1 << 16;
// More shares than threads, for a thread may come late or be taken away by other programs.
constexpr int64_t kSharesPerThread = 4;
constexpr size_t kLine = 64;

struct Job {
  std::vector<Share> shares;
  Work work;
  size_t floats, codes;  // of scratch
  std::atomic<size_t> next{0}, done{0};
};

// What a share costs: expanding a weight costs about as much as four products with it.
int64_t CostOf(const Matrix& matrix, int64_t rows_of_x) { return matrix.padded() * (3 + rows_of_x) / 4; }

std::vector<Share> Cut(const Matrix& matrix, int64_t rows_of_x, int64_t most) {
  std::vector<Share> shares;
  // Whole tiles; and whole cache lines of y, which two threads should not both write.
  const int64_t fit = most / std::max<int64_t>(1, CostOf(matrix, rows_of_x));
  const int64_t rows = std::max<int64_t>(16, fit / 16 * 16);
  for (int64_t first = 0; first < matrix.outputs; first += rows)
    shares.push_back({first, std::min(matrix.outputs, first + rows)});
  return shares;
}

float* Aligned(float* memory) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  return reinterpret_cast<float*>((address + kLine - 1) / kLine * kLine);
}

// Takes shares until there are none left. A thread of the pool that comes when all are done leaves at once.
void TakePart(Job& job) {
  size_t i = job.next.fetch_add(1);
  if (i >= job.shares.size()) return;
  std::vector<float> rows(job.floats + kLine / sizeof(float));
  std::vector<int8_t> codes(job.codes);
  for (; i < job.shares.size(); i = job.next.fetch_add(1)) {
    job.work(job.shares[i], {Aligned(rows.data()), codes.data()});
    job.done.fetch_add(1, std::memory_order_release);
  }
}

// Waits for shares that others have begun; never for a thread to begin one: all of the pool's may be waiting here.
void AwaitOthers(const Job& job) {
  for (int spins = 0; job.done.load(std::memory_order_acquire) < job.shares.size(); ++spins)
    if (spins > 1000) std::this_thread::yield();
}

}  // namespace

void ForAllRows(xla::ffi::ThreadPool& pool, const Matrix& matrix, int64_t rows_of_x, Work work) {
  const int64_t cost = matrix.outputs * CostOf(matrix, rows_of_x);
  const int64_t threads = cost < kAlone ? 1 : std::max<int64_t>(1, pool.num_threads());
  // Shared, for a thread of the pool may look in when this function has long returned.
  auto job = std::make_shared<Job>();
  job->shares = Cut(matrix, rows_of_x, threads == 1 ? cost : cost / (threads * kSharesPerThread));
  job->work = std::move(work);
  job->floats = rows_of_x == 1 ? 0 : kTile * matrix.padded();
  job->codes = matrix.padded() + kBlock;
  for (int64_t helper = 1; helper < threads; ++helper) pool.Schedule([job] { TakePart(*job); });
  TakePart(*job);
  AwaitOthers(*job);
}

}  // namespace lmmjax
