// The packed maps: each output sums only the taps within its own reach. One spatial axis,
// stride 1.
//
//   y[o] = sum over the taps t with K-1-t <= reach[o] of x[o + t*dilation - low] * w[t]
//
// A position's channels are a row. Each row of a result is a sum of products of rows, which are looked up for each
// position: rows out of reach are never read. Rows are read once for each tap, from the caches.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "geometry.h"
#include "loops.h"
#include "memory.h"
#include "threads.h"
#include "tuning.h"

namespace depthwise {
namespace {

struct Packed {
  Packed(const Geometry& geometry, Dtype dtype, const std::int32_t* of)
      : g(geometry),
        loops(loops_for(dtype, geometry.channels)),
        reach(of),
        taps(geometry.window[2]),
        in(geometry.in[2]),
        out(geometry.out[2]),
        row_bytes(geometry.channels * element_bytes(dtype)) {}

  // The taps that output `o` of an image sums are those from the result on.
  Index first_tap(Index image, Index o) const {
    const Index back = reach[image * out + o];
    return taps - 1 - std::clamp<Index>(back, -1, taps - 1);
  }
  // Where output `o` reads through a tap; whether that is inside x.
  Index position(Index o, Index tap) const { return o + tap * g.dilation[2] - g.low[2]; }
  bool inside(Index position) const { return position >= 0 && position < in; }
  // The taps through which output `o` of an image reads: from the first to before the second.
  std::pair<Index, Index> taps_of(Index image, Index o) const {
    Index first = first_tap(image, o), end = taps;
    while (first < end && position(o, first) < 0) ++first;
    while (first < end && position(o, end - 1) >= in) --end;
    return {first, end};
  }

  // Calls f(image, first row, last row) for each piece of `images` images of `rows` rows.
  template <class F>
  bool for_pieces(Index images, Index rows, Pool& pool, const F& f) const {
    const Index vectors = ceil_div(g.channels, loops.lanes);
    const Index wanted =
        ceil_div(blocks_worth(images * rows, vectors, taps, kMostPackedBlocks), std::max<Index>(images, 1));
    const Index pieces = std::clamp<Index>(wanted, 1, std::max<Index>(rows, 1));
    return parallel_for(pool, images * pieces, false, [&](Index block, Index) {
      const Index image = block / pieces, piece = block % pieces;
      f(image, piece * rows / pieces, (piece + 1) * rows / pieces);
      return true;
    });
  }

  const Geometry& g;
  const Loops loops;
  const std::int32_t* const reach;  // (stack, batch, out)
  const Index taps, in, out, row_bytes;
};

// Adds up the sums of all chunks of one tap's row, and stores them as elements.
template <class Sum>
void finish(const Packed& p, Sum* sums, Index chunks, Index chunk_pitch, char* dw) {
  for (Index chunk = 1; chunk < chunks; ++chunk) {
    for (Index c = 0; c < p.g.channels; ++c) sums[c] += sums[chunk * chunk_pitch + c];
  }
  if (p.loops.narrow) {
    p.loops.narrow(reinterpret_cast<const char*>(sums), dw, p.g.channels);
  } else {
    std::memcpy(dw, sums, p.row_bytes);
  }
}

}  // namespace

bool packed_forward(Dtype dtype, const Geometry& g, const void* x, const void* w, const std::int32_t* reach, void* y,
                    Pool& pool) {
  return false_without_memory([&] {
    const Packed p(g, dtype, reach);
    return p.for_pieces(g.stack * g.multiplier * g.batch, p.out, pool, [&](Index image, Index begin, Index end) {
      const Index kernel = image / g.batch, read = kernel / g.multiplier * g.batch + image % g.batch;
      const char* const xs = static_cast<const char*>(x) + read * p.in * p.row_bytes;
      const char* const ws = static_cast<const char*>(w) + kernel * p.taps * p.row_bytes;
      std::vector<RowPair> pairs(p.taps);
      RowSum sum{pairs.data(), 0, nullptr, g.channels};
      for (Index o = begin; o < end; ++o) {
        sum.count = 0;
        for (Index t = p.first_tap(read, o); t < p.taps; ++t) {
          const Index i = p.position(o, t);
          if (p.inside(i)) pairs[sum.count++] = {xs + i * p.row_bytes, ws + t * p.row_bytes};
        }
        sum.to = static_cast<char*>(y) + (image * p.out + o) * p.row_bytes;
        run_loop(p.loops.row_sum, sum);
      }
    });
  });
}

bool packed_input_grad(Dtype dtype, const Geometry& g, const void* cotangent, const void* w, const std::int32_t* reach,
                       void* dx, Pool& pool) {
  return false_without_memory([&] {
    const Packed p(g, dtype, reach);
    return p.for_pieces(g.stack * g.batch, p.in, pool, [&](Index image, Index begin, Index end) {
      const Index stack = image / g.batch;
      std::vector<RowPair> pairs(p.taps * g.multiplier);
      RowSum sum{pairs.data(), 0, nullptr, g.channels};
      for (Index i = begin; i < end; ++i) {
        sum.count = 0;
        for (Index t = 0; t < p.taps; ++t) {
          const Index o = i - p.position(0, t);
          if (o < 0 || o >= p.out || t < p.first_tap(image, o)) continue;
          for (Index m = 0; m < g.multiplier; ++m) {
            const Index kernel = stack * g.multiplier + m;
            pairs[sum.count++] = {
                static_cast<const char*>(cotangent) + ((kernel * g.batch + image % g.batch) * p.out + o) * p.row_bytes,
                static_cast<const char*>(w) + (kernel * p.taps + t) * p.row_bytes};
          }
        }
        sum.to = static_cast<char*>(dx) + (image * p.in + i) * p.row_bytes;
        run_loop(p.loops.row_sum, sum);
      }
    });
  });
}

bool packed_kernel_grad(Dtype dtype, const Geometry& g, const void* x, const void* cotangent, const std::int32_t* reach,
                        void* dw, Pool& pool) {
  return false_without_memory([&] {
    static thread_local Scratch kept;
    Scratch own;
    const Packed p(g, dtype, reach);
    const Index kernels = g.stack * g.multiplier, positions = g.batch * p.out;
    // As for the gradient of any kernel: chunks follow from the geometry alone.
    const Index tap_bytes = g.channels * sum_bytes(dtype), kernel_bytes = p.taps * tap_bytes;
    const Index vectors = ceil_div(g.channels, p.loops.lanes);
    const Index wanted = blocks_worth(positions, vectors, p.taps, kMostGradBlocks);
    const Index most =
        std::min(positions / kLeastChunkPositions, kPartialSumsBytes / std::max<Index>(kernel_bytes * kernels, 1));
    const Index chunks = std::max<Index>(std::min(wanted, most), 1);
    char* const sums = scratch(kernels * chunks * kernel_bytes, kept, own);
    if (!sums) return false;
    auto add = [&](Index block, Index) {
      const Index kernel = block / chunks, chunk = block % chunks, stack = kernel / g.multiplier;
      char* const to = sums + block * kernel_bytes;
      std::memset(to, 0, kernel_bytes);
      std::vector<RowTarget> targets(p.taps);
      RowProducts products{nullptr, targets.data(), 0, g.channels, 1, p.row_bytes};
      const Index end = (chunk + 1) * positions / chunks;
      for (Index i = chunk * positions / chunks; i < end; i += products.positions) {
        const Index image = stack * g.batch + i / p.out, o = i % p.out;
        const auto reads = p.taps_of(image, o);
        // Positions side by side that read through the same taps are added before the sums are stored.
        Index alike = 1;
        while (alike < kPackedPositions && i + alike < end && o + alike < p.out &&
               p.taps_of(image, o + alike) == reads) {
          ++alike;
        }
        products.positions = alike == kPackedPositions ? alike : 1;
        products.count = 0;
        for (Index t = reads.first; t < reads.second; ++t) {
          targets[products.count++] = {static_cast<const char*>(x) + (image * p.in + p.position(o, t)) * p.row_bytes,
                                       to + t * tap_bytes};
        }
        products.g = static_cast<const char*>(cotangent) + (kernel * positions + i) * p.row_bytes;
        run_loop(p.loops.row_products, products);
      }
      return true;
    };
    if (!parallel_for(pool, kernels * chunks, alternate_direction(), add)) return false;
    return parallel_for(pool, kernels * p.taps, false, [&](Index row, Index) {
      char* const from = sums + row / p.taps * chunks * kernel_bytes + row % p.taps * tap_bytes;
      char* const to = static_cast<char*>(dw) + row * p.row_bytes;
      if (dtype == Dtype::f64) {
        finish(p, reinterpret_cast<double*>(from), chunks, p.taps * g.channels, to);
      } else {
        finish(p, reinterpret_cast<float*>(from), chunks, p.taps * g.channels, to);
      }
      return true;
    });
  });
}

}  // namespace depthwise
