// The driver: how a convolution is cut into blocks for the threads, and blocks into the tiles of kernels.cc.
#include "depthwise.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace depthwise {
namespace {

Index ceil_div(Index a, Index b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

Index size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }  // bytes
Index sum_size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

// ---------------------------------------------------------------------------------------------------- Threads

// The blocks of one call. Each thread begins with a part of its own, the same in every call, so that a layer finds in its
// caches what the one before it left there; who is done takes what the others have not begun. Backwards, each part is taken
// from its end.
class Job {
 public:
  // `block`, called with a block and with a number of the thread's own below `threads`, refers to a function that is alive
  // while a block is left. It is false, or throws std::bad_alloc, if there is no memory.
  Job(Index blocks, Index threads, bool backwards, std::function<bool(Index, Index)> block)
      : blocks_(blocks), threads_(threads), backwards_(backwards), block_(std::move(block)), parts_(new Part[threads]) {
    for (Index t = 0; t < threads; ++t) {
      parts_[t].next = parts_[t].begin = t * blocks / threads;
      parts_[t].end = (t + 1) * blocks / threads;
    }
  }
  // Takes blocks until none is left; `own` is the part to begin with.
  void work(Index own) {
    Index finished = 0;
    for (Index t = 0; t < threads_; ++t) {
      Part& part = parts_[(own + t) % threads_];
      for (Index i; (i = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end; ++finished) {
        if (!run(backwards_ ? part.begin + part.end - 1 - i : i, own)) enough_.store(false, std::memory_order_relaxed);
      }
    }
    if (finished) done_.fetch_add(finished, std::memory_order_acq_rel);
  }
  // The same for a thread that comes to help: each has a part of its own.
  void help() { work(1 + helpers_.fetch_add(1, std::memory_order_relaxed)); }
  bool done() const { return done_.load(std::memory_order_acquire) >= blocks_; }
  // Once it is done: whether there was memory for all blocks.
  bool enough() const { return enough_.load(std::memory_order_relaxed); }

 private:
  // Nothing is thrown into a thread that is not ours.
  bool run(Index block, Index own) const {
    try {
      return block_(block, own);
    } catch (const std::bad_alloc&) {
      return false;
    }
  }

  struct alignas(64) Part {
    std::atomic<Index> next;
    Index begin, end;
  };
  std::atomic<Index> helpers_{0}, done_{0};
  const Index blocks_, threads_;
  const bool backwards_;
  const std::function<bool(Index, Index)> block_;
  std::unique_ptr<Part[]> parts_;
  std::atomic<bool> enough_{true};
};

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Where a thread of the pool that has done its part of a job stays for a moment, so that a call that follows at once finds
// it awake: to wake one through the pool takes as long as a small layer. Where mostly none follows, as when XLA's own
// operations stand between and need the thread, it goes back at once from then on, and is tried again once in a while. A row
// of calls makes up for the wait at its end.
class Seat {
 public:
  // Waits on this thread for jobs while `job` is unfinished and a moment longer, and works on those that come.
  static void wait(std::shared_ptr<Job> job) {
    for (Seat& seat : seats_) {
      int empty = kEmpty;
      if (!seat.state_.compare_exchange_strong(empty, kTaken)) continue;
      if (seat.patience_ >= 0) {
        seat.sit(std::move(job));
      } else {
        ++seat.patience_;
      }
      seat.state_.store(kEmpty);
      return;
    }
  }
  // Hands a job to a thread that waits; false if none does.
  static bool call(const std::shared_ptr<Job>& job) {
    for (Seat& seat : seats_) {
      int waiting = kWaiting;
      if (seat.state_.load(std::memory_order_relaxed) == kWaiting && seat.state_.compare_exchange_strong(waiting, kTaken)) {
        seat.job_ = job;
        seat.state_.store(kCalled, std::memory_order_release);
        return true;
      }
    }
    return false;
  }

 private:
  void sit(std::shared_ptr<Job> job) {
    state_.store(kWaiting, std::memory_order_release);
    for (;;) {
      std::chrono::steady_clock::time_point end{};
      for (;;) {
        for (int i = 0; i < 32 && state_.load(std::memory_order_relaxed) == kWaiting; ++i) relax();
        if (state_.load(std::memory_order_relaxed) != kWaiting) break;
        std::this_thread::yield();  // to whoever has something to do
        if (!job->done()) continue;
        const auto now = std::chrono::steady_clock::now();
        if (end == std::chrono::steady_clock::time_point{}) end = now + kMoment;
        int waiting = kWaiting;
        if (now >= end && state_.compare_exchange_strong(waiting, kTaken)) {
          patience_ = patience_ >= kLoss ? patience_ - kLoss : -kPause;
          return;
        }
      }
      while (state_.load(std::memory_order_acquire) != kCalled) relax();
      job = std::move(job_);
      patience_ = std::min(patience_ + 1, kMost);
      state_.store(kWaiting, std::memory_order_release);  // the next one may come while this thread works
      job->help();
    }
  }

  // kTaken: by whoever changes what is in it.
  enum State { kEmpty, kWaiting, kTaken, kCalled };
  static constexpr std::chrono::microseconds kMoment{100};
  // Each call that comes adds one to the patience, up to a bound; what one that does not come takes from it; and how many
  // jobs pass without a wait once it is used up.
  static constexpr int kMost = 8, kLoss = 4, kPause = 16;
  static Seat seats_[16];
  alignas(64) std::atomic<int> state_{kEmpty};
  int patience_ = 0;
  std::shared_ptr<Job> job_;
};
Seat Seat::seats_[16];

// Whether a call takes its blocks backwards: every other one, to begin with what the one before it touched last and the
// caches still hold. Of arrays larger than the caches, a second pass in the same direction would find nothing.
bool turn() {
  static std::atomic<unsigned> calls{0};
  return calls.fetch_add(1, std::memory_order_relaxed) % 2;
}

// Calls f(i, thread) for all 0 <= i < n, on this thread and on those of the pool that come in time; false if any of them was.
// This thread takes blocks like any other and only waits for blocks that a thread is working on, so that it never waits for the
// pool to be free. Throws std::bad_alloc before the first block or not at all.
template <class F>
bool parallel_for(Pool& pool, Index n, bool backwards, const F& f) {
  const Index threads = std::min<Index>(pool.threads(), n);
  if (threads <= 1) {
    bool enough = true;
    for (Index i = 0; i < n && enough; ++i) enough = f(backwards ? n - 1 - i : i, 0);
    return enough;
  }
  auto job = std::make_shared<Job>(n, threads, backwards, std::cref(f));
  for (Index t = 1; t < threads; ++t) {
    if (Seat::call(job)) continue;
    try {
      pool.schedule([job] {
        job->help();
        Seat::wait(job);
      });
    } catch (const std::bad_alloc&) {
      break;  // those that were called do all
    }
  }
  job->work(0);
  for (int spins = 0; !job->done(); ++spins) {
    if (spins > 1000) {
      std::this_thread::yield();
    } else {
      relax();
    }
  }
  return job->enough();
}

// From about this many multiply-adds of vectors on, a second thread is worth waking.
constexpr Index kBlockWork = 12000;

// Into how many blocks, up to `most`, it is worth to cut so many outputs, each of so many vectors of channels and taps.
Index blocks_worth(Index outputs, Index vectors, Index taps, Index most) {
  const double work = static_cast<double>(outputs) * static_cast<double>(vectors) * static_cast<double>(taps);
  return static_cast<Index>(std::clamp(work / kBlockWork, 1.0, static_cast<double>(most)));
}

// ---------------------------------------------------------------------------------------------------- Geometry

// A correlation: forward, or the transpose in x, which is one too once strides are split into phases.
struct Problem {
  const Geometry& g;
  bool transposed;
  const Index* in;   // spatial sizes of what is read
  const Index* out;  // and of what is written
};

// Outputs along an axis that share their taps: output j, written at first + j*pitch, reads position
// `column` + j*stride + k*step through tap `tap` + k*tap_step, k < taps, if it lies inside the input.
struct Phase {
  Index taps, tap, tap_step;
  Index column, step, stride;
  Index first, pitch, count;
};

// The inverse of `a` modulo `n`, which share no factor; 0 modulo 1.
Index inverse(Index a, Index n) {
  Index factor = 0, next = 1, rest = n, divisor = a % n;
  while (divisor) {  // factor*a = rest and next*a = divisor, modulo n
    const Index quotient = rest / divisor;
    factor = std::exchange(next, factor - quotient * next);
    rest = std::exchange(divisor, rest - quotient * divisor);
  }
  return factor < 0 ? factor + n : factor;
}

// One phase forward. Transposed, input i = s*q + r - low is reached by the taps t with t*d = r modulo s, from output
// q + (r - t*d)/s: a phase for each r, whose taps are s/gcd(s, d) apart and are taken backwards to ascend in outputs.
std::vector<Phase> phases(const Problem& p, int axis) {
  const Geometry& g = p.g;
  const Index s = g.stride[axis], d = g.dilation[axis], low = g.low[axis], window = g.window[axis];
  if (!p.transposed) return {{window, 0, 1, -low, d, s, 0, 1, g.out[axis]}};
  const Index common = std::gcd(s, d), apart = s / common, step = d / common;
  const Index tap_of_common = inverse(step, apart);  // the first tap t with t*d = common modulo s
  // Strides and distances that lead nowhere, from a single output or tap, do not enter the products with an array's pitch.
  const Index pitch = std::min(s, g.in[axis]);
  std::vector<Phase> result;
  result.reserve(pitch);
  for (Index first = 0; first < pitch; ++first) {
    const Index r = (first + low) % s, q = (first + low) / s;
    const Index count = (g.in[axis] - 1 - first) / s + 1;
    const Index tap = r / common * tap_of_common % apart;  // the product is below s*s
    if (r % common || tap >= window) {
      result.push_back({0, 0, 0, 0, 1, 1, first, pitch, count});
      continue;
    }
    const Index taps = (window - 1 - tap) / apart + 1;
    const Index column = q + (r - tap * d) / s - (taps - 1) * step;
    result.push_back({taps, tap + (taps - 1) * apart, taps > 1 ? -apart : 0, column, step, 1, first, pitch, count});
  }
  return result;
}

Index most_taps(const std::vector<Phase>& phases) {
  Index most = 0;
  for (const Phase& phase : phases) most = std::max(most, phase.taps);
  return most;
}

// ---------------------------------------------------------------------------------------------------- Tiles

// Relative time per output of a tile with so many sums in flight: fewer leave the multipliers idle and read more for each.
double overhead(int sums) { return sums >= 14 ? 1.0 : sums >= 7 ? 1.7 : sums >= 4 ? 2.0 : sums >= 3 ? 2.5 : 4.0; }

// The shapes to choose from for a phase of the last axis, for at least as many channels as a vector has; null if none fits.
const TileShape* shapes_for(const TileKernels& kernels, const Phase& phase, Index columns) {
  if (phase.step != 1 && phase.taps != 1) return nullptr;
  if (phase.column + phase.taps - 1 >= 0 && phase.column + (phase.count - 1) * phase.stride < columns) {
    if (const TileShape* shapes = find_tiles(kernels.certain, phase.taps, phase.stride)) return shapes;
  }
  return phase.taps >= 6 && phase.stride == 1 && kernels.wide->kernel ? kernels.wide : nullptr;
}

// The best of `shapes` of a height for `count` outputs in each of `rows` rows, and its cost; null if there is none. Tiles
// that would pass the end are moved back over their neighbours, so that no tile is wider or higher than all there is.
const TileShape* choose_tile(const TileShape* shapes, Index count, Index rows, int height, double& cost) {
  const TileShape* best = nullptr;
  if (height > rows) return best;
  for (; shapes->kernel; ++shapes) {
    if (shapes->height != height || (shapes->width > count && shapes->width > 1)) continue;
    const double found = static_cast<double>(ceil_div(count, shapes->width) * shapes->width) *
                         static_cast<double>(ceil_div(rows, height) * height) * overhead(shapes->width * height);
    if (!best || found < cost) best = shapes, cost = found;
  }
  return best;
}

// Bytes of the last cache that this processor's cores share. (sysconf adds up those of the whole socket on some.)
Index last_level_cache() {
  long kilobytes = 0;
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
    std::fclose(file);
  }
  return Index{kilobytes > 0 ? kilobytes : 32 << 10} << 10;
}

}  // namespace

Memories& memories() {
  static Memories result{last_level_cache(), Index{8} << 20, Index{32} << 20};
  return result;
}

namespace {

// A result beyond the allocator's threshold is new memory at every call: larger pages make its first touch cheap.
void advise(void* p, Index bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  if (bytes <= memories().allocator) return;
  const auto begin = (reinterpret_cast<std::uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(p) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

// The rows or columns that outputs of several phases read, of so many that there are.
struct Reach {
  Index first, end = 0;
  const Index all;
  explicit Reach(Index n) : first(n), all(n) {}
  void add(const Phase& phase, Index begin, Index stop) {
    if (begin >= stop || !phase.taps) return;
    first = std::min(first, std::max<Index>(phase.column + begin * phase.stride, 0));
    end = std::max(end, std::min(phase.column + (stop - 1) * phase.stride + (phase.taps - 1) * phase.step + 1, all));
  }
  Index count() const { return std::max<Index>(end - first, 0); }
};

// Memory that begins with a cache's line.
class Memory {
 public:
  // At least so many bytes, which stay until the next call, or null if there are not so many.
  char* get(Index bytes) {
    if (!memory_ || size_ < bytes) {
      memory_.reset();  // first, for both may be too much
      memory_.reset(static_cast<char*>(::operator new(bytes, kLine, std::nothrow)));
      size_ = memory_ ? bytes : 0;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(char* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<char, Free> memory_;
  Index size_ = 0;
};

// The bytes that a thread keeps for its next call, of each kind: new memory would have to be made first. What is more belongs to
// the call and is given back with it.
constexpr Index kKeptBytes = Index{1} << 20;

char* scratch(Index bytes, Memory& kept, Memory& of_call) { return (bytes <= kKeptBytes ? kept : of_call).get(bytes); }

// How a block of rows, of any image and any channels, is cut into tiles.
struct Plan {
  struct Plane {
    Index position, tap;
  };
  // The tiles of a phase of the last axis, left to right.
  struct Run {
    const TileShape* shape;
    Index begin, end, next;
  };
  // The rows that one row of tiles covers, and what is read for them.
  struct Band {
    const Phase* phase;
    Index row;
    int height;
    std::size_t first_run, first_tap_row, tap_rows;
  };
  Index cut = -1, y = 0;  // y: where the block's plane begins
  std::vector<Plane> planes;
  Index first_row = 0, rows = 0, first_column = 0, columns = 0;  // that are read of each plane
  std::vector<Run> runs;  // one for each phase of the last axis, for each phase of the one before
  std::vector<Band> bands;
  std::vector<TapRow> tap_rows;
  Index chunk = 0, staged = 0;  // channels staged at a time, and bytes
};

// What a thread stages at a time, unless one vector of channels is more.
constexpr Index kStagedBytes = Index{128} << 10;

// Whether columns that are so many bytes apart lie in so few of an L1 cache's sets, of 8 lines each, that those under a window
// of so many taps push each other out many times.
bool crowded(Index column, Index taps) {
  constexpr Index kLine = 64, kSets = 64;
  return column % kLine == 0 && taps >= 25 * (kSets / std::gcd(column / kLine, kSets));
}

// Whether the input is staged: converted, or only packed, once ahead of the tiles. `across` and `each` are the taps of an
// output along the last axis, which has so many columns, and in all.
bool is_staged(const Kernels& kernels, Index across, Index each, Index columns, Index column_bytes) {
  if (!kernels.stage) return false;
  // Narrow floats under windows that have no tiles of their own.
  if (kernels.widen && (across >= 8 || each >= 64)) return true;
  // Windows that reach over most of a row read it again for most tiles.
  return across >= 5 && 2 * across > columns && crowded(column_bytes, each);
}

Kernels kernels_for(Dtype dtype, Index channels);

// What a thread has made for one block and needs for the next.
struct Latest {
  Plan plan;
  // The kernel, or the first of those that are summed, and its bias, in the type of the sums: of narrow floats each thread has
  // converted its own, which is in its caches.
  Index kernel = -1;
  const char *w = nullptr, *bias = nullptr;
  // What of them, and of the staged input, is more than a thread keeps.
  Memory kernel_memory, staged_memory;
};

// A correlation cut into blocks, which any threads may compute: an image's rows, a few at a time; if there is one row only,
// columns; and channels if that is not enough.
class Correlation {
 public:
  Correlation(const Problem& p, const Kernels& kernels, Dtype dtype, const void* x, const void* w, const void* bias,
              Activation activation, void* y, int threads);
  Index blocks() const { return images * cuts * channel_blocks; }
  // `latest` is of the block that the thread computed before, or empty. False if there is no memory, and nothing is done.
  bool block(Index index, Latest& latest) const;

 private:
  bool find_shapes(const TileKernels& tiles);
  Plan plan(Index cut) const;
  bool load_kernel(Index kernel, Latest& latest) const;

  const Problem p;
  const Kernels kernels;
  const char *const x, *const w, *const bias;
  const Activation activation;
  char* const y;
  const Index size, sum_size, channels;
  const std::vector<Phase> depths, heights, columns;
  // What is written and how much is summed for it: transposed, each image is a sum over the multiplier.
  const Index images, summed;
  const Index taps;
  const Index x_row, x_plane, x_image;  // bytes
  const Index y_row, y_plane, y_image;
  const Index w_row, w_plane;
  // The shapes for each phase of the last axis, and whether the input is staged for them.
  std::vector<const TileShape*> shapes;
  bool staged;
  // How the images are cut is the same for all of them, and for all channels.
  Index rows, block_columns, block_channels;
  Index row_blocks, column_blocks, channel_blocks, cuts;
  bool stream, ahead;
};

Correlation::Correlation(const Problem& problem, const Kernels& kernels_, Dtype dtype, const void* x_, const void* w_,
                         const void* bias_, Activation activation_, void* y_, int threads)
    : p(problem),
      kernels(kernels_),
      x(static_cast<const char*>(x_)),
      w(static_cast<const char*>(w_)),
      bias(static_cast<const char*>(bias_)),
      activation(activation_),
      y(static_cast<char*>(y_)),
      size(size_of(dtype)),
      sum_size(sum_size_of(dtype)),
      channels(p.g.channels),
      depths(phases(p, 0)),
      heights(phases(p, 1)),
      columns(phases(p, 2)),
      images(p.g.stack * p.g.batch * (p.transposed ? 1 : p.g.multiplier)),
      summed(p.transposed ? p.g.multiplier : 1),
      taps(p.g.window[0] * p.g.window[1] * p.g.window[2]),
      x_row(p.in[2] * channels * size),
      x_plane(p.in[1] * x_row),
      x_image(p.in[0] * x_plane),
      y_row(p.out[2] * channels * size),
      y_plane(p.out[1] * y_row),
      y_image(p.out[0] * y_plane),
      w_row(p.g.window[2] * channels * sum_size),
      w_plane(p.g.window[1] * w_row),
      shapes(columns.size(), kernels.general) {
  const Geometry& g = p.g;
  // Transposed, strides leave each output a part of the taps.
  const Index across = most_taps(columns), each = most_taps(depths) * most_taps(heights) * across;
  staged = channels >= kernels.lanes && is_staged(kernels, across, each, p.in[2], channels * size) && find_shapes(kernels.staged);
  if (!staged && channels >= kernels.lanes) find_shapes(kernels.direct);

  const Index vectors = ceil_div(channels, kernels.lanes);
  const Index outputs = g.stack * g.multiplier * g.batch * g.out[0] * g.out[1] * g.out[2];
  const Index wanted = blocks_worth(outputs, vectors, taps, 4 * threads);
  const Index planes = images * p.out[0];
  rows = std::min<Index>(p.out[1], 14 * static_cast<Index>(heights.size()));
  auto halve = [&](Index least) {
    while (rows > least && planes * ceil_div(p.out[1], rows) < wanted) rows = ceil_div(rows, 2);
  };
  // Rows at the edge of a block are staged twice: fewer channels are better then.
  if (!staged || vectors <= 4) halve(7 * static_cast<Index>(heights.size()));
  block_columns = p.out[2];
  if (p.out[1] == 1 && columns.size() == 1) {
    while (block_columns > 112 && planes * ceil_div(p.out[2], block_columns) < wanted) {
      block_columns = ceil_div(block_columns, 2);
    }
    block_columns = ceil_div(block_columns, 14) * 14;
    if (staged) block_columns = std::min<Index>(block_columns, 1120);  // what is staged of a long row has a bound too
  }
  column_blocks = ceil_div(p.out[2], block_columns);
  block_channels = channels;
  if (vectors > 4 && planes * ceil_div(p.out[1], rows) * column_blocks < wanted) block_channels = 4 * kernels.lanes;
  // The last block takes the rest, so that each has whole vectors.
  channel_blocks = std::max<Index>(channels / block_channels, 1);
  if (channel_blocks == 1) halve(2);
  row_blocks = ceil_div(p.out[1], rows);
  cuts = column_blocks * row_blocks * p.out[0];

  const Index y_bytes = images * y_image, x_bytes = g.stack * g.batch * (p.transposed ? g.multiplier : 1) * x_image;
  // Past the caches whole vectors, and of narrow floats none, which are half a line.
  const Memories& sizes = memories();
  stream = y_bytes >= sizes.streamed && y_bytes <= sizes.allocator && x_bytes + y_bytes > sizes.last_level_cache / 2 &&
           !kernels.widen && channels % kernels.lanes == 0 && reinterpret_cast<std::uintptr_t>(y) % (kernels.lanes * size) == 0;
  // Of so much to read, the last cache cannot have kept all.
  ahead = x_bytes > sizes.last_level_cache / 3;
}

// Takes for each phase of the last axis the shapes that there are for it, else the general ones; false if any was missing.
bool Correlation::find_shapes(const TileKernels& tiles) {
  bool all = true;
  for (std::size_t i = 0; i < columns.size(); ++i) {
    const TileShape* found = columns[i].taps ? shapes_for(tiles, columns[i], p.in[2]) : kernels.general;
    shapes[i] = found ? found : kernels.general;
    all &= found != nullptr;
  }
  return all;
}

Plan Correlation::plan(Index cut) const {
  const Geometry& g = p.g;
  Plan plan;
  plan.cut = cut;
  const Index column_begin = cut % column_blocks * block_columns;
  const Index row_begin = cut / column_blocks % row_blocks * rows, row_end = std::min(row_begin + rows, p.out[1]);
  const Index depth = cut / column_blocks / row_blocks;
  const Phase& plane = depths[depth % depths.size()];
  plan.y = depth * y_plane;
  for (Index a = 0; a < plane.taps; ++a) {
    const Index position = plane.column + depth / static_cast<Index>(depths.size()) * plane.stride + a * plane.step;
    if (position >= 0 && position < p.in[0]) plan.planes.push_back({position, plane.tap + a * plane.tap_step});
  }
  // The outputs of a phase that fall into the block begin with this one.
  auto first_of = [](const Phase& phase, Index row) { return std::max<Index>(ceil_div(row - phase.first, phase.pitch), 0); };
  auto count_of = [&](const Phase& phase) { return std::min(column_begin + block_columns, phase.count) - column_begin; };
  Reach rows_read(p.in[1]), columns_read(p.in[2]);
  for (const Phase& phase : heights) {
    rows_read.add(phase, first_of(phase, row_begin), std::min(first_of(phase, row_end), phase.count));
  }
  for (const Phase& phase : columns) columns_read.add(phase, column_begin, column_begin + count_of(phase));
  plan.first_row = rows_read.first;
  plan.rows = rows_read.count();
  plan.first_column = staged ? columns_read.first : 0;
  plan.columns = staged ? columns_read.count() : p.in[2];
  plan.chunk = block_channels;
  Index read_row = x_row, read_plane = x_plane, read_image = g.batch * x_image;
  if (staged) {
    // So many channels at a time that what is staged stays in a near cache.
    const Index positions = summed * static_cast<Index>(plan.planes.size()) * plan.rows * plan.columns;
    const Index fitting = kStagedBytes / std::max<Index>(positions * kernels.lanes * sum_size, 1);
    const Index chunks = ceil_div(ceil_div(block_channels, kernels.lanes), std::clamp<Index>(fitting, 1, 4));
    plan.chunk = std::min(ceil_div(ceil_div(block_channels, chunks), kernels.lanes) * kernels.lanes, block_channels);
    read_row = plan.columns * plan.chunk * sum_size;
    read_plane = plan.rows * read_row;
    read_image = static_cast<Index>(plan.planes.size()) * read_plane;
    plan.staged = summed * read_image;
  }
  // Tiles of all phases of the last axis have one height.
  for (const Phase& phase : heights) {
    const Index begin = first_of(phase, row_begin), end = std::min(first_of(phase, row_end), phase.count);
    if (begin >= end) continue;
    double best = 0;
    int height = 0;
    for (const TileShape* shape = shapes[0]; shape->kernel; ++shape) {
      double total = 0;
      bool possible = true;
      for (std::size_t i = 0; i < columns.size(); ++i) {
        double cost = 0;
        if (count_of(columns[i]) <= 0) continue;
        possible &= choose_tile(shapes[i], count_of(columns[i]), end - begin, shape->height, cost) != nullptr;
        total += cost;
      }
      if (possible && (!height || total < best)) height = shape->height, best = total;
    }
    const std::size_t first_run = plan.runs.size();
    for (std::size_t i = 0; i < columns.size(); ++i) {
      const TileShape* shape = choose_tile(shapes[i], count_of(columns[i]), end - begin, height, best);
      plan.runs.push_back({shape, column_begin, column_begin + count_of(columns[i]), 0});
    }
    for (Index next = begin; next < end; next += height) {
      const Index row = std::max(std::min(next, end - height), begin);
      const std::size_t first_tap_row = plan.tap_rows.size();
      for (Index m = 0; m < summed; ++m) {
        for (std::size_t a = 0; a < plan.planes.size(); ++a) {
          const Index plane_read = staged ? static_cast<Index>(a) * read_plane - plan.first_row * read_row
                                          : plan.planes[a].position * read_plane;
          const Index plane_of_taps = (m * g.window[0] + plan.planes[a].tap) * w_plane;
          for (Index b = 0; b < phase.taps; ++b) {
            TapRow entry{plane_of_taps + (phase.tap + b * phase.tap_step) * w_row, {}};
            bool any = false;
            for (int h = 0; h < height; ++h) {
              const Index read = phase.column + (row + h) * phase.stride + b * phase.step;
              const bool inside = read >= 0 && read < p.in[1];
              entry.x[h] = inside ? m * read_image + plane_read + read * read_row : kOutside;
              any |= inside;
            }
            if (any) plan.tap_rows.push_back(entry);
          }
        }
      }
      plan.bands.push_back({&phase, row, height, first_run, first_tap_row, plan.tap_rows.size() - first_tap_row});
    }
  }
  return plan;
}

bool Correlation::load_kernel(Index kernel, Latest& latest) const {
  if (latest.kernel == kernel) return true;
  latest.w = w + kernel * taps * channels * size;
  latest.bias = bias ? bias + kernel * channels * size : nullptr;
  if (kernels.widen) {
    static thread_local Memory kept;
    const Index numbers = summed * taps * channels;
    char* const to = scratch((numbers + channels) * sum_size, kept, latest.kernel_memory);
    if (!to) return false;
    kernels.widen(latest.w, to, numbers);
    latest.w = to;
    if (bias) {
      kernels.widen(latest.bias, to + numbers * sum_size, channels);
      latest.bias = to + numbers * sum_size;
    }
  }
  latest.kernel = kernel;
  return true;
}

bool Correlation::block(Index index, Latest& latest) const {
  const Geometry& g = p.g;
  const Index channel_block = index % channel_blocks, cut = index / channel_blocks % cuts, image = index / channel_blocks / cuts;
  if (latest.plan.cut != cut) latest.plan = plan(cut);
  Plan& now = latest.plan;
  // The kernel of an image of y, and the image that is read for it; of several, each of which is summed, the first.
  const Index stack = image / g.batch / (p.transposed ? 1 : g.multiplier);
  if (!load_kernel(p.transposed ? stack * g.multiplier : image / g.batch, latest)) return false;
  const char* x_image_read = x + (stack * g.batch * summed + image % g.batch) * x_image;
  char* y_base = y + image * y_image + now.y;

  Tile tile{};
  tile.columns = now.columns;
  tile.w = const_cast<char*>(latest.w);
  tile.bias = latest.bias;
  tile.activation = activation;
  tile.stream = stream;
  tile.ahead = ahead;
  const Index block_begin = channel_block * block_channels;
  const Index block_end = channel_block + 1 == channel_blocks ? channels : block_begin + block_channels;
  const Index chunk = staged ? now.chunk : block_end - block_begin;
  for (Index c = block_begin; c < block_end; c += chunk) {
    // The last chunk is moved back over its neighbour.
    tile.begin = std::max(std::min(c, block_end - chunk), block_begin);
    tile.end = std::min(tile.begin + chunk, block_end);
    tile.x = x_image_read;
    tile.pitch = channels;
    if (staged) {
      static thread_local Memory kept;
      char* to = scratch(now.staged, kept, latest.staged_memory);
      if (!to) return false;
      tile.x = to - tile.begin * sum_size;
      tile.pitch = chunk;
      for (Index m = 0; m < summed; ++m) {
        for (const Plan::Plane& plane : now.planes) {
          const char* from = x_image_read + m * g.batch * x_image + plane.position * x_plane + now.first_row * x_row +
                             (now.first_column * channels + tile.begin) * size;
          for (Index row = 0; row < now.rows; ++row, from += x_row, to += now.columns * chunk * sum_size) {
            kernels.stage(from, channels * size, to, now.columns, chunk);
          }
        }
      }
    }
    for (const Plan::Band& band : now.bands) {
      const Phase& down = *band.phase;
      tile.rows = now.tap_rows.data() + band.first_tap_row;
      Plan::Run* const runs = now.runs.data() + band.first_run;
      for (std::size_t i = 0; i < columns.size(); ++i) runs[i].next = runs[i].begin;
      // Several phases in turn, tile by tile: their outputs lie between each other.
      for (bool left = true; left;) {
        left = false;
        for (std::size_t i = 0; i < columns.size(); ++i) {
          Plan::Run& run = runs[i];
          if (run.next >= run.end) continue;
          left = true;
          const Phase& across = columns[i];
          const Index width = run.shape->width;
          // The last tile is moved back over its neighbour rather than cut.
          const Index j = std::max(std::min(run.next, run.end - width), run.begin);
          tile.tiles = columns.size() == 1 ? std::max<Index>((run.end - j) / width, 1) : 1;
          run.next = j + tile.tiles * width;
          tile.count = across.taps ? static_cast<Index>(band.tap_rows) : 0;
          tile.square = down.stride == across.stride && down.step == 1 && summed * static_cast<Index>(now.planes.size()) == 1;
          tile.taps = across.taps;
          tile.step = across.step;
          tile.stride = across.stride;
          tile.tap_offset = across.tap * channels;
          tile.tap_pitch = across.tap_step * channels;
          tile.y_pitch = across.pitch * channels;
          tile.column = across.column + j * across.stride - now.first_column;
          for (int h = 0; h < band.height; ++h) {
            tile.y[h] = y_base + (down.first + (band.row + h) * down.pitch) * y_row +
                        (across.first + j * across.pitch) * channels * size;
          }
          runs_kernel(run.shape->kernel);
          run.shape->kernel(tile);
        }
      }
    }
  }
#if defined(__x86_64__)
  if (stream) __builtin_ia32_sfence();  // before others read what was stored past the caches
#endif
  return true;
}

bool correlate(const Problem& p, Dtype dtype, const void* x, const void* w, const void* bias, Activation activation,
               void* y, Pool& pool) {
  const Geometry& g = p.g;
  const Index outputs = g.stack * g.batch * p.out[0] * p.out[1] * p.out[2] * g.channels;
  if (outputs == 0) return true;
  const Kernels kernels = kernels_for(dtype, g.channels);
  advise(y, outputs * (p.transposed ? 1 : g.multiplier) * size_of(dtype));

  const Correlation correlation(p, kernels, dtype, x, w, bias, activation, y, pool.threads());
  std::vector<Latest> latest(std::max(pool.threads(), 1));  // of each thread
  return parallel_for(pool, correlation.blocks(), turn(),
                      [&](Index index, Index thread) { return correlation.block(index, latest[thread]); });
}

// What f gives, or false if it throws for want of memory.
template <class F>
bool with_memory(const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return false;
  }
}

}  // namespace

bool forward(Dtype dtype, const Geometry& g, const void* x, const void* w, const void* bias, Activation activation,
             void* y, Pool& pool) {
  return with_memory([&] { return correlate({g, false, g.in, g.out}, dtype, x, w, bias, activation, y, pool); });
}

bool input_grad(Dtype dtype, const Geometry& g, const void* cotangent, const void* w, void* dx, Pool& pool) {
  return with_memory([&] {
    return correlate({g, true, g.out, g.in}, dtype, cotangent, w, nullptr, Activation::identity, dx, pool);
  });
}

// ---------------------------------------------------------------------------------------------------- Kernel gradient

namespace {

// The kernel gradient cut into blocks, which any threads may compute: some channels of some units of the cotangent. A unit is
// a few rows, or a piece of them where there are few long ones. A chunk of units has its own partial sum; how many chunks
// there are depends on the geometry alone, so that sums are taken in the same order by any number of threads.
class KernelGrad {
 public:
  KernelGrad(const Geometry& g, const Kernels& kernels, Dtype dtype, const void* x, const void* cotangent, void* dw);
  // False if there is no memory for the sums.
  bool allocate(Memory& kept);
  Index blocks() const { return kernels_in_all * chunks * channel_blocks; }
  void block(Index index) const;
  // Adds the partial sums up, in the type of the sums.
  template <class A>
  bool finish(Pool& pool) const;

 private:
  // What a block adds to its sum, channels `begin` to `end`, for the units from `first` to `last`.
  struct Block {
    const char *x, *cotangent;  // for its kernel
    char* sum;
    Index begin, end, first, last;
  };
  void add_tiles(const Block& block) const;
  void add_rows(const Block& block) const;
  Index plane_under(Index plane, Index tap) const;
  Index row_under(Index x_plane_read, Index row, Index tap) const;

  const Geometry& g;
  const Kernels kernels;
  const char *const x, *const cotangent;
  char* const dw;
  const Index size, sum_size, channels;
  const Index taps;
  // Elements from tap to tap of a sum: those whose distance would be a power of two lie a little further apart, in other sets
  // of the caches.
  const Index sum_pitch;
  const Index x_row, x_plane, x_image, g_row, w_row, sum_bytes;  // bytes
  const Index planes;  // of the cotangent, for one kernel
  const Index kernels_in_all;
  const TileShape* shapes;  // null: general ones
  Index height = 1;         // rows of a unit
  Index heights, pieces, piece, units, chunks, channel_blocks, block_channels;
  bool apart;  // from dw
  char* sums = nullptr;
  Memory sums_memory;
};

KernelGrad::KernelGrad(const Geometry& geometry, const Kernels& kernels_, Dtype dtype, const void* x_, const void* cotangent_,
                       void* dw_)
    : g(geometry),
      kernels(kernels_),
      x(static_cast<const char*>(x_)),
      cotangent(static_cast<const char*>(cotangent_)),
      dw(static_cast<char*>(dw_)),
      size(size_of(dtype)),
      sum_size(sum_size_of(dtype)),
      channels(g.channels),
      taps(g.window[0] * g.window[1] * g.window[2]),
      sum_pitch(channels * sum_size % 1024 == 0 ? channels + kernels.lanes : channels),
      x_row(g.in[2] * channels * size),
      x_plane(g.in[1] * x_row),
      x_image(g.in[0] * x_plane),
      g_row(g.out[2] * channels * size),
      w_row(g.window[2] * sum_pitch * sum_size),
      sum_bytes(taps * sum_pitch * sum_size),
      planes(g.batch * g.out[0]),
      kernels_in_all(g.stack * g.multiplier),
      shapes(find_tiles(kernels.grads, g.window[2], g.stride[2])) {
  // The kernels for certain taps test only those columns that reach beyond the first or the last output.
  const bool certain = channels >= kernels.lanes && g.dilation[2] == 1 && g.window[2] - 1 >= g.low[2] &&
                       (g.out[2] - 1) * g.stride[2] - g.low[2] < g.in[2];
  if (!certain) shapes = nullptr;
  if (shapes && g.out[1] > 1) {
    // Of the heights that there are the first, unless another leaves less over at the end.
    height = shapes->height;
    auto covered = [&](Index rows) { return ceil_div(g.out[1], rows) * rows; };
    for (const TileShape* shape = shapes; shape->kernel; ++shape) {
      if (shape->height > 1 && covered(shape->height) < covered(height)) height = shape->height;
    }
  }
  heights = ceil_div(g.out[1], height);
  const Index groups = planes * heights, pixels = planes * g.out[1] * g.out[2];
  pieces = groups < 64 ? std::max<Index>(std::min(g.out[2] / 128, 64 / std::max<Index>(groups, 1)), 1) : 1;
  piece = ceil_div(g.out[2], pieces);
  units = groups * pieces;
  // Chunks are few beside what is summed; channels are split if that is not enough for all threads.
  const Index vectors = ceil_div(channels, kernels.lanes);
  const Index wanted = blocks_worth(pixels, vectors, taps, 32);
  const Index most = std::min(pixels / 128, (Index{8} << 20) / std::max<Index>(sum_bytes * kernels_in_all, 1));
  chunks = std::max<Index>(std::min({wanted, units, most}), 1);
  channel_blocks = std::min(std::max<Index>(channels / (4 * kernels.lanes), 1), ceil_div(wanted, chunks));
  block_channels = channels / channel_blocks / kernels.lanes * kernels.lanes;
  apart = chunks > 1 || kernels.narrow || sum_pitch != channels;
}

bool KernelGrad::allocate(Memory& kept) {
  sums = apart ? scratch(kernels_in_all * chunks * sum_bytes, kept, sums_memory) : dw;
  return sums;
}

// Where the plane of the input under a tap of axis 0 at a plane of the cotangent begins, and its row likewise.
Index KernelGrad::plane_under(Index plane, Index tap) const {
  const Index position = plane % g.out[0] * g.stride[0] + tap * g.dilation[0] - g.low[0];
  return position < 0 || position >= g.in[0] ? kOutside : plane / g.out[0] * x_image + position * x_plane;
}
Index KernelGrad::row_under(Index x_plane_read, Index row, Index tap) const {
  const Index position = row * g.stride[1] + tap * g.dilation[1] - g.low[1];
  return x_plane_read == kOutside || position < 0 || position >= g.in[1] ? kOutside : x_plane_read + position * x_row;
}

void KernelGrad::block(Index index) const {
  const Index channel_block = index % channel_blocks;
  index /= channel_blocks;
  const Index chunk = index % chunks, kernel = index / chunks;
  Block block;
  block.x = x + kernel / g.multiplier * g.batch * x_image;
  block.cotangent = cotangent + kernel * planes * g.out[1] * g_row;
  block.sum = sums + (kernel * chunks + chunk) * sum_bytes;
  block.begin = channel_block * block_channels;
  block.end = channel_block + 1 == channel_blocks ? channels : block.begin + block_channels;
  block.first = chunk * units / chunks;
  block.last = (chunk + 1) * units / chunks;
  for (Index k = 0; k < taps; ++k) {
    std::memset(block.sum + (k * sum_pitch + block.begin) * sum_size, 0, (block.end - block.begin) * sum_size);
  }
  if (shapes) {
    add_tiles(block);
  } else {
    add_rows(block);
  }
}

void KernelGrad::add_tiles(const Block& block) const {
  Tile t{};
  t.x = block.x;
  t.w = block.sum;
  t.columns = g.in[2];
  t.tap_pitch = sum_pitch;
  t.pitch = t.y_pitch = channels;
  t.begin = block.begin;
  t.end = block.end;
  std::vector<TapRow> tap_rows;
  for (Index unit = block.first; unit < block.last; ++unit) {
    const Index group = unit / pieces, plane = group / heights, row = group % heights * height;
    const Index count = std::min(height, g.out[1] - row);
    t.square = g.stride[1] == g.stride[2] && g.dilation[1] == 1 && g.window[0] == 1 && count == height;
    tap_rows.clear();
    for (Index a = 0; a < g.window[0]; ++a) {
      const Index x_read = plane_under(plane, a);
      for (Index b = 0; b < g.window[1]; ++b) {
        TapRow entry{(a * g.window[1] + b) * w_row, {}};
        bool any = false;
        for (Index h = 0; h < height; ++h) {
          entry.x[h] = h < count ? row_under(x_read, row + h, b) : kOutside;
          any |= entry.x[h] != kOutside;
        }
        if (any) tap_rows.push_back(entry);
      }
    }
    t.rows = tap_rows.data();
    t.count = static_cast<Index>(tap_rows.size());
    const Index stop = std::min((unit % pieces + 1) * piece, g.out[2]);
    for (Index column = unit % pieces * piece; column < stop;) {
      const TileShape* shape = shapes;
      while (shape->height != height || shape->width > stop - column) ++shape;
      t.column = column * g.stride[2] - g.low[2];
      for (Index h = 0; h < height; ++h) {  // the rows beyond the last read nothing of x
        const Index g_read = (plane * g.out[1] + row + std::min(h, count - 1)) * g_row + column * channels * size;
        t.y[h] = const_cast<char*>(block.cotangent + g_read);
      }
      runs_kernel(shape->kernel);
      shape->kernel(t);
      column += shape->width;
    }
  }
}

void KernelGrad::add_rows(const Block& block) const {
  // So many units at a time that they stay in the caches while each row of taps passes over them.
  constexpr Index kUnits = 8;
  GradRow list[kUnits];
  Grad t{};
  t.columns = g.in[2];
  t.taps = g.window[2];
  t.step = g.dilation[2];
  t.stride = g.stride[2];
  t.pitch = channels;
  t.tap_pitch = sum_pitch;
  t.begin = block.begin;
  t.end = block.end;
  t.rows = list;
  for (Index from = block.first; from < block.last;) {
    const Index part = from % pieces, count = pieces > 1 ? 1 : std::min(kUnits, block.last - from);
    t.outputs = std::min(piece, g.out[2] - part * piece);
    t.column = part * piece * g.stride[2] - g.low[2];
    for (Index a = 0; a < g.window[0] && t.outputs > 0; ++a) {
      for (Index b = 0; b < g.window[1]; ++b) {
        t.count = 0;
        for (Index unit = from; unit < from + count; ++unit) {
          const Index row = unit / pieces;
          const Index read = row_under(plane_under(row / g.out[1], a), row % g.out[1], b);
          if (read == kOutside) continue;
          list[t.count++] = {block.cotangent + row * g_row + part * piece * channels * size, block.x + read};
        }
        t.dw = block.sum + (a * g.window[1] + b) * w_row;
        runs_kernel(kernels.general_grad);
        kernels.general_grad(t);
      }
    }
    from += count;
  }
}

template <class A>
bool KernelGrad::finish(Pool& pool) const {
  if (!apart) return true;
  constexpr Index kPart = 16384;  // elements
  const Index rows = kernels_in_all * taps, per = std::max<Index>(kPart / channels, 1);
  return parallel_for(pool, ceil_div(rows, per), false, [&](Index part, Index) {
    for (Index row = part * per; row < std::min((part + 1) * per, rows); ++row) {
      char* result = dw + row * channels * size;
      A* partial = reinterpret_cast<A*>(sums + row / taps * chunks * sum_bytes) + row % taps * sum_pitch;
      A* total = kernels.narrow ? partial : reinterpret_cast<A*>(result);
      if (total != partial) std::memcpy(total, partial, channels * sizeof(A));
      for (Index chunk = 1; chunk < chunks; ++chunk) {
        const A* next = partial + chunk * taps * sum_pitch;
        for (Index i = 0; i < channels; ++i) total[i] += next[i];
      }
      if (kernels.narrow) kernels.narrow(reinterpret_cast<const char*>(total), result, channels);
    }
    return true;
  });
}

}  // namespace

bool kernel_grad(Dtype dtype, const Geometry& g, const void* x, const void* cotangent, void* dw, Pool& pool) {
  return with_memory([&] {
    static thread_local Memory kept;
    KernelGrad grad(g, kernels_for(dtype, g.channels), dtype, x, cotangent, dw);
    return grad.allocate(kept) &&
           parallel_for(pool, grad.blocks(), turn(),
                        [&](Index index, Index) {
                          grad.block(index);
                          return true;
                        }) &&
           (dtype == Dtype::f64 ? grad.finish<double>(pool) : grad.finish<float>(pool));
  });
}

// ---------------------------------------------------------------------------------------------------- Checks

const char* problem(const Geometry& g) {
  // Far beyond any array: products of two stay in range, and so do the bytes of an array.
  constexpr Index kLimit = Index{1} << 31;
  constexpr double kElements = 0x1p56;
  if (g.stack < 0 || g.batch < 0) return "a negative number of images";
  if (g.multiplier < 1) return "no kernels";
  if (g.channels < 1) return "no channels";
  if (g.multiplier > kLimit || g.channels > kLimit) return "a size above 2**31";
  const double images = static_cast<double>(std::max<Index>(g.stack, 1)) * static_cast<double>(g.multiplier) *
                        static_cast<double>(std::max<Index>(g.batch, 1)) * static_cast<double>(g.channels);
  double in = images, out = images, window = images;  // elements, of empty arrays those that stand beside the empty axis
  for (int i = 0; i < 3; ++i) {
    if (g.in[i] < 0) return "a negative size";
    if (g.window[i] < 1) return "an empty window";
    if (g.stride[i] < 1) return "a stride below 1";
    if (g.dilation[i] < 1) return "a dilation below 1";
    if (g.low[i] < 0) return "a negative padding";
    if (g.out[i] < 1) return "an empty output";
    if (g.in[i] > kLimit || g.out[i] > kLimit) return "a size above 2**31";
    if (g.window[i] > kLimit) return "a window above 2**31";
    if (g.stride[i] > kLimit) return "a stride above 2**31";
    if (g.dilation[i] > kLimit) return "a dilation above 2**31";
    if (g.low[i] > kLimit) return "a padding above 2**31";
    in *= static_cast<double>(std::max<Index>(g.in[i], 1));
    out *= static_cast<double>(g.out[i]);
    window *= static_cast<double>(g.window[i]);
  }
  if (std::max({in, out, window}) > kElements) return "arrays of more than 2**56 elements";
  return nullptr;
}

// ---------------------------------------------------------------------------------------------------- Instruction sets

namespace {

struct InstructionSet {
  const char* name;
  bool (*available)();
  Kernels (*kernels)(Dtype);
};

const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     },
     avx512::kernels},
    // Every processor with AVX2 and FMA has F16C.
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::kernels},
#endif
#if defined(__aarch64__)
    {"neon", [] { return true; }, neon::kernels},
#else
    {"baseline", [] { return true; }, baseline::kernels},
#endif
};

const InstructionSet* selected() {
  static const InstructionSet* const result = []() -> const InstructionSet* {
    const char* asked = std::getenv("DEPTHWISE_JAX_ISA");
    for (const InstructionSet& set : kInstructionSets) {
      if ((!asked || !*asked || std::strcmp(asked, set.name) == 0) && set.available()) return &set;
    }
    return nullptr;
  }();
  return result;
}

// The widest vectors that the channels fill, else the narrowest there are.
Kernels kernels_for(Dtype dtype, Index channels) {
  const InstructionSet* set = selected();
  while (set + 1 != std::end(kInstructionSets) && channels < set->kernels(dtype).lanes) ++set;
  return set->kernels(dtype);
}

}  // namespace

const char* instruction_set() { return selected() ? selected()->name : nullptr; }

}  // namespace depthwise
