// Large tensors in memory that is used again: as buffers.py has them, for callers in C++, which would need Python's code and objects for it
// at every call. A block is idle again when torch has dropped every tensor in it. Part of python.cpp.
#pragma once
#include <pthread.h>
#include <sys/mman.h>

#include "python_words.h"

namespace {

struct Type {
    uint8_t code, bits;
};

struct Block {
    char* data;
    size_t size;
    int64_t users;
    Block* next;
};
Block* idle_blocks = nullptr;
size_t idle_bytes = 0;
char blocks_lock = 0;
const size_t KEEP_IDLE = size_t(1) << 30;

void lock_blocks() { while (__atomic_test_and_set(&blocks_lock, __ATOMIC_ACQUIRE)) {} }
void unlock_blocks() { __atomic_clear(&blocks_lock, __ATOMIC_RELEASE); }

// The first idle block of `size` bytes (0: of any size, if more than `keep` bytes are idle), or null.
Block* take_idle(size_t size, size_t keep) {
    lock_blocks();
    Block** at = &idle_blocks;
    while (*at && (size ? (*at)->size != size : idle_bytes <= keep)) at = &(*at)->next;
    Block* found = *at;
    if (found) {
        *at = found->next;
        idle_bytes -= found->size;
    }
    unlock_blocks();
    return found;
}
Block* new_block(size_t size) {
    while (Block* block = take_idle(0, size < KEEP_IDLE ? KEEP_IDLE - size : 0)) {
        munmap(block->data, block->size);
        free(block);
    }
    Block* block = static_cast<Block*>(calloc(1, sizeof(Block)));
    void* data = block ? mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0) : MAP_FAILED;
    if (data == MAP_FAILED) {
        free(block);
        PyErr_NoMemory();
        return nullptr;
    }
#if defined(MADV_HUGEPAGE)
    madvise(data, size, MADV_HUGEPAGE);
#endif
    block->data = static_cast<char*>(data);
    block->size = size;
    return block;
}
// A block of at least `size` bytes, which leave() must follow; null with an error of Python's where there is no memory.
Block* take_block(size_t size) {
    // Rounded up by at most an eighth, so that sizes that vary a little from step to step share their blocks.
    size_t step = 4096;
    while (step * 16 < size) step *= 2;
    size = size ? (size + step - 1) / step * step : step;
    Block* block = take_idle(size, 0);
    if (!block) block = new_block(size);
    if (block) block->users = 1;
    return block;
}
void leave(Block* block) {  // on any thread, with or without Python's lock
    if (__atomic_sub_fetch(&block->users, 1, __ATOMIC_ACQ_REL)) return;
    lock_blocks();
    block->next = idle_blocks;
    idle_blocks = block;
    idle_bytes += block->size;
    unlock_blocks();
}

struct Part {
    Managed managed;  // first: torch knows the part by it
    int64_t shape[MOST_DIMS], strides[MOST_DIMS];
    Block* home;
};
void drop_part(Managed* managed) {
    Part* part = reinterpret_cast<Part*>(managed);
    leave(part->home);
    free(part);
}

// An uninitialised contiguous tensor at `data` in `home`; null with an error of Python's.
PyObject* tensor_in(Block* home, char* data, const int64_t* shape, int dims, Type type) {
    Part* part = static_cast<Part*>(calloc(1, sizeof(Part)));
    if (!part) return PyErr_NoMemory();
    int64_t stride = 1;
    for (int d = dims - 1; d >= 0; --d) {
        part->shape[d] = shape[d];
        part->strides[d] = stride;
        stride *= shape[d];
    }
    part->home = home;
    part->managed.major = 1;
    part->managed.deleter = drop_part;
    part->managed.tensor = View{data, DL_CPU, 0, dims, type.code, type.bits, 1, part->shape, part->strides, 0};
    __atomic_add_fetch(&home->users, 1, __ATOMIC_RELAXED);
    void* made = nullptr;
    if (!exchange->import(&part->managed, &made)) return static_cast<PyObject*>(made);
    drop_part(&part->managed);
    return nullptr;
}

// Tensors one after another in one block, each on a cache line of its own.
struct Row {
    Block* home;
    size_t used;
    explicit Row(size_t bytes) : home(take_block(bytes)), used(0) {}
    ~Row() { if (home) leave(home); }
    static size_t bytes_of(int64_t count, Type type) { return (size_t(count) * (type.bits / 8) + 63) & ~size_t(63); }
    char* place(int64_t count, Type type) {
        char* at = home->data + used;
        used += bytes_of(count, type);
        return at;
    }
    PyObject* take(const int64_t* shape, int dims, Type type, char*& data) {
        data = place(count_of(shape, dims), type);
        return tensor_in(home, data, shape, dims, type);
    }
};

}  // namespace
