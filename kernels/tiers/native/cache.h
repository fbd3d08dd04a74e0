// A set-associative cache of rows over a store.
//
// Slots are rows of tensors that the caller owns (weights and optimizer state): kernels read and update them in place, and know nothing
// of this file. A batch pins its slots from fetch to release; a row that is pinned stays. What was fetched for training is written back
// when it leaves. Slots that this process cannot address (on a device) are reached through buffers that a callback, Move, gives.
#pragma once
#include <string.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "fill.h"
#include "memory.h"
#include "places.h"
#include "store.h"

namespace twt {
namespace {

const size_t MOVED = 1 << 15;  // rows that go through a buffer at once in a snapshot
const int64_t AHEAD = 64;   // ids whose sets are asked for before they are looked at
const int64_t LEAVING = 6;  // rows whose values are asked for before they are copied

// Copies the rows of `leaving` slots to buffers and says in `from` where each part of them is, contiguous; in `to` where the caller shall put
// those of the `coming` slots. What comes is copied to the slots when fetch has returned. Not 0: it could not.
typedef int64_t (*Move)(int64_t leaving, const int64_t* leaving_slots, int64_t coming, const int64_t* coming_slots, char** from, char** to);
const size_t MAX_PARTS = 16;

struct Coming {  // a batch whose rows are not all in their slots yet; ticket 0: none
    int64_t ticket = 0;
    int asked = 0;  // Filler::ask
    std::vector<Miss> misses;
    std::vector<int64_t> held;  // its slots
};

struct Kept {  // a row and the slot that holds it
    int64_t row, slot;
};

class Cache {
  public:
    Cache(std::unique_ptr<Rows> store, std::vector<Part> parts, uint64_t seed, int64_t slots, bool lfu)
        : store_(std::move(store)), parts_(std::move(parts)), filler_(*store_, parts_, seed), sets_(slots / WAYS), lfu_(lfu), places_(store_->rows(), sets_),
          sets_of_(size_t(sets_)) {
        count();
    }

    // The slots of `ids`; they stay until release(ticket). `move`: for slots that are not in `arrays`. `later`: their rows may come until
    // complete(ticket), so that the disk is not waited for here.
    int64_t fetch(const int64_t* ids, int64_t n, int64_t* slots, char* const* arrays, bool train, Move move, bool later) {
        std::lock_guard<std::mutex> guard(lock_);
        for (int64_t i = 0; i < n; i++)
            if (ids[i] < 0 || ids[i] >= store_->rows())
                throw Failure{"id " + std::to_string(ids[i]) + " is out of range: the table has " + std::to_string(store_->rows()) + " rows"};
        if (unpin(arrays) >= PINS) throw Failure{std::to_string(PINS) + " batches are under way: release() those that are done"};
        tick();
        Coming now;
        std::vector<Miss>& misses = now.misses;
        std::vector<int64_t>& held = now.held;
        int64_t hits = 0;
        char *from[MAX_PARTS] = {}, *to[MAX_PARTS] = {};
        try {
            Places::Place sought[AHEAD];
            for (int64_t i = -AHEAD; i < n; i++) {
                if (i >= 0) slots[i] = take(ids[i], sought[i % AHEAD], train, held, misses, hits);
                if (i + AHEAD < n) ask(ids[i + AHEAD], sought[(i + AHEAD) % AHEAD]);
            }
            now.asked = filler_.ask(misses);
            std::vector<Kept> leaving;
            for (const Miss& miss : misses)
                if (miss.dirty) leaving.push_back({miss.before, miss.slot});
            if (move && !misses.empty()) {
                std::vector<int64_t> places;
                for (Miss& miss : misses) miss.at = int64_t(places.size()), places.push_back(miss.slot);
                stage(move, leaving.data(), leaving.size(), places, from, to);
            }
            save(leaving, move ? from : arrays);
            written_ += int64_t(leaving.size());
        } catch (...) {
            for (int64_t slot : held) at(slot).pins--;
            for (const Miss& miss : misses) {  // nothing was moved yet: the rows that were to leave are still there
                tag(miss.slot) = miss.tag;
                at(miss.slot).dirty = miss.dirty;
            }
            come(arrays);  // before another ask() takes the place of its reads
            throw;
        }
        hits_ += hits;
        misses_ += int64_t(misses.size());
        for (const Miss& miss : misses) present_ += miss.before < 0;
        now.ticket = ++tickets_;
        {
            std::lock_guard<std::mutex> tickets(tickets_lock_);
            held_[now.ticket] = held;
        }
        come(arrays);  // those of the batch before: its reads had the time of this one's
        coming_ = std::move(now);
        if (!later) come(move ? to : arrays);
        std::lock_guard<std::mutex> tickets(tickets_lock_);
        incomplete_ = coming_.ticket;
        count();
        if (later || failed_.empty()) return tickets_;
        auto failed = failed_.find(tickets_);
        if (failed == failed_.end()) return tickets_;
        Failure why = failed->second;
        let_go(tickets_);
        throw why;
    }

    // Whether the rows of `ticket` are in their slots, without waiting.
    bool ready(int64_t ticket) {
        std::lock_guard<std::mutex> tickets(tickets_lock_);
        return incomplete_ != ticket && !failed_.count(ticket);
    }

    // The rows of `ticket` are in their slots, or Failure says why not: it is to be released all the same.
    void complete(int64_t ticket, char* const* arrays) {
        std::unique_lock<std::mutex> tickets(tickets_lock_);
        while (incomplete_ == ticket) {  // else nobody waits for a fetch; and one that is under way brings them
            tickets.unlock();
            bool mine = lock_.try_lock();
            if (mine) {
                std::lock_guard<std::mutex> guard(lock_, std::adopt_lock);
                if (coming_.ticket == ticket) come(arrays);
            }
            tickets.lock();
            if (!mine && incomplete_ == ticket) came_.wait_for(tickets, std::chrono::milliseconds(1));
        }
        auto failed = failed_.find(ticket);
        if (failed != failed_.end()) throw failed->second;
    }

    // Never waits for a fetch: the pins go when the next one begins.
    void release(int64_t ticket) {
        std::lock_guard<std::mutex> guard(tickets_lock_);
        if (!held_.count(ticket)) throw Failure{"ticket " + std::to_string(ticket) + " is not held"};
        let_go(ticket);
    }

    // Everything that training changed goes to the store and is ready to be the snapshot.
    void prepare(char* const* arrays, Move move) {
        std::lock_guard<std::mutex> guard(lock_);
        come(arrays);
        unpin(arrays);
        std::vector<Kept> changed;
        for (int64_t slot = 0; slot < sets_ * WAYS; slot++)
            if (at(slot).dirty) changed.push_back({row_of(slot), slot});
        for (size_t first = 0; move && first < changed.size(); first += MOVED) {
            std::vector<Kept> some(changed.begin() + long(first), changed.begin() + long(std::min(first + MOVED, changed.size())));
            char *from[MAX_PARTS] = {}, *to[MAX_PARTS] = {};
            stage(move, some.data(), some.size(), {}, from, to);
            save(some, from);
        }
        if (!move) save(changed, arrays);
        for (const Kept& each : changed) at(each.slot).dirty = at(each.slot).pins != 0;  // what a batch still holds may change again
        store_->prepare();
        std::lock_guard<std::mutex> tickets(tickets_lock_);
        count();
    }

    void finish() {
        std::lock_guard<std::mutex> guard(lock_);
        store_->finish();
        std::lock_guard<std::mutex> tickets(tickets_lock_);
        count();
    }

    // Where rows are, -1 for those that are not cached. `change`: the caller will change them there.
    void find_all(const int64_t* ids, int64_t n, int64_t* slots, bool change) {
        std::lock_guard<std::mutex> guard(lock_);
        for (int64_t i = 0; i < n; i++) {
            if (ids[i] < 0 || ids[i] >= store_->rows()) throw Failure{"id " + std::to_string(ids[i]) + " is out of range"};
            slots[i] = find(ids[i]);
            if (change && slots[i] >= 0) at(slots[i]).dirty = 1;
        }
    }

    // Nothing is cached any more, and what was changed there is dropped: the records were replaced.
    void forget() {
        std::lock_guard<std::mutex> guard(lock_);
        unpin(nullptr);
        for (int64_t slot = 0; slot < sets_ * WAYS; slot++)
            if (at(slot).pins) throw Failure{"rows are replaced while batches are under way: step() first, and end the pipeline"};
        for (int64_t slot = 0; slot < sets_ * WAYS; slot++) tag(slot) = 0, at(slot) = Slot{};
        present_ = 0;
        if (Memory* memory = dynamic_cast<Memory*>(store_.get())) memory->recount();
        std::lock_guard<std::mutex> tickets(tickets_lock_);
        count();
    }

    // Copies of rows as they are now, cached or not; the cache stays as it is.
    void peek(const int64_t* ids, int64_t n, int64_t part, char* out, char* const* arrays) {
        std::lock_guard<std::mutex> guard(lock_);
        come(arrays);
        const int64_t bytes = parts_[size_t(part)].bytes;
        each_row(ids, n, part, [&](int64_t i, int64_t slot) { memcpy(out + i * bytes, arrays[part] + slot * bytes, size_t(bytes)); },
                 [&](int64_t i, std::vector<char>& record, int64_t before) { memcpy(out + i * bytes, record.data() + before, size_t(bytes)); });
    }

    // Sets one part of rows, cached or not.
    void poke(const int64_t* ids, int64_t n, int64_t part, const char* from, char* const* arrays) {
        std::lock_guard<std::mutex> guard(lock_);
        come(arrays);
        const int64_t bytes = parts_[size_t(part)].bytes;
        each_row(ids, n, part,
                 [&](int64_t i, int64_t slot) {
                     memcpy(arrays[part] + slot * bytes, from + i * bytes, size_t(bytes));
                     at(slot).dirty = 1;
                 },
                 [&](int64_t i, std::vector<char>& record, int64_t before) {
                     memcpy(record.data() + before, from + i * bytes, size_t(bytes));
                     store_->write({ids[i]}, [&](size_t, char* to) { memcpy(to, record.data(), record.size()); });
                 });
        std::lock_guard<std::mutex> tickets(tickets_lock_);
        count();
    }

    // As the last call that came to its end left them: never waits for a fetch.
    void counters(int64_t* out) {
        std::lock_guard<std::mutex> guard(tickets_lock_);
        memcpy(out, counted_, sizeof counted_);
        out[9] = int64_t(held_.size());
    }

  private:
    // `cached(i, slot)` for ids that have a slot; `away(i, record, before)` for others: all parts of the row, and where `part` begins in them.
    template <class Cached, class Away> void each_row(const int64_t* ids, int64_t n, int64_t part, Cached cached, Away away) {
        int64_t before = 0;
        for (int64_t p = 0; p < part; p++) before += parts_[size_t(p)].bytes;
        std::vector<char> record(static_cast<size_t>(store_->record()));
        for (int64_t i = 0; i < n; i++) {
            if (ids[i] < 0 || ids[i] >= store_->rows()) throw Failure{"id " + std::to_string(ids[i]) + " is out of range"};
            const int64_t slot = find(ids[i]);
            if (slot >= 0) {
                cached(i, slot);
                continue;
            }
            filler_.record(ids[i], record.data());
            away(i, record, before);
        }
    }

    void count() {  // under tickets_lock_
        int64_t all[] = {hits_, misses_, filler_.made, filler_.read, written_, present_, store_->journal_rows(), store_->written_rows(), store_->generation(), 0};
        memcpy(counted_, all, sizeof all);
    }

    void tick() {
        if (++clock_ != 0) return;
        for (int64_t slot = 0; slot < sets_ * WAYS; slot++) at(slot).stamp = 0;  // all are as old as the count is long
        clock_ = 1;
    }

    size_t unpin(char* const* arrays) {  // how many batches are under way
        std::vector<int64_t> freed;
        size_t count;
        bool unread;
        {
            std::lock_guard<std::mutex> guard(tickets_lock_);
            freed.swap(free_);
            count = held_.size();
            unread = coming_.ticket && !held_.count(coming_.ticket);
        }
        if (unread) come(arrays);  // its slots are about to be free
        for (size_t i = 0; i < freed.size(); i++) {
            if (i + NEAR < freed.size()) __builtin_prefetch(&at(freed[i + NEAR]));
            at(freed[i]).pins--;
        }
        return count;
    }

    void let_go(int64_t ticket) {  // under tickets_lock_
        std::vector<int64_t>& held = held_[ticket];
        free_.insert(free_.end(), held.begin(), held.end());
        held_.erase(ticket);
        failed_.erase(ticket);
    }

    // Brings the rows that are still to come. Where they cannot be read, or are those of a batch before that could not be, their ticket says so.
    void come(char* const* arrays) {
        if (!coming_.ticket) return;
        Coming now;
        std::swap(now, coming_);
        std::string why;
        try {
            filler_.fill(now.misses, now.asked, arrays);
        } catch (const Failure& failure) {
            why = failure.what;
        } catch (const std::exception& error) {
            why = error.what();
        }
        if (!why.empty()) {
            for (const Miss& miss : now.misses) tag(miss.slot) = 0, at(miss.slot).dirty = 0;  // what could not be read is not there
            present_ -= int64_t(now.misses.size());
            lost_ = why;
        } else if (!lost_.empty() && std::any_of(now.held.begin(), now.held.end(), [&](int64_t slot) { return !tag(slot); })) {
            why = lost_;
        }
        std::lock_guard<std::mutex> tickets(tickets_lock_);
        incomplete_ = 0;
        came_.notify_all();
        if (!why.empty() && held_.count(now.ticket)) failed_[now.ticket] = Failure{why};
        count();
    }

    Slot& at(int64_t slot) { return sets_of_[size_t(slot / WAYS)].slots[slot % WAYS]; }
    uint32_t& tag(int64_t slot) { return sets_of_[size_t(slot / WAYS)].tags[slot % WAYS]; }

    int64_t row_of(int64_t slot) const {  // -1: nothing is there
        uint32_t tag = sets_of_[size_t(slot / WAYS)].tags[slot % WAYS];
        return tag ? places_.row(slot / WAYS, tag) : -1;
    }

    int64_t find(Places::Place place) const {
        uint32_t found = same(sets_of_[size_t(place.set)].tags, place.tag);
        return found ? place.set * WAYS + __builtin_ctz(found) : -1;
    }

    int64_t find(int64_t id) const {
        int64_t slot = find(places_.of(id, 0));
        return slot < 0 && spilled_ ? find(places_.of(id, 1)) : slot;
    }

    // Ask for the memory that take() will look at. Inline: GCC drops calls of functions that only prefetch.
    __attribute__((always_inline)) void ask(int64_t id, Places::Place& sought) const {
        sought = places_.of(id, 0);
        const char* set = reinterpret_cast<const char*>(&sets_of_[size_t(sought.set)]);
        __builtin_prefetch(set), __builtin_prefetch(set + 64), __builtin_prefetch(set + 128);
    }

    // The slot of `id`, pinned once for this call.
    int64_t take(int64_t id, Places::Place sought, bool train, std::vector<int64_t>& held, std::vector<Miss>& misses, int64_t& hits) {
        int64_t place = find(sought);
        if (place < 0 && spilled_) place = find(places_.of(id, 1));
        bool missing = place < 0;
        uint32_t fresh = sought.tag;
        if (missing) place = victim(id, fresh);
        Slot& slot = at(place);
        if (missing) {
            misses.push_back(Miss{place, id, row_of(place), tag(place), slot.dirty != 0, place});
            tag(place) = fresh;
            slot.dirty = 0, slot.count = 0;
        }
        if (slot.stamp != clock_) {
            hits += !missing;
            slot.stamp = clock_;
            slot.count += slot.count < UINT16_MAX;
            slot.pins++;
            slot.dirty |= train;
            held.push_back(place);
        }
        return place;
    }

    // The slot that is given up for `id`: an empty one, else the one used longest ago (or least often) of those nobody holds.
    // `tag`: what the row will be known by there.
    int64_t victim(int64_t id, uint32_t& tag) {
        for (uint64_t which = 0; which < 2; which++) {
            Places::Place place = places_.of(id, which);
            spilled_ |= which == 1;
            tag = place.tag;
            const Slot* slots = sets_of_[size_t(place.set)].slots;
            const uint32_t* tags = sets_of_[size_t(place.set)].tags;
            int64_t best = -1;
            for (int64_t way = 0; way < WAYS; way++) {
                if (slots[way].pins) continue;
                if (!tags[way]) return place.set * WAYS + way;
                if (best < 0 || before(slots[way], slots[best])) best = way;
            }
            if (best >= 0) return place.set * WAYS + best;  // the second set only where all of the first is held
        }
        throw Failure{"the cache is too small: the rows of the batches under way fill the sets of id " + std::to_string(id) + " (" +
                      std::to_string(sets_ * WAYS) + " slots, in sets of " + std::to_string(WAYS) + " that fill unevenly): give `cache` more memory, twice the rows of those batches, or prefetch fewer"};
    }

    bool before(const Slot& one, const Slot& other) const {
        if (lfu_ && one.count != other.count) return one.count < other.count;
        return one.stamp < other.stamp;
    }

    void gather(int64_t slot, char* const* arrays, char* record) const {
        for (size_t p = 0; p < parts_.size(); p++) {
            memcpy(record, arrays[p] + slot * parts_[p].bytes, size_t(parts_[p].bytes));
            record += parts_[p].bytes;
        }
    }

    // Has the rows of slots copied to buffers; `leaving` then names places in those.
    void stage(Move move, Kept* leaving, size_t count, const std::vector<int64_t>& coming, char** from, char** to) {
        std::vector<int64_t> slots;
        for (size_t i = 0; i < count; i++) slots.push_back(leaving[i].slot);
        if (move(int64_t(count), slots.data(), int64_t(coming.size()), coming.data(), from, to) != 0) throw Failure{"rows could not be moved between the device and the host"};
        for (size_t i = 0; i < count; i++) leaving[i].slot = int64_t(i);
    }

    // Writes rows to the store.
    void save(const std::vector<Kept>& kept, char* const* arrays) {
        std::vector<int64_t> rows;
        for (size_t first = 0; first < kept.size(); first += MOST_ROWS) {
            size_t count = std::min(MOST_ROWS, kept.size() - first);
            rows.clear();
            for (size_t i = 0; i < count; i++) rows.push_back(kept[first + i].row);
            store_->write(rows, [&](size_t i, char* to) {
                if (i + LEAVING < count)
                    for (size_t p = 0; p < parts_.size(); p++)
                        for (int64_t at = 0; at < parts_[p].bytes; at += 64) __builtin_prefetch(arrays[p] + kept[first + i + LEAVING].slot * parts_[p].bytes + at, 0, 0);  // once
                gather(kept[first + i].slot, arrays, to);
            });
        }
    }

    std::unique_ptr<Rows> store_;
    std::vector<Part> parts_;
    Filler filler_;
    int64_t sets_;
    bool lfu_;
    Places places_;
    Zeros<Set> sets_of_;
    std::unordered_map<int64_t, std::vector<int64_t>> held_;  // by ticket; with free_, under tickets_lock_
    std::vector<int64_t> free_;  // slots of tickets that were released, still pinned
    std::unordered_map<int64_t, Failure> failed_;  // tickets whose rows could not be read; as held_
    int64_t incomplete_ = 0;  // coming_.ticket; as held_
    std::mutex tickets_lock_;
    std::condition_variable came_;  // incomplete_ changed
    std::mutex lock_;
    Coming coming_;
    std::string lost_;  // why rows could not be read, the last time
    uint32_t clock_ = 0;
    bool spilled_ = false;  // a row was ever put into its second set
    int64_t tickets_ = 0, hits_ = 0, misses_ = 0, written_ = 0, present_ = 0;
    int64_t counted_[10] = {};  // under tickets_lock_, as is held_
};

}  // namespace
}  // namespace twt
