// Gives the slots of a cache the rows that it missed: from the store, or made where they were never written.
#pragma once
#include <string.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <system_error>
#include <thread>

#include "store.h"

namespace twt {
namespace {

const int READERS = 8;  // threads that wait for the disk
const size_t MANY = 2048;   // rows of memory that several threads copy faster than one
const size_t SOON = 6;       // rows whose values are asked for before they are copied
const int64_t NEAR = 32;    // slots, and rows of the store, that are asked for before they are looked at

struct Miss {
    int64_t slot, row, before;  // before: the row that leaves, or -1
    uint32_t tag;               // and its tag
    bool dirty;                 // its values must be written first
    int64_t at;                 // where its values go: the slot, or a place in a buffer
    int64_t asked = -1, answer = 0;  // where the disk was asked for it, and the number of that
};

class Filler {
  public:
    // `store` and `parts` outlive this.
    Filler(Rows& store, const std::vector<Part>& parts, uint64_t seed) : store_(store), parts_(parts), seed_(seed) {}

    int64_t made = 0, read = 0;  // rows, so far

    // Has the disk read what was left to it, while rows that leave are written and others come. Its result is fill()'s `asked`.
    int ask(std::vector<Miss>& misses) {
        std::vector<Where> wanted;
        for (size_t i = 0; i < misses.size() && store_.any_far(); i++) {
            if (i + NEAR < misses.size()) store_.soon(misses[i + NEAR].row);
            Where where = store_.where(misses[i].row);
            if (!store_.far(where)) continue;
            misses[i].asked = where.at, misses[i].answer = int64_t(wanted.size());
            wanted.push_back(where);
        }
        return wanted.empty() ? 0 : store_.ask(wanted);
    }

    // Fills the slots: what is made or in memory first, then what the disk was asked for; what is still missing is read by several
    // threads, in the order of the files.
    void fill(const std::vector<Miss>& misses, int asked, char* const* arrays) {
        struct Wanted {
            Where where;
            int64_t slot, answer;
        };
        std::vector<Wanted> stored, distant;
        std::vector<size_t> fresh;
        for (size_t i = 0; i < misses.size(); i++) {
            if (i + NEAR < misses.size()) store_.soon(misses[i + NEAR].row);
            Where where = store_.where(misses[i].row);
            if (where.at < 0)
                fresh.push_back(i);
            else  // it may have left since the disk was asked
                (where.logged && where.at == misses[i].asked ? distant : stored).push_back({where, misses[i].at, misses[i].answer});
        }
        made += int64_t(fresh.size()), read += int64_t(stored.size() + distant.size());
        bool in_memory = store_.in_memory(), shared = in_memory && stored.size() >= MANY;
        if (!in_memory) std::sort(stored.begin(), stored.end(), [](const Wanted& a, const Wanted& b) { return a.where.logged != b.where.logged ? a.where.logged : a.where.at < b.where.at; });
        for (size_t i : fresh)
            for (size_t p = 0; p < parts_.size(); p++)
                start_row(parts_[p], int64_t(p), seed_, misses[i].row, reinterpret_cast<float*>(arrays[p] + misses[i].at * parts_[p].bytes));
        store_.more();
        std::vector<char> record(static_cast<size_t>(store_.record()));
        size_t slow = 0;
        for (size_t i = 0; i < stored.size() && !shared; i++) {
            const Wanted each = stored[i];
            if (i + SOON < stored.size()) store_.soon(stored[i + SOON].where);
            if (store_.read_now(each.where, record.data()))
                scatter(record.data(), each.slot, arrays);
            else
                stored[slow++] = each;
        }
        if (!shared) stored.resize(slow);
        for (const Wanted& each : distant) {
            if (const char* found = store_.answer(asked, size_t(each.answer), each.where))
                scatter(found, each.slot, arrays);
            else
                stored.push_back(each);
        }
        std::atomic<size_t> next{0};
        std::mutex failing;
        std::string failed;
        auto work = [&] {
            std::vector<char> mine(static_cast<size_t>(store_.record()));
            for (size_t i; (i = next.fetch_add(16)) < stored.size();)
                for (size_t k = i; k < std::min(i + 16, stored.size()); k++) try {
                        store_.read(stored[k].where, mine.data());
                        scatter(mine.data(), stored[k].slot, arrays);
                    } catch (const Failure& f) {
                        std::lock_guard<std::mutex> guard(failing);
                        failed = f.what;
                    }
        };
        size_t threads = stored.size() < 64 ? 0 : READERS - 1;
        std::vector<std::thread> readers;
        readers.reserve(threads);
        try {
            for (size_t i = 0; i < threads; i++) readers.emplace_back(work);
        } catch (const std::system_error&) {  // as many as there may be
        }
        work();
        for (std::thread& t : readers) t.join();
        if (!failed.empty()) throw Failure{failed};
    }

    // One record, wherever it is.
    void record(int64_t row, char* record) {
        Where where = store_.where(row);
        if (where.at >= 0) {
            store_.read(where, record);
            return;
        }
        for (size_t p = 0; p < parts_.size(); p++) {
            start_row(parts_[p], int64_t(p), seed_, row, reinterpret_cast<float*>(record));
            record += parts_[p].bytes;
        }
    }

  private:
    void scatter(const char* record, int64_t slot, char* const* arrays) const {
        for (size_t p = 0; p < parts_.size(); p++) {
            memcpy(arrays[p] + slot * parts_[p].bytes, record, size_t(parts_[p].bytes));
            record += parts_[p].bytes;
        }
    }

    Rows& store_;
    const std::vector<Part>& parts_;
    uint64_t seed_;
};

}  // namespace
}  // namespace twt
