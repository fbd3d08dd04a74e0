// Where the rows of a journal are.
#include "store.h"

namespace twt {

void Index::clear() {
    entries_.assign(1024, {-1, 0});
    used_ = 0;
}

int64_t Index::find(int64_t row) const {
    uint64_t mask = entries_.size() - 1;
    for (uint64_t i = mix(uint64_t(row)) & mask;; i = (i + 1) & mask) {
        if (entries_[i].row == row) return entries_[i].place;
        if (entries_[i].row < 0) return -1;
    }
}

int64_t Index::put(int64_t row, int64_t place) {
    if ((used_ + 1) * 2 > int64_t(entries_.size())) {
        std::vector<Entry> old = in_huge_pages(entries_.size() * 2, Entry{-1, 0});
        old.swap(entries_);
        used_ = 0;
        for (const Entry& e : old)
            if (e.row >= 0) put(e.row, e.place);
    }
    uint64_t mask = entries_.size() - 1;
    uint64_t i = mix(uint64_t(row)) & mask;
    while (entries_[i].row >= 0 && entries_[i].row != row) i = (i + 1) & mask;
    int64_t before = entries_[i].row < 0 ? -1 : entries_[i].place;
    used_ += before < 0;
    entries_[i] = {row, place};
    return before;
}

void Index::soon(int64_t row) const { __builtin_prefetch(&entries_[mix(uint64_t(row)) & (entries_.size() - 1)]); }

}  // namespace twt
