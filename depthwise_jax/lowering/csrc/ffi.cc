// The handlers that XLA calls. They check everything: a wrong call is an error, never a read out of bounds.
#include "xla/ffi/api/ffi.h"

#include <new>
#include <string>
#include <utility>

#include "depthwise.h"

namespace ffi = xla::ffi;

namespace depthwise {
namespace {

// Part of every symbol's name; native.py has the same number. Raise it when shapes or attributes change their meaning.
#define DEPTHWISE_ABI 4
#define DEPTHWISE_NAME(name, abi) DEPTHWISE_NAME_(name, abi)
#define DEPTHWISE_NAME_(name, abi) depthwise_jax_##name##_v##abi

using Attribute = ffi::Span<const std::int64_t>;

class XlaPool : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool& pool) : pool_(pool) {}
  int threads() const override { return static_cast<int>(pool_.num_threads()); }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
};

ffi::Error invalid(const std::string& message) { return ffi::Error::InvalidArgument("depthwise_jax: " + message); }

std::string text(ffi::AnyBuffer::Dimensions shape) {
  std::string result = "(";
  for (std::int64_t n : shape) result += (result.size() > 1 ? ", " : "") + std::to_string(n);
  return result + ")";
}

ffi::ErrorOr<Dtype> dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::F32: return Dtype::f32;
    case ffi::DataType::F64: return Dtype::f64;
    case ffi::DataType::F16: return Dtype::f16;
    case ffi::DataType::BF16: return Dtype::bf16;
    default: return ffi::Unexpected(invalid("expected float32, float64, float16 or bfloat16"));
  }
}

// The geometry of x (*stack, batch, in..., C), w (*stack, M, window..., C), y (*stack, M, batch, out..., C), with one
// spatial axis per number in the attributes, up to three. w and y may both lack the axis M, which is 1 then.
ffi::ErrorOr<Geometry> geometry_of(ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer y, Attribute stride,
                                   Attribute low, Attribute dilation) {
  const auto a = x.dimensions(), b = w.dimensions(), c = y.dimensions();
  auto fail = [&](const std::string& what) {
    return ffi::Unexpected(invalid(what + "; got x " + text(a) + ", w " + text(b) + ", y " + text(c)));
  };
  const std::size_t axes = stride.size();
  if (axes < 1 || axes > 3 || low.size() != axes || dilation.size() != axes) {
    return fail("expected 1 to 3 strides and as many paddings and dilations");
  }
  if (a.size() < axes + 2) return fail("expected x with batch, " + std::to_string(axes) + " spatial axes and channels");
  const std::size_t stacked = a.size() - axes - 2, multiplied = c.size() == a.size() + 1 ? 1 : 0;
  if (c.size() != a.size() + multiplied || b.size() != a.size() + multiplied - 1) {
    return fail("expected w of an axis less than x and y of as many, or both of one more");
  }
  Geometry g{};
  g.stack = 1;
  for (std::size_t i = 0; i < stacked; ++i) {
    if (a[i] != b[i] || a[i] != c[i]) return fail("expected the same leading axes");
    g.stack *= a[i];
  }
  g.multiplier = multiplied ? b[stacked] : 1;
  g.batch = a[stacked];
  g.channels = a[a.size() - 1];
  if ((multiplied && c[stacked] != g.multiplier) || c[stacked + multiplied] != g.batch ||
      c[c.size() - 1] != g.channels || b[b.size() - 1] != g.channels) {
    return fail("expected the same multiplier, batch and channels");
  }
  for (std::size_t i = 0; i < 3; ++i) {
    g.in[i] = g.out[i] = g.window[i] = g.stride[i] = g.dilation[i] = 1;  // missing axes come first
    if (i < 3 - axes) continue;
    const std::size_t axis = i + axes - 3;
    g.in[i] = a[stacked + 1 + axis];
    g.window[i] = b[stacked + multiplied + axis];
    g.out[i] = c[stacked + multiplied + 1 + axis];
    g.stride[i] = stride[axis];
    g.low[i] = low[axis];
    g.dilation[i] = dilation[axis];
  }
  if (const char* what = geometry_error(g)) return fail(what);
  return g;
}

struct Call {
  Geometry geometry;
  Dtype dtype;
};

ffi::ErrorOr<Call> call_of(ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer y, Attribute stride, Attribute low,
                           Attribute dilation) {
  auto geometry = geometry_of(x, w, y, stride, low, dilation);
  if (geometry.has_error()) return ffi::Unexpected(geometry.error());
  if (x.element_type() != w.element_type() || x.element_type() != y.element_type()) {
    return ffi::Unexpected(invalid("expected operands and result of one dtype"));
  }
  if (!instruction_set()) {
    return ffi::Unexpected(invalid("DEPTHWISE_JAX_ISA is not an instruction set that this machine supports"));
  }
  auto dtype = dtype_of(x.element_type());
  if (dtype.has_error()) return ffi::Unexpected(dtype.error());
  return Call{*geometry, *dtype};
}

// The reach of a packed map's call, (*stack, batch, out).
ffi::ErrorOr<const std::int32_t*> reach_of(ffi::AnyBuffer reach, const Geometry& g) {
  if (reach.element_type() != ffi::DataType::S32 ||
      static_cast<Index>(reach.element_count()) != g.stack * g.batch * g.out[2]) {
    return ffi::Unexpected(invalid("expected a reach (*stack, batch, out) of int32; got " + text(reach.dimensions())));
  }
  for (int axis = 0; axis < 2; ++axis) {
    if (g.in[axis] != 1 || g.out[axis] != 1 || g.window[axis] != 1) {
      return ffi::Unexpected(invalid("expected one spatial axis beside a reach"));
    }
  }
  if (g.stride[2] != 1) return ffi::Unexpected(invalid("expected a stride of 1 beside a reach"));
  return reach.typed_data<std::int32_t>();
}

// The error of a map's handler, or XLA's error for lack of memory: no exception may pass through XLA's C interface.
template <class F>
ffi::Error handled(const F& handler) {
  constexpr auto kExhausted = ffi::ErrorCode::kResourceExhausted;
  try {
    try {
      auto done = handler();
      if (done.has_error()) return done.error();
      if (*done) return ffi::Error::Success();
    } catch (const std::bad_alloc&) {
    }
    return ffi::Error(kExhausted, "depthwise_jax: no memory beside the operands and the result");
  } catch (const std::bad_alloc&) {
    return ffi::Error(kExhausted, "no memory");  // short enough to be stored without an allocation
  }
}

ffi::ErrorOr<bool> checked_forward(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::RemainingArgs bias,
                                   ffi::AnyBuffer y, Attribute stride, Attribute low, Attribute dilation,
                                   std::int64_t activation) {
  auto call = call_of(x, w, y, stride, low, dilation);
  if (call.has_error()) return ffi::Unexpected(call.error());
  const auto& [g, dtype] = *call;
  const void* b = nullptr;
  if (bias.size() > 1) return ffi::Unexpected(invalid("expected at most one bias"));
  if (bias.size() == 1) {
    auto buffer = bias.get<ffi::AnyBuffer>(0);
    if (buffer.has_error()) return ffi::Unexpected(buffer.error());
    if (buffer->element_type() != w.element_type() ||
        static_cast<Index>(buffer->element_count()) != g.stack * g.multiplier * g.channels) {
      return ffi::Unexpected(
          invalid("expected a bias (*stack, M, C) of the kernel's dtype; got " + text(buffer->dimensions())));
    }
    b = buffer->untyped_data();
  }
  if (activation < 0 || activation >= kActivations)
    return ffi::Unexpected(invalid("expected an activation of 0, 1 or 2"));
  XlaPool pool(threads);
  return forward(dtype, g, x.untyped_data(), w.untyped_data(), b, static_cast<Activation>(activation), y.untyped_data(),
                 pool);
}

ffi::Error run_forward(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::RemainingArgs bias,
                       ffi::Result<ffi::AnyBuffer> y, Attribute stride, Attribute low, Attribute dilation,
                       std::int64_t activation) {
  return handled([&] { return checked_forward(threads, x, w, bias, *y, stride, low, dilation, activation); });
}

ffi::Error run_input_grad(ffi::ThreadPool threads, ffi::AnyBuffer cotangent, ffi::AnyBuffer w,
                          ffi::Result<ffi::AnyBuffer> dx, Attribute stride, Attribute low, Attribute dilation) {
  return handled([&]() -> ffi::ErrorOr<bool> {
    auto call = call_of(*dx, w, cotangent, stride, low, dilation);
    if (call.has_error()) return ffi::Unexpected(call.error());
    XlaPool pool(threads);
    return input_grad(call->dtype, call->geometry, cotangent.untyped_data(), w.untyped_data(), dx->untyped_data(),
                      pool);
  });
}

ffi::Error run_kernel_grad(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer cotangent,
                           ffi::Result<ffi::AnyBuffer> dw, Attribute stride, Attribute low, Attribute dilation) {
  return handled([&]() -> ffi::ErrorOr<bool> {
    auto call = call_of(x, *dw, cotangent, stride, low, dilation);
    if (call.has_error()) return ffi::Unexpected(call.error());
    XlaPool pool(threads);
    return kernel_grad(call->dtype, call->geometry, x.untyped_data(), cotangent.untyped_data(), dw->untyped_data(),
                       pool);
  });
}

// A packed map of two operands in the order of the plain one, and a reach.
template <class CallOf, class Map>
ffi::Error run_packed(const CallOf& call_of_operands, ffi::ThreadPool threads, ffi::AnyBuffer first,
                      ffi::AnyBuffer second, ffi::AnyBuffer reach, ffi::AnyBuffer result, const Map& map) {
  return handled([&]() -> ffi::ErrorOr<bool> {
    auto call = call_of_operands();
    if (call.has_error()) return ffi::Unexpected(call.error());
    auto reaches = reach_of(reach, call->geometry);
    if (reaches.has_error()) return ffi::Unexpected(reaches.error());
    XlaPool pool(threads);
    return map(call->dtype, call->geometry, first.untyped_data(), second.untyped_data(), *reaches,
               result.untyped_data(), pool);
  });
}

ffi::Error run_packed_forward(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer reach,
                              ffi::Result<ffi::AnyBuffer> y, Attribute stride, Attribute low, Attribute dilation) {
  return run_packed([&] { return call_of(x, w, *y, stride, low, dilation); }, threads, x, w, reach, *y, packed_forward);
}

ffi::Error run_packed_input_grad(ffi::ThreadPool threads, ffi::AnyBuffer cotangent, ffi::AnyBuffer w,
                                 ffi::AnyBuffer reach, ffi::Result<ffi::AnyBuffer> dx, Attribute stride, Attribute low,
                                 Attribute dilation) {
  return run_packed([&] { return call_of(*dx, w, cotangent, stride, low, dilation); }, threads, cotangent, w, reach,
                    *dx, packed_input_grad);
}

ffi::Error run_packed_kernel_grad(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer cotangent,
                                  ffi::AnyBuffer reach, ffi::Result<ffi::AnyBuffer> dw, Attribute stride, Attribute low,
                                  Attribute dilation) {
  return run_packed([&] { return call_of(x, *dw, cotangent, stride, low, dilation); }, threads, x, cotangent, reach,
                    *dw, packed_kernel_grad);
}

}  // namespace
}  // namespace depthwise

#pragma GCC visibility push(default)

extern "C" const char* depthwise_jax_instruction_set() { return depthwise::instruction_set(); }

#define GEOMETRY_ATTRIBUTES \
  Attr<depthwise::Attribute>("stride").Attr<depthwise::Attribute>("low").Attr<depthwise::Attribute>("dilation")

XLA_FFI_DEFINE_HANDLER_SYMBOL(DEPTHWISE_NAME(forward, DEPTHWISE_ABI), depthwise::run_forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .GEOMETRY_ATTRIBUTES.Attr<std::int64_t>("activation"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(DEPTHWISE_NAME(input_grad, DEPTHWISE_ABI), depthwise::run_input_grad,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .GEOMETRY_ATTRIBUTES);
XLA_FFI_DEFINE_HANDLER_SYMBOL(DEPTHWISE_NAME(kernel_grad, DEPTHWISE_ABI), depthwise::run_kernel_grad,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .GEOMETRY_ATTRIBUTES);

#define PACKED_HANDLER(map)                                                                               \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(DEPTHWISE_NAME(packed_##map, DEPTHWISE_ABI), depthwise::run_packed_##map, \
                                ffi::Ffi::Bind()                                                          \
                                    .Ctx<ffi::ThreadPool>()                                               \
                                    .Arg<ffi::AnyBuffer>()                                                \
                                    .Arg<ffi::AnyBuffer>()                                                \
                                    .Arg<ffi::AnyBuffer>()                                                \
                                    .Ret<ffi::AnyBuffer>()                                                \
                                    .GEOMETRY_ATTRIBUTES)
PACKED_HANDLER(forward);
PACKED_HANDLER(input_grad);
PACKED_HANDLER(kernel_grad);

#pragma GCC visibility pop
