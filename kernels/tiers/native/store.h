// Rows of one table in a file, with snapshots that are complete or absent.
//
//   rows.dat     header (4 KiB), one bit for each row that was ever written, the records; holes where nothing was written
//   journal.dat  records written since the last snapshot, each with its row and a checksum, the newest of a row last; read through an
//                index in memory. At most half of it is out of date: what is needed of other parts moves to the end, and they become holes.
//                Its newest part is in memory too (log.h); on Linux the rest is read past the system's memory
//   COMMIT       its generation, the journal's bytes and rows; there from the moment a snapshot is complete until the journal has been copied into rows.dat
//
// A process that dies leaves either no COMMIT (the journal is dropped: the last snapshot) or one (the journal is copied again).
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <new>
#include <string>
#include <vector>

#include "disk_reads.h"
#include "files.h"
#include "log.h"

namespace twt {

// How a part of a row (its weights, or one state of its optimizer) starts out.
enum Start : int64_t { CONSTANT = 0, UNIFORM = 1, NORMAL = 2 };

struct Part {
    int64_t bytes;    // of one row
    int64_t start;    // Start
    double a, b;      // CONSTANT: a; UNIFORM: from a to b; NORMAL: mean a, deviation b
};


inline uint64_t mix(uint64_t x) {  // the finalizer of SplitMix64 (Steele, Lea, Flood 2014)
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

uint32_t checksum(const void* data, size_t bytes, uint32_t from = 0);

// The starting value of a row, from (seed, part, row, column) alone: float32, the same bits on every machine.
void start_row(const Part& part, int64_t number, uint64_t seed, int64_t row, float* out);

// Asks for huge pages for memory that is not touched yet: rows are read at random, and each would miss the TLB. Best effort.
void huge_pages(void* memory, size_t bytes);

template <class T>
std::vector<T> in_huge_pages(size_t count, T value) {
    std::vector<T> made;
    made.reserve(count);
    huge_pages(made.data(), count * sizeof(T));
    made.resize(count, value);
    return made;
}

// `count` zeroed T, from a line of the CPU's caches on, in huge pages.
template <class T>
class Zeros {
  public:
    explicit Zeros(size_t count) : count_(count) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, count * sizeof(T)) != 0) throw std::bad_alloc();
        huge_pages(memory, count * sizeof(T));
        first_ = static_cast<T*>(memset(memory, 0, count * sizeof(T)));
    }
    ~Zeros() { free(first_); }
    Zeros(const Zeros&) = delete;
    Zeros& operator=(const Zeros&) = delete;
    T& operator[](size_t i) { return first_[i]; }
    const T& operator[](size_t i) const { return first_[i]; }
    size_t size() const { return count_; }

  private:
    T* first_;
    size_t count_;
};

// row -> place in the journal; open addressing, no erasing.
class Index {
  public:
    Index() { clear(); }
    void clear();
    int64_t find(int64_t row) const;  // -1: not there
    int64_t put(int64_t row, int64_t place);  // where it was before, or -1
    void soon(int64_t row) const;  // `row` will be looked for
    int64_t size() const { return used_; }

  private:
    struct Entry {
        int64_t row, place;
    };
    std::vector<Entry> entries_;
    int64_t used_ = 0;
};

// Where the newest record of a row is: in the journal or among the rows; at < 0: it was never written, and starts from its seed.
struct Where {
    bool logged;
    int64_t at, row;
};

const size_t MOST_ROWS = 1024;  // that are written at once

// What keeps the records of a table: a Store, or memory (memory.h).
class Rows {
  public:
    virtual ~Rows() {}
    virtual int64_t rows() const = 0;
    virtual int64_t record() const = 0;  // bytes
    virtual int64_t generation() const = 0;
    virtual bool in_memory() const { return false; }  // nothing is gained by an order of reading
    virtual Where where(int64_t row) const = 0;
    virtual void soon(int64_t row) const = 0;  // `row` will be asked for
    virtual void read(Where where, char* record) const = 0;  // throws Failure
    virtual void soon(Where) const {}  // read_now() will be called
    virtual bool read_now(Where where, char* record) const = 0;  // false: it is not in memory, or cannot be read
    virtual bool any_far() const { return false; }  // some records were left to the disk
    virtual bool far(Where) const { return false; }  // this one was
    // Has the disk read such records, while the caller does other things; says by what number to ask for them.
    virtual int ask(const std::vector<Where>&) { return 0; }
    virtual void more() {}  // hands the disk those that it had no room for; does not wait
    // Waits for the i-th of them, which is there until the ask() after the next; nullptr: read() it. Throws Failure where that is not the row of `where`.
    virtual const char* answer(int, size_t, Where) { return nullptr; }
    // The records of distinct `rows`, at most MOST_ROWS; record(i, to) gives the i-th. Throws Failure: then all rows have what they had, or all are written.
    virtual void write(const std::vector<int64_t>& rows, const std::function<void(size_t, char*)>& record) = 0;
    // Makes everything written so far the new snapshot, in two steps: after prepare() it is complete, finish() puts it in place.
    virtual void prepare() = 0;
    virtual void finish() = 0;
    virtual int64_t journal_rows() const = 0;
    virtual int64_t written_rows() const = 0;  // of the snapshot
};

class Store : public Rows {
  public:
    // Opens or creates the files in `folder`. Throws Failure.
    // `near`: bytes of the journal, its newest, that stay in memory; 16 MiB at least. Older records are read from the disk.
    // A journal with a COMMIT is complete; where `wanted` >= 0 it is used only up to that generation, and else dropped.
    Store(const std::string& folder, int64_t rows, const std::vector<Part>& parts, uint64_t seed, bool create, int64_t wanted, int64_t near);

    int64_t rows() const override { return rows_; }
    int64_t record() const override { return record_; }
    int64_t generation() const override { return generation_; }
    Where where(int64_t row) const override;
    void soon(int64_t row) const override;
    void read(Where where, char* record) const override;
    bool read_now(Where where, char* record) const override;
    void soon(Where where) const override;
    bool any_far() const override { return log_.any_far(); }
    bool far(Where where) const override { return where.logged && log_.far(where.at); }
    int ask(const std::vector<Where>& wanted) override;
    void more() override;
    const char* answer(int asked, size_t i, Where where) override;
    void write(const std::vector<int64_t>& rows, const std::function<void(size_t, char*)>& record) override;
    void prepare() override;
    void finish() override { apply(); }
    int64_t journal_rows() const override { return journal_.size(); }
    int64_t written_rows() const override { return stored_; }

  private:
    void apply();
    void read_header(bool fresh);
    void write_header();
    void append(const std::vector<int64_t>& rows);
    void tidy();
    void give_back(size_t segment);
    bool whole(const char* entry) const;
    const char* checked(const char* entry, Where where) const;  // the record of an entry; throws Failure where it is another row's
    void each_entry(int64_t end, const std::function<void(int64_t at, int64_t row, const char* record)>& use);
    void look_through(int64_t end, int64_t rows);
    bool read_commit(int64_t* said) const;  // {generation, bytes of the journal, its rows}
    std::string folder_;
    int64_t rows_, record_ = 0, generation_ = 0, bits_at_, records_at_, entry_;
    uint64_t seed_;
    std::vector<Part> parts_;
    std::vector<unsigned char> bits_;
    Index journal_;
    int64_t given_back_ = 0, stored_ = 0;
    std::vector<size_t> empty_;  // segments that go back to the file system when they are on the disk
    std::vector<int64_t> live_;  // by segment of the journal: records that no later one replaces
    bool prepared_ = false;      // a COMMIT names the journal as it is: nothing of it is given back
    std::vector<char> one_;      // an entry that is about to be written
    File file_, lock_;
    Log log_;  // the journal
    DiskReads reads_[2];
    int asked_ = 0;  // the last of them that was used
};

}  // namespace twt
