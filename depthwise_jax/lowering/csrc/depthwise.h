// The library's interface: the three maps of a depthwise convolution on CPUs. ffi.cc calls them for XLA.
//
// Every convolution is converted to one form: three spatial axes, channels last, and the M kernels per channel
// outermost.
//
//   x (stack, batch, in..., C)   w (stack, M, window..., C)   y (stack, M, batch, out..., C)
//
// Each index of `stack` is a separate convolution. All arrays of a call have one type; narrow floats are summed in
// float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace depthwise {

using Index = std::ptrdiff_t;

enum class Dtype { f32, f64, f16, bf16 };

enum class Activation { identity, relu, relu6 };
constexpr int kActivations = 3;
static_assert(static_cast<int>(Activation::relu6) + 1 == kActivations);

// Output o reads position o*stride + t*dilation - low of the input through tap t, on each axis.
struct Geometry {
  Index stack, multiplier, batch, channels;
  Index in[3], out[3], window[3], stride[3], low[3], dilation[3];
};

// Threads to spread work over. `schedule` may run the task at any time, even after the call that scheduled it has
// returned.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int threads() const = 0;
  virtual void schedule(std::function<void()> task) = 0;
};

// What is wrong with a geometry, or null. The maps below trust a geometry that passed.
const char* geometry_error(const Geometry& geometry);

// Each map returns false if it runs out of memory. The maps allocate float copies of narrow w and bias, the staged
// parts of x, and the partial sums of dw, at most kPartialSumsBytes.
//
// y = activation(conv(x, w) + bias); bias (stack, M, C) may be null.
bool forward(Dtype dtype, const Geometry& geometry, const void* x, const void* w, const void* bias,
             Activation activation, void* y, Pool& pool);
// dx: the transpose of `forward` in x, applied to g, which has the shape of y.
bool input_grad(Dtype dtype, const Geometry& geometry, const void* g, const void* w, void* dx, Pool& pool);
// dw: the transpose of `forward` in w. The order of its sums depends on the geometry only.
bool kernel_grad(Dtype dtype, const Geometry& geometry, const void* x, const void* g, void* dw, Pool& pool);

// The same for a geometry with one spatial axis at stride 1, where output o sums only the taps t with
// K-1-t <= reach[o]; reach (stack, batch, out).
bool packed_forward(Dtype dtype, const Geometry& geometry, const void* x, const void* w, const std::int32_t* reach,
                    void* y, Pool& pool);
bool packed_input_grad(Dtype dtype, const Geometry& geometry, const void* g, const void* w, const std::int32_t* reach,
                       void* dx, Pool& pool);
bool packed_kernel_grad(Dtype dtype, const Geometry& geometry, const void* x, const void* g, const std::int32_t* reach,
                        void* dw, Pool& pool);

// The sizes that decide how results are written. The harness changes them.
struct MemorySizes {
  Index last_level_cache_bytes;
  Index stream_from_bytes;       // results from this size on are stored past the caches
  Index reused_by_malloc_bytes;  // larger results are new memory at every call
};
MemorySizes& memory_sizes();

// The instruction set in use: "avx512", "avx2", "baseline" or "neon". The environment variable DEPTHWISE_JAX_ISA, read
// once, selects another one; null if this machine does not support it.
const char* instruction_set();

}  // namespace depthwise
