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

#include "flat.h"
#include "order.h"

#define API extern "C" __attribute__((visibility("default")))

namespace twd {
namespace {

const int64_t BLOCK = 64;  // ids that are looked for together

struct Failure {
    std::string what;
};

class IdMap {
  public:
    IdMap(int64_t capacity, int64_t admit_after, Policy policy) : capacity_(capacity), admit_after_(admit_after), policy_(policy), order_(policy) {}

    // The slot of each id. `leave_out` (if `leaves`) gets slot `capacity`, what is not admitted `capacity + 1`. Ids that are admitted now are
    // listed in `fresh_ids` and `fresh_slots`, which have room for n. `counted`: how many those are, and how many of
    // `ids` have no slot. Fails before anything changes.
    int64_t fetch(const int64_t* ids, int64_t n, bool admit, bool leaves, int64_t leave_out, int64_t* slots, int64_t* fresh_ids,
                  int64_t* fresh_slots, int64_t* counted) {
        std::lock_guard<std::mutex> guard(lock_);
        clock_++;
        missing_.clear();
        std::vector<int32_t> held;  // those of `ids` that have a slot, each once, in the order in which they came
        for (int64_t first = 0; first < n; first += BLOCK) {
            const int64_t last = std::min(n, first + BLOCK);
            size_t sought[BLOCK];
            for (int64_t i = first; i < last; i++) sought[i - first] = places_.sought(ids[i]);
            for (int64_t i = first; i < last; i++) {
                int64_t slot = leaves && ids[i] == leave_out ? capacity_ : places_.find(ids[i], sought[i - first]);
                slots[i] = slot < 0 ? capacity_ + 1 : slot;
                if (slot < 0) missing_.push_back(i);
                else if (slot < capacity_) order_.prefetch(slot);
            }
            for (int64_t i = first; i < last; i++) {
                if (slots[i] >= capacity_ || at(slots[i]).stamp == clock_) continue;
                at(slots[i]).stamp = clock_;
                held.push_back(int32_t(slots[i]));
            }
        }
        counted[0] = 0;
        int64_t defaults = int64_t(missing_.size());
        if (admit) defaults = admit_missing(ids, held, slots, fresh_ids, fresh_slots, counted);
        counted[1] = defaults;
        Counts& counts = counts_[admit ? 0 : 1];
        counts.lookups += n;
        counts.defaults += defaults;
        held_[++tickets_] = std::move(held);
        return tickets_;
    }

    void release(int64_t ticket) {
        std::lock_guard<std::mutex> guard(lock_);
        if (!held_.erase(ticket)) throw Failure{"ticket " + std::to_string(ticket) + " is not held"};
    }

    void counters(int64_t* out) {
        std::lock_guard<std::mutex> guard(lock_);
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
        order_.each(used_, [&](int32_t slot) {
            if (n == room) return false;
            ids[n] = at(slot).id;
            slots[n] = slot;
            uses[n++] = at(slot).uses;
            return true;
        });
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
        held_.clear();
        places_ = std::move(places);
        seen_ = std::move(seen);
        before_ = std::move(before);
        order_.grow(n, capacity_, size_t(n));
        for (int64_t i = 0; i < n; i++) {
            at(i).id = ids[i];
            at(i).stamp = 0;
            at(i).uses = uint32_t(std::min<int64_t>(std::max<int64_t>(uses[i], 1), UINT32_MAX));
        }
        order_.restart(order);
        used_ = n;
    }

  private:
    Slot& at(int64_t slot) { return order_.at(slot); }

    struct Counts {
        int64_t lookups = 0, defaults = 0;
    };

    struct Found {  // an id that has no slot, how often it was looked up in this call, and what it gets
        int64_t id, count, slot;
    };

    // Counts the ids that are not there, and gives slots to those seen often enough. Returns how many of `missing_` read the default.
    int64_t admit_missing(const int64_t* ids, std::vector<int32_t>& held, int64_t* slots, int64_t* fresh_ids, int64_t* fresh_slots,
                          int64_t* fresh_count) {
        find_missing(ids);
        const bool counting = seen_.size() || before_.size();
        int64_t wanted = 0;
        for (size_t k = 0; k < found_.size(); k++) {
            if (counting && k + AHEAD < found_.size()) seen_.sought(found_[k + AHEAD].id), before_.sought(found_[k + AHEAD].id);
            if (counting) found_[k].count += seen(found_[k].id);
            wanted += found_[k].count >= admit_after_;
        }
        int64_t evicting = std::max<int64_t>(0, used_ + wanted - capacity_);
        if (evicting) {
            int64_t pinned = int64_t(held.size()) + mark_held();
            if (wanted > capacity_ - pinned)
                throw Failure{std::to_string(wanted) + " ids are to be admitted, and of " + std::to_string(capacity_) + " rows " + std::to_string(pinned) +
                              " belong to the batches under way: give `capacity` more rows"};
        }
        int64_t growth = std::min(capacity_, used_ + wanted);
        order_.grow(growth, capacity_, held.size() + size_t(wanted));
        places_.reserve(growth);
        seen_.reserve(seen_.size() + int64_t(found_.size()) - wanted);
        held.reserve(held.size() + size_t(wanted));
        victims_.reserve(size_t(evicting));
        order_.touch(held);
        order_.evict(evicting, clock_, victims_);
        for (size_t k = 0; k < victims_.size(); k++) {
            if (k + AHEAD < victims_.size()) places_.sought(at(victims_[k + AHEAD]).id);
            places_.erase(at(victims_[k]).id);
        }
        evicted_ += evicting;
        size_t taken = 0;
        for (size_t k = 0; k < found_.size(); k++) {
            if (k + AHEAD < found_.size()) places_.sought(found_[k + AHEAD].id);
            Found& each = found_[k];
            before_.erase(each.id);
            each.slot = capacity_ + 1;
            if (each.count < admit_after_) {
                seen_.put(each.id, each.count);
                continue;
            }
            seen_.erase(each.id);
            int32_t slot = used_ < capacity_ ? int32_t(used_++) : victims_[taken++];
            each.slot = slot;
            at(slot).id = each.id;
            at(slot).stamp = clock_;
            order_.add(slot);
            held.push_back(slot);
            places_.put(each.id, slot);
            fresh_ids[*fresh_count] = each.id;
            fresh_slots[(*fresh_count)++] = slot;
        }
        if (seen_.size() >= capacity_) {  // a bounded memory of what has no row
            forgotten_ += before_.size();
            before_ = std::move(seen_);
            seen_ = Flat();
        }
        admitted_ += wanted;
        order_.tidy(used_);
        int64_t defaults = 0;
        for (size_t m = 0; m < missing_.size(); m++) {
            int64_t slot = found_[size_t(which_[m])].slot;
            defaults += slot > capacity_;
            slots[missing_[m]] = slot;
        }
        return defaults;
    }

    // `found_`: the ids at the places `missing_`, each once, in the order in which they came; `which_`: of each place, where in `found_`.
    void find_missing(const int64_t* ids) {
        found_.clear();
        which_.resize(missing_.size());
        size_t size = 16;
        while (size < missing_.size() * 2) size *= 2;
        firsts_.assign(size, -1);
        for (size_t m = 0; m < missing_.size(); m++) {
            int64_t id = ids[missing_[m]];
            size_t i = size_t(mix(uint64_t(id))) & (size - 1);
            while (firsts_[i] >= 0 && found_[size_t(firsts_[i])].id != id) i = (i + 1) & (size - 1);
            if (firsts_[i] < 0) {
                firsts_[i] = int32_t(found_.size());
                found_.push_back(Found{id, 0, 0});
            }
            found_[size_t(firsts_[i])].count++;
            which_[m] = firsts_[i];
        }
    }

    int64_t seen(int64_t id) const { return std::max<int64_t>(0, seen_.find(id)) + std::max<int64_t>(0, before_.find(id)); }

    // Stamps the slots that earlier calls hold, so that this one gives none of them away; returns how many it had not stamped itself.
    int64_t mark_held() {
        int64_t more = 0;
        for (const auto& ticket : held_)
            for (size_t k = 0; k < ticket.second.size(); k++) {
                if (k + AHEAD < ticket.second.size()) order_.prefetch(ticket.second[k + AHEAD]);
                Slot& slot = at(ticket.second[k]);
                more += slot.stamp != clock_;
                slot.stamp = clock_;
            }
        return more;
    }

    const int64_t capacity_, admit_after_;
    const Policy policy_;
    Flat places_;         // id -> slot
    Flat seen_, before_;  // id -> how often it was looked up without a row; before_: the older ones, which go first
    Order order_;
    int64_t used_ = 0, tickets_ = 0, admitted_ = 0, evicted_ = 0, forgotten_ = 0;
    uint64_t clock_ = 0;
    Counts counts_[2];  // of calls that admit, and of those that do not
    std::unordered_map<int64_t, std::vector<int32_t>> held_;  // by ticket
    std::vector<int64_t> missing_;  // of the call under way: places in its ids; the rest as find_missing() and evict() say
    std::vector<int32_t> which_, firsts_, victims_;
    std::vector<Found> found_;
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

API int64_t twd_abi() { return 3; }
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
                      int64_t* fresh_ids, int64_t* fresh_slots, int64_t* counted) {
    return twd::guarded([&] { return twd::at(map).fetch(ids, n, admit != 0, leaves != 0, leave_out, slots, fresh_ids, fresh_slots, counted); });
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
