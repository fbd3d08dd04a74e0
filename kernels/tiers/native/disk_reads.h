// Reads of one size at many places of a file, all under way at once, past the system's memory (Linux AIO on a file opened with O_DIRECT).
// Best effort: what could not be read this way is not found, and must be read in another.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "files.h"
#if defined(__linux__)
#include <errno.h>
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace twt {

class DiskReads {
  public:
    DiskReads() {}
    DiskReads(const DiskReads&) = delete;
    DiskReads& operator=(const DiskReads&) = delete;
    ~DiskReads() {
        close();
        free(memory_);
    }

    // Starts to read `bytes` at each of `places`, as many as there is room for. What an earlier call started and nobody waited for is dropped.
    // `block`: what the file is read by, at most a page. `others`: reads of other objects that are under way.
    void begin(int file, const std::vector<int64_t>& places, int64_t bytes, int64_t block, size_t others) {
        if (done_ < started_) close();
        file_ = file, bytes_ = bytes, block_ = block, places_ = places, done_ = started_ = 0;
        span_ = (bytes + block - 2) / block * block + block;  // what whole blocks around any place take
        found_.assign(places.size(), nullptr);
        places_.resize(std::min(places.size(), size_t(MOST / span_)));
#if defined(__linux__)
        if (room_ < places_.size() * size_t(span_)) {
            free(memory_);
            room_ = (places_.size() * size_t(span_) + PAGE - 1) / PAGE * PAGE, memory_ = static_cast<char*>(aligned_alloc(size_t(PAGE), room_));
            if (!memory_) room_ = 0;
        }
        if (!memory_ || file < 0 || (!context_ && syscall(SYS_io_setup, DEPTH, &context_) != 0)) places_.clear();
#else
        places_.clear();
#endif
        more(others);
    }

    size_t under_way() const { return started_ - done_; }  // as far as is known

    // Starts those that there was no room for, as far as others have come since: without waiting.
    void more(size_t others) {
        do submit(others);
        while (under_way() && reap(false) && started_ < places_.size());
    }

    // Waits for all.
    void end() {
        for (submit(0); under_way(); submit(0)) reap(true);
    }

    // What was at the i-th place, until the next begin(); nullptr: it could not be read.
    const char* found(size_t i) const { return found_[i]; }

  private:
    static const int64_t MOST = 64 << 20;  // bytes of memory: each of 8,000 short rows takes two blocks of 4 KiB
    static const int DEPTH = 192;  // reads under way: where a disk has 256 at once, the call that starts one more would wait

    bool reap(bool wait) {  // whether any came
#if defined(__linux__)
        io_event events[DEPTH];
        timespec none = {0, 0};
        for (;;) {
            long count = syscall(SYS_io_getevents, context_, wait ? 1L : 0L, long(DEPTH), events, wait ? nullptr : &none);
            if (count < 0 && errno == EINTR) continue;
            if (count < 0) return close(), false;
            for (long k = 0; k < count; k++, done_++) {
                size_t i = size_t(events[k].data);
                int64_t before = places_[i] % block_;
                if (events[k].res >= before + bytes_) found_[i] = memory_ + i * size_t(span_) + before;
            }
            return count > 0;
        }
#else
        return wait;
#endif
    }

    void submit(size_t others) {
#if defined(__linux__)
        while (started_ < places_.size() && under_way() + others < size_t(DEPTH)) {
            size_t count = std::min(places_.size() - started_, size_t(DEPTH) - under_way() - others);
            std::vector<iocb> reads(count);
            std::vector<iocb*> each(count);
            for (size_t k = 0; k < count; k++) {
                size_t i = started_ + k;
                int64_t first = places_[i] / block_ * block_, end = (places_[i] + bytes_ + block_ - 1) / block_ * block_;
                memset(&reads[k], 0, sizeof(iocb));
                reads[k].aio_data = i;
                reads[k].aio_fildes = uint32_t(file_);
                reads[k].aio_lio_opcode = IOCB_CMD_PREAD;
                reads[k].aio_buf = uint64_t(uintptr_t(memory_ + i * size_t(span_)));
                reads[k].aio_nbytes = uint64_t(end - first);
                reads[k].aio_offset = first;
                each[k] = &reads[k];
            }
            long taken = syscall(SYS_io_submit, context_, long(count), each.data());
            if (taken < 0 && errno == EINTR) continue;
            if (taken <= 0) return places_.resize(started_);  // no more of them
            started_ += size_t(taken);
        }
#endif
    }

    void close() {  // waits for what is under way, and forgets it
#if defined(__linux__)
        if (context_) syscall(SYS_io_destroy, context_);
        context_ = 0;
#endif
        places_.clear();
        done_ = started_ = 0;
    }

    int file_ = -1;
    int64_t bytes_ = 0, span_ = 0, block_ = PAGE;
    std::vector<int64_t> places_;
    std::vector<const char*> found_;
    size_t started_ = 0, done_ = 0, room_ = 0;
    char* memory_ = nullptr;
#if defined(__linux__)
    aio_context_t context_ = 0;
#endif
};

}  // namespace twt
