// The driver: how a convolution is cut into blocks for the threads, and blocks into the tiles of kernels.cc.
#include "depthwise.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace depthwise {
namespace {

Index ceil_div(Index a, Index b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

Index size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }
Index sum_size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }

// ---------------------------------------------------------------------------------------------------- Threads

// Calls f(0) ... f(n - 1), on this thread and on those of the pool that come in time. Each begins with a part of its
// own, the same in every call, so that a layer finds in its caches what the one before it left there; who is done takes
// what the others have not begun. This thread takes blocks like any other and only waits for blocks that a thread is
// working on, so that it never waits for the pool to be free.
template <class F>
void parallel_for(Pool& pool, Index n, const F& f) {
  const Index threads = std::min<Index>(pool.threads(), n);
  if (threads <= 1) {
    for (Index i = 0; i < n; ++i) f(i);
    return;
  }
  struct alignas(64) Part {
    std::atomic<Index> next;
    Index end;
  };
  struct Shared {
    std::atomic<Index> joined{0}, done{0};
    std::unique_ptr<Part[]> parts;
  };
  auto shared = std::make_shared<Shared>();
  shared->parts = std::make_unique<Part[]>(threads);
  for (Index t = 0; t < threads; ++t) {
    shared->parts[t].next = t * n / threads;
    shared->parts[t].end = (t + 1) * n / threads;
  }
  const F* body = &f;  // alive while a block is left
  auto work = [shared, body, threads](Index own) {
    Index finished = 0;
    for (Index t = 0; t < threads; ++t) {
      Part& part = shared->parts[(own + t) % threads];
      for (Index i; (i = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end; ++finished) (*body)(i);
    }
    if (finished) shared->done.fetch_add(finished, std::memory_order_acq_rel);
  };
  for (Index t = 1; t < threads; ++t) {
    pool.schedule([shared, work] { work(1 + shared->joined.fetch_add(1, std::memory_order_relaxed)); });
  }
  work(0);
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < n; ++spins) {
    if (spins > 1000) std::this_thread::yield();
  }
}

// From about this many multiply-adds of vectors on, a second thread is worth waking.
constexpr Index kBlockWork = 12000;

// ---------------------------------------------------------------------------------------------------- Geometry

// A correlation: forward, or the transpose in x, which is one too once strides are split into phases.
struct Problem {
  const Geometry& g;
  bool transposed;
  const Index* in;   // spatial sizes of what is read
  const Index* out;  // and of what is written
};

// What one output position of an axis reads: positions in ascending order, and the tap for each.
struct Reach {
  Index position, tap;
};

std::vector<std::vector<Reach>> reaches(const Problem& p, int axis) {
  const Geometry& g = p.g;
  const Index s = g.stride[axis], d = g.dilation[axis], low = g.low[axis];
  std::vector<std::vector<Reach>> result(p.out[axis]);
  for (Index o = 0; o < g.out[axis]; ++o) {
    for (Index t = 0; t < g.window[axis]; ++t) {
      const Index i = o * s + t * d - low;
      if (i < 0 || i >= g.in[axis]) continue;
      if (p.transposed) {
        result[i].push_back({o, t});
      } else {
        result[o].push_back({i, t});
      }
    }
  }
  return result;
}

// Outputs along the last axis that share their taps: output j, written at first + j*pitch, reads column
// `column` + j*stride + k*step through tap `tap` + k*tap_step, k < taps.
struct Phase {
  Index taps, tap, tap_step;
  Index column, step, stride;
  Index first, pitch, count;
};

// One phase forward. Transposed, input i = s*q + r - low is reached by the taps t with t*d = r modulo s, from output
// q + (r - t*d)/s: a phase for each r, whose taps are s/gcd(s, d) apart and are taken backwards to ascend in outputs.
std::vector<Phase> phases(const Problem& p) {
  const Geometry& g = p.g;
  const Index s = g.stride[2], d = g.dilation[2], low = g.low[2], window = g.window[2];
  if (!p.transposed) return {{window, 0, 1, -low, d, s, 0, 1, g.out[2]}};
  const Index apart = s / std::gcd(s, d);
  std::vector<Phase> result;
  for (Index first = 0; first < std::min(s, g.in[2]); ++first) {
    const Index r = (first + low) % s, q = (first + low) / s;
    const Index count = (g.in[2] - 1 - first) / s + 1;
    Index tap = 0;
    while (tap < std::min(apart, window) && tap * d % s != r) ++tap;
    if (tap >= std::min(apart, window)) {
      result.push_back({0, 0, 0, 0, 1, 1, first, s, count});
      continue;
    }
    const Index taps = (window - 1 - tap) / apart + 1, step = apart * d / s;
    const Index column = q + (r - tap * d) / s - (taps - 1) * step;
    result.push_back({taps, tap + (taps - 1) * apart, -apart, column, step, 1, first, s, count});
  }
  return result;
}

// ---------------------------------------------------------------------------------------------------- Tiles

// Relative time per output of a tile with so many sums in flight: fewer leave the multipliers idle.
double overhead(int width, int height) {
  const int sums = width * height;
  return sums >= 14 ? 1.0 : sums >= 7 ? 1.1 : sums >= 6 ? 1.15 : sums >= 3 ? 1.5 : 3.0;
}

// The tile shape for `count` outputs in each of `rows` rows; of height 1 or `rows`.
const TileShape* choose_tile(const Kernels& kernels, const Phase& phase, Index columns, Index channels, Index count,
                             int rows) {
  // The kernels for certain taps test only those columns that reach beyond the first or the last output.
  const bool certain = channels >= kernels.lanes && (phase.step == 1 || phase.taps == 1) &&
                       phase.column + phase.taps - 1 >= 0 && phase.column + (phase.count - 1) * phase.stride < columns;
  const TileShape* best = nullptr;
  double best_cost = 0;
  for (const TileShape* shape = kernels.tiles; shape->kernel; ++shape) {
    const bool general = shape->taps == 0;
    if (general && best) break;
    if (shape->taps == kMany) {
      if ((best && best->taps != kMany) || phase.taps < 6 || channels < kernels.lanes || phase.step != 1 || phase.stride != 1) continue;
    } else if (!general && !(certain && shape->taps == phase.taps && shape->stride == phase.stride)) {
      continue;
    }
    if ((shape->height != 1 && shape->height != rows) || (shape->width > count && shape->width > 1)) continue;
    const double cost = ceil_div(count, shape->width) * shape->width * overhead(shape->width, shape->height);
    if (!best || cost < best_cost) best = shape, best_cost = cost;
  }
  return best;
}

Index last_level_cache() {
#if defined(__linux__) && defined(_SC_LEVEL3_CACHE_SIZE)
  static const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (size > 0) return size;
#endif
  return Index{32} << 20;
}

// A result beyond the allocator's threshold is new memory at every call: larger pages make its first touch cheap.
void advise(void* p, Index bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  if (bytes <= (Index{32} << 20)) return;
  const auto begin = (reinterpret_cast<std::uintptr_t>(p) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(p) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)p, (void)bytes;
#endif
}

Kernels kernels_for(Dtype dtype, Index channels);

void correlate(const Problem& p, Dtype dtype, const void* x, const void* w, const void* bias, Activation activation,
               void* y, Pool& pool) {
  const Geometry& g = p.g;
  if (g.stack * g.batch * p.out[0] * p.out[1] * p.out[2] == 0) return;
  const Kernels kernels = kernels_for(dtype, g.channels);
  const Index size = size_of(dtype), sum_size = sum_size_of(dtype), channels = g.channels;
  const auto depths = reaches(p, 0), heights = reaches(p, 1);
  const auto columns = phases(p);
  // What is written and what is read; transposed, each image is a sum over the multiplier.
  const Index images = g.stack * g.batch * (p.transposed ? 1 : g.multiplier);
  const Index images_read = g.stack * g.batch * (p.transposed ? g.multiplier : 1);
  const Index summed = p.transposed ? g.multiplier : 1;
  const Index taps = g.window[0] * g.window[1] * g.window[2];
  const Index x_row = p.in[2] * channels * size, x_plane = p.in[1] * x_row, x_image = p.in[0] * x_plane;
  const Index y_row = p.out[2] * channels * size, y_plane = p.out[1] * y_row, y_image = p.out[0] * y_plane;
  const Index w_plane = g.window[1] * g.window[2] * channels * sum_size;
  const Index x_bytes = images_read * x_image, y_bytes = images * y_image;

  // Blocks: an image's rows, a few at a time; if there is one row only, columns; and channels if that is not enough.
  const Index vectors = ceil_div(channels, kernels.lanes);
  const Index work = g.stack * g.multiplier * g.batch * g.out[0] * g.out[1] * g.out[2] * vectors * taps;
  const Index wanted = std::min<Index>(std::max<Index>(work / kBlockWork, 1), 4 * pool.threads());
  const Index planes = images * p.out[0];
  Index rows = std::min<Index>(p.out[1], 14);
  while (rows > 2 && planes * ceil_div(p.out[1], rows) < wanted) rows = ceil_div(rows / 2, 2) * 2;
  const Index row_blocks = ceil_div(p.out[1], rows);
  Index block_columns = p.out[2];
  if (p.out[1] == 1 && columns.size() == 1) {
    while (block_columns > 112 && planes * ceil_div(p.out[2], block_columns) < wanted) {
      block_columns = ceil_div(block_columns, 2);
    }
    block_columns = ceil_div(block_columns, 14) * 14;
  }
  const Index column_blocks = ceil_div(p.out[2], block_columns);
  Index block_channels = channels;
  if (vectors > 4 && (planes * row_blocks * column_blocks < wanted || (taps >= 25 && channels >= 192))) {
    block_channels = 4 * kernels.lanes;
  }
  // The last block takes the rest, so that each has whole vectors.
  const Index channel_blocks = std::max<Index>(channels / block_channels, 1);

  const bool stream = y_bytes >= (Index{8} << 20) && y_bytes <= (Index{32} << 20) &&
                      x_bytes + y_bytes > last_level_cache() / 2 &&
                      channels * size % (kernels.lanes * size) == 0 &&
                      reinterpret_cast<std::uintptr_t>(y) % (kernels.lanes * size) == 0;
  const bool fetch = p.out[1] > 1 && x_bytes > (Index{1} << 20);
  advise(y, y_bytes);

  auto block = [&](Index index) {
    const Index channel_block = index % channel_blocks;
    index /= channel_blocks;
    const Index column_block = index % column_blocks;
    index /= column_blocks;
    const Index row_block = index % row_blocks;
    index /= row_blocks;
    const Index depth = index % p.out[0], image = index / p.out[0];
    // The kernel of an image of y, and the image that is read for it; of several, each of which is summed, the first.
    const Index stack = image / g.batch / (p.transposed ? 1 : g.multiplier);
    const Index kernel = p.transposed ? stack * g.multiplier : image / g.batch;
    const char* x_base = static_cast<const char*>(x) + (stack * g.batch * summed + image % g.batch) * x_image;
    const char* w_base = static_cast<const char*>(w) + kernel * taps * channels * sum_size;
    char* y_base = static_cast<char*>(y) + image * y_image + depth * y_plane;

    Tile common{};
    common.columns = p.in[2];
    common.pitch = channels;
    common.begin = channel_block * block_channels;
    common.end = channel_block + 1 == channel_blocks ? channels : common.begin + block_channels;
    if (bias) common.bias = static_cast<const char*>(bias) + kernel * channels * sum_size;
    common.activation = activation;
    common.stream = stream;
    common.ahead_pitch = x_row;

    // The rows to read, ascending, each with the tap rows for one or both of two rows of output.
    struct Merged {
      const char *x, *w;  // the row, and the plane of taps
      Index position, tap[2];
    };
    std::vector<Merged> merged;
    // A phase's tiles, left to right; two of them where the two rows of output are taken one by one.
    struct Run {
      const Phase* phase;
      const TileShape* shape;
      Index next, end;
      std::vector<Row> rows[2];
      Tile tile[2];
    };
    std::vector<Run> runs(columns.size());
    const Index column_begin = column_block * block_columns;
    const Index row_end = std::min((row_block + 1) * rows, p.out[1]);
    for (Index row = row_block * rows; row < row_end; row += 2) {
      const int height = row + 1 < row_end ? 2 : 1;
      merged.clear();
      for (Index m = 0; m < summed; ++m) {
        for (const Reach& plane : depths[depth]) {
          const char* x_plane_read = x_base + m * g.batch * x_image + plane.position * x_plane;
          const char* w_plane_read = w_base + (m * g.window[0] + plane.tap) * w_plane;
          auto a = heights[row].begin(), a_end = heights[row].end();
          const auto& second = heights[height == 2 ? row + 1 : row];
          auto b = height == 2 ? second.begin() : second.end(), b_end = second.end();
          while (a != a_end || b != b_end) {
            const Index position = a == a_end   ? b->position
                                   : b == b_end ? a->position
                                                : std::min(a->position, b->position);
            Merged read{x_plane_read + position * x_row, w_plane_read, position, {-1, -1}};
            if (a != a_end && a->position == position) read.tap[0] = a++->tap;
            if (b != b_end && b->position == position) read.tap[1] = b++->tap;
            merged.push_back(read);
          }
        }
      }
      const char* ahead = nullptr;
      if (fetch && !merged.empty()) {
        const Merged& last = merged.back();
        ahead = last.x + x_row;
        common.ahead_rows = std::min<Index>(p.transposed ? 1 : 2 * g.stride[1], p.in[1] - 1 - last.position);
      }
      for (std::size_t i = 0; i < columns.size(); ++i) {
        const Phase& phase = columns[i];
        Run& run = runs[i];
        run.phase = &phase;
        run.next = column_begin;
        run.end = std::min(column_begin + block_columns, phase.count);
        if (run.next >= run.end) continue;
        run.shape = choose_tile(kernels, phase, p.in[2], channels, run.end - run.next, height);
        for (int h = 0; h < height; h += run.shape->height) {
          std::vector<Row>& list = run.rows[h];
          list.clear();
          for (const Merged& m : merged) {
            Row r{m.x, {nullptr, nullptr}};
            for (int i = 0; i < run.shape->height; ++i) {
              if (m.tap[h + i] >= 0) r.w[i] = m.w + (m.tap[h + i] * g.window[2] + phase.tap) * channels * sum_size;
            }
            if (r.w[0] || r.w[1]) list.push_back(r);
          }
          Tile& t = run.tile[h];
          t = common;
          t.ahead = ahead;
          ahead = nullptr;  // once is enough
          t.taps = phase.taps;
          t.step = phase.step;
          t.stride = phase.stride;
          t.tap_pitch = phase.tap_step * channels;
          t.y_pitch = phase.pitch * channels;
          t.rows = list.data();
          t.count = phase.taps ? static_cast<Index>(list.size()) : 0;
        }
      }
      // The phases in turn, tile by tile: their outputs lie between each other.
      for (bool left = true; left;) {
        left = false;
        for (Run& run : runs) {
          if (run.next >= run.end) continue;
          left = true;
          const Phase& phase = *run.phase;
          // The last tile is moved back over its neighbour rather than cut.
          const Index j = std::max(std::min(run.next, run.end - run.shape->width), column_begin);
          run.next += run.shape->width;
          for (int h = 0; h < height; h += run.shape->height) {
            Tile& t = run.tile[h];
            t.column = phase.column + j * phase.stride;
            for (int i = 0; i < run.shape->height; ++i) {
              t.y[i] = y_base + (row + h + i) * y_row + (phase.first + j * phase.pitch) * channels * size;
            }
            run.shape->kernel(t);
          }
        }
      }
    }
#if defined(__x86_64__)
    if (stream) __builtin_ia32_sfence();  // before others read what was stored past the caches
#endif
  };
  parallel_for(pool, planes * row_blocks * column_blocks * channel_blocks, block);
}

}  // namespace

void forward(Dtype dtype, const Geometry& g, const void* x, const void* w, const void* bias, Activation activation,
             void* y, Pool& pool) {
  correlate({g, false, g.in, g.out}, dtype, x, w, bias, activation, y, pool);
}

void input_grad(Dtype dtype, const Geometry& g, const void* cotangent, const void* w, void* dx, Pool& pool) {
  correlate({g, true, g.out, g.in}, dtype, cotangent, w, nullptr, Activation::identity, dx, pool);
}

// ---------------------------------------------------------------------------------------------------- Kernel gradient

bool kernel_grad(Dtype dtype, const Geometry& g, const void* x, const void* cotangent, void* dw, Pool& pool) {
  const Kernels kernels = kernels_for(dtype, g.channels);
  const Index size = size_of(dtype), sum_size = sum_size_of(dtype), channels = g.channels;
  const Index taps = g.window[0] * g.window[1] * g.window[2];
  const Index x_row = g.in[2] * channels * size, x_plane = g.in[1] * x_row, x_image = g.in[0] * x_plane;
  const Index g_row = g.out[2] * channels * size;
  const Index rows = g.batch * g.out[0] * g.out[1];  // of the cotangent, for one kernel
  const Index kernels_in_all = g.stack * g.multiplier, dw_bytes = taps * channels * sum_size;

  // Units of work: rows, or pieces of them where there are few long ones. A chunk of units has its own partial sum; how
  // many chunks there are depends on the geometry alone, so that sums are taken in the same order by any number of threads.
  const Index pieces = rows < 64 ? std::max<Index>(std::min(g.out[2] / 128, 64 / std::max<Index>(rows, 1)), 1) : 1;
  const Index piece = ceil_div(g.out[2], pieces);
  const Index units = rows * pieces;
  const Index vectors = ceil_div(channels, kernels.lanes);
  const Index work = rows * g.out[2] * vectors * taps;
  const Index wanted = std::min<Index>(std::max<Index>(work / kBlockWork, 1), 32);
  const Index channel_blocks = std::min(std::max<Index>(channels / (4 * kernels.lanes), 1), wanted);
  const Index block_channels = channels / channel_blocks / kernels.lanes * kernels.lanes;
  Index chunks = std::min(ceil_div(wanted, channel_blocks), std::max<Index>(units, 1));
  chunks = std::max<Index>(std::min(chunks, (Index{8} << 20) / std::max<Index>(dw_bytes * kernels_in_all, 1)), 1);
  std::unique_ptr<char[]> scratch;
  if (chunks > 1) {
    scratch.reset(new (std::nothrow) char[kernels_in_all * chunks * dw_bytes]);
    if (!scratch) return false;
  }
  char* sums = chunks > 1 ? scratch.get() : static_cast<char*>(dw);

  // The kernels for certain taps test only those columns that reach beyond the first or the last output.
  const bool certain = channels >= kernels.lanes && (g.dilation[2] == 1 || g.window[2] == 1) &&
                       g.window[2] - 1 >= g.low[2] && (g.out[2] - 1) * g.stride[2] - g.low[2] < g.in[2];

  auto block = [&](Index index) {
    const Index channel_block = index % channel_blocks;
    index /= channel_blocks;
    const Index chunk = index % chunks, kernel = index / chunks;
    Grad t{};
    t.columns = g.in[2];
    t.taps = g.window[2];
    t.step = g.dilation[2];
    t.stride = g.stride[2];
    t.pitch = channels;
    t.row_pitch = g.window[2] * channels;
    t.begin = channel_block * block_channels;
    t.end = channel_block + 1 == channel_blocks ? channels : t.begin + block_channels;
    char* sum = sums + (kernel * chunks + chunk) * dw_bytes;
    for (Index k = 0; k < taps; ++k) std::memset(sum + (k * channels + t.begin) * sum_size, 0, (t.end - t.begin) * sum_size);

    const char* x_base = static_cast<const char*>(x) + kernel / g.multiplier * g.batch * x_image;
    const char* g_base = static_cast<const char*>(cotangent) + kernel * rows * g_row;
    // So many units at a time that they stay in the caches while each group of tap rows passes over them.
    constexpr Index kUnits = 8;
    GradRow list[kUnits];
    const Index end = (chunk + 1) * units / chunks;
    for (Index begin = chunk * units / chunks; begin < end;) {
      const Index part = begin % pieces;
      const Index count = pieces > 1 ? 1 : std::min(kUnits, end - begin);
      t.outputs = std::min(piece, g.out[2] - part * piece);
      t.column = part * piece * g.stride[2] - g.low[2];
      for (Index depth_tap = 0; depth_tap < g.window[0] && t.outputs > 0; ++depth_tap) {
        for (Index height_tap = 0; height_tap < g.window[1];) {
          const GradShape* shape = kernels.grads;
          while (shape->taps && !(certain && shape->taps == g.window[2] && shape->stride == g.stride[2] &&
                                  shape->height <= g.window[1] - height_tap)) {
            ++shape;
          }
          // The rows under one row of the cotangent; false if all lie outside.
          auto fill = [&](GradRow& entry, Index unit) {
            const Index row = unit / pieces;
            const Index oh = row % g.out[1], od = row / g.out[1] % g.out[0], image = row / g.out[1] / g.out[0];
            const Index id = od * g.stride[0] + depth_tap * g.dilation[0] - g.low[0];
            if (id < 0 || id >= g.in[0]) return false;
            entry.g = g_base + row * g_row + part * piece * channels * size;
            bool any = false;
            for (int h = 0; h < shape->height; ++h) {
              const Index ih = oh * g.stride[1] + (height_tap + h) * g.dilation[1] - g.low[1];
              const bool inside = ih >= 0 && ih < g.in[1];
              entry.x[h] = inside ? x_base + image * x_image + id * x_plane + ih * x_row : nullptr;
              any |= inside;
            }
            return any;
          };
          t.count = 0;
          for (Index unit = begin; unit < begin + count; ++unit) t.count += fill(list[t.count], unit);
          t.rows = list;
          t.dw = sum + (depth_tap * g.window[1] + height_tap) * g.window[2] * channels * sum_size;
          shape->kernel(t);
          height_tap += shape->height;
        }
      }
      begin += count;
    }
  };
  parallel_for(pool, kernels_in_all * chunks * channel_blocks, block);

  if (chunks > 1) {
    const Index numbers = taps * channels;
    for (Index kernel = 0; kernel < kernels_in_all; ++kernel) {
      auto add = [&](auto zero) {
        using A = decltype(zero);
        A* total = reinterpret_cast<A*>(static_cast<char*>(dw) + kernel * dw_bytes);
        const A* partial = reinterpret_cast<const A*>(sums + kernel * chunks * dw_bytes);
        constexpr Index kPart = 16384;
        parallel_for(pool, ceil_div(numbers, kPart), [&](Index part) {
          const Index begin = part * kPart, stop = std::min(begin + kPart, numbers);
          std::memcpy(total + begin, partial + begin, (stop - begin) * sizeof(A));
          for (Index chunk = 1; chunk < chunks; ++chunk) {
            const A* next = partial + chunk * numbers;
            for (Index i = begin; i < stop; ++i) total[i] += next[i];
          }
        });
      };
      if (dtype == Dtype::f64) {
        add(double{});
      } else {
        add(float{});
      }
    }
  }
  return true;
}

// ---------------------------------------------------------------------------------------------------- Checks

const char* problem(const Geometry& g) {
  // Far beyond any array: products of two stay in range.
  constexpr Index kLimit = Index{1} << 31;
  if (g.stack < 0 || g.batch < 0) return "a negative number of images";
  if (g.multiplier < 1 || g.multiplier > kLimit) return "no kernels";
  if (g.channels < 1 || g.channels > kLimit) return "no channels";
  for (int i = 0; i < 3; ++i) {
    if (g.in[i] < 0 || g.in[i] > kLimit) return "a negative size";
    if (g.window[i] < 1 || g.window[i] > kLimit) return "an empty window";
    if (g.stride[i] < 1 || g.stride[i] > kLimit) return "strides must be at least 1";
    if (g.dilation[i] < 1 || g.dilation[i] > kLimit) return "dilation must be at least 1";
    if (g.low[i] < 0 || g.low[i] > kLimit) return "padding must be at least 0";
    if (g.out[i] < 1 || g.out[i] > kLimit) return "an empty output";
  }
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
