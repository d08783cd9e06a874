// Forward, and the gradient in x: both are correlations once strides are split into phases.
//
//   images          blocks                  bands                    tiles
//   y (N, H, W, C)  rows of one image       rows of one block        outputs of one band
//
//   +---------+
//   | image 0 |     +-------------------+   +-------------------+   +------+------+-----+
//   +---------+     | block: 14 rows    |   | band: 7 rows      |-->| tile | tile |  <--| 7 rows
//   | image 1 |---->|                   |-->+-------------------+   |      |      |     | x 2 columns
//   +---------+     +-------------------+   | band: 7 rows      |   +------+------+-----+
//   | ...     |     | block: 14 rows    |   +-------------------+    the last one overlaps its neighbour
//   +---------+     +-------------------+
//                   one thread at a time    one height              registers of one loop, for one vector of
//                                                                   channels after the other
//
// Glossary
//   kernel   the filter, w; never a piece of code
//   tap      one position of the window
//   loop     compiled code for tiles of one shape under one window (loops.cc)
//   tile     outputs whose sums are in registers together: `width` columns of `height` rows
//   run      the tiles of a band, left to right
//   band     the rows that one row of tiles covers
//   block    the work that a thread takes at once: a cut of the channels of an image
//   cut      the rows and columns of a block; every image is cut in the same way, and a Plan is for a cut of any image
//   plane    a position along the first spatial axis (of three): an image of rank 2 is one plane
//   phase    outputs that share their taps; forward there is one along each axis (phases.h)
//   stage    copy what a block reads into scratch memory, packed and in the type of the sums
//   vector   as many channels as a register holds
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "dispatch.h"
#include "geometry.h"
#include "loops.h"
#include "memory.h"
#include "phases.h"
#include "threads.h"
#include "tuning.h"

namespace depthwise {
namespace {

using Shapes = const TileShape<Tile>*;

// ---------------------------------------------------------------------------------------------------- Choices

// The shapes for a phase of the last axis, if there are at least as many channels as a vector has; null if none fits.
Shapes shapes_for(const TileLoops& loops, const Phase& phase, Index columns) {
  if (phase.step != 1 && phase.taps != 1) return nullptr;
  if (phase.column + phase.taps - 1 >= 0 && phase.column + (phase.count - 1) * phase.stride < columns) {
    if (const Shapes shapes = find_shapes(loops.specialized, phase.taps, phase.stride)) return shapes;
  }
  return phase.taps >= kWideTaps && phase.stride == 1 && loops.wide->loop ? loops.wide : nullptr;
}

// The best of `shapes` of this height for `count` outputs in each of `rows` rows, and its cost; null if there is none.
// The last tile overlaps its neighbour: no tile may be wider or higher than all outputs.
Shapes choose_tile(Shapes shapes, Index count, Index rows, int height, double& cost) {
  Shapes best = nullptr;
  if (height > rows) return best;
  for (; shapes->loop; ++shapes) {
    if (shapes->height != height || (shapes->width > count && shapes->width > 1)) continue;
    const double found = static_cast<double>(ceil_div(count, shapes->width) * shapes->width) *
                         static_cast<double>(ceil_div(rows, height) * height) * relative_cost(shapes->width * height);
    if (!best || found < cost) best = shapes, cost = found;
  }
  return best;
}

// Whether columns `pitch_bytes` apart share so few of an L1 cache's sets that those under a window of `taps` taps evict
// each other many times.
bool conflict_in_l1(Index pitch_bytes, Index taps) {
  const Index lines = pitch_bytes / kCacheLineBytes;
  return pitch_bytes % kCacheLineBytes == 0 && taps >= kPackedTapsPerSet * (kCacheSets / std::gcd(lines, kCacheSets));
}

// Whether the input is staged. `taps_across` and `taps` are the taps of an output along the last axis and in all.
bool is_staged(const Loops& loops, Index taps_across, Index taps, Index columns, Index pitch_bytes) {
  if (!loops.stage) return false;
  // Narrow floats under windows without loops of their own.
  if (loops.widen && (taps_across >= kStagedTapsAcross || taps >= kStagedTaps)) return true;
  // Windows that reach over most of a row read it again for most tiles.
  return taps_across >= kPackedTapsAcross && 2 * taps_across > columns && conflict_in_l1(pitch_bytes, taps);
}

// ---------------------------------------------------------------------------------------------------- Plans

// The rows or columns that outputs of several phases read, of `size` that there are.
class ReadRange {
 public:
  explicit ReadRange(Index size) : first_(size), size_(size) {}
  void add(const Phase& phase, Index begin, Index end) {
    if (begin >= end || !phase.taps) return;
    const Index last = phase.column + (end - 1) * phase.stride + (phase.taps - 1) * phase.step;
    first_ = std::min(first_, std::max<Index>(phase.column + begin * phase.stride, 0));
    end_ = std::max(end_, std::min(last + 1, size_));
  }
  Index first() const { return first_; }
  Index count() const { return std::max<Index>(end_ - first_, 0); }

 private:
  Index first_, end_ = 0;
  const Index size_;
};

// How a cut is computed, for any image and any channels.
struct Plan {
  struct Plane {
    Index position, tap;
  };
  // The tiles of a phase of the last axis.
  struct Run {
    Shapes shape;
    Index begin, end, next;
  };
  struct Band {
    const Phase* phase;
    Index row;
    int height;
    std::size_t first_run, first_tap_row, tap_rows;
  };
  Index cut = -1;
  Index y_plane_bytes = 0;                                       // where the cut's plane begins in an image of y
  std::vector<Plane> planes;                                     // that are read
  Index first_row = 0, rows = 0, first_column = 0, columns = 0;  // that are read of each plane
  std::vector<Run> runs;  // one for each phase of the last axis, for each phase of the one before
  std::vector<Band> bands;
  std::vector<TapRow> tap_rows;
  Index chunk = 0, staged_bytes = 0;  // channels staged at a time, and their size
};

// Data that a thread keeps from one block for the next.
struct ThreadState {
  Plan plan;
  // The kernel, or the first of those that are summed, and its bias, in the type of the sums: each thread converts
  // narrow floats for itself, into its own caches.
  Index kernel = -1;
  const char *w = nullptr, *bias = nullptr;
  // The part of these, and of the staged input, that exceeds what a thread keeps.
  Scratch kernel_scratch, staged_scratch;
};

// ---------------------------------------------------------------------------------------------------- Correlation

// A correlation cut into blocks, which any threads may compute: some rows of an image; columns, if there is only one
// row; and some of the channels, if those are too few.
class Correlation {
 public:
  Correlation(const CorrelationSpec& spec, const Loops& loops, Dtype dtype, const void* x, const void* w,
              const void* bias, Activation activation, void* y, int threads);
  Index blocks() const { return images_ * cuts_ * channel_blocks_; }
  // `state` is of the thread's last block, or new. False if there is no memory; then nothing is done.
  bool block(Index index, ThreadState& state) const;

 private:
  bool choose_shapes(const TileLoops& loops);
  void cut_into_blocks(int threads);
  void choose_stores();

  Plan plan(Index cut) const;
  int best_height(const Plan& plan, Index rows) const;
  void add_tap_rows(Plan& plan, const Phase& phase, Index row, int height) const;
  Index outputs_in_cut(const Plan& plan, const Phase& phase) const;
  Index first_column_of(Index cut) const { return cut % column_blocks_ * block_columns_; }

  bool load_kernel(Index kernel, ThreadState& state) const;
  void stage(const Plan& plan, const char* x_image, Index begin, char* to) const;
  void run_band(Plan& plan, const Plan::Band& band, char* y, Tile& tile) const;

  // Between the planes, rows and images of what is read for a cut: of x itself, or of what is staged.
  struct ReadPitches {
    Index row_bytes, plane_bytes, image_bytes;
  };
  ReadPitches read_pitches(const Plan& plan) const;

  const CorrelationSpec spec_;
  const Loops loops_;
  const char *const x_, *const w_, *const bias_;
  const Activation activation_;
  char* const y_;
  const Index element_bytes_, sum_bytes_, channels_;
  const std::vector<Phase> plane_phases_, row_phases_, column_phases_;
  // Images that are written, and those that are summed for each: transposed, the multiplier's.
  const Index images_, summed_;
  const Index taps_;
  const Index x_row_bytes_, x_plane_bytes_, x_image_bytes_;
  const Index y_row_bytes_, y_plane_bytes_, y_image_bytes_;
  const Index w_row_bytes_, w_plane_bytes_;  // in the type of the sums
  std::vector<Shapes> shapes_;               // for each phase of the last axis
  bool staged_;
  Index block_rows_, block_columns_, block_channels_;
  Index row_blocks_, column_blocks_, channel_blocks_, cuts_;
  bool stream_, prefetch_;
};

Correlation::Correlation(const CorrelationSpec& spec, const Loops& loops, Dtype dtype, const void* x, const void* w,
                         const void* bias, Activation activation, void* y, int threads)
    : spec_(spec),
      loops_(loops),
      x_(static_cast<const char*>(x)),
      w_(static_cast<const char*>(w)),
      bias_(static_cast<const char*>(bias)),
      activation_(activation),
      y_(static_cast<char*>(y)),
      element_bytes_(element_bytes(dtype)),
      sum_bytes_(sum_bytes(dtype)),
      channels_(spec.geometry.channels),
      plane_phases_(phases(spec, 0)),
      row_phases_(phases(spec, 1)),
      column_phases_(phases(spec, 2)),
      images_(spec.geometry.stack * spec.geometry.batch * (spec.transposed ? 1 : spec.geometry.multiplier)),
      summed_(spec.transposed ? spec.geometry.multiplier : 1),
      taps_(spec.geometry.window[0] * spec.geometry.window[1] * spec.geometry.window[2]),
      x_row_bytes_(spec.in[2] * channels_ * element_bytes_),
      x_plane_bytes_(spec.in[1] * x_row_bytes_),
      x_image_bytes_(spec.in[0] * x_plane_bytes_),
      y_row_bytes_(spec.out[2] * channels_ * element_bytes_),
      y_plane_bytes_(spec.out[1] * y_row_bytes_),
      y_image_bytes_(spec.out[0] * y_plane_bytes_),
      w_row_bytes_(spec.geometry.window[2] * channels_ * sum_bytes_),
      w_plane_bytes_(spec.geometry.window[1] * w_row_bytes_),
      shapes_(column_phases_.size(), loops.general) {
  const bool vectors = channels_ >= loops_.lanes;
  // Transposed, strides leave each output a part of the taps.
  const Index taps_across = most_taps(column_phases_);
  const Index taps = most_taps(plane_phases_) * most_taps(row_phases_) * taps_across;
  staged_ = vectors && is_staged(loops_, taps_across, taps, spec_.in[2], channels_ * element_bytes_) &&
            choose_shapes(loops_.staged);
  if (!staged_ && vectors) choose_shapes(loops_.direct);
  cut_into_blocks(threads);
  choose_stores();
}

// Takes for each phase of the last axis the shapes that there are for it, or else the general ones; false if any is
// missing.
bool Correlation::choose_shapes(const TileLoops& loops) {
  bool all = true;
  for (std::size_t i = 0; i < column_phases_.size(); ++i) {
    const Phase& phase = column_phases_[i];
    const Shapes found = phase.taps ? shapes_for(loops, phase, spec_.in[2]) : loops_.general;
    shapes_[i] = found ? found : loops_.general;
    all &= found != nullptr;
  }
  return all;
}

void Correlation::cut_into_blocks(int threads) {
  const Geometry& g = spec_.geometry;
  const Index* const out = spec_.out;
  const Index vectors = ceil_div(channels_, loops_.lanes);
  const Index outputs = g.stack * g.multiplier * g.batch * g.out[0] * g.out[1] * g.out[2];
  const Index wanted = blocks_worth(outputs, vectors, taps_, kBlocksPerThread * threads);
  const Index planes = images_ * out[0];
  const Index phases = static_cast<Index>(row_phases_.size());
  block_rows_ = std::min(out[1], kMostBlockRows * phases);
  auto halve_rows = [&](Index least) {
    while (block_rows_ > least && planes * ceil_div(out[1], block_rows_) < wanted)
      block_rows_ = ceil_div(block_rows_, 2);
  };
  // Rows at the edge of a block are staged twice: it is better to split the channels then.
  if (!staged_ || vectors <= kBlockVectors) halve_rows(kBlockRows * phases);
  block_columns_ = out[2];
  if (out[1] == 1 && column_phases_.size() == 1) {
    while (block_columns_ > kLeastBlockColumns && planes * ceil_div(out[2], block_columns_) < wanted) {
      block_columns_ = ceil_div(block_columns_, 2);
    }
    block_columns_ = ceil_div(block_columns_, kMostColumns) * kMostColumns;
    if (staged_) block_columns_ = std::min(block_columns_, kMostStagedColumns);
  }
  column_blocks_ = ceil_div(out[2], block_columns_);
  block_channels_ = channels_;
  if (vectors > kBlockVectors && planes * ceil_div(out[1], block_rows_) * column_blocks_ < wanted) {
    block_channels_ = kBlockVectors * loops_.lanes;
  }
  // The last block takes the rest: each has whole vectors.
  channel_blocks_ = std::max<Index>(channels_ / block_channels_, 1);
  if (channel_blocks_ == 1) halve_rows(kLeastBlockRows);
  row_blocks_ = ceil_div(out[1], block_rows_);
  cuts_ = column_blocks_ * row_blocks_ * out[0];
}

void Correlation::choose_stores() {
  const Geometry& g = spec_.geometry;
  const Index y_bytes = images_ * y_image_bytes_;
  const Index x_bytes = g.stack * g.batch * (spec_.transposed ? g.multiplier : 1) * x_image_bytes_;
  const MemorySizes& sizes = memory_sizes();
  // Only whole, aligned vectors can be stored past the caches, and no narrow floats: a vector of them is half a line.
  const bool aligned =
      channels_ % loops_.lanes == 0 && reinterpret_cast<std::uintptr_t>(y_) % (loops_.lanes * element_bytes_) == 0;
  stream_ = y_bytes >= sizes.stream_from_bytes && y_bytes <= sizes.reused_by_malloc_bytes &&
            x_bytes + y_bytes > sizes.last_level_cache_bytes / kStreamCacheParts && !loops_.widen && aligned;
  prefetch_ = x_bytes > sizes.last_level_cache_bytes / kPrefetchCacheParts;
}

// ---------------------------------------------------------------------------------------------------- Planning

// The first output of a phase in this row or a later one.
Index first_output(const Phase& phase, Index row) {
  return std::max<Index>(ceil_div(row - phase.first, phase.pitch), 0);
}

// The outputs of a phase of the last axis in the plan's cut.
Index Correlation::outputs_in_cut(const Plan& plan, const Phase& phase) const {
  const Index begin = first_column_of(plan.cut);
  return std::min(begin + block_columns_, phase.count) - begin;
}

Correlation::ReadPitches Correlation::read_pitches(const Plan& plan) const {
  if (!staged_) return {x_row_bytes_, x_plane_bytes_, spec_.geometry.batch * x_image_bytes_};
  const Index row_bytes = plan.columns * plan.chunk * sum_bytes_, plane_bytes = plan.rows * row_bytes;
  return {row_bytes, plane_bytes, static_cast<Index>(plan.planes.size()) * plane_bytes};
}

Plan Correlation::plan(Index cut) const {
  Plan plan;
  plan.cut = cut;
  const Index column_begin = first_column_of(cut);
  const Index row_begin = cut / column_blocks_ % row_blocks_ * block_rows_;
  const Index row_end = std::min(row_begin + block_rows_, spec_.out[1]);
  const Index plane = cut / column_blocks_ / row_blocks_, plane_phases = static_cast<Index>(plane_phases_.size());
  const Phase& plane_phase = plane_phases_[plane % plane_phases];
  plan.y_plane_bytes = plane * y_plane_bytes_;
  for (Index a = 0; a < plane_phase.taps; ++a) {
    const Index position = plane_phase.column + plane / plane_phases * plane_phase.stride + a * plane_phase.step;
    if (position >= 0 && position < spec_.in[0])
      plan.planes.push_back({position, plane_phase.tap + a * plane_phase.tap_step});
  }

  ReadRange rows(spec_.in[1]), columns(spec_.in[2]);
  for (const Phase& phase : row_phases_) {
    rows.add(phase, first_output(phase, row_begin), std::min(first_output(phase, row_end), phase.count));
  }
  for (const Phase& phase : column_phases_)
    columns.add(phase, column_begin, column_begin + outputs_in_cut(plan, phase));
  plan.first_row = rows.first();
  plan.rows = rows.count();
  plan.first_column = staged_ ? columns.first() : 0;
  plan.columns = staged_ ? columns.count() : spec_.in[2];
  plan.chunk = block_channels_;
  if (staged_) {
    // What is staged at a time stays in a near cache.
    const Index positions = summed_ * static_cast<Index>(plan.planes.size()) * plan.rows * plan.columns;
    const Index fitting = kStagedBytes / std::max<Index>(positions * loops_.lanes * sum_bytes_, 1);
    const Index vectors = std::clamp<Index>(fitting, 1, kStagedVectors);
    const Index chunks = ceil_div(ceil_div(block_channels_, loops_.lanes), vectors);
    plan.chunk = std::min(ceil_div(ceil_div(block_channels_, chunks), loops_.lanes) * loops_.lanes, block_channels_);
    plan.staged_bytes = summed_ * read_pitches(plan).image_bytes;
  }

  for (const Phase& phase : row_phases_) {
    const Index begin = first_output(phase, row_begin), end = std::min(first_output(phase, row_end), phase.count);
    if (begin >= end) continue;
    const int height = best_height(plan, end - begin);
    const std::size_t first_run = plan.runs.size();
    for (std::size_t i = 0; i < column_phases_.size(); ++i) {
      const Index count = outputs_in_cut(plan, column_phases_[i]);
      double cost = 0;
      plan.runs.push_back(
          {choose_tile(shapes_[i], count, end - begin, height, cost), column_begin, column_begin + count, 0});
    }
    for (Index next = begin; next < end; next += height) {
      const Index row = std::max(std::min(next, end - height), begin);
      const std::size_t first_tap_row = plan.tap_rows.size();
      add_tap_rows(plan, phase, row, height);
      plan.bands.push_back({&phase, row, height, first_run, first_tap_row, plan.tap_rows.size() - first_tap_row});
    }
  }
  return plan;
}

// The height of a band's tiles, which those of all phases of the last axis share.
int Correlation::best_height(const Plan& plan, Index rows) const {
  double best = 0;
  int height = 0;
  for (Shapes shape = shapes_[0]; shape->loop; ++shape) {
    double total = 0;
    bool possible = true;
    for (std::size_t i = 0; i < column_phases_.size(); ++i) {
      const Index count = outputs_in_cut(plan, column_phases_[i]);
      if (count <= 0) continue;
      double cost = 0;
      possible &= choose_tile(shapes_[i], count, rows, shape->height, cost) != nullptr;
      total += cost;
    }
    if (possible && (!height || total < best)) height = shape->height, best = total;
  }
  return height;
}

// Adds the rows of taps of a band that reach the input, with what each reads.
void Correlation::add_tap_rows(Plan& plan, const Phase& phase, Index row, int height) const {
  const ReadPitches pitches = read_pitches(plan);
  for (Index m = 0; m < summed_; ++m) {
    for (std::size_t a = 0; a < plan.planes.size(); ++a) {
      const Index plane_bytes = staged_
                                    ? static_cast<Index>(a) * pitches.plane_bytes - plan.first_row * pitches.row_bytes
                                    : plan.planes[a].position * pitches.plane_bytes;
      const Index w_plane_bytes = (m * spec_.geometry.window[0] + plan.planes[a].tap) * w_plane_bytes_;
      for (Index b = 0; b < phase.taps; ++b) {
        TapRow entry{w_plane_bytes + (phase.tap + b * phase.tap_step) * w_row_bytes_, {}};
        bool any = false;
        for (int h = 0; h < height; ++h) {
          const Index read = phase.column + (row + h) * phase.stride + b * phase.step;
          const bool inside = read >= 0 && read < spec_.in[1];
          entry.x_bytes[h] = inside ? m * pitches.image_bytes + plane_bytes + read * pitches.row_bytes : kOutside;
          any |= inside;
        }
        if (any) plan.tap_rows.push_back(entry);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------- Computing

bool Correlation::load_kernel(Index kernel, ThreadState& state) const {
  if (state.kernel == kernel) return true;
  state.w = w_ + kernel * taps_ * channels_ * element_bytes_;
  state.bias = bias_ ? bias_ + kernel * channels_ * element_bytes_ : nullptr;
  if (loops_.widen) {
    static thread_local Scratch kept;
    const Index count = summed_ * taps_ * channels_;
    char* const to = scratch((count + channels_) * sum_bytes_, kept, state.kernel_scratch);
    if (!to) return false;
    loops_.widen(state.w, to, count);
    state.w = to;
    if (bias_) {
      loops_.widen(state.bias, to + count * sum_bytes_, channels_);
      state.bias = to + count * sum_bytes_;
    }
  }
  state.kernel = kernel;
  return true;
}

// Packs what the plan reads of an image, or of each that is summed, for its chunk of channels from `begin` on.
void Correlation::stage(const Plan& plan, const char* x_image, Index begin, char* to) const {
  for (Index m = 0; m < summed_; ++m) {
    for (const Plan::Plane& plane : plan.planes) {
      const char* from = x_image + m * spec_.geometry.batch * x_image_bytes_ + plane.position * x_plane_bytes_ +
                         plan.first_row * x_row_bytes_ + (plan.first_column * channels_ + begin) * element_bytes_;
      for (Index row = 0; row < plan.rows; ++row) {
        loops_.stage(from, channels_ * element_bytes_, to, plan.columns, plan.chunk);
        from += x_row_bytes_;
        to += plan.columns * plan.chunk * sum_bytes_;
      }
    }
  }
}

// Computes a band of the plane of y at `y`. Several phases take turns, tile by tile: their outputs alternate in memory.
void Correlation::run_band(Plan& plan, const Plan::Band& band, char* y, Tile& tile) const {
  const Phase& down = *band.phase;
  tile.rows = plan.tap_rows.data() + band.first_tap_row;
  Plan::Run* const runs = plan.runs.data() + band.first_run;
  for (std::size_t i = 0; i < column_phases_.size(); ++i) runs[i].next = runs[i].begin;
  for (bool left = true; left;) {
    left = false;
    for (std::size_t i = 0; i < column_phases_.size(); ++i) {
      Plan::Run& run = runs[i];
      if (run.next >= run.end) continue;
      left = true;
      const Phase& across = column_phases_[i];
      const Index width = run.shape->width;
      // The last tile overlaps its neighbour.
      const Index j = std::max(std::min(run.next, run.end - width), run.begin);
      tile.tiles = column_phases_.size() == 1 ? std::max<Index>((run.end - j) / width, 1) : 1;
      run.next = j + tile.tiles * width;
      tile.count = across.taps ? static_cast<Index>(band.tap_rows) : 0;
      tile.square =
          down.stride == across.stride && down.step == 1 && summed_ * static_cast<Index>(plan.planes.size()) == 1;
      tile.taps = across.taps;
      tile.step = across.step;
      tile.stride = across.stride;
      tile.tap_offset = across.tap * channels_;
      tile.tap_pitch = across.tap_step * channels_;
      tile.y_pitch = across.pitch * channels_;
      tile.column = across.column + j * across.stride - plan.first_column;
      for (int h = 0; h < band.height; ++h) {
        tile.y[h] = y + (down.first + (band.row + h) * down.pitch) * y_row_bytes_ +
                    (across.first + j * across.pitch) * channels_ * element_bytes_;
      }
      run_loop(run.shape->loop, tile);
    }
  }
}

bool Correlation::block(Index index, ThreadState& state) const {
  const Geometry& g = spec_.geometry;
  const Index channel_block = index % channel_blocks_, cut = index / channel_blocks_ % cuts_;
  const Index image = index / channel_blocks_ / cuts_;
  if (state.plan.cut != cut) state.plan = plan(cut);
  Plan& plan = state.plan;
  // The kernel of this image of y and the image of x that is read for it; if several are summed, the first of them.
  const Index stack = image / g.batch / (spec_.transposed ? 1 : g.multiplier);
  if (!load_kernel(spec_.transposed ? stack * g.multiplier : image / g.batch, state)) return false;
  const char* const x_image = x_ + (stack * g.batch * summed_ + image % g.batch) * x_image_bytes_;
  char* const y_plane = y_ + image * y_image_bytes_ + plan.y_plane_bytes;

  Tile tile{};
  tile.columns = plan.columns;
  tile.w = state.w;
  tile.bias = state.bias;
  tile.activation = activation_;
  tile.stream = stream_;
  tile.prefetch = prefetch_;
  const Index begin = channel_block * block_channels_;
  const Index end = channel_block + 1 == channel_blocks_ ? channels_ : begin + block_channels_;
  const Index chunk = staged_ ? plan.chunk : end - begin;
  for (Index c = begin; c < end; c += chunk) {
    // The last chunk overlaps its neighbour.
    tile.begin = std::max(std::min(c, end - chunk), begin);
    tile.end = std::min(tile.begin + chunk, end);
    tile.x = x_image;
    tile.pitch = channels_;
    if (staged_) {
      static thread_local Scratch kept;
      char* const to = scratch(plan.staged_bytes, kept, state.staged_scratch);
      if (!to) return false;
      stage(plan, x_image, tile.begin, to);
      tile.x = to - tile.begin * sum_bytes_;
      tile.pitch = chunk;
    }
    for (const Plan::Band& band : plan.bands) run_band(plan, band, y_plane, tile);
  }
#if defined(__x86_64__)
  if (stream_) __builtin_ia32_sfence();  // before others read what was stored past the caches
#endif
  return true;
}

bool correlate(const CorrelationSpec& spec, Dtype dtype, const void* x, const void* w, const void* bias,
               Activation activation, void* y, Pool& pool) {
  const Geometry& g = spec.geometry;
  const Index outputs = g.stack * g.batch * spec.out[0] * spec.out[1] * spec.out[2] * g.channels;
  if (outputs == 0) return true;
  request_huge_pages(y, outputs * (spec.transposed ? 1 : g.multiplier) * element_bytes(dtype));
  const Loops loops = loops_for(dtype, g.channels);
  const Correlation correlation(spec, loops, dtype, x, w, bias, activation, y, pool.threads());
  std::vector<ThreadState> states(std::max(pool.threads(), 1));
  return parallel_for(pool, correlation.blocks(), alternate_direction(),
                      [&](Index index, Index thread) { return correlation.block(index, states[thread]); });
}

}  // namespace

bool forward(Dtype dtype, const Geometry& g, const void* x, const void* w, const void* bias, Activation activation,
             void* y, Pool& pool) {
  return false_without_memory(
      [&] { return correlate({g, false, g.in, g.out}, dtype, x, w, bias, activation, y, pool); });
}

bool input_grad(Dtype dtype, const Geometry& g, const void* cotangent, const void* w, void* dx, Pool& pool) {
  return false_without_memory(
      [&] { return correlate({g, true, g.out, g.in}, dtype, cotangent, w, nullptr, Activation::identity, dx, pool); });
}

}  // namespace depthwise
