// Memory: scratch memory of the threads, huge pages, and what happens when memory runs out.
#pragma once

#include <memory>
#include <new>

#include "depthwise.h"
#include "tuning.h"

namespace depthwise {

// Memory that begins with a cache line and stays for the next use.
class Scratch {
 public:
  // At least `bytes`, valid until the next call, or null if there is not enough memory.
  char* get(Index bytes) {
    if (!memory_ || bytes_ < bytes) {
      memory_.reset();  // first, because there may not be room for both
      memory_.reset(static_cast<char*>(::operator new(bytes, kLine, std::nothrow)));
      bytes_ = memory_ ? bytes : 0;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kLine{kCacheLineBytes};
  struct Free {
    void operator()(char* p) const { ::operator delete(p, kLine); }
  };
  std::unique_ptr<char, Free> memory_;
  Index bytes_ = 0;
};

// Scratch memory from `thread`, which the thread keeps for its next call, or from `call` if it is more than a thread
// keeps.
inline char* scratch(Index bytes, Scratch& thread, Scratch& call) {
  return (bytes <= kKeptScratchBytes ? thread : call).get(bytes);
}

// Asks for huge pages under a result that is new memory at every call: its first touch is cheaper.
void request_huge_pages(void* result, Index bytes);

// The result of f, or false if it throws std::bad_alloc.
template <class F>
bool false_without_memory(const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return false;
  }
}

}  // namespace depthwise
