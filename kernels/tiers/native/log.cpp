#include "log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <new>

#include "files.h"
#include "store.h"

namespace twt {

namespace {

const int64_t BLOCK = 2 << 20;   // bytes, at least, that go to the disk together
const int64_t BLOCKS = 4;        // in memory, at least
const int64_t NEAR = 16 << 20;   // bytes in memory, at least
const int DEPTH = 32;            // blocks under way

}  // namespace

Log::~Log() {
    stop();
    free(memory_);
    free(piece_);
}

void Log::open(const std::string& path, int64_t unit, int64_t near, bool fresh) {
    path_ = path, unit_ = unit;
    block_ = (BLOCK + unit - 1) / unit * unit;
    room_ = std::max(BLOCKS, (std::max(near, NEAR) + block_ - 1) / block_) * block_;
    margin_ = 2 * block_;
    step_ = std::max(int64_t(4), room_ / block_ / 16) * block_;
    states_.assign(size_t(room_ / block_), LEFT);
    file_ = ::open(path.c_str(), O_RDWR | O_CREAT | (fresh ? O_TRUNC : 0), 0644);
    if (file_ < 0) fail_io("cannot open", path);
#if defined(__linux__)
    direct_ = ::open(path.c_str(), O_RDWR | O_DIRECT);  // not every file system has it
#ifdef STATX_DIOALIGN
    struct statx facts;
    if (statx(direct_, "", AT_EMPTY_PATH, STATX_DIOALIGN, &facts) == 0 && (facts.stx_mask & STATX_DIOALIGN)) {
        int64_t least = std::max(facts.stx_dio_mem_align, facts.stx_dio_offset_align);  // powers of two; 0: it is not known
        if (least >= 512 && least < PAGE) grain_ = least;  // a row is read with less around it
    }
#endif
#endif
    void* memory = nullptr;
    if (posix_memalign(&memory, 2 << 20, size_t(room_)) != 0) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    huge_pages(memory, size_t(room_));
}

void Log::reserve(int64_t bytes) {
    int64_t from = end_ + bytes - room_;
    if (from > landed_) settle(from);
    near_from_ = std::max(near_from_, from);
}

void Log::grow(int64_t bytes) {
    end_ += bytes;
    if (end_ - sent_ >= block_) send();
}

void Log::send() {
#if defined(__linux__)
    if (direct_ < 0) return;
    if (!context_ && syscall(SYS_io_setup, DEPTH, &context_) != 0) return;
    reap(false);
    for (; end_ - sent_ >= block_; sent_ += block_) {
        if (sent_ + block_ > allocated_) {  // a write beyond the file's end would be waited for
            allocated_ = sent_ + step_;
            (void)!fallocate(file_, 0, sent_, step_);
        }
        iocb write, *each = &write;
        memset(&write, 0, sizeof write);
        write.aio_data = uint64_t(sent_);
        write.aio_fildes = uint32_t(direct_);
        write.aio_lio_opcode = IOCB_CMD_PWRITE;
        write.aio_buf = uint64_t(uintptr_t(at(sent_)));
        write.aio_nbytes = uint64_t(block_);
        write.aio_offset = sent_;
        if (syscall(SYS_io_submit, context_, 1L, &each) != 1) return;  // later, or when its memory is needed
        state(sent_) = UNDER_WAY;
    }
#endif
}

// Notes which blocks are on the disk now; those that could not be written are left.
void Log::reap(bool wait) {
#if defined(__linux__)
    io_event events[DEPTH];
    timespec none = {0, 0};
    long count = syscall(SYS_io_getevents, context_, wait ? 1L : 0L, long(DEPTH), events, wait ? nullptr : &none);
    if (count < 0 && errno != EINTR) return stop();
    for (long k = 0; k < count; k++) state(int64_t(events[k].data)) = events[k].res == block_ ? DONE : LEFT;
    while (landed_ < sent_ && state(landed_) == DONE) landed_ += block_;
#endif
}

// What is before `end` is on the disk, or Failure says why not.
void Log::settle(int64_t end) {
    while (landed_ < end) {
        if (landed_ < sent_ && state(landed_) == UNDER_WAY) {
            reap(true);
            continue;
        }
        if (landed_ == sent_ || state(landed_) == LEFT) write_all(file_, at(landed_), block_, landed_, path_);
        landed_ += block_;
        sent_ = std::max(sent_, landed_);
    }
}

void Log::stop() {  // waits for what is under way, and does not believe it
#if defined(__linux__)
    if (context_) syscall(SYS_io_destroy, context_);
    context_ = 0;
    std::replace(states_.begin(), states_.end(), char(UNDER_WAY), char(LEFT));
#endif
}

void Log::flush() {
    settle(sent_);
    while (end_ - sent_ >= block_) settle(sent_ + block_);
    if (end_ > sent_) write_all(file_, at(sent_), end_ - sent_, sent_, path_);
    if (ftruncate(file_, end_) != 0) fail_io("cannot trim", path_);
    allocated_ = 0;
    sync(file_, path_);
}

void Log::clear() {
    stop();
    if (ftruncate(file_, 0) != 0) fail_io("cannot empty", path_);
    end_ = near_from_ = loaded_ = sent_ = landed_ = allocated_ = 0;
}

char* Log::piece(int64_t first, int64_t bytes) {
    void* made = nullptr;
    if (!piece_ && posix_memalign(&made, size_t(PAGE), size_t(unit_)) != 0) throw std::bad_alloc();
    if (!piece_) piece_ = static_cast<char*>(made);
    if (near(first)) return static_cast<char*>(memcpy(piece_, at(first), size_t(bytes)));
    if (direct_ < 0 || pread(direct_, piece_, size_t((bytes + PAGE - 1) / PAGE * PAGE), first) < bytes) read_all(file_, piece_, bytes, first, path_);
    return piece_;
}

void Log::read(int64_t place, char* to, int64_t bytes) const { read_all(file_, to, bytes, place, path_); }

bool Log::give_back(int64_t first, int64_t bytes) {
    if (first + bytes > landed_) return false;
#ifdef FALLOC_FL_PUNCH_HOLE
    (void)!fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, first, bytes);  // where that can be
#endif
    return true;
}

}  // namespace twt
