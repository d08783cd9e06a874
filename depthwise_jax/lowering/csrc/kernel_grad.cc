// The gradient in w: sums over the positions of the cotangent g.
//
//   kernels     chunks          units              tiles
//   stack * M   a partial sum   a few rows of g,   positions of g in registers,
//               each            or a piece of      added to the sums of all taps
//                               long rows
//
// A block is some channels of a chunk. The number of chunks depends only on the geometry, so any number of threads
// takes the sums in the same order. At the end the partial sums of all chunks are added up. correlation.cc has a
// glossary.
#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "geometry.h"
#include "loops.h"
#include "memory.h"
#include "threads.h"
#include "tuning.h"

namespace depthwise {
namespace {

class KernelGrad {
 public:
  KernelGrad(const Geometry& g, const Loops& loops, Dtype dtype, const void* x, const void* cotangent, void* dw);
  // False if there is no memory for the sums.
  bool allocate(Scratch& kept);
  Index blocks() const { return kernels_ * chunks_ * channel_blocks_; }
  void block(Index index) const;
  // Adds up the partial sums, of type Sum.
  template <class Sum>
  bool finish(Pool& pool) const;

 private:
  // What a block adds to its sum: for its kernel, the units from `first` to `last` of channels `begin` to `end`.
  struct Block {
    const char *x, *cotangent;
    char* sum;
    Index begin, end, first, last;
  };
  void choose_tiles();
  void cut_into_blocks();
  void add_tiles(const Block& block) const;
  void add_rows(const Block& block) const;
  Index x_plane_offset(Index plane, Index tap) const;
  Index x_row_offset(Index plane_offset, Index row, Index tap) const;

  const Geometry& g_;
  const Loops loops_;
  const char *const x_, *const cotangent_;
  char* const dw_;
  const Index element_bytes_, sum_bytes_, channels_;
  const Index taps_;
  const Index sum_pitch_;  // elements from tap to tap of a partial sum
  const Index x_row_bytes_, x_plane_bytes_, x_image_bytes_, g_row_bytes_;
  const Index tap_row_bytes_, kernel_sum_bytes_;  // of a partial sum
  const Index planes_;                            // of the cotangent, for one kernel
  const Index kernels_;
  const TileShape<GradTile>* shapes_ = nullptr;  // null: the general loop
  Index height_ = 1;                             // rows of a unit
  Index row_groups_, pieces_, piece_columns_, units_;
  Index chunks_, channel_blocks_, block_channels_;
  bool separate_sums_;  // partial sums are not taken in dw itself
  char* sums_ = nullptr;
  Scratch sums_scratch_;
};

// Taps whose distance would meet the same sets of the caches lie a vector further apart.
Index sum_pitch(Index channels, Index sum_bytes, Index lanes) {
  return channels * sum_bytes % kConflictingPitchBytes == 0 ? channels + lanes : channels;
}

KernelGrad::KernelGrad(const Geometry& g, const Loops& loops, Dtype dtype, const void* x, const void* cotangent,
                       void* dw)
    : g_(g),
      loops_(loops),
      x_(static_cast<const char*>(x)),
      cotangent_(static_cast<const char*>(cotangent)),
      dw_(static_cast<char*>(dw)),
      element_bytes_(element_bytes(dtype)),
      sum_bytes_(sum_bytes(dtype)),
      channels_(g.channels),
      taps_(g.window[0] * g.window[1] * g.window[2]),
      sum_pitch_(sum_pitch(channels_, sum_bytes_, loops.lanes)),
      x_row_bytes_(g.in[2] * channels_ * element_bytes_),
      x_plane_bytes_(g.in[1] * x_row_bytes_),
      x_image_bytes_(g.in[0] * x_plane_bytes_),
      g_row_bytes_(g.out[2] * channels_ * element_bytes_),
      tap_row_bytes_(g.window[2] * sum_pitch_ * sum_bytes_),
      kernel_sum_bytes_(taps_ * sum_pitch_ * sum_bytes_),
      planes_(g.batch * g.out[0]),
      kernels_(g.stack * g.multiplier) {
  choose_tiles();
  cut_into_blocks();
}

void KernelGrad::choose_tiles() {
  // The specialized loops test only those columns that reach beyond the first or the last output.
  const bool specialized = channels_ >= loops_.lanes && g_.dilation[2] == 1 && g_.window[2] - 1 >= g_.low[2] &&
                           (g_.out[2] - 1) * g_.stride[2] - g_.low[2] < g_.in[2];
  if (specialized) shapes_ = find_shapes(loops_.grads, g_.window[2], g_.stride[2]);
  if (!shapes_ || g_.out[1] <= 1) return;
  // The first height of the list, unless another leaves fewer rows over at the end.
  height_ = shapes_->height;
  auto covered = [&](Index rows) { return ceil_div(g_.out[1], rows) * rows; };
  for (const TileShape<GradTile>* shape = shapes_; shape->loop; ++shape) {
    if (shape->height > 1 && covered(shape->height) < covered(height_)) height_ = shape->height;
  }
}

void KernelGrad::cut_into_blocks() {
  row_groups_ = ceil_div(g_.out[1], height_);
  const Index groups = planes_ * row_groups_, positions = planes_ * g_.out[1] * g_.out[2];
  pieces_ = 1;
  if (groups < kMostPieceUnits) {
    const Index most = std::min(g_.out[2] / kLeastPieceColumns, kMostPieceUnits / std::max<Index>(groups, 1));
    pieces_ = std::max<Index>(most, 1);
  }
  piece_columns_ = ceil_div(g_.out[2], pieces_);
  units_ = groups * pieces_;
  // The sums of all chunks are small compared with the summed arrays; channels are split if that is not enough for all
  // threads.
  const Index vectors = ceil_div(channels_, loops_.lanes);
  const Index wanted = blocks_worth(positions, vectors, taps_, kMostGradBlocks);
  const Index most =
      std::min(positions / kLeastChunkPositions, kPartialSumsBytes / std::max<Index>(kernel_sum_bytes_ * kernels_, 1));
  chunks_ = std::max<Index>(std::min({wanted, units_, most}), 1);
  channel_blocks_ = std::min(std::max<Index>(channels_ / (kBlockVectors * loops_.lanes), 1), ceil_div(wanted, chunks_));
  block_channels_ = channels_ / channel_blocks_ / loops_.lanes * loops_.lanes;
  separate_sums_ = chunks_ > 1 || loops_.narrow || sum_pitch_ != channels_;
}

bool KernelGrad::allocate(Scratch& kept) {
  sums_ = separate_sums_ ? scratch(kernels_ * chunks_ * kernel_sum_bytes_, kept, sums_scratch_) : dw_;
  return sums_;
}

// Where the plane of x under a tap of the first axis begins, for a plane of the cotangent, and where its row begins. In
// bytes.
Index KernelGrad::x_plane_offset(Index plane, Index tap) const {
  const Index position = plane % g_.out[0] * g_.stride[0] + tap * g_.dilation[0] - g_.low[0];
  if (position < 0 || position >= g_.in[0]) return kOutside;
  return plane / g_.out[0] * x_image_bytes_ + position * x_plane_bytes_;
}
Index KernelGrad::x_row_offset(Index plane_offset, Index row, Index tap) const {
  const Index position = row * g_.stride[1] + tap * g_.dilation[1] - g_.low[1];
  if (plane_offset == kOutside || position < 0 || position >= g_.in[1]) return kOutside;
  return plane_offset + position * x_row_bytes_;
}

void KernelGrad::block(Index index) const {
  const Index channel_block = index % channel_blocks_;
  index /= channel_blocks_;
  const Index chunk = index % chunks_, kernel = index / chunks_;
  Block block;
  block.x = x_ + kernel / g_.multiplier * g_.batch * x_image_bytes_;
  block.cotangent = cotangent_ + kernel * planes_ * g_.out[1] * g_row_bytes_;
  block.sum = sums_ + (kernel * chunks_ + chunk) * kernel_sum_bytes_;
  block.begin = channel_block * block_channels_;
  block.end = channel_block + 1 == channel_blocks_ ? channels_ : block.begin + block_channels_;
  block.first = chunk * units_ / chunks_;
  block.last = (chunk + 1) * units_ / chunks_;
  for (Index k = 0; k < taps_; ++k) {
    std::memset(block.sum + (k * sum_pitch_ + block.begin) * sum_bytes_, 0, (block.end - block.begin) * sum_bytes_);
  }
  if (shapes_) {
    add_tiles(block);
  } else {
    add_rows(block);
  }
}

void KernelGrad::add_tiles(const Block& block) const {
  GradTile tile{};
  tile.x = block.x;
  tile.dw = block.sum;
  tile.columns = g_.in[2];
  tile.tap_pitch = sum_pitch_;
  tile.pitch = tile.g_pitch = channels_;
  tile.begin = block.begin;
  tile.end = block.end;
  std::vector<TapRow> tap_rows;
  for (Index unit = block.first; unit < block.last; ++unit) {
    const Index group = unit / pieces_, plane = group / row_groups_, row = group % row_groups_ * height_;
    const Index rows = std::min(height_, g_.out[1] - row);
    tile.square = g_.stride[1] == g_.stride[2] && g_.dilation[1] == 1 && g_.window[0] == 1 && rows == height_;
    tap_rows.clear();
    for (Index a = 0; a < g_.window[0]; ++a) {
      const Index plane_offset = x_plane_offset(plane, a);
      for (Index b = 0; b < g_.window[1]; ++b) {
        TapRow entry{(a * g_.window[1] + b) * tap_row_bytes_, {}};
        bool any = false;
        for (Index h = 0; h < height_; ++h) {
          entry.x_bytes[h] = h < rows ? x_row_offset(plane_offset, row + h, b) : kOutside;
          any |= entry.x_bytes[h] != kOutside;
        }
        if (any) tap_rows.push_back(entry);
      }
    }
    tile.rows = tap_rows.data();
    tile.count = static_cast<Index>(tap_rows.size());
    const Index end = std::min((unit % pieces_ + 1) * piece_columns_, g_.out[2]);
    for (Index column = unit % pieces_ * piece_columns_; column < end;) {
      const TileShape<GradTile>* shape = shapes_;
      while (shape->height != height_ || shape->width > end - column) ++shape;
      tile.column = column * g_.stride[2] - g_.low[2];
      for (Index h = 0; h < height_; ++h) {  // rows beyond the last read nothing of x
        tile.g[h] = block.cotangent + (plane * g_.out[1] + row + std::min(h, rows - 1)) * g_row_bytes_ +
                    column * channels_ * element_bytes_;
      }
      run_loop(shape->loop, tile);
      column += shape->width;
    }
  }
}

void KernelGrad::add_rows(const Block& block) const {
  GradRow list[kGeneralGradUnits];
  GradRows rows{};
  rows.columns = g_.in[2];
  rows.taps = g_.window[2];
  rows.step = g_.dilation[2];
  rows.stride = g_.stride[2];
  rows.pitch = channels_;
  rows.tap_pitch = sum_pitch_;
  rows.begin = block.begin;
  rows.end = block.end;
  rows.rows = list;
  for (Index from = block.first; from < block.last;) {
    const Index piece = from % pieces_, count = pieces_ > 1 ? 1 : std::min(kGeneralGradUnits, block.last - from);
    rows.outputs = std::min(piece_columns_, g_.out[2] - piece * piece_columns_);
    rows.column = piece * piece_columns_ * g_.stride[2] - g_.low[2];
    for (Index a = 0; a < g_.window[0] && rows.outputs > 0; ++a) {
      for (Index b = 0; b < g_.window[1]; ++b) {
        rows.count = 0;
        for (Index unit = from; unit < from + count; ++unit) {
          const Index row = unit / pieces_;
          const Index offset = x_row_offset(x_plane_offset(row / g_.out[1], a), row % g_.out[1], b);
          if (offset == kOutside) continue;
          list[rows.count++] = {
              block.cotangent + row * g_row_bytes_ + piece * piece_columns_ * channels_ * element_bytes_,
              block.x + offset};
        }
        rows.dw = block.sum + (a * g_.window[1] + b) * tap_row_bytes_;
        run_loop(loops_.general_grad, rows);
      }
    }
    from += count;
  }
}

template <class Sum>
bool KernelGrad::finish(Pool& pool) const {
  if (!separate_sums_) return true;
  const Index rows = kernels_ * taps_, part_rows = std::max<Index>(kFinishElements / channels_, 1);
  return parallel_for(pool, ceil_div(rows, part_rows), false, [&](Index part, Index) {
    for (Index row = part * part_rows; row < std::min((part + 1) * part_rows, rows); ++row) {
      char* result = dw_ + row * channels_ * element_bytes_;
      Sum* partial =
          reinterpret_cast<Sum*>(sums_ + row / taps_ * chunks_ * kernel_sum_bytes_) + row % taps_ * sum_pitch_;
      Sum* total = loops_.narrow ? partial : reinterpret_cast<Sum*>(result);
      if (total != partial) std::memcpy(total, partial, channels_ * sizeof(Sum));
      for (Index chunk = 1; chunk < chunks_; ++chunk) {
        const Sum* next = partial + chunk * taps_ * sum_pitch_;
        for (Index i = 0; i < channels_; ++i) total[i] += next[i];
      }
      if (loops_.narrow) loops_.narrow(reinterpret_cast<const char*>(total), result, channels_);
    }
    return true;
  });
}

}  // namespace

bool kernel_grad(Dtype dtype, const Geometry& g, const void* x, const void* cotangent, void* dw, Pool& pool) {
  return false_without_memory([&] {
    static thread_local Scratch kept;
    KernelGrad grad(g, loops_for(dtype, g.channels), dtype, x, cotangent, dw);
    auto block = [&](Index index, Index) {
      grad.block(index);
      return true;
    };
    return grad.allocate(kept) && parallel_for(pool, grad.blocks(), alternate_direction(), block) &&
           (dtype == Dtype::f64 ? grad.finish<double>(pool) : grad.finish<float>(pool));
  });
}

}  // namespace depthwise
