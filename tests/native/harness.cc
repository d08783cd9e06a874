// The library without XLA and Python, against a plain loop in double. Built with sanitizers by `make sanitize`.
//
//   harness ITERATIONS [SEED [FIRST]]   random convolutions; from 10000 on it fails if a compiled loop never ran
//   harness sweep                       every small window with every stride up to 130
//   harness failures                    allocations that fail, one after the other
//   harness large                       arrays of more than 2^31 elements, in sparse mappings
//
// Iterations FIRST, FIRST + 1, ... are each drawn from SEED and their own number, so a failure repeats alone with the
// command that it prints. The environment variable DEPTHWISE_JAX_ISA picks the instruction set.
//
// In one half of the iterations all values are small integers: every order of the sums gives the same float, so results
// must be the rounded truth to the bit. In the other half they are real numbers, with the bound n*u*sum|terms| of a sum
// of n terms at the unit roundoff u, and one rounding to the result's dtype. Every eighth holds infinities and NaN.
// Arrays begin right behind a page that cannot be touched, or end right before one, or fill an allocation of their
// size, for AddressSanitizer.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <queue>
#include <string>
#include <thread>
#include <vector>

#include "depthwise.h"
#include "dispatch.h"
#include "loops.h"
#include "tuning.h"

using namespace depthwise;

namespace {

// The sanitizers need not watch the reference, which takes the longest under them.
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
  // From 1 to `high`, on a logarithmic scale: small numbers most often.
  Index logarithmic(Index high) {
    const double u = static_cast<double>(bits() >> 11) * 0x1p-53;  // in [0, 1)
    return std::min(high, static_cast<Index>(std::exp(u * std::log(static_cast<double>(high) + 1))));
  }
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
    const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
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

// Where an array lies: in an allocation of its size; or in pages of its own, right behind or right before one that
// cannot be touched.
enum class Place { allocation, behind_guard, before_guard };

// An array of a dtype. What an output leaves around itself in its pages must stay as it was.
class Buffer {
 public:
  Buffer(Dtype dtype, Index count, Place place)
      : dtype_(dtype), count_(count), size_(format_of(dtype).size), bytes_(count * size_), place_(place) {
    if (place == Place::allocation) {
      data_ = memory_ = static_cast<char*>(std::malloc(std::max<Index>(bytes_, 1)));
      if (!memory_) std::abort();
      std::memset(data_, kPattern, bytes_);
      return;
    }
    const Index page = sysconf(_SC_PAGESIZE);
    inner_ = std::max<Index>((bytes_ + page - 1) / page, 1) * page;
    void* const mapped =
        mmap(nullptr, inner_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    memory_ = static_cast<char*>(mapped) + page;
    if (mprotect(memory_, inner_, PROT_READ | PROT_WRITE)) std::abort();
    std::memset(memory_, kPattern, inner_);  // a NaN in every dtype: what is not written shows
    data_ = place == Place::behind_guard ? memory_ : memory_ + inner_ - bytes_;
  }
  Buffer(Dtype dtype, const std::vector<double>& values, Place place) : Buffer(dtype, values.size(), place) {
    for (Index i = 0; i < count_; ++i) write(data_ + i * size_, dtype_, values[i]);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (!memory_) return;
    if (place_ == Place::allocation) {
      std::free(memory_);
    } else {
      const Index page = sysconf(_SC_PAGESIZE);
      munmap(memory_ - page, inner_ + 2 * page);
    }
  }
  char* data() const { return data_; }
  double operator[](Index i) const { return read(data_ + i * size_, dtype_); }
  bool guarded() const {
    if (place_ == Place::allocation) return true;
    const auto kept = [](char byte) { return byte == kPattern; };
    return std::all_of(memory_, data_, kept) && std::all_of(data_ + bytes_, memory_ + inner_, kept);
  }
  bool same(const Buffer& other) const { return std::memcmp(data_, other.data_, bytes_) == 0; }
  Dtype dtype() const { return dtype_; }
  Index count() const { return count_; }

 private:
  static constexpr char kPattern = static_cast<char>(0xff);
  Dtype dtype_;
  Index count_, size_, bytes_, inner_ = 0;
  Place place_;
  char *memory_ = nullptr, *data_ = nullptr;
};

// Allocations, which can be made to fail: all from number `first` to `last` on, counted from 1.
struct Allocations {
  std::atomic<Index> made{0}, first{0}, last{0};
  void fail(Index from, Index to) {
    made = 0;
    first = from;
    last = to;
  }
  bool fails() {
    const Index number = ++made;
    return number >= first && number <= last;
  }
} allocations;

// ---------------------------------------------------------------------------------------------------- Threads

// Claims a number of threads and has another: tasks may run late, or after their caller has returned.
class Threads : public Pool {
 public:
  explicit Threads(int workers) {
    for (int i = 0; i < workers; ++i) workers_.emplace_back([this] { work(); });
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
  // Waits until no task is waiting or running.
  void idle() {
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return tasks_.empty() && running_ == 0; });
  }
  int claimed = 1;

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return stop_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      ++running_;
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop();
      lock.unlock();
      task();
      task = nullptr;
      lock.lock();
      if (--running_ == 0) idle_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  int running_ = 0;
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

// Calls f(x, w, y) with the first element of each, for every output position, tap and position inside the input; of a
// packed map for the taps within each output's reach alone.
template <class F>
UNWATCHED void for_each_product(const Geometry& g, const std::vector<std::int32_t>& reach, const F& f) {
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
                if (!inside || (!reach.empty() && g.window[2] - 1 - t[2] > reach[read * g.out[2] + o[2]])) continue;
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

// ---------------------------------------------------------------------------------------------------- Loops

// One of the loops of the instruction set in use, and the windows that it serves.
struct LoopEntry {
  enum Use { direct, staged, wide, wide_staged, general, grad, general_grad, rows };
  Use use;
  Dtype dtype;
  Index taps, stride;  // 0: any
  int width, height, lanes;
  const void* code;
};

Loops loops_of(Dtype dtype) {
  const std::string name = instruction_set();
#if defined(__x86_64__)
  if (name == "avx512") return avx512::loops(dtype);
  if (name == "avx2") return avx2::loops(dtype);
#endif
#if defined(__aarch64__)
  return neon::loops(dtype);
#else
  return baseline::loops(dtype);
#endif
}

// Every loop of the instruction set, from the lists that the maps choose from.
std::vector<LoopEntry> all_loops() {
  std::vector<LoopEntry> result;
  for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::f16, Dtype::bf16}) {
    const Loops loops = loops_of(dtype);
    auto add = [&](LoopEntry::Use use, Index taps, Index stride, const auto* shapes) {
      for (; shapes->loop; ++shapes) {
        result.push_back({use, dtype, taps, stride, shapes->width, shapes->height, loops.lanes,
                          reinterpret_cast<const void*>(shapes->loop)});
      }
    };
    auto add_all = [&](LoopEntry::Use use, const auto* list) {
      for (; list->shapes; ++list) add(use, list->taps, list->stride, list->shapes);
    };
    add_all(LoopEntry::direct, loops.direct.specialized);
    add(LoopEntry::wide, 0, 1, loops.direct.wide);
    if (loops.widen) {  // other types stage for their direct loops
      add_all(LoopEntry::staged, loops.staged.specialized);
      add(LoopEntry::wide_staged, 0, 1, loops.staged.wide);
    }
    add(LoopEntry::general, 0, 0, loops.general);
    add_all(LoopEntry::grad, loops.grads);
    result.push_back(
        {LoopEntry::general_grad, dtype, 0, 0, 1, 1, loops.lanes, reinterpret_cast<const void*>(loops.general_grad)});
    for (const void* code :
         {reinterpret_cast<const void*>(loops.row_sum), reinterpret_cast<const void*>(loops.row_products)}) {
      result.push_back({LoopEntry::rows, dtype, 0, 1, 1, 1, loops.lanes, code});
    }
  }
  return result;
}

// How often each loop ran.
class Runs {
 public:
  void add(const void* code) {
    for (Slot& slot : slots_) {
      const void* found = slot.code.load(std::memory_order_acquire);
      if (!found && slot.code.compare_exchange_strong(found, code)) found = code;
      if (found == code) {
        slot.count.fetch_add(1, std::memory_order_relaxed);
        return;
      }
    }
    std::abort();
  }
  Index of(const void* code) const {
    for (const Slot& slot : slots_) {
      if (slot.code == code) return slot.count;
    }
    return 0;
  }
  // Prints the loops that never ran, and how many.
  Index report_idle() const {
    static const char* const uses[] = {"direct",  "staged", "wide",         "wide staged",
                                       "general", "grad",   "general grad", "rows"};
    const std::vector<LoopEntry> all = all_loops();
    Index idle = 0;
    for (const LoopEntry& entry : all) {
      if (of(entry.code)) continue;
      ++idle;
      std::printf("never ran: %s %s, %td taps, stride %td, tile %dx%d\n", format_of(entry.dtype).name, uses[entry.use],
                  entry.taps, entry.stride, entry.width, entry.height);
    }
    std::printf("%s: %td of %zu loops never ran\n", instruction_set(), idle, all.size());
    return idle;
  }

 private:
  struct Slot {
    std::atomic<const void*> code{nullptr};
    std::atomic<Index> count{0};
  };
  Slot slots_[1024];
} runs;

// ---------------------------------------------------------------------------------------------------- Geometries

Index product(const Index* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

constexpr Index kLimit = Index{1} << 31;  // that `geometry_error` has for sizes, strides, dilations and paddings

// Multiply-adds: mostly few, up to enough for all threads.
double draw_budget(Random& random) {
  const double u = random.real();
  return std::exp(6 + 8.5 * std::fabs(u * u * u));
}

double work_of(const Geometry& g) {
  const double images = static_cast<double>(std::max<Index>(g.stack * g.multiplier * g.batch, 1)) * g.channels;
  double outputs = images, taps = 1, inputs = images;
  for (int axis = 0; axis < 3; ++axis) {
    outputs *= static_cast<double>(g.out[axis]);
    inputs *= static_cast<double>(g.in[axis]);
    taps *= static_cast<double>(g.window[axis]);
  }
  return outputs * taps + inputs;
}

// A window along one axis of `in` positions, whatever it may be: numbers on a logarithmic scale, and such that they
// meet.
void draw_axis(Random& random, Geometry& g, int axis, Index largest) {
  g.window[axis] = random.logarithmic(random.pick({4, 9, 31, 100}));
  g.stride[axis] = random.logarithmic(random.pick({3, 6, 70, 200}));
  g.dilation[axis] = random.logarithmic(random.pick({2, 6, 70, 200}));
  g.in[axis] = random.logarithmic(largest);
  // Beyond any map: then outputs, taps and paddings are about so far apart, for some of them to meet the map.
  if (random.one_in(15)) {
    const Index scale = random.logarithmic(kLimit), near = random.between(-3, 3);
    auto some = [&](Index otherwise) {
      return random.one_in(3) ? otherwise : std::clamp(scale + near, Index{1}, kLimit);
    };
    g.window[axis] = random.between(1, 4);
    g.stride[axis] = some(g.stride[axis]);
    g.dilation[axis] = some(g.dilation[axis]);
    g.low[axis] = std::clamp(random.between(0, 3) * scale + random.between(-9, 9), Index{0}, kLimit);
    g.out[axis] = random.between(1, 6);
    return;
  }
  const Index span = (g.window[axis] - 1) * g.dilation[axis] + 1;
  // None, half a window, or anything up to beyond it.
  const Index kind = random.between(0, 3);
  const Index high = kind == 0 ? 0 : kind == 1 ? (span - 1) / 2 : random.between(0, span + 2);
  g.low[axis] = kind == 0 ? 0 : kind == 1 ? span / 2 : random.between(0, span + 2);
  const Index room = g.in[axis] + g.low[axis] + high - span;
  g.out[axis] = room < 0 ? 0 : room / g.stride[axis] + 1;
}

Geometry draw_geometry(Random& random, double budget) {
  for (;;) {
    Geometry g{};
    g.stack = random.pick({1, 1, 1, 1, 1, 2, 3, random.one_in(20) ? 0 : 1});
    g.multiplier = random.pick({1, 1, 1, 2, 3, random.logarithmic(40)});
    g.batch = random.pick({1, 1, 2, 2, 3, 5, random.one_in(20) ? 0 : 1, random.logarithmic(70)});
    g.channels = random.pick({random.between(1, 20), random.between(1, 130), random.between(1, 130),
                              random.pick({8, 16, 24, 32, 48, 64, 96, 128, 192, 260})});
    const Index rank = random.between(1, 3);
    const bool large = budget > 1e6;
    // Of every third the window is one that most networks have, square and with half of it as padding.
    const bool common = random.one_in(3);
    const Index window = random.pick({3, 3, 5, 7}), stride = random.pick({1, 1, 2});
    for (int axis = 0; axis < 3; ++axis) {
      g.in[axis] = g.out[axis] = g.window[axis] = g.stride[axis] = g.dilation[axis] = 1;
      if (axis < 3 - rank) continue;
      draw_axis(random, g, axis, large ? 300 : rank == 3 ? 20 : 80);
      if (common) {
        g.window[axis] = window;
        g.stride[axis] = stride;
        g.dilation[axis] = 1;
        g.in[axis] = random.between(1, rank == 3 ? 10 : large ? 200 : 40);
        g.low[axis] = window / 2;
        g.out[axis] = (g.in[axis] - 1) / stride + 1;
      }
      if (axis == 2 && rank < 3 && random.one_in(6)) g.in[axis] = random.between(100, 1500);
      if (random.one_in(60)) g.in[axis] = 0;  // padding alone
      // The maps need no output that fits: what lies outside contributes nothing, however far it is.
      if (random.one_in(12)) g.out[axis] = random.between(1, 30);
    }
    if (geometry_error(g)) continue;
    const double work = work_of(g);
    if (work <= budget && work >= budget / 300) return g;
  }
}

// One that a loop may serve: a few tiles and what is left beside them, and channels about a vector.
Geometry draw_geometry_for(Random& random, const LoopEntry& entry) {
  Geometry g{};
  g.stack = 1;
  g.multiplier = random.pick({1, 1, 1, 2});
  g.batch = random.pick({1, 1, 2});
  g.channels =
      random.pick({entry.lanes - 1, entry.lanes, entry.lanes + 1, 2 * entry.lanes, random.between(1, 5 * entry.lanes)});
  g.channels = std::max<Index>(g.channels, 1);
  g.window[0] = g.stride[0] = g.dilation[0] = g.in[0] = g.out[0] = 1;
  if (random.one_in(8)) {
    g.window[0] = random.between(1, 3);
    g.in[0] = random.between(1, 3);
    g.low[0] = random.between(0, 1);
  }
  g.window[2] = entry.taps ? entry.taps : random.between(1, 24);
  g.stride[2] = entry.stride ? entry.stride : random.between(1, 4);
  g.window[1] = random.pick({g.window[2], g.window[2], 1, random.between(1, 9)});
  g.stride[1] = random.pick({g.stride[2], g.stride[2], 1, 2});
  g.dilation[1] = random.pick({1, 1, 1, 2});
  g.dilation[2] =
      entry.use == LoopEntry::general || entry.use == LoopEntry::general_grad || entry.use == LoopEntry::rows
          ? random.between(1, 3)
          : 1;
  if (entry.use == LoopEntry::staged)
    g.window[1] = (kStagedTaps - 1 + g.window[2]) / g.window[2] + random.between(0, 2);
  if (entry.use == LoopEntry::wide_staged) g.window[2] = random.between(kStagedTapsAcross, 30);
  if (entry.use == LoopEntry::wide) g.window[2] = random.between(kWideTaps, 30);
  const int sizes[] = {0, entry.height, entry.width};
  for (int axis = 1; axis < 3; ++axis) {
    const Index span = (g.window[axis] - 1) * g.dilation[axis] + 1;
    g.out[axis] = random.pick({sizes[axis], sizes[axis], 2 * sizes[axis], random.between(1, 15)});
    g.low[axis] = random.pick({0, span / 2, random.between(0, span - 1)});
    const Index reach =
        (g.out[axis] - 1) * g.stride[axis] + span - g.low[axis];  // up to the last tap of the last output
    g.in[axis] = std::max<Index>(reach - random.between(0, span - 1), 1);
  }
  return g;
}

// Large results are stored past the caches, and larger ones ask for huge pages.
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

// Small maps under windows that reach over them, with channel counts that leave the columns few of the caches' sets:
// packed first.
Geometry draw_conflicting_geometry(Random& random) {
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

// ---------------------------------------------------------------------------------------------------- One convolution

bool wrong(const char* what, const char* how) {
  std::printf("%s: %s\n", what, how);
  return false;
}

// The three maps of a geometry, on numbers that it draws, and their truth.
struct Trial {
  Geometry g;
  Dtype dtype = Dtype::f32;
  Activation activation = Activation::identity;
  bool integers = true, specials = false, biased = false, packed = false;
  int threads = 1;

  // Where the next array lies: an allocation is seldom aligned to vectors, a page always, and the end of a page
  // sometimes.
  static Place place(Random& random) { return static_cast<Place>(random.between(0, 2)); }

  // False after a report of what is wrong.
  bool run(Random& random, Threads& pool) const {
    const Index images = g.stack * g.batch, c = g.channels;
    const Index kernels = g.stack * g.multiplier;
    const Index x_count = images * product(g.in) * c, y_count = kernels * g.batch * product(g.out) * c;
    const Index w_count = kernels * product(g.window) * c, b_count = biased ? kernels * c : 0;
    const auto x = draw(random, x_count), cotangent = draw(random, y_count);
    const auto w = draw(random, w_count), b = draw(random, b_count);
    const Buffer xs(dtype, x, place(random)), gs(dtype, cotangent, place(random));
    const Buffer ws(dtype, w, place(random)), bs(dtype, b, place(random));
    const Buffer y(dtype, y_count, place(random)), dx(dtype, x_count, place(random));
    const Buffer dw(dtype, w_count, place(random)), again(dtype, w_count, place(random));

    // Documents of any lengths, and numbers out of range.
    std::vector<std::int32_t> reach(packed ? images * g.out[2] : 0);
    for (std::size_t i = 0; i < reach.size(); ++i) {
      reach[i] =
          static_cast<std::int32_t>(i % g.out[2] == 0 || random.one_in(5) ? random.between(-2, 3) : reach[i - 1] + 1);
    }
    auto make_y = [&] {
      if (packed) return packed_forward(dtype, g, xs.data(), ws.data(), reach.data(), y.data(), pool);
      return forward(dtype, g, xs.data(), ws.data(), biased ? bs.data() : nullptr, activation, y.data(), pool);
    };
    auto make_dx = [&] {
      if (packed) return packed_input_grad(dtype, g, gs.data(), ws.data(), reach.data(), dx.data(), pool);
      return input_grad(dtype, g, gs.data(), ws.data(), dx.data(), pool);
    };
    auto make_dw = [&](const Buffer& to) {
      if (packed) return packed_kernel_grad(dtype, g, xs.data(), gs.data(), reach.data(), to.data(), pool);
      return kernel_grad(dtype, g, xs.data(), gs.data(), to.data(), pool);
    };
    pool.claimed = threads;
    bool ok = make_y() || wrong("y", "no memory");
    ok &= make_dx() || wrong("dx", "no memory");
    ok &= make_dw(dw) || wrong("dw", "no memory");
    pool.claimed = threads == 1 ? 2 : 1;
    ok &= make_dw(again) || wrong("dw", "no memory");
    if (!dw.same(again)) ok = wrong("dw", "other numbers with another number of threads");

    Sums true_y(y_count), true_dx(x_count), true_dw(w_count);
    for (Index i = 0; i < y_count && biased; ++i) {
      const double bias = b[i / (product(g.out) * g.batch * c) * c + i % c];
      true_y.value[i] = bias;
      true_y.magnitude[i] = std::fabs(bias);
    }
    for_each_product(g, reach, [&](Index i, Index k, Index o) {
      add_products(c, &x[i], &w[k], &true_y.value[o], &true_y.magnitude[o]);
      add_products(c, &cotangent[o], &w[k], &true_dx.value[i], &true_dx.magnitude[i]);
      add_products(c, &x[i], &cotangent[o], &true_dw.value[k], &true_dw.magnitude[k]);
    });
    for (double& value : true_y.value) {
      if (activation != Activation::identity && value < 0) value = 0;
      if (activation == Activation::relu6 && value > 6) value = 6;
    }
    const Index taps = product(g.window);
    return check("y", y, true_y, taps + 1) & check("dx", dx, true_dx, g.multiplier * taps) &
           check("dw", dw, true_dw, g.batch * product(g.out)) & ok;
  }

  std::string describe() const {
    const char* activations[] = {"identity", "relu", "relu6"};
    return std::string(format_of(dtype).name) + ", stack " + std::to_string(g.stack) + ", multiplier " +
           std::to_string(g.multiplier) + ", batch " + std::to_string(g.batch) + ", channels " +
           std::to_string(g.channels) + ", in " + text(g.in) + ", out " + text(g.out) + ", window " + text(g.window) +
           ", stride " + text(g.stride) + ", low " + text(g.low) + ", dilation " + text(g.dilation) + ", " +
           activations[static_cast<int>(activation)] + (biased ? ", bias" : "") + (packed ? ", packed" : "") +
           (integers ? ", integers" : ", reals") + (specials ? ", not finite" : "") + ", threads " +
           std::to_string(threads);
  }

 private:
  std::vector<double> draw(Random& random, Index count) const {
    std::vector<double> values(count);
    const Format& format = format_of(dtype);
    for (double& value : values) {
      value = integers ? static_cast<double>(random.between(-4, 4)) : rounded(2 * random.real(), format);
    }
    if (specials && count) {
      for (Index n = random.between(0, 3); n > 0; --n) {
        values[random.between(0, count - 1)] = random.one_in(2) ? NAN : random.one_in(2) ? INFINITY : -INFINITY;
      }
    }
    return values;
  }

  bool check(const char* what, const Buffer& actual, const Sums& expected, Index terms) const {
    if (!actual.guarded()) return wrong(what, "wrote outside its result");
    const Format &format = format_of(actual.dtype()), &sums = format_of(sums_of(dtype));
    // The reference sums in double, too, so for double the bound holds for both sides.
    const double unit = std::ldexp(dtype == Dtype::f64 ? 2 : 1, -sums.digits);
    for (Index i = 0; i < actual.count(); ++i) {
      const double got = actual[i], value = expected.value[i], want = rounded(value, format);
      bool ok;
      if (std::isnan(value)) {
        ok = std::isnan(got);
      } else if (integers || !std::isfinite(want) || !std::isfinite(got)) {
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
};

// The trial of one iteration: for one of the loops, from all that is accepted, or what needs large arrays.
Trial draw_trial(Random& random, const LoopEntry& entry) {
  Trial trial;
  const bool large = random.one_in(4000), conflicting = random.one_in(100), certain = !random.one_in(3);
  trial.g = large         ? draw_large_geometry(random)
            : conflicting ? draw_conflicting_geometry(random)
            : certain     ? draw_geometry_for(random, entry)
                          : draw_geometry(random, draw_budget(random));
  trial.dtype = large ? Dtype::f32 : certain ? entry.dtype : static_cast<Dtype>(random.between(0, 3));
  trial.integers = random.one_in(2);
  trial.specials = random.one_in(8);
  trial.activation = static_cast<Activation>(random.between(0, 2));
  trial.biased = random.one_in(2);
  if (certain && entry.use == LoopEntry::rows) {
    for (int axis = 0; axis < 2; ++axis) {
      trial.g.in[axis] = trial.g.out[axis] = trial.g.window[axis] = trial.g.stride[axis] = trial.g.dilation[axis] = 1;
      trial.g.low[axis] = 0;
    }
    trial.g.stride[2] = 1;
    trial.packed = true;
    trial.biased = false;
    trial.activation = Activation::identity;
    trial.g.out[2] *= random.pick({1, 1, 40});  // for several chunks
    trial.g.in[2] = std::max<Index>(trial.g.in[2] + trial.g.out[2] - random.between(0, 9), 1);
    trial.g.window[2] = random.pick({trial.g.window[2], 1, 2, 3, 4});
  }
  trial.threads =
      static_cast<int>(random.pick({1, 2, 2, 3, 4, 8, random.one_in(8) ? 24 : 2, random.one_in(8) ? 200 : 2}));
  return trial;
}

// In half of all iterations the machine's memories are small: every result is larger than the caches then, or than what
// the allocator keeps.
MemorySizes draw_memory_sizes(Random& random, const MemorySizes& real) {
  if (random.one_in(2)) return real;
  return {random.pick({0, real.last_level_cache_bytes}), random.pick({0, 4096}),
          random.pick({0, Index{1} << 16, real.reused_by_malloc_bytes})};
}

int fuzz(std::uint64_t iterations, std::uint64_t seed, std::uint64_t first, const char* program) {
  Threads pool(kWaitingWorkers + 2);  // more than may wait for the next call
  const std::vector<LoopEntry> loops = all_loops();
  const MemorySizes real = memory_sizes();
  int failures = 0;
  for (std::uint64_t i = first; i < first + iterations && failures < 10; ++i) {
    Random random(seed, i);
    const Trial trial = draw_trial(random, loops[i % loops.size()]);  // each in turn
    memory_sizes() = draw_memory_sizes(random, real);
    if (!trial.run(random, pool)) {
      std::printf("  in %s\n  again: DEPTHWISE_JAX_ISA=%s %s 1 %llu %llu\n", trial.describe().c_str(),
                  instruction_set(), program, static_cast<unsigned long long>(seed),
                  static_cast<unsigned long long>(i));
      ++failures;
    }
  }
  std::printf("%s: %llu iterations from seed %llu, %s\n", instruction_set(),
              static_cast<unsigned long long>(iterations), static_cast<unsigned long long>(seed),
              failures ? "failed" : "no failure");
  // Fewer iterations need not meet all loops.
  const bool all = iterations < 10000 || runs.report_idle() == 0;
  return failures || !all ? 1 : 0;
}

// ---------------------------------------------------------------------------------------------------- Sweep

// Windows of 1 to 9 taps, strides of 1 to 130 and dilations of 1 to 3 along the last axis; as many channels as do not
// fill a vector, fill one, and more.
int sweep() {
  Threads pool(1);
  Index trials = 0;
  for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
    const Index lanes = loops_of(dtype).lanes;
    for (Index taps = 1; taps <= 9; ++taps) {
      for (Index stride = 1; stride <= 130; ++stride) {
        for (Index dilation = 1; dilation <= 3; ++dilation) {
          for (const Index channels : {lanes - 1, lanes, lanes + 1}) {
            Random random(1, ++trials);
            Trial trial;
            trial.dtype = dtype;
            const Index span = (taps - 1) * dilation + 1, low = random.between(0, span - 1);
            const Index outputs = random.between(2, 4), reach = (outputs - 1) * stride + span - low;
            const Index in = std::max<Index>(reach - random.between(0, span - 1), 1);
            trial.g = {1,
                       1,
                       1,
                       channels,
                       {1, 1, in},
                       {1, 1, outputs},
                       {1, 1, taps},
                       {1, 1, stride},
                       {0, 0, low},
                       {1, 1, dilation}};
            if (!trial.run(random, pool)) {
              std::printf("  in %s\n", trial.describe().c_str());
              return 1;
            }
          }
        }
      }
    }
  }
  std::printf("%s: %td windows and strides, no failure\n", instruction_set(), trials);
  return 0;
}

// ---------------------------------------------------------------------------------------------------- No memory

// Each allocation of each map fails in turn, alone or with all that follow: the map says so or does without, and is
// right when it is called again.
int failures() {
  Threads pool(3);
  const Geometry geometries[] = {
      {1, 1, 2, 40, {1, 9, 16}, {1, 9, 16}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {1, 1, 1}},
      {1, 2, 1, 33, {3, 9, 30}, {3, 5, 15}, {1, 3, 9}, {1, 2, 2}, {0, 1, 4}, {1, 1, 1}},  // phases, staged narrow
                                                                                          // floats
      {2, 1, 1, 1024, {1, 4, 7}, {1, 4, 7}, {1, 5, 5}, {1, 1, 1}, {0, 2, 2}, {1, 1, 1}},  // packed
      {1, 1, 1, 24, {1, 1, 2000}, {1, 1, 2000}, {1, 1, 4}, {1, 1, 1}, {0, 0, 3}, {1, 1, 1}},
      {1, 1, 1, 8, {1, 6, 6000}, {1, 6, 6000}, {1, 3, 9}, {1, 1, 1}, {0, 1, 4}, {1, 1, 1}},  // more than a thread keeps
      {1, 1, 1, 1700, {1, 2, 3}, {1, 2, 3}, {1, 13, 13}, {1, 1, 1}, {0, 6, 6}, {1, 1, 1}}};
  Index trials = 0, refused = 0;
  for (const Geometry& g : geometries) {
    const Index x_count = g.stack * g.batch * product(g.in) * g.channels;
    const Index w_count = g.stack * g.multiplier * product(g.window) * g.channels;
    const Index y_count = g.stack * g.multiplier * g.batch * product(g.out) * g.channels;
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16}) {
      const std::vector<double> ones(std::max({x_count, w_count, y_count}), 1.0);
      const Buffer x(dtype, ones, Place::behind_guard), w(dtype, ones, Place::behind_guard),
          cotangent(dtype, ones, Place::behind_guard);
      for (int map = 0; map < 3; ++map) {
        const Index count = map == 0 ? y_count : map == 1 ? x_count : w_count;
        const Buffer expected(dtype, count, Place::behind_guard), result(dtype, count, Place::behind_guard);
        auto call = [&](const Buffer& to) {
          if (map == 0) return forward(dtype, g, x.data(), w.data(), nullptr, Activation::identity, to.data(), pool);
          if (map == 1) return input_grad(dtype, g, cotangent.data(), w.data(), to.data(), pool);
          return kernel_grad(dtype, g, x.data(), cotangent.data(), to.data(), pool);
        };
        for (const int threads : {1, 4}) {
          pool.claimed = threads;
          if (!call(expected)) return wrong("a map", "no memory"), 1;
          for (Index first = 1;; ++first) {
            bool reached = false;
            for (const Index last : {first, std::numeric_limits<Index>::max()}) {
              allocations.fail(first, last);
              const bool done = call(result);
              pool.idle();  // late tasks allocate nothing, and end before the next failure is prepared
              reached |= allocations.made >= first;
              allocations.fail(0, 0);
              ++trials;
              refused += !done;
              if (!result.guarded()) return wrong("a map", "wrote outside its result"), 1;
              if (done && !result.same(expected))
                return wrong("a map", "wrong although it said that there was memory"), 1;
              if (!call(result) || !result.same(expected))
                return wrong("a map", "wrong after a call without memory"), 1;
            }
            if (!reached) break;
          }
        }
      }
    }
  }
  std::printf("%s: %td calls without memory, %td said so, no failure\n", instruction_set(), trials, refused);
  return refused ? 0 : 1;
}

// ---------------------------------------------------------------------------------------------------- Large arrays

// A sparse array of bfloat16: zeros in no memory; or, to be written, pages that stand for many, but for the first and
// the last.
class Sparse {
 public:
  explicit Sparse(Index count) : bytes_((2 * count + kChunk - 1) / kChunk * kChunk) {
    void* const mapped =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    data_ = static_cast<char*>(mapped);
  }
  Sparse(const Sparse&) = delete;
  ~Sparse() { munmap(data_, bytes_); }
  void share_pages() {
    const int file = memfd_create("shared", 0);
    if (file < 0 || ftruncate(file, kChunk)) std::abort();
    for (Index at = kChunk; at + kChunk < bytes_; at += kChunk) {
      if (mmap(data_ + at, kChunk, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) std::abort();
    }
    close(file);
  }
  char* data() const { return data_; }
  void set(Index i, double value) { write(data_ + 2 * i, Dtype::bf16, value); }
  double operator[](Index i) const { return read(data_ + 2 * i, Dtype::bf16); }

 private:
  static constexpr Index kChunk = Index{16} << 20;
  Index bytes_;
  char* data_;
};

// Maps of more than 2^31 elements whose last positions alone hold numbers: under two taps, and a row with a stride that
// reads it in few places.
int large() {
  Threads pool(1);
  pool.claimed = 2;
  auto expect = [](const char* what, double got, double want) {
    if (got != want) std::printf("%s: got %.17g, expected %.17g\n", what, got, want);
    return got == want;
  };
  bool ok = true;
  {
    const Index rows = 16389, columns = 8197, channels = 16, count = rows * columns * channels, last = count - channels;
    const Geometry g{1,         1,         1,         channels, {1, rows, columns}, {1, rows, columns},
                     {1, 2, 1}, {1, 1, 1}, {0, 1, 0}, {1, 1, 1}};
    Sparse x(count), y(count);
    y.share_pages();
    x.set(last + 5, 3);
    x.set(last - columns * channels + 5, 4);  // the row above
    std::vector<double> taps(2 * channels);
    taps[5] = 10;
    taps[channels + 5] = 1;
    const Buffer w(Dtype::bf16, taps, Place::before_guard), dw(Dtype::bf16, 2 * channels, Place::before_guard);
    ok &= forward(Dtype::bf16, g, x.data(), w.data(), nullptr, Activation::identity, y.data(), pool);
    ok &= expect("large y", y[last + 5], 10 * 4 + 3) && expect("large y", y[last - channels + 5], 0);
    ok &= input_grad(Dtype::bf16, g, x.data(), w.data(), y.data(), pool);
    ok &= expect("large dx", y[last + 5], 3) && expect("large dx", y[last - columns * channels + 5], 10 * 3 + 4);
    ok &= kernel_grad(Dtype::bf16, g, x.data(), x.data(), dw.data(), pool);
    ok &= expect("large dw", dw[5], 4 * 3) && expect("large dw", dw[channels + 5], 3 * 3 + 4 * 4);
  }
  {
    const Index in = kLimit, stride = Index{1} << 29, channels = 3;
    const Geometry g{
        1, 1, 1, channels, {1, 1, in}, {1, 1, 4}, {1, 1, 2}, {1, 1, stride}, {0, 0, 0}, {1, 1, stride - 1}};
    Sparse x(in * channels);
    for (Index i = 0; i < 4; ++i) x.set(((i + 1) * stride - 1) * channels + 2, static_cast<double>(i + 1));
    const std::vector<double> ones(4 * channels, 1);
    const Buffer w(Dtype::bf16, std::vector<double>(2 * channels, 1), Place::before_guard);
    const Buffer y(Dtype::bf16, 4 * channels, Place::before_guard), dw(Dtype::bf16, 2 * channels, Place::before_guard);
    const Buffer cotangent(Dtype::bf16, ones, Place::before_guard);
    ok &= forward(Dtype::bf16, g, x.data(), w.data(), nullptr, Activation::identity, y.data(), pool);
    for (Index i = 0; i < 4; ++i) ok &= expect("strided y", y[i * channels + 2], static_cast<double>(i + 1));
    ok &= kernel_grad(Dtype::bf16, g, x.data(), cotangent.data(), dw.data(), pool);
    ok &= expect("strided dw", dw[channels + 2], 10) && expect("strided dw", dw[2], 0);
  }
  std::printf("%s: arrays of more than 2^31 elements, %s\n", instruction_set(), ok ? "no failure" : "failed");
  return ok ? 0 : 1;
}

}  // namespace

namespace depthwise {
void count_run(const void* loop) { runs.add(loop); }
}  // namespace depthwise

// All allocations of this program: some can be made to fail.
void* allocate(std::size_t bytes, std::size_t alignment) {
  if (allocations.fails()) return nullptr;
  return std::aligned_alloc(alignment, (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment);
}
void* allocate_or_throw(std::size_t bytes, std::size_t alignment) {
  void* const p = allocate(bytes, alignment);
  if (!p) throw std::bad_alloc();
  return p;
}
constexpr std::size_t kAlignment = alignof(std::max_align_t);
void* operator new(std::size_t bytes) { return allocate_or_throw(bytes, kAlignment); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return allocate(bytes, kAlignment); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate_or_throw(bytes, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

int main(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    std::fprintf(stderr, "usage: %s ITERATIONS [SEED [FIRST]] | sweep | failures | large\n", argv[0]);
    return 2;
  }
  if (!instruction_set()) {
    std::printf("%s: not on this machine, passed over\n", std::getenv("DEPTHWISE_JAX_ISA"));
    return 0;
  }
  const std::map<std::string, int (*)()> modes = {{"sweep", sweep}, {"failures", failures}, {"large", large}};
  if (const auto mode = modes.find(argv[1]); mode != modes.end()) return mode->second();
  const auto number = [&](int i, std::uint64_t otherwise) {
    return argc > i ? std::strtoull(argv[i], nullptr, 0) : otherwise;
  };
  return fuzz(number(1, 0), number(2, 1), number(3, 0), argv[0]);
}
