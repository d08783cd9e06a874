#include "memory.h"

#include <cstdint>
#include <cstdio>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace depthwise {
namespace {

// The last cache that this processor's cores share. (sysconf adds up those of a whole socket on some machines.)
Index last_level_cache_bytes() {
  long kibibytes = 0;
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kibibytes) != 1) kibibytes = 0;
    std::fclose(file);
  }
  return kibibytes > 0 ? Index{kibibytes} << 10 : kDefaultLastLevelCacheBytes;
}

}  // namespace

MemorySizes& memory_sizes() {
  static MemorySizes sizes{last_level_cache_bytes(), kStreamFromBytes, kReusedByMallocBytes};
  return sizes;
}

void request_huge_pages(void* result, Index bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes <= memory_sizes().reused_by_malloc_bytes) return;
  constexpr std::uintptr_t kPage = kHugePageBytes;
  const auto begin = (reinterpret_cast<std::uintptr_t>(result) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(result) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)result, (void)bytes;
#endif
}

}  // namespace depthwise
