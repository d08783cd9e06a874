// Depthwise convolution on CPUs: what the kernels, their driver and the FFI handlers share.
//
// Everything is brought to one form: three spatial axes, channels last, and the M kernels per channel outermost.
//
//   x (stack, batch, in..., C)   w (stack, M, window..., C)   y (stack, M, batch, out..., C)
//
// Each index of `stack` is a convolution of its own. All arrays are of one type; narrow floats are summed in float.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace depthwise {

using Index = std::ptrdiff_t;

enum class Dtype { f32, f64, f16, bf16 };
enum class Activation { identity, relu, relu6 };

struct Geometry {
  Index stack, multiplier, batch, channels;
  Index in[3], out[3], window[3], stride[3], low[3], dilation[3];
};

// Threads to spread work over. `schedule` may run the task at any time, or after parallel_for has returned.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int threads() const = 0;
  virtual void schedule(std::function<void()> task) = 0;
};

// Null if the geometry is sound, else what is wrong with it. The three maps below trust a geometry that passed.
const char* problem(const Geometry& geometry);

// The maps are false where there is no memory: for w and bias as float where they are narrow, and for the partial sums of
// dw, at most 8 MiB, and dw as float where it is narrow.
//
// y = activation(conv(x, w) + bias); bias (stack, M, C) may be null.
bool forward(Dtype dtype, const Geometry& geometry, const void* x, const void* w, const void* bias,
             Activation activation, void* y, Pool& pool);
// dx = the transpose of forward in x, of g shaped as y.
bool input_grad(Dtype dtype, const Geometry& geometry, const void* g, const void* w, void* dx, Pool& pool);
// dw = the transpose of forward in w. The order of its sums depends on the geometry only.
bool kernel_grad(Dtype dtype, const Geometry& geometry, const void* x, const void* g, void* dw, Pool& pool);

// Sizes of this machine's memories, in bytes, that decide how results are written; the harness changes them.
struct Memories {
  Index last_level_cache;
  Index streamed;   // results from this size on are stored past the caches
  Index allocator;  // results above this size are new memory at every call
};
Memories& memories();

// The instruction set that is used: "avx512", "avx2", "baseline" or "neon". The environment variable
// DEPTHWISE_JAX_ISA, read once, names a lower one; null if it names one that is not there.
const char* instruction_set();

}  // namespace depthwise
