// The slots of a map, and the order in which their ids leave.
//
// For LRU and AGE a log of slots, written at its end: an entry counts while its slot says that its place is there. So a use costs a write in a row,
// and no neighbours are read; entries that count no more are dropped when the log is four times as long as there are ids. For LFU a list
// in runs of equal uses.
#pragma once
#include <stdint.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "flat.h"

namespace twd {
namespace {

enum Policy { LRU, LFU, AGE };
const size_t AHEAD = 12;  // places that are asked of memory before they are needed

struct Slot {  // half a cache line
    int64_t id;
    uint64_t stamp;  // the last call that looked it up, or that found it held
    union {
        int64_t place;  // LRU, AGE: in all of the log that ever was
        struct {
            int32_t prev, next;
        } list;  // LFU
    };
    uint32_t uses;  // calls that looked it up
};

class Order {
  public:
    explicit Order(Policy policy) : policy_(policy) {}

    Slot& at(int64_t slot) { return slots_[size_t(slot)]; }
    void prefetch(int64_t slot) const { __builtin_prefetch(&slots_[size_t(slot)]); }

    // Slots 0 to `slots`, of at most `most`, and room for `more` calls of touch() and add().
    void grow(int64_t slots, int64_t most, size_t more) {
        if (size_t(slots) > slots_.size()) slots_.resize(std::min(size_t(most), std::max(size_t(slots), slots_.size() * 2)));
        if (log_.size() + more > log_.capacity()) log_.reserve(std::max(log_.size() + more, log_.capacity() * 2));
    }

    // These slots' ids were used, in this order.
    void touch(const std::vector<int32_t>& used) {
        for (size_t k = 0; k < used.size(); k++) {
            int32_t slot = used[k];
            if (policy_ != LFU && k + AHEAD < used.size()) prefetch(used[k + AHEAD]);
            uint32_t old = at(slot).uses, now = old + (old < UINT32_MAX);
            if (policy_ == LFU) {
                if (k + AHEAD < used.size()) prefetch_neighbours(used[k + AHEAD]);
                int32_t before = at(slot).list.prev;
                unlink(slot);
                int32_t after = tail(now);
                if (after < 0) after = tail(old);
                at(slot).uses = now;
                insert(slot, after < 0 ? before : after);
            } else {
                at(slot).uses = now;
                if (policy_ == LRU) append(slot);
            }
        }
    }

    // This slot has an id of its own now.
    void add(int32_t slot) {
        at(slot).uses = 1;
        if (policy_ == LFU) insert(slot, tail(1));
        else append(slot);
    }

    // Takes the first `count` slots out that are not stamped `clock`; there are as many.
    void evict(int64_t count, uint64_t clock, std::vector<int32_t>& victims) {
        victims.clear();
        if (policy_ == LFU) {
            for (int32_t slot = head_; int64_t(victims.size()) < count;) {
                int32_t following = at(slot).list.next;
                if (following >= 0) prefetch(following);
                if (at(slot).stamp != clock) {
                    unlink(slot);
                    victims.push_back(slot);
                }
                slot = following;
            }
            return;
        }
        kept_.clear();
        size_t i = first_;
        for (; int64_t(victims.size()) < count; i++) {
            if (i + AHEAD < log_.size()) prefetch(log_[i + AHEAD]);
            if (at(log_[i]).place != begin_ + int64_t(i)) continue;
            if (at(log_[i]).stamp == clock) kept_.push_back(log_[i]);
            else victims.push_back(log_[i]);
        }
        for (int32_t slot : victims) at(slot).place = -1;
        first_ = i - kept_.size();  // what stays moves up, so that nothing is passed over twice
        for (size_t k = 0; k < kept_.size(); k++) place(kept_[k], first_ + k);
    }

    // Call between calls: drops entries that count no more, where there are many. `used`: slots 0 to `used` have ids.
    void tidy(int64_t used) {
        if (log_.size() > size_t(used) * 4 + 4096) squeeze(used);
    }

    // Slots in the order in which their ids leave, as long as `work` says true.
    template <class Work>
    void each(int64_t used, Work work) {
        if (policy_ != LFU) squeeze(used);
        int32_t slot = head_;
        for (int64_t k = 0; k < used; k++) {
            if (policy_ != LFU) slot = log_[size_t(k)];
            if (!work(slot)) return;
            if (policy_ == LFU) slot = at(slot).list.next;
        }
    }

    // These are the slots that have ids, in this order; their ids and uses are set.
    void restart(const std::vector<int32_t>& order) {
        log_.clear();
        first_ = 0;
        begin_ = 0;
        head_ = last_ = -1;
        tails_.clear();
        for (int32_t slot : order) {
            if (policy_ == LFU) insert(slot, last_);
            else append(slot);
        }
    }

  private:
    // --- the log ---------------------------------------------------------------------------------------------------------------------

    void place(int32_t slot, size_t at_index) {
        log_[at_index] = slot;
        at(slot).place = begin_ + int64_t(at_index);
    }
    void append(int32_t slot) {
        at(slot).place = begin_ + int64_t(log_.size());
        log_.push_back(slot);
    }

    // The log as one entry for each of the `used` slots. Both passes go through the slots in a row: what they look up in between is small.
    void squeeze(int64_t used) {
        std::vector<uint64_t> taken(log_.size() / 64 + 1, 0);
        std::vector<int64_t> before(taken.size());  // places taken before this word
        for (int64_t slot = 0; slot < used; slot++) {
            size_t index = size_t(at(slot).place - begin_);
            taken[index / 64] |= uint64_t(1) << (index % 64);
        }
        int64_t sum = 0;
        for (size_t word = 0; word < taken.size(); word++) {
            before[word] = sum;
            sum += __builtin_popcountll(taken[word]);
        }
        const int64_t begun = begin_;
        begin_ += int64_t(log_.size());  // so that no old place is one of the new ones
        log_.resize(size_t(used));
        first_ = 0;
        for (int64_t slot = 0; slot < used; slot++) {
            size_t index = size_t(at(slot).place - begun);
            uint64_t earlier = taken[index / 64] & ((uint64_t(1) << (index % 64)) - 1);
            place(int32_t(slot), size_t(before[index / 64] + __builtin_popcountll(earlier)));
        }
    }

    // --- the list --------------------------------------------------------------------------------------------------------------------

    void prefetch_neighbours(int32_t slot) {
        if (at(slot).list.prev >= 0) prefetch(at(slot).list.prev);
        if (at(slot).list.next >= 0) prefetch(at(slot).list.next);
    }

    int32_t tail(uint32_t uses) const {
        auto found = tails_.find(uses);
        return found == tails_.end() ? -1 : found->second;
    }

    void insert(int32_t slot, int32_t after) {
        at(slot).list.prev = after;
        int32_t following = after < 0 ? head_ : at(after).list.next;
        at(slot).list.next = following;
        (after < 0 ? head_ : at(after).list.next) = slot;
        (following < 0 ? last_ : at(following).list.prev) = slot;
        tails_[at(slot).uses] = slot;
    }

    void unlink(int32_t slot) {
        int32_t before = at(slot).list.prev, following = at(slot).list.next;
        (before < 0 ? head_ : at(before).list.next) = following;
        (following < 0 ? last_ : at(following).list.prev) = before;
        uint32_t uses = at(slot).uses;
        auto run = tails_.find(uses);
        if (run->second != slot) return;
        if (before >= 0 && at(before).uses == uses) run->second = before;
        else tails_.erase(run);
    }

    const Policy policy_;
    std::vector<Slot, OnHugePages<Slot>> slots_;
    std::vector<int32_t, OnHugePages<int32_t>> log_;
    std::vector<int32_t> kept_;
    size_t first_ = 0;   // of the log: nothing before it counts
    int64_t begin_ = 0;  // the place of log_[0]
    std::unordered_map<uint32_t, int32_t> tails_;  // of the list: the last slot of each run
    int32_t head_ = -1, last_ = -1;
};

}  // namespace
}  // namespace twd
