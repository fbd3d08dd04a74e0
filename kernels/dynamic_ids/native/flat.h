// A hash table from 64-bit ids to numbers, on huge pages where it is big.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <new>
#include <vector>

namespace twd {
namespace {

// Random places on small pages cost more to find than to read.
template <class T>
struct OnHugePages {
    typedef T value_type;
    OnHugePages() {}
    template <class U>
    OnHugePages(const OnHugePages<U>&) {}
    T* allocate(size_t count) {
        const size_t page = size_t(2) << 20;
        void* made = nullptr;
        size_t bytes = count * sizeof(T);
        if (posix_memalign(&made, bytes < page ? 64 : page, bytes)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (bytes >= page) madvise(made, bytes, MADV_HUGEPAGE);
#endif
        return static_cast<T*>(made);
    }
    void deallocate(T* made, size_t) { free(made); }
    template <class U>
    bool operator==(const OnHugePages<U>&) const { return true; }
    template <class U>
    bool operator!=(const OnHugePages<U>&) const { return false; }
};

inline uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// id -> a number that is not negative; open addressing, at most 3/5 full, erasing moves what follows back.
class Flat {
  public:
    Flat() : entries_(16, Entry{0, -1}) {}
    int64_t size() const { return used_; }
    // Where an id is looked for first, asked of memory now; holds until the next reserve() or put().
    size_t sought(int64_t id) const {
        size_t at = home(id);
        __builtin_prefetch(&entries_[at]);
        return at;
    }
    int64_t find(int64_t id) const { return used_ ? find(id, home(id)) : -1; }
    int64_t find(int64_t id, size_t sought) const {
        for (size_t i = sought;; i = next(i)) {
            if (entries_[i].value < 0) return -1;
            if (entries_[i].id == id) return entries_[i].value;
        }
    }
    void put(int64_t id, int64_t value) {
        reserve(used_ + 1);
        size_t i = place(id);
        used_ += entries_[i].value < 0;
        entries_[i] = Entry{id, value};
    }
    void erase(int64_t id) {
        if (!used_) return;
        size_t hole = place(id);
        if (entries_[hole].value < 0) return;
        used_--;
        for (size_t i = next(hole); entries_[i].value >= 0; i = next(i)) {
            size_t wanted = home(entries_[i].id), mask = entries_.size() - 1;
            if (((i - wanted) & mask) < ((i - hole) & mask)) continue;  // it would come to lie before where it is looked for
            entries_[hole] = entries_[i];
            hole = i;
        }
        entries_[hole].value = -1;
    }
    // Room for `count` ids, so that put() cannot fail.
    void reserve(int64_t count) {
        size_t wanted = entries_.size();
        while (uint64_t(count) * 5 > uint64_t(wanted) * 3) wanted *= 2;
        if (wanted == entries_.size()) return;
        Entries old(wanted, Entry{0, -1});
        old.swap(entries_);
        for (size_t i = 0; i < old.size(); i++) {
            if (i + 16 < old.size() && old[i + 16].value >= 0) sought(old[i + 16].id);
            if (old[i].value >= 0) entries_[place(old[i].id)] = old[i];
        }
    }
    template <class Work>
    void each(Work work) const {
        for (const Entry& e : entries_)
            if (e.value >= 0) work(e.id, e.value);
    }

  private:
    struct Entry {
        int64_t id, value;
    };
    typedef std::vector<Entry, OnHugePages<Entry>> Entries;
    size_t home(int64_t id) const { return size_t(mix(uint64_t(id))) & (entries_.size() - 1); }
    size_t next(size_t i) const { return (i + 1) & (entries_.size() - 1); }
    size_t place(int64_t id) const {
        size_t i = home(id);
        while (entries_[i].value >= 0 && entries_[i].id != id) i = next(i);
        return i;
    }
    Entries entries_;
    int64_t used_ = 0;
};

}  // namespace
}  // namespace twd
