// Which slot of a table each 64-bit id has, and the C functions that id_map.py calls.
//
// Only numbers are kept here: rows and optimizer state lie in tensors of the caller, who fills the slots of ids that were just admitted.
// A call holds its slots until release(ticket); a slot that is held is not given to another id.
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace twd {
namespace {

const int64_t AHEAD = 12;  // ids whose places are asked of memory before they are needed
enum Policy { LRU, LFU, AGE };

struct Failure {
    std::string what;
};

uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// id -> a number that is not negative; open addressing, at most 3/5 full, erasing moves what follows back.
class Flat {
  public:
    Flat() { clear(); }
    void clear() {
        entries_.assign(16, Entry{0, -1});
        used_ = 0;
    }
    int64_t size() const { return used_; }
    void prefetch(int64_t id) const { __builtin_prefetch(&entries_[home(id)]); }
    int64_t find(int64_t id) const {
        for (size_t i = home(id);; i = next(i)) {
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
        std::vector<Entry> old(wanted, Entry{0, -1});
        old.swap(entries_);
        for (const Entry& e : old)
            if (e.value >= 0) entries_[place(e.id)] = e;
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
    size_t home(int64_t id) const { return size_t(mix(uint64_t(id))) & (entries_.size() - 1); }
    size_t next(size_t i) const { return (i + 1) & (entries_.size() - 1); }
    size_t place(int64_t id) const {
        size_t i = home(id);
        while (entries_[i].value >= 0 && entries_[i].id != id) i = next(i);
        return i;
    }
    std::vector<Entry> entries_;
    int64_t used_ = 0;
};

class IdMap {
  public:
    IdMap(int64_t capacity, int64_t admit_after, Policy policy) : capacity_(capacity), admit_after_(admit_after), policy_(policy) {}

    // The slot of each id. `leave_out` (if `leaves`) gets slot `capacity`, what is not admitted `capacity + 1`. Ids that are admitted now are
    // listed in `fresh_ids` and `fresh_slots`, which have room for n. Fails before anything changes.
    int64_t fetch(const int64_t* ids, int64_t n, bool admit, bool leaves, int64_t leave_out, int64_t* slots, int64_t* fresh_ids,
                  int64_t* fresh_slots, int64_t* fresh_count) {
        std::lock_guard<std::mutex> guard(lock_);
        unpin();
        clock_++;
        std::vector<int32_t> held;
        std::vector<int64_t> missing;  // places in ids
        for (int64_t i = 0; i < n; i++) {
            if (i + AHEAD < n) places_.prefetch(ids[i + AHEAD]);
            int64_t slot = places_.find(ids[i]);
            if (leaves && ids[i] == leave_out) {
                slot = capacity_;
            } else if (slot < 0) {
                missing.push_back(i);
                slot = capacity_ + 1;
            } else {
                prefetch(slot);
            }
            slots[i] = slot;
        }
        for (int64_t i = 0; i < n; i++) {
            int64_t slot = slots[i];
            if (slot >= capacity_) continue;
            if (i + AHEAD < n && slots[i + AHEAD] < capacity_) prefetch(slots[i + AHEAD]);
            if (at(slot).stamp != clock_) {
                at(slot).stamp = clock_;
                held.push_back(int32_t(slot));
            }
        }
        for (int32_t slot : held) pin(slot);
        Counts& counts = counts_[admit ? 0 : 1];
        *fresh_count = 0;
        int64_t defaults = int64_t(missing.size());
        if (admit) {
            try {
                defaults = admit_missing(ids, missing, held, slots, fresh_ids, fresh_slots, fresh_count);
            } catch (...) {
                for (int32_t slot : held) unpin(slot);
                throw;
            }
        }
        counts.lookups += n;
        counts.defaults += defaults;
        std::lock_guard<std::mutex> tickets(tickets_lock_);
        held_[++tickets_] = std::move(held);
        return tickets_;
    }

    void release(int64_t ticket) {
        std::lock_guard<std::mutex> guard(tickets_lock_);
        auto found = held_.find(ticket);
        if (found == held_.end()) throw Failure{"ticket " + std::to_string(ticket) + " is not held"};
        free_.insert(free_.end(), found->second.begin(), found->second.end());
        held_.erase(found);
    }

    void counters(int64_t* out) {
        std::lock_guard<std::mutex> guard(lock_);
        std::lock_guard<std::mutex> tickets(tickets_lock_);
        int64_t all[] = {used_, seen_.size() + before_.size(), counts_[0].lookups, counts_[0].defaults, counts_[1].lookups, counts_[1].defaults,
                         admitted_, evicted_, forgotten_, int64_t(held_.size())};
        memcpy(out, all, sizeof all);
    }

    // All ids in the order in which they would leave, with their slots and in how many calls each was looked up, up to `room` of them;
    // returns how many. Without `ids`: how many there are.
    int64_t list(int64_t* ids, int64_t* slots, int64_t* uses, int64_t room) {
        std::lock_guard<std::mutex> guard(lock_);
        int64_t n = 0;
        if (ids == nullptr) return used_;
        for (int32_t slot = head_; slot >= 0 && n < room; slot = at(slot).next, n++) {
            ids[n] = at(slot).id;
            slots[n] = slot;
            uses[n] = at(slot).uses;
        }
        return n;
    }

    // The ids that wait for admission: how often each was seen, and whether it is one of the older half; as `list`.
    int64_t waiting(int64_t* ids, int64_t* times, int64_t* older, int64_t room) {
        std::lock_guard<std::mutex> guard(lock_);
        int64_t n = 0;
        if (ids == nullptr) return seen_.size() + before_.size();
        for (int64_t old = 0; old < 2; old++)
            (old ? before_ : seen_).each([&](int64_t id, int64_t count) {
                if (n == room) return;
                ids[n] = id;
                times[n] = count;
                older[n++] = old;
            });
        return n;
    }

    // Holds exactly these from now on, ids[i] in slot i, in the order in which they would leave. What was held before is let go.
    void load(const int64_t* ids, const int64_t* uses, int64_t n, const int64_t* waiting, const int64_t* times, const int64_t* older, int64_t m) {
        std::lock_guard<std::mutex> guard(lock_);
        if (n > capacity_) throw Failure{std::to_string(n) + " ids do not fit a capacity of " + std::to_string(capacity_)};
        std::vector<int32_t> order(static_cast<size_t>(n));
        for (size_t i = 0; i < order.size(); i++) order[i] = int32_t(i);
        if (policy_ == LFU)  // the ids may come from a map with another order
            std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return uses[a] < uses[b]; });
        Flat places, seen, before;
        places.reserve(n);
        for (int64_t i = 0; i < n; i++) {
            if (places.find(ids[i]) >= 0) throw Failure{"id " + std::to_string(ids[i]) + " is there twice"};
            places.put(ids[i], i);
        }
        for (int64_t i = 0; i < m; i++) (older[i] ? before : seen).put(waiting[i], times[i]);
        {
            std::lock_guard<std::mutex> tickets(tickets_lock_);
            held_.clear();
            free_.clear();
        }
        places_ = std::move(places);
        seen_ = std::move(seen);
        before_ = std::move(before);
        for (Slot& slot : slots_) slot.pins = 0;
        grow(n);
        pinned_ = used_ = 0;
        head_ = last_ = -1;
        tails_.clear();
        for (int64_t i = 0; i < n; i++) {
            at(i).id = ids[i];
            at(i).stamp = 0;
            at(i).uses = uint32_t(std::min<int64_t>(std::max<int64_t>(uses[i], 1), UINT32_MAX));
        }
        for (int32_t slot : order) insert(slot, last_);
        used_ = n;
    }

  private:
    struct Slot {  // half a cache line
        int64_t id;
        uint64_t stamp;  // the last call that looked it up
        int32_t prev, next;
        uint32_t uses, pins;
    };
    Slot& at(int64_t slot) { return slots_[size_t(slot)]; }
    void prefetch(int64_t slot) const { __builtin_prefetch(&slots_[size_t(slot)]); }

    struct Counts {
        int64_t lookups = 0, defaults = 0;
    };

    // Counts the ids that are not there, and gives slots to those seen often enough. Returns how many of `missing` read the default.
    int64_t admit_missing(const int64_t* ids, const std::vector<int64_t>& missing, std::vector<int32_t>& held, int64_t* slots, int64_t* fresh_ids,
                          int64_t* fresh_slots, int64_t* fresh_count) {
        Flat number;  // of an id in `found`
        std::vector<std::pair<int64_t, int64_t>> found;  // (id, how often in this call), in the order in which they came
        number.reserve(int64_t(missing.size()));
        for (int64_t i : missing) {
            int64_t k = number.find(ids[i]);
            if (k < 0) {
                number.put(ids[i], int64_t(found.size()));
                found.push_back({ids[i], 1});
            } else {
                found[size_t(k)].second++;
            }
        }
        int64_t wanted = 0;
        for (const auto& each : found) wanted += seen(each.first) + each.second >= admit_after_;
        int64_t room = capacity_ - pinned_;
        if (wanted > room)
            throw Failure{std::to_string(wanted) + " ids are to be admitted, and of " + std::to_string(capacity_) + " rows " + std::to_string(pinned_) +
                          " belong to the batches under way: give `capacity` more rows"};
        int64_t growth = std::min(capacity_, used_ + wanted);
        grow(growth);
        places_.reserve(growth);
        seen_.reserve(seen_.size() + int64_t(found.size()));
        held.reserve(held.size() + size_t(wanted));
        for (size_t k = 0; k < held.size(); k++) {
            if (k + AHEAD < held.size()) prefetch(held[k + AHEAD]);
            if (k + AHEAD / 2 < held.size() && policy_ != AGE) {  // a slot's neighbours, which it leaves
                const Slot& soon = at(held[k + AHEAD / 2]);
                if (soon.prev >= 0) prefetch(soon.prev);
                if (soon.next >= 0) prefetch(soon.next);
            }
            touch(held[k]);
        }
        int32_t cursor = head_;  // each victim once: what is passed over is held
        for (const auto& each : found) {
            int64_t count = seen(each.first) + each.second;
            before_.erase(each.first);
            if (count < admit_after_) {
                seen_.put(each.first, count);
                continue;
            }
            seen_.erase(each.first);
            int32_t slot = used_ < capacity_ ? int32_t(used_++) : victim(cursor);
            at(slot).id = each.first;
            at(slot).uses = 1;
            at(slot).stamp = clock_;
            insert(slot, policy_ == LFU ? tail(1) : last_);
            pin(slot);
            held.push_back(slot);
            places_.put(each.first, slot);
            fresh_ids[*fresh_count] = each.first;
            fresh_slots[(*fresh_count)++] = slot;
        }
        if (seen_.size() >= capacity_) {  // a bounded memory of what has no row
            forgotten_ += before_.size();
            before_ = std::move(seen_);
            seen_ = Flat();
        }
        admitted_ += wanted;
        int64_t defaults = 0;
        for (int64_t i : missing) {
            int64_t slot = places_.find(ids[i]);
            defaults += slot < 0;
            if (slot >= 0) slots[i] = slot;
        }
        return defaults;
    }

    int64_t seen(int64_t id) const { return std::max<int64_t>(0, seen_.find(id)) + std::max<int64_t>(0, before_.find(id)); }

    // The next slot from `cursor` on that nobody holds, taken from its id.
    int32_t victim(int32_t& cursor) {
        while (at(cursor).pins) cursor = at(cursor).next;
        int32_t slot = cursor;
        cursor = at(slot).next;
        unlink(slot);
        places_.erase(at(slot).id);
        evicted_++;
        return slot;
    }

    void grow(int64_t slots) {
        if (size_t(slots) <= slots_.size()) return;
        size_t wanted = std::min(size_t(capacity_), std::max(size_t(slots), slots_.size() * 2));
        slots_.resize(wanted);
    }

    void pin(int32_t slot) { pinned_ += at(slot).pins++ == 0; }
    void unpin(int32_t slot) { pinned_ -= --at(slot).pins == 0; }
    void unpin() {
        std::lock_guard<std::mutex> guard(tickets_lock_);
        for (int32_t slot : free_) unpin(slot);
        free_.clear();
    }

    // --- the order in which ids leave: a list from head_ to last_; for LFU in runs of equal uses, each with its tail ------------------

    int32_t tail(uint32_t uses) const {
        auto found = tails_.find(uses);
        return found == tails_.end() ? -1 : found->second;
    }

    void touch(int32_t slot) {
        uint32_t old = at(slot).uses, now = old + (old < UINT32_MAX);
        if (policy_ == AGE) {
            at(slot).uses = now;
            return;
        }
        int32_t before = at(slot).prev;
        unlink(slot);
        at(slot).uses = now;
        int32_t after = last_;
        if (policy_ == LFU) {
            after = tail(now);
            if (after < 0) after = tail(old);
            if (after < 0) after = before;
        }
        insert(slot, after);
    }

    void insert(int32_t slot, int32_t after) {
        at(slot).prev = after;
        int32_t following = after < 0 ? head_ : at(after).next;
        at(slot).next = following;
        (after < 0 ? head_ : at(after).next) = slot;
        (following < 0 ? last_ : at(following).prev) = slot;
        if (policy_ == LFU) tails_[at(slot).uses] = slot;
    }

    void unlink(int32_t slot) {
        int32_t before = at(slot).prev, following = at(slot).next;
        (before < 0 ? head_ : at(before).next) = following;
        (following < 0 ? last_ : at(following).prev) = before;
        if (policy_ != LFU) return;
        uint32_t uses = at(slot).uses;
        auto run = tails_.find(uses);
        if (run->second != slot) return;
        if (before >= 0 && at(before).uses == uses) run->second = before;
        else tails_.erase(run);
    }

    const int64_t capacity_, admit_after_;
    const Policy policy_;
    Flat places_;         // id -> slot
    Flat seen_, before_;  // id -> how often it was looked up without a row; before_: the older ones, which go first
    std::vector<Slot> slots_;
    std::unordered_map<uint32_t, int32_t> tails_;
    int32_t head_ = -1, last_ = -1;
    int64_t used_ = 0, pinned_ = 0, tickets_ = 0, admitted_ = 0, evicted_ = 0, forgotten_ = 0;
    uint64_t clock_ = 0;
    Counts counts_[2];  // of calls that admit, and of those that do not
    std::unordered_map<int64_t, std::vector<int32_t>> held_;  // by ticket; with free_, under tickets_lock_
    std::vector<int32_t> free_;
    std::mutex tickets_lock_;
    std::mutex lock_;
};

thread_local std::string said;

template <class Work>
int64_t guarded(Work work) {
    try {
        return work();
    } catch (const Failure& failure) {
        said = failure.what;
    } catch (const std::exception& error) {
        said = error.what();
    }
    return -1;
}

IdMap& at(void* map) { return *static_cast<IdMap*>(map); }

}  // namespace
}  // namespace twd

// --- what id_map.py calls --------------------------------------------------------------------------------------------------------

API int64_t twd_abi() { return 2; }
API const char* twd_error() { return twd::said.c_str(); }
API void* twd_open(int64_t capacity, int64_t admit_after, int64_t policy) {
    void* made = nullptr;
    twd::guarded([&] {
        made = new twd::IdMap(capacity, admit_after, twd::Policy(policy));
        return 0;
    });
    return made;
}
API void twd_close(void* map) { delete static_cast<twd::IdMap*>(map); }
API int64_t twd_fetch(void* map, const int64_t* ids, int64_t n, int64_t admit, int64_t leaves, int64_t leave_out, int64_t* slots,
                      int64_t* fresh_ids, int64_t* fresh_slots, int64_t* fresh_count) {
    return twd::guarded([&] { return twd::at(map).fetch(ids, n, admit != 0, leaves != 0, leave_out, slots, fresh_ids, fresh_slots, fresh_count); });
}
API int64_t twd_release(void* map, int64_t ticket) {
    return twd::guarded([&] {
        twd::at(map).release(ticket);
        return 0;
    });
}
API void twd_counters(void* map, int64_t* out) { twd::at(map).counters(out); }
API int64_t twd_list(void* map, int64_t* ids, int64_t* slots, int64_t* uses, int64_t room) {
    return twd::guarded([&] { return twd::at(map).list(ids, slots, uses, room); });
}
API int64_t twd_waiting(void* map, int64_t* ids, int64_t* times, int64_t* older, int64_t room) {
    return twd::guarded([&] { return twd::at(map).waiting(ids, times, older, room); });
}
API int64_t twd_load(void* map, const int64_t* ids, const int64_t* uses, int64_t n, const int64_t* waiting, const int64_t* times,
                     const int64_t* older, int64_t m) {
    return twd::guarded([&] {
        twd::at(map).load(ids, uses, n, waiting, times, older, m);
        return 0;
    });
}
