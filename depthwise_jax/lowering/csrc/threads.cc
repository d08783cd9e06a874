#include "threads.h"

#include <chrono>
#include <thread>

namespace depthwise {

Job::Job(Index blocks, Index threads, bool backwards, Block block)
    : blocks_(blocks), threads_(threads), backwards_(backwards), block_(std::move(block)), parts_(new Part[threads]) {
  for (Index t = 0; t < threads; ++t) {
    parts_[t].next = parts_[t].begin = t * blocks / threads;
    parts_[t].end = (t + 1) * blocks / threads;
  }
}

void Job::work(Index own) {
  Index finished = 0;
  for (Index t = 0; t < threads_; ++t) {
    Part& part = parts_[(own + t) % threads_];
    for (Index i; (i = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end; ++finished) {
      const bool succeeded = run(backwards_ ? part.begin + part.end - 1 - i : i, own);
      if (!succeeded) succeeded_.store(false, std::memory_order_relaxed);
    }
  }
  if (finished) done_.fetch_add(finished, std::memory_order_acq_rel);
}

// No exception may escape into a thread of the pool.
bool Job::run(Index block, Index own) const {
  try {
    return block_(block, own);
  } catch (const std::bad_alloc&) {
    return false;
  }
}

namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// A place where a thread of the pool that has done its part of a job waits a moment for the next call. Waking a thread
// through the pool takes as long as a small layer. If usually no call follows, for instance because XLA's own
// operations come between and need the thread, it returns to the pool at once from then on, and tries again once in a
// while. A series of calls earns the credit that the wait at its end costs.
class WaitingWorker {
 public:
  // Waits on this thread for jobs while `job` is unfinished and a moment longer, and works on those that come.
  static void wait(std::shared_ptr<Job> job) {
    for (WaitingWorker& worker : workers_) {
      int free = kFree;
      if (!worker.state_.compare_exchange_strong(free, kLocked)) continue;
      if (worker.credit_ >= 0) {
        worker.serve(std::move(job));
      } else {
        ++worker.credit_;
      }
      worker.state_.store(kFree);
      return;
    }
  }
  // Hands a job to a thread that waits; false if none does.
  static bool hand_over(const std::shared_ptr<Job>& job) {
    for (WaitingWorker& worker : workers_) {
      int waiting = kWaiting;
      if (worker.state_.load(std::memory_order_relaxed) == kWaiting &&
          worker.state_.compare_exchange_strong(waiting, kLocked)) {
        worker.job_ = job;
        worker.state_.store(kHandedOver, std::memory_order_release);
        return true;
      }
    }
    return false;
  }

 private:
  void serve(std::shared_ptr<Job> job) {
    state_.store(kWaiting, std::memory_order_release);
    for (;;) {
      std::chrono::steady_clock::time_point end{};
      for (;;) {
        for (int i = 0; i < kPausesPerLook && state_.load(std::memory_order_relaxed) == kWaiting; ++i) pause();
        if (state_.load(std::memory_order_relaxed) != kWaiting) break;
        std::this_thread::yield();  // other threads may need the processor
        if (!job->done()) continue;
        const auto now = std::chrono::steady_clock::now();
        if (end == std::chrono::steady_clock::time_point{}) end = now + kWaitForNextCall;
        int waiting = kWaiting;
        if (now >= end && state_.compare_exchange_strong(waiting, kLocked)) {
          credit_ = credit_ >= kCreditPerMiss ? credit_ - kCreditPerMiss : -kJobsWithoutWait;
          return;
        }
      }
      while (state_.load(std::memory_order_acquire) != kHandedOver) pause();
      job = std::move(job_);
      credit_ = std::min(credit_ + 1, kMostCredit);
      state_.store(kWaiting, std::memory_order_release);  // the next job may come while this thread works
      job->join();
    }
  }

  // kLocked: one thread is changing what is in it.
  enum State { kFree, kWaiting, kLocked, kHandedOver };
  static WaitingWorker workers_[kWaitingWorkers];
  alignas(kCacheLineBytes) std::atomic<int> state_{kFree};
  int credit_ = 0;
  std::shared_ptr<Job> job_;
};
WaitingWorker WaitingWorker::workers_[kWaitingWorkers];

}  // namespace

void run_on_pool(Pool& pool, const std::shared_ptr<Job>& job, Index threads) {
  for (Index t = 1; t < threads; ++t) {
    if (WaitingWorker::hand_over(job)) continue;
    try {
      pool.schedule([job] {
        job->join();
        WaitingWorker::wait(job);
      });
    } catch (const std::bad_alloc&) {
      break;  // the threads that were called do everything
    }
  }
  job->work(0);
  for (int pauses = 0; !job->done(); ++pauses) {
    if (pauses > kPausesBeforeYield) {
      std::this_thread::yield();
    } else {
      pause();
    }
  }
}

bool alternate_direction() {
  static std::atomic<unsigned> calls{0};
  return calls.fetch_add(1, std::memory_order_relaxed) % 2;
}

Index blocks_worth(Index outputs, Index vectors, Index taps, Index most) {
  const double work = static_cast<double>(outputs) * static_cast<double>(vectors) * static_cast<double>(taps);
  return static_cast<Index>(std::clamp(work / kBlockWork, 1.0, static_cast<double>(most)));
}

}  // namespace depthwise
