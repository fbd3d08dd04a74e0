// Rows of one table in a file, with snapshots that are complete or absent.
//
//   rows.dat     header (4 KiB), one bit for each row that was ever written, the records; holes where nothing was written
//   journal.dat  records written since the last snapshot, each with its row and a checksum; read through an index in memory
//   COMMIT       there from the moment a snapshot is complete until the journal has been copied into rows.dat
//
// A process that dies leaves either no COMMIT (the journal is dropped: the last snapshot) or one (the journal is copied again).
#pragma once
#include <stdint.h>

#include <string>
#include <vector>

namespace twt {

// How a part of a row (its weights, or one state of its optimizer) starts out.
enum Start : int64_t { CONSTANT = 0, UNIFORM = 1, NORMAL = 2 };

struct Part {
    int64_t bytes;    // of one row
    int64_t start;    // Start
    double a, b;      // CONSTANT: a; UNIFORM: from a to b; NORMAL: mean a, deviation b
};

struct Failure {
    std::string what;
};

uint32_t checksum(const void* data, size_t bytes, uint32_t from = 0);

// The starting value of a row, from (seed, part, row, column) alone: float32, the same bits on every machine.
void start_row(const Part& part, int64_t number, uint64_t seed, int64_t row, float* out);

// row -> place in the journal; open addressing, no erasing.
class Index {
  public:
    Index() { clear(); }
    void clear();
    int64_t find(int64_t row) const;  // -1: not there
    void put(int64_t row, int64_t place);
    int64_t size() const { return used_; }

  private:
    void grow();
    std::vector<int64_t> rows_, places_;
    int64_t used_ = 0;
};

// A file that is closed when nobody holds it any more, also where opening the store fails halfway.
class File {
  public:
    File() {}
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    File& operator=(int number);
    operator int() const { return number_; }

  private:
    int number_ = -1;
};

class Store {
  public:
    // Opens or creates the files in `folder`. Throws Failure.
    // A journal with a COMMIT is complete; where `wanted` >= 0 it is used only up to that generation, and else dropped.
    Store(const std::string& folder, int64_t rows, const std::vector<Part>& parts, uint64_t seed, bool create, int64_t wanted);

    int64_t rows() const { return rows_; }
    int64_t record() const { return record_; }
    int64_t generation() const { return generation_; }
    // Was the row ever written? What was not starts from its seed.
    bool known(int64_t row) const { return (bits_[row >> 3] >> (row & 7)) & 1 || journal_.find(row) >= 0; }
    void read(int64_t row, char* record) const;  // throws Failure
    void write(int64_t row, const char* record);
    // Makes everything written so far the new snapshot, in two steps: after prepare() it is complete, finish() puts it in place.
    void prepare();
    void finish() { apply(); }
    int64_t journal_rows() const { return journal_.size(); }
    int64_t written_rows() const { return stored_; }  // of the snapshot

  private:
    void apply();
    void read_header(bool fresh);
    void write_header();
    bool read_commit(int64_t* said) const;  // {generation, bytes of the journal}
    std::string folder_;
    int64_t rows_, record_ = 0, generation_ = 0, bits_at_, records_at_, entry_;
    uint64_t seed_;
    std::vector<Part> parts_;
    std::vector<unsigned char> bits_;
    Index journal_;
    int64_t journal_end_ = 0, stored_ = 0;
    File file_, log_, lock_;
};

}  // namespace twt
