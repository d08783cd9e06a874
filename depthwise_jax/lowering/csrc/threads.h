// How the blocks of a call are spread over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <new>
#include <utility>

#include "depthwise.h"
#include "tuning.h"

namespace depthwise {

// The blocks of one call. Each thread begins with its own part, the same part in every call, because its caches hold
// what the previous layer left there. Threads that finish early steal blocks that nobody has started. Backwards,
// each part is taken from its end.
class Job {
 public:
  // Computes a block, given its number and a number below `threads` that is the calling thread's own. False, or
  // std::bad_alloc, if there is no memory.
  using Block = std::function<bool(Index, Index)>;

  // Objects to which `block` refers must live until all blocks are taken.
  Job(Index blocks, Index threads, bool backwards, Block block);
  // Takes blocks until none is left, beginning with the part `own`.
  void work(Index own);
  // The same for a thread that joins: it gets its own part.
  void join() { work(1 + joined_.fetch_add(1, std::memory_order_relaxed)); }
  bool done() const { return done_.load(std::memory_order_acquire) >= blocks_; }
  // Once the job is done: whether there was memory for every block.
  bool succeeded() const { return succeeded_.load(std::memory_order_relaxed); }

 private:
  bool run(Index block, Index own) const;

  struct alignas(kCacheLineBytes) Part {
    std::atomic<Index> next;
    Index begin, end;
  };
  std::atomic<Index> joined_{0}, done_{0};
  const Index blocks_, threads_;
  const bool backwards_;
  const Block block_;
  std::unique_ptr<Part[]> parts_;
  std::atomic<bool> succeeded_{true};
};

// Works on a job on this thread and on those of the pool that come in time. This thread takes blocks like any other and
// waits only for blocks that a thread is working on, never for the pool to be free.
void run_on_pool(Pool& pool, const std::shared_ptr<Job>& job, Index threads);

// Calls f(i, thread) for all 0 <= i < n; false if any call returned false. Throws std::bad_alloc before the first block
// or not at all.
template <class F>
bool parallel_for(Pool& pool, Index n, bool backwards, const F& f) {
  const Index threads = std::min<Index>(pool.threads(), n);
  if (threads <= 1) {
    bool succeeded = true;
    for (Index i = 0; i < n && succeeded; ++i) succeeded = f(backwards ? n - 1 - i : i, 0);
    return succeeded;
  }
  const auto job = std::make_shared<Job>(n, threads, backwards, std::cref(f));
  run_on_pool(pool, job, threads);
  return job->succeeded();
}

// Whether this call takes its blocks backwards: every other call does, and begins with what the call before it touched
// last and the caches still hold. A second pass in the same direction over arrays larger than the caches would find
// nothing.
bool alternate_direction();

// How many blocks, up to `most`, are worth cutting: for `outputs` outputs of `vectors` vectors of channels and `taps`
// taps.
Index blocks_worth(Index outputs, Index vectors, Index taps, Index most);

}  // namespace depthwise
