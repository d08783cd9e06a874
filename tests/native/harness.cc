// The kernels alone, without XLA and Python: random convolutions against a plain loop in double. Built with sanitizers
// by `make sanitize`.
//
//   harness ITERATIONS [SEED [FIRST]]
//
// Iterations FIRST, FIRST + 1, ... are each drawn from SEED and their own number, so that a failure repeats alone with
// the command that it prints. The environment variable DEPTHWISE_JAX_ISA picks the instruction set.
//
// In one half of the iterations all values are small integers: every order of the sums gives the same float, so results
// must be the rounded truth to the bit. In the other half they are real numbers, with the bound n*u*sum|terms| of a sum
// of n terms at the unit roundoff u, and one rounding to the result's dtype. Every eighth holds infinities and NaN.
// Inputs end where their allocation ends, for AddressSanitizer; outputs lie between guards that must stay as they were.
#include "depthwise.h"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <mutex>
#include <queue>
#include <string>
#include <thread>
#include <vector>

using namespace depthwise;

namespace {

// The reference is not what the sanitizers are to watch, and takes the longest under them.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define UNWATCHED __attribute__((no_sanitize("address", "thread", "undefined")))
#else
#define UNWATCHED
#endif

// ---------------------------------------------------------------------------------------------------- Numbers

// splitmix64
class Random {
 public:
  Random(std::uint64_t seed, std::uint64_t index) : state_(seed * 0x9e3779b97f4a7c15u) {
    state_ = bits() ^ (index * 0xd1342543de82ef95u);
  }
  std::uint64_t bits() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  Index between(Index low, Index high) { return low + static_cast<Index>(bits() % (high - low + 1)); }
  bool one_in(Index n) { return between(1, n) == 1; }
  Index pick(std::initializer_list<Index> values) { return values.begin()[between(0, values.size() - 1)]; }
  double real() { return static_cast<double>(bits() >> 11) * 0x1p-52 - 1; }  // in [-1, 1)

 private:
  std::uint64_t state_;
};

struct Format {
  const char* name;
  int size, digits, least;  // digits of the significand; the exponent of the smallest normal number
  double largest;
};
const Format& format_of(Dtype dtype) {
  static const Format formats[] = {{"float32", 4, 24, -126, std::numeric_limits<float>::max()},
                                   {"float64", 8, 53, -1022, std::numeric_limits<double>::max()},
                                   {"float16", 2, 11, -14, 65504.0},
                                   {"bfloat16", 2, 8, -126, 0x1.fep127}};
  return formats[static_cast<int>(dtype)];
}
// The dtype of the sums.
Dtype sums_of(Dtype dtype) { return dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32; }

// The nearest number of a format, ties to even.
double rounded(double value, const Format& format) {
  if (!std::isfinite(value) || value == 0) return value;
  int exponent;
  std::frexp(value, &exponent);  // value is in [2^(exponent - 1), 2^exponent)
  const int unit = std::max(exponent - 1, format.least) - (format.digits - 1);
  const double result = std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
  return std::fabs(result) > format.largest ? std::copysign(INFINITY, value) : result;
}

// Writes a number that the dtype has.
void write(char* p, Dtype dtype, double value) {
  const float narrow = static_cast<float>(value);
  std::uint32_t bits;
  std::memcpy(&bits, &narrow, 4);
  std::uint16_t half;
  switch (dtype) {
    case Dtype::f64: std::memcpy(p, &value, 8); return;
    case Dtype::f32: std::memcpy(p, &narrow, 4); return;
    case Dtype::bf16: half = static_cast<std::uint16_t>(bits >> 16); break;
    default: {
      const double magnitude = std::fabs(value);
      if (std::isnan(value)) {
        half = 0x7e00;
      } else if (std::isinf(value)) {
        half = 0x7c00;
      } else if (magnitude < 0x1p-14) {
        half = static_cast<std::uint16_t>(magnitude * 0x1p24);
      } else {
        half = static_cast<std::uint16_t>(((bits & 0x7fffffffu) >> 13) - (112u << 10));
      }
      if (std::signbit(value)) half |= 0x8000;
    }
  }
  std::memcpy(p, &half, 2);
}

double read(const char* p, Dtype dtype) {
  if (dtype == Dtype::f64) {
    double value;
    std::memcpy(&value, p, 8);
    return value;
  }
  std::uint32_t bits = 0;
  std::memcpy(&bits, p, format_of(dtype).size);
  if (dtype == Dtype::f16) {
    const std::uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 31   ? (fraction ? NAN : INFINITY)
                             : exponent == 0 ? fraction * 0x1p-24
                                              : std::ldexp(1024.0 + fraction, static_cast<int>(exponent) - 25);
    return bits & 0x8000 ? -magnitude : magnitude;
  }
  if (dtype == Dtype::bf16) bits <<= 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// ---------------------------------------------------------------------------------------------------- Memory

// An array of a dtype, some elements behind the start of its allocation; with guards on both sides if it is an output.
class Buffer {
 public:
  Buffer(Dtype dtype, Index count, Index offset, bool output)
      : dtype_(dtype),
        count_(count),
        size_(format_of(dtype).size),
        before_((offset + (output ? kGuard : 0)) * size_),
        after_(output ? kGuard * size_ : 0),
        memory_(static_cast<char*>(std::malloc(bytes()))) {
    if (!memory_) std::abort();
    std::memset(memory_.get(), kPattern, bytes());  // in every dtype no number: what is not written shows
  }
  char* data() const { return memory_.get() + before_; }
  double operator[](Index i) const { return read(data() + i * size_, dtype_); }
  void fill(const std::vector<double>& values) {
    for (Index i = 0; i < count_; ++i) write(data() + i * size_, dtype_, values[i]);
  }
  bool guarded() const {
    for (Index i = 0; i < before_; ++i) if (memory_.get()[i] != kPattern) return false;
    for (Index i = 0; i < after_; ++i) if (data()[count_ * size_ + i] != kPattern) return false;
    return true;
  }
  bool same(const Buffer& other) const { return std::memcmp(data(), other.data(), count_ * size_) == 0; }
  Dtype dtype() const { return dtype_; }
  Index count() const { return count_; }

 private:
  static constexpr Index kGuard = 24;
  static constexpr char kPattern = static_cast<char>(0xff);
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::size_t bytes() const { return before_ + count_ * size_ + after_; }

  Dtype dtype_;
  Index count_, size_, before_, after_;
  std::unique_ptr<char, Free> memory_;
};

// ---------------------------------------------------------------------------------------------------- Threads

// Claims a number of threads and has its own: tasks that it runs late, or after their caller has returned, must do.
class Threads : public Pool {
 public:
  Threads() {
    for (int i = 0; i < 3; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Threads() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  int threads() const override { return claimed; }
  void schedule(std::function<void()> task) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push(std::move(task));
    }
    wake_.notify_one();
  }
  int claimed = 1;

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop();
      lock.unlock();
      task();
      lock.lock();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_;
  std::queue<std::function<void()>> tasks_;
  std::vector<std::thread> workers_;
  bool stop_ = false;
};

// ---------------------------------------------------------------------------------------------------- Truth

// The sums of the products, and of their magnitudes.
struct Sums {
  explicit Sums(Index count) : value(count), magnitude(count) {}
  std::vector<double> value, magnitude;
};

// value[c] += a[c]*b[c], for all channels.
UNWATCHED void add_products(Index channels, const double* a, const double* b, double* value, double* magnitude) {
  for (Index c = 0; c < channels; ++c) {
    const double product = a[c] * b[c];
    value[c] += product;
    magnitude[c] += std::fabs(product);
  }
}

// Calls f(x, w, y) with the first element of each, for every output position, tap and position inside the input.
template <class F>
UNWATCHED void for_each_product(const Geometry& g, const F& f) {
  Index o[3], t[3], i[3];
  for (Index image = 0; image < g.stack * g.multiplier * g.batch; ++image) {
    // The image of y under one of the kernels, and the image of x that all kernels of its stack share.
    const Index kernel = image / g.batch, read = kernel / g.multiplier * g.batch + image % g.batch;
    for (o[0] = 0; o[0] < g.out[0]; ++o[0]) {
      for (o[1] = 0; o[1] < g.out[1]; ++o[1]) {
        for (o[2] = 0; o[2] < g.out[2]; ++o[2]) {
          const Index y = ((image * g.out[0] + o[0]) * g.out[1] + o[1]) * g.out[2] + o[2];
          for (t[0] = 0; t[0] < g.window[0]; ++t[0]) {
            for (t[1] = 0; t[1] < g.window[1]; ++t[1]) {
              for (t[2] = 0; t[2] < g.window[2]; ++t[2]) {
                bool inside = true;
                for (int a = 0; a < 3; ++a) {
                  i[a] = o[a] * g.stride[a] + t[a] * g.dilation[a] - g.low[a];
                  inside = inside && i[a] >= 0 && i[a] < g.in[a];
                }
                if (!inside) continue;
                const Index x = ((read * g.in[0] + i[0]) * g.in[1] + i[1]) * g.in[2] + i[2];
                const Index w = ((kernel * g.window[0] + t[0]) * g.window[1] + t[1]) * g.window[2] + t[2];
                f(x * g.channels, w * g.channels, y * g.channels);
              }
            }
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------- One iteration

Index product(const Index* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// Multiply-adds: mostly few, up to enough for all threads.
double draw_budget(Random& random) {
  const double u = random.real();
  return std::exp(6 + 8.5 * std::fabs(u * u * u));
}

Geometry draw_geometry(Random& random, double budget) {
  for (;;) {
    Geometry g{};
    g.stack = random.pick({1, 1, 1, 1, 1, 2, 3, random.one_in(20) ? 0 : 1});
    g.multiplier = random.pick({1, 1, 1, 2, 3});
    g.batch = random.pick({1, 1, 2, 2, 3, 5, random.one_in(20) ? 0 : 1});
    g.channels = random.pick({random.between(1, 20), random.between(1, 130), random.between(1, 130),
                              random.pick({8, 16, 24, 32, 48, 64, 96, 128, 192, 260})});
    const Index rank = random.between(1, 3);
    const bool large = budget > 1e6;
    // Of every third the window is one that most networks have, square and with half of it as padding.
    const bool common = random.one_in(3);
    const Index window = random.pick({3, 3, 5, 7}), stride = random.pick({1, 1, 2});
    for (Index axis = 0; axis < 3; ++axis) {
      const bool used = axis >= 3 - rank;
      g.window[axis] = used ? random.pick({1, 2, 3, 3, 3, 4, 5, 5, 7, 7, 9, random.between(1, 31)}) : 1;
      g.stride[axis] = used ? random.pick({1, 1, 1, 2, 2, 3, random.between(1, 6)}) : 1;
      g.dilation[axis] = used ? random.pick({1, 1, 1, 1, 2, 3, random.between(1, 6)}) : 1;
      if (used && common) {
        g.window[axis] = window;
        g.stride[axis] = stride;
        g.dilation[axis] = 1;
      }
      g.in[axis] = used ? random.between(1, rank == 3 ? 10 : large ? 200 : 40) : 1;
      if (axis == 2 && rank < 3 && random.one_in(4)) g.in[axis] = random.between(100, 1500);
      if (used && random.one_in(60)) g.in[axis] = 0;  // padding alone
      const Index span = (g.window[axis] - 1) * g.dilation[axis] + 1;
      Index high = 0;
      if (used) {
        // None, half a window, or anything up to beyond it.
        const Index kind = common ? 1 : random.between(0, 3);
        g.low[axis] = kind == 0 ? 0 : kind == 1 ? span / 2 : random.between(0, span + 2);
        high = kind == 0 ? 0 : kind == 1 ? (span - 1) / 2 : random.between(0, span + 2);
      }
      g.out[axis] = (g.in[axis] + g.low[axis] + high - span) / g.stride[axis] + 1;
      if (g.in[axis] + g.low[axis] + high < span) g.out[axis] = 0;
      // The maps need no output that fits: what lies outside contributes nothing, however far it is.
      if (used && random.one_in(12)) g.out[axis] = random.between(1, 30);
    }
    if (problem(g)) continue;
    const double images = static_cast<double>(std::max<Index>(g.stack * g.multiplier * g.batch, 1)) * g.channels;
    const double work = images * product(g.out) * product(g.window) + images * product(g.in);
    if (work <= budget && work >= budget / 300) return g;
  }
}

// Results of 8 MiB and more are stored past the caches, and from 32 MiB on their pages are advised.
Geometry draw_large_geometry(Random& random) {
  Geometry g{};
  g.stack = g.multiplier = g.batch = 1;
  g.channels = random.pick({16, 32, 64, 100});
  for (int axis = 0; axis < 3; ++axis) {
    g.in[axis] = g.window[axis] = g.stride[axis] = g.dilation[axis] = g.out[axis] = 1;
  }
  g.window[1] = random.pick({1, 2});
  g.window[2] = random.pick({1, 3});
  g.low[2] = g.window[2] / 2;
  g.in[1] = random.between(200, 300);
  g.in[2] = (Index{1} << 20) * random.between(3, 11) / g.channels / g.in[1] + 1;
  g.out[1] = g.in[1] - g.window[1] + 1;
  g.out[2] = g.in[2];
  return g;
}

// Small maps under windows that reach over them, of so many channels that columns share few of the caches' sets: packed first.
Geometry draw_crowded_geometry(Random& random) {
  Geometry g{};
  g.stack = g.batch = 1;
  g.multiplier = random.pick({1, 1, 2});
  g.channels = random.pick({256, 512, 1024, 2048});
  g.window[0] = g.stride[0] = g.dilation[0] = g.in[0] = g.out[0] = 1;
  for (int axis = 1; axis < 3; ++axis) {
    g.window[axis] = random.pick({5, 7, 9, 13});
    g.stride[axis] = random.pick({1, 1, 2});
    g.dilation[axis] = 1;
    g.in[axis] = random.between(1, 8);
    g.low[axis] = g.window[axis] / 2;
    g.out[axis] = (g.in[axis] - 1) / g.stride[axis] + 1;
  }
  return g;
}

std::string text(const Index* v) {
  return "(" + std::to_string(v[0]) + ", " + std::to_string(v[1]) + ", " + std::to_string(v[2]) + ")";
}

class Iteration {
 public:
  Iteration(std::uint64_t seed, std::uint64_t index, Threads& pool) : random_(seed, index), pool_(pool) {
    const bool large = random_.one_in(2000), crowded = random_.one_in(100);
    g_ = large     ? draw_large_geometry(random_)
         : crowded ? draw_crowded_geometry(random_)
                   : draw_geometry(random_, draw_budget(random_));
    dtype_ = large ? Dtype::f32 : static_cast<Dtype>(random_.between(0, 3));
    integers_ = random_.one_in(2);
    specials_ = random_.one_in(8);
    aligned_ = random_.one_in(3);
    activation_ = static_cast<Activation>(random_.between(0, 2));
    biased_ = random_.one_in(2);
    threads_ = static_cast<int>(random_.pick({1, 2, 2, 3, 4, 8}));
  }

  // False after a report of what is wrong.
  bool run() {
    const Index images = g_.stack * g_.batch, c = g_.channels;
    const Index kernels = g_.stack * g_.multiplier;
    const Index x_count = images * product(g_.in) * c, y_count = kernels * g_.batch * product(g_.out) * c;
    const Index w_count = kernels * product(g_.window) * c, b_count = biased_ ? kernels * c : 0;
    const auto x = draw(x_count, dtype_), g = draw(y_count, dtype_), w = draw(w_count, dtype_), b = draw(b_count, dtype_);
    Buffer xs = input(dtype_, x), gs = input(dtype_, g), ws = input(dtype_, w), bs = input(dtype_, b);
    Buffer y = output(dtype_, y_count), dx = output(dtype_, x_count), dw = output(dtype_, w_count);
    Buffer again = output(dtype_, w_count);

    pool_.claimed = threads_;
    bool ok = forward(dtype_, g_, xs.data(), ws.data(), biased_ ? bs.data() : nullptr, activation_, y.data(), pool_) ||
              wrong("y", "no memory");
    ok &= input_grad(dtype_, g_, gs.data(), ws.data(), dx.data(), pool_) || wrong("dx", "no memory");
    ok &= kernel_grad(dtype_, g_, xs.data(), gs.data(), dw.data(), pool_) || wrong("dw", "no memory");
    pool_.claimed = threads_ == 1 ? 2 : 1;
    ok &= kernel_grad(dtype_, g_, xs.data(), gs.data(), again.data(), pool_) || wrong("dw", "no memory");
    if (!dw.same(again)) ok = wrong("dw", "other numbers with another number of threads");

    Sums true_y(y_count), true_dx(x_count), true_dw(w_count);
    for (Index i = 0; i < y_count && biased_; ++i) {
      const double bias = b[i / (product(g_.out) * g_.batch * c) * c + i % c];
      true_y.value[i] = bias;
      true_y.magnitude[i] = std::fabs(bias);
    }
    for_each_product(g_, [&](Index i, Index k, Index o) {
      add_products(c, &x[i], &w[k], &true_y.value[o], &true_y.magnitude[o]);
      add_products(c, &g[o], &w[k], &true_dx.value[i], &true_dx.magnitude[i]);
      add_products(c, &x[i], &g[o], &true_dw.value[k], &true_dw.magnitude[k]);
    });
    for (double& value : true_y.value) {
      if (activation_ != Activation::identity && value < 0) value = 0;
      if (activation_ == Activation::relu6 && value > 6) value = 6;
    }
    const Index taps = product(g_.window);
    return check("y", y, true_y, taps + 1) & check("dx", dx, true_dx, g_.multiplier * taps) &
           check("dw", dw, true_dw, g_.batch * product(g_.out)) & ok;
  }

  std::string describe() const {
    const char* activations[] = {"identity", "relu", "relu6"};
    return std::string(format_of(dtype_).name) + ", stack " + std::to_string(g_.stack) + ", multiplier " +
           std::to_string(g_.multiplier) + ", batch " +
           std::to_string(g_.batch) + ", channels " + std::to_string(g_.channels) + ", in " + text(g_.in) + ", out " +
           text(g_.out) + ", window " + text(g_.window) + ", stride " + text(g_.stride) + ", low " + text(g_.low) +
           ", dilation " + text(g_.dilation) + ", " + activations[static_cast<int>(activation_)] +
           (biased_ ? ", bias" : "") + (integers_ ? ", integers" : ", reals") + (specials_ ? ", not finite" : "") +
           ", threads " + std::to_string(threads_);
  }

 private:
  std::vector<double> draw(Index count, Dtype dtype) {
    std::vector<double> values(count);
    const Format& format = format_of(dtype);
    for (double& value : values) {
      value = integers_ ? static_cast<double>(random_.between(-4, 4)) : rounded(2 * random_.real(), format);
    }
    if (specials_ && count) {
      for (Index n = random_.between(0, 3); n > 0; --n) {
        values[random_.between(0, count - 1)] = random_.one_in(2) ? NAN : random_.one_in(2) ? INFINITY : -INFINITY;
      }
    }
    return values;
  }
  Buffer input(Dtype dtype, const std::vector<double>& values) {
    Buffer buffer(dtype, values.size(), offset(), false);
    buffer.fill(values);
    return buffer;
  }
  Buffer output(Dtype dtype, Index count) { return Buffer(dtype, count, aligned_ ? 8 : offset(), true); }
  Index offset() { return aligned_ ? 0 : random_.between(0, 17); }

  bool wrong(const char* what, const char* how) const {
    std::printf("%s: %s\n", what, how);
    return false;
  }

  bool check(const char* what, const Buffer& actual, const Sums& expected, Index terms) const {
    if (!actual.guarded()) return wrong(what, "wrote outside its result");
    const Format &format = format_of(actual.dtype()), &sums = format_of(sums_of(dtype_));
    // The reference sums in double, too, so for double the bound holds for both sides.
    const double unit = std::ldexp(dtype_ == Dtype::f64 ? 2 : 1, -sums.digits);
    for (Index i = 0; i < actual.count(); ++i) {
      const double got = actual[i], value = expected.value[i], want = rounded(value, format);
      bool ok;
      if (std::isnan(value)) {
        ok = std::isnan(got);
      } else if (integers_ || !std::isfinite(want) || !std::isfinite(got)) {
        ok = got == want;
      } else {
        double allowed = static_cast<double>(terms + 1) * unit * expected.magnitude[i];
        allowed += (std::fabs(value) + allowed) * std::ldexp(1, -format.digits);
        allowed += std::ldexp(1, format.least - format.digits);
        ok = std::fabs(got - value) <= allowed;
      }
      if (!ok) {
        std::printf("%s[%td]: got %.17g, expected %.17g\n", what, i, got, want);
        return false;
      }
    }
    return true;
  }

  Random random_;
  Threads& pool_;
  Geometry g_;
  Dtype dtype_;
  Activation activation_;
  bool integers_, specials_, aligned_, biased_;
  int threads_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    std::fprintf(stderr, "usage: %s ITERATIONS [SEED [FIRST]]\n", argv[0]);
    return 2;
  }
  const auto number = [&](int i, std::uint64_t otherwise) { return argc > i ? std::strtoull(argv[i], nullptr, 0) : otherwise; };
  const std::uint64_t iterations = number(1, 0), seed = number(2, 1), first = number(3, 0);
  const char* asked = std::getenv("DEPTHWISE_JAX_ISA");
  if (!instruction_set()) {
    std::printf("%s: not on this machine, passed over\n", asked);
    return 0;
  }
  Threads pool;
  int failures = 0;
  for (std::uint64_t i = first; i < first + iterations && failures < 10; ++i) {
    Iteration iteration(seed, i, pool);
    if (!iteration.run()) {
      std::printf("  in %s\n  again: DEPTHWISE_JAX_ISA=%s %s 1 %llu %llu\n", iteration.describe().c_str(),
                  instruction_set(), argv[0], static_cast<unsigned long long>(seed), static_cast<unsigned long long>(i));
      ++failures;
    }
  }
  std::printf("%s: %llu iterations from seed %llu, %s\n", instruction_set(),
              static_cast<unsigned long long>(iterations), static_cast<unsigned long long>(seed),
              failures ? "failed" : "no failure");
  return failures ? 1 : 0;
}
