// Every heuristic of the library: its value, its unit, and the measurement behind it, or that none is recorded.
//
// Measured on 2 cores of a Zen 5 with AVX-512 (48 KiB L1d and 1 MiB L2 per core, 32 MiB L3 shared), float32, 2 threads;
// times are medians in ms. A layer is written as rows x columns x channels, k the window; batch 8 unless stated. To
// change a value, compare two builds: python -m benchmarks.builds OLD.so NEW.so.
#pragma once

#include <chrono>

#include "depthwise.h"

namespace depthwise {

// ---------------------------------------------------------------------------------------------------- The processor

constexpr Index kCacheLineBytes = 64;
// Sets of an L1 data cache: 32 KiB of 8 ways. Larger L1 caches have more ways and as many sets.
constexpr Index kCacheSets = 64;
constexpr Index kHugePageBytes = Index{2} << 20;
// The last cache where the system does not tell.
constexpr Index kDefaultLastLevelCacheBytes = Index{32} << 20;

// ---------------------------------------------------------------------------------------------------- Threads

// Multiply-adds of vectors that make a block worth a thread. Two threads beat one from 8 to 11 us of work on, about
// 26,000 multiply-adds of vectors at k3: half of that for each.
constexpr double kBlockWork = 12000;
// Blocks per thread at most, for threads that finish early. No measurement recorded.
constexpr Index kBlocksPerThread = 4;
// Workers that may wait for the next call at a time, over all pools. No measurement recorded.
constexpr int kWaitingWorkers = 16;
// How long a worker waits for the next call. Waking a sleeping worker took 4.5 to 32 us, one that is awake 0.5 us.
// Raised from 20 us for networks with other operations between the calls; no measurement of that recorded.
constexpr std::chrono::microseconds kWaitForNextCall{100};
// A worker's credit: one more for each call that came in time, up to a limit; so many less for one that did not; and
// how many jobs pass without a wait once it is used up. No measurement recorded.
constexpr int kMostCredit = 8, kCreditPerMiss = 4, kJobsWithoutWait = 16;
// Pause instructions between two looks at the clock, and before the caller first yields its processor to others. No
// measurement recorded.
constexpr int kPausesPerLook = 32, kPausesBeforeYield = 1000;

// ---------------------------------------------------------------------------------------------------- Correlation

// Rows of a block: at most, at least where channels can be split instead, and at least otherwise. Blocks of 2 rows took
// 15 to 25 % longer than blocks of 7; 7 and 14 are whole numbers of the highest tiles.
constexpr Index kMostBlockRows = 14, kBlockRows = 7, kLeastBlockRows = 2;
// Columns of a block of a single long row: at least, and at most if the input is staged. Multiples of the widest tile.
// No measurement recorded.
constexpr Index kLeastBlockColumns = 112, kMostStagedColumns = 1120;
// Vectors of a block of channels, where channels are split: 64 floats. With AVX-512, 14x14x480 k5 took .094 instead of
// .118 and 28x28x240 k5 .21 instead of .26 in blocks of 64 channels.
constexpr Index kBlockVectors = 4;

// The time per output of a tile with so many sums, relative to one of 14: fewer leave the multipliers idle and read
// more for each. Fitted to tiles on small maps; the figures are not recorded.
inline double relative_cost(int sums) {
  return sums >= 14 ? 1.0 : sums >= 7 ? 1.7 : sums >= 4 ? 2.0 : sums >= 3 ? 2.5 : 4.0;
}
// Taps side by side from which the wide loop is used for a window without loops of its own. No measurement recorded.
constexpr Index kWideTaps = 6;

// Narrow floats are staged from so many taps on, side by side or for each output. No measurement recorded.
constexpr Index kStagedTapsAcross = 8, kStagedTaps = 64;
// Other inputs are packed if a window is at least this wide and reaches over more than half of a row, and each line of
// the cache's sets that the columns share would serve this many taps. No measurement recorded.
constexpr Index kPackedTapsAcross = 5, kPackedTapsPerSet = 25;
// What a thread stages at a time, unless one vector of channels is more: an eighth of L2. Halved from 256 KiB; no
// measurement recorded.
constexpr Index kStagedBytes = Index{128} << 10;
// Vectors of channels staged at a time at most. No measurement recorded.
constexpr Index kStagedVectors = 4;

// ---------------------------------------------------------------------------------------------------- Memory

// Results from this size on are stored past the caches, if operands and result exceed a part of the last cache. That
// took 112x112x32 k3 (12.8 MB) from .56 to .355 and 56x56x144 k3 (14.5 MB) from .74 to .43; 14x14x480 (3 MB), read at
// once by the next layer, went from .096 to .131.
constexpr Index kStreamFromBytes = Index{8} << 20;
constexpr Index kStreamCacheParts = 2;
// Tiles fetch ahead from this part of the last cache on: of a larger input the cache cannot have kept all. Without
// fetching ahead 56x56x96 k7 took 1.36, with it .88. The part itself: no measurement recorded.
constexpr Index kPrefetchCacheParts = 3;
// The largest threshold up to which glibc's malloc keeps freed memory. Beyond it a result is new at every call: 38 MB
// took 9300 page faults and 12.7 ms. On huge pages the first touch of 38.5 MB took 2.6 instead of 13.1; below the
// threshold they gained nothing (112x112x32 k3: .684 instead of .365).
constexpr Index kReusedByMallocBytes = Index{32} << 20;
// Scratch memory of each kind that a thread keeps for its next call. A bound on what idle threads hold; no measurement
// recorded.
constexpr Index kKeptScratchBytes = Index{1} << 20;

// ---------------------------------------------------------------------------------------------------- Kernel gradient

// Blocks at most, whatever the number of threads: the order of the sums must not depend on it. Chunks of 2 (C >= 240)
// to 16 (few channels) were best for 2 threads; 32 leaves room for more.
constexpr Index kMostGradBlocks = 32;
// Long rows are cut into pieces of at least so many columns, up to so many units in all. No measurement recorded.
constexpr Index kLeastPieceColumns = 128, kMostPieceUnits = 64;
// Positions of the cotangent in a chunk at least, and bytes of all partial sums at most. No measurement recorded.
constexpr Index kLeastChunkPositions = 128, kPartialSumsBytes = Index{8} << 20;
// Taps of a sum that would lie a multiple of so many bytes apart lie a vector further apart, in other sets of the
// caches. No measurement recorded.
constexpr Index kConflictingPitchBytes = 1024;
// Units that pass under a row of taps at a time in the general loop, and stay in the caches meanwhile. No measurement
// recorded.
constexpr Index kGeneralGradUnits = 8;
// Pieces of all rows that a packed map is cut into at most: enough for threads that finish early to steal. No
// measurement recorded.
constexpr Index kMostPackedBlocks = 256;
// Positions whose products a packed kernel gradient adds before it stores a sum. Of (2, 2048, 1024), a window of 4 and
// documents of 100 in float32 it takes 0.9 to 1.0 ms with 4 and 1.7 with 1, on two threads of an AMD Zen 4.
constexpr int kPackedPositions = 4;
// Elements of the gradient whose partial sums a thread adds up at a time. No measurement recorded.
constexpr Index kFinishElements = 16384;

}  // namespace depthwise
