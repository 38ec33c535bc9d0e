// What XLA calls: `lmmjax_product` and `lmmjax_unpack`. A matrix comes as four arrays: mask, values, starts, scales;
// one that the format does not have comes with no elements.
#include <string>

#include "parallel.h"
#include "path.h"
#include "xla/ffi/api/ffi.h"

namespace lmmjax {
namespace {

namespace ffi = xla::ffi;
constexpr size_t kArrays = 4;

ffi::Error Wrong(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, "lmmjax: " + what); }

ffi::ErrorOr<Values> KindOf(ffi::AnyBuffer values) {
  switch (values.element_type()) {
    case ffi::F32: return Values::kFloat32;
    case ffi::BF16: return Values::kBFloat16;
    case ffi::F16: return Values::kFloat16;
    case ffi::S8: return Values::kInt8;
    case ffi::U8: return Values::kInt4;
    default: return ffi::Unexpected(Wrong("values are of a type that no format has"));
  }
}

template <class T>
const T* DataOrNull(ffi::AnyBuffer array) {
  return array.element_count() ? static_cast<const T*>(array.untyped_data()) : nullptr;
}

// Returns whether rows lie one behind the other within the values, none longer than its inputs: a file may say anything.
bool InOrder(const Matrix& m) {
  bool in_order = m.starts[0] >= 0 && m.starts[m.outputs] <= m.total;
  for (int64_t r = 0; r < m.outputs; ++r) in_order &= m.starts[r] <= m.starts[r + 1] && m.count(r) <= m.padded();
  return in_order;
}

// Returns the matrix of a call's arrays. `per_row` is what its rows hold if it has no starts.
ffi::ErrorOr<Matrix> Read(ffi::RemainingArgs args, int64_t inputs, int64_t outputs, int64_t group, int64_t per_row) {
  if (args.size() != kArrays) return ffi::Unexpected(Wrong("a matrix is mask, values, starts and scales"));
  const ffi::AnyBuffer mask = *args.get<ffi::AnyBuffer>(0), values = *args.get<ffi::AnyBuffer>(1);
  const ffi::AnyBuffer starts = *args.get<ffi::AnyBuffer>(2), scales = *args.get<ffi::AnyBuffer>(3);
  ffi::ErrorOr<Values> kind = KindOf(values);
  if (!kind) return ffi::Unexpected(kind.error());
  Matrix m;
  m.kind = *kind;
  m.inputs = inputs;
  m.outputs = outputs;
  m.mask = DataOrNull<uint8_t>(mask);
  m.values = values.untyped_data();
  m.total = values.element_count() * (*kind == Values::kInt4 ? 2 : 1);
  m.starts = DataOrNull<int32_t>(starts);
  m.per_row = per_row;
  m.scales = DataOrNull<BFloat16>(scales);
  m.group = group;
  m.groups = (inputs + group - 1) / group;
  const auto fits = [&](ffi::AnyBuffer array, int64_t expected) {
    return array.element_count() == 0 || static_cast<int64_t>(array.element_count()) == expected;
  };
  const auto is = [](ffi::AnyBuffer array, ffi::DataType type) {
    return array.element_count() == 0 || array.element_type() == type;
  };
  if (!is(mask, ffi::U8) || !is(starts, ffi::S32) || !is(scales, ffi::BF16))
    return ffi::Unexpected(Wrong("mask, starts or scales are of the wrong type"));
  if (!fits(mask, outputs * m.blocks() * (kBlock / 8))) return ffi::Unexpected(Wrong("mask has the wrong size"));
  if (!fits(starts, outputs + 1)) return ffi::Unexpected(Wrong("starts has the wrong size"));
  if (!fits(scales, outputs * m.groups)) return ffi::Unexpected(Wrong("scales has the wrong size"));
  if (!m.starts && m.total != outputs * m.stride()) return ffi::Unexpected(Wrong("values has the wrong size"));
  if (m.starts && !m.mask) return ffi::Unexpected(Wrong("rows that start anywhere need a mask"));
  if (m.starts && !InOrder(m)) return ffi::Unexpected(Wrong("starts do not lead through the values in order"));
  return m;
}

ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args,
                   ffi::Result<ffi::Buffer<ffi::F32>> y, int64_t inputs, int64_t group, int64_t per_row) {
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2) return Wrong("x or the product has no two axes");
  const int64_t rows_of_x = x.dimensions()[0];
  if (y->dimensions()[0] != rows_of_x) return Wrong("the product has the wrong shape");
  if (rows_of_x == 0) return ffi::Error::Success();
  ffi::ErrorOr<Matrix> m = Read(args, inputs, y->dimensions()[1], group, per_row);
  if (!m) return m.error();
  if (x.dimensions()[1] != m->padded()) return Wrong("x is not filled up with zeros to whole blocks");
  const Path& on = path();
  ForAllRows(pool, *m, rows_of_x, [&](Share share, Scratch scratch) {
    on.product(*m, x.typed_data(), rows_of_x, share.first, share.last, y->typed_data(), scratch);
  });
  return ffi::Error::Success();
}

ffi::Error Unpack(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::Result<ffi::Buffer<ffi::F32>> dense,
                  int64_t group, int64_t per_row) {
  ffi::ErrorOr<Matrix> m = Read(args, dense->dimensions()[1], dense->dimensions()[0], group, per_row);
  if (!m) return m.error();
  const Path& on = path();
  ForAllRows(pool, *m, 1, [&](Share share, Scratch scratch) {
    on.unpack(*m, share.first, share.last, dense->typed_data(), scratch);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lmmjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(lmmjax_product, lmmjax::Product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("inputs")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("per_row"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(lmmjax_unpack, lmmjax::Unpack,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("per_row"));
