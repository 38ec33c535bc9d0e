#include "path.h"

#include <atomic>
#include <cstring>

namespace lmmjax {
namespace {

// Fastest first. The last runs anywhere.
constexpr const Path* kPaths[] = {
#ifdef LMMJAX_X86
    &kAvx512,
    &kAvx2,
#endif
    &kPortable,
};

const Path* Fastest() {
  for (const Path* path : kPaths) {
    if (path->runs_here()) return path;
  }
  return &kPortable;
}

std::atomic<const Path*>& Chosen() {
  static std::atomic<const Path*> chosen{Fastest()};
  return chosen;
}

}  // namespace

const Path& path() { return *Chosen().load(std::memory_order_relaxed); }

}  // namespace lmmjax

extern "C" {

// Returns the name of the path that kernels take.
const char* lmmjax_path() { return lmmjax::path().name; }

// Has all kernels take the path of this name, or for "" the fastest; returns whether it is there and this CPU runs it.
bool lmmjax_choose(const char* name) {
  if (!*name) {
    lmmjax::Chosen().store(lmmjax::Fastest());
    return true;
  }
  for (const lmmjax::Path* path : lmmjax::kPaths) {
    if (std::strcmp(path->name, name) == 0 && path->runs_here()) {
      lmmjax::Chosen().store(path);
      return true;
    }
  }
  return false;
}
}
