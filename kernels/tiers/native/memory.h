// Rows of one table in memory that the caller owns: records one after the other, and one bit for each that was ever written.
#pragma once
#include <string.h>

#include "store.h"

namespace twt {

class Memory : public Rows {
  public:
    // `bits`: (rows + 7) / 8 bytes. Both outlive this. What was written by others since is seen from recount() on.
    Memory(char* memory, unsigned char* bits, int64_t rows, const std::vector<Part>& parts) : memory_(memory), bits_(bits), rows_(rows) {
        for (const Part& part : parts) record_ += part.bytes;
        huge_pages(memory, size_t(rows * record_));
        recount();
    }

    void recount() {
        written_ = 0;
        for (int64_t i = 0; i < (rows_ + 7) / 8; i++) written_ += __builtin_popcount(bits_[i]);
    }

    int64_t rows() const override { return rows_; }
    int64_t record() const override { return record_; }
    int64_t generation() const override { return 0; }
    bool in_memory() const override { return true; }
    Where where(int64_t row) const override { return {false, (bits_[row >> 3] >> (row & 7)) & 1 ? row * record_ : -1, row}; }
    using Rows::soon;
    void soon(int64_t row) const override {
        __builtin_prefetch(bits_ + (row >> 3));
        for (int64_t at = 0; at < record_; at += 64) __builtin_prefetch(memory_ + row * record_ + at);
    }
    void read(Where where, char* record) const override { memcpy(record, memory_ + where.at, size_t(record_)); }
    bool read_now(Where where, char* record) const override { return read(where, record), true; }
    void write(const std::vector<int64_t>& rows, const std::function<void(size_t, char*)>& record) override {
        for (size_t i = 0; i < rows.size(); i++) {
            if (i + EARLY < rows.size()) soon(rows[i + EARLY]);
            record(i, memory_ + rows[i] * record_);
            unsigned char bit = (unsigned char)(1 << (rows[i] & 7));
            written_ += !(bits_[rows[i] >> 3] & bit);
            bits_[rows[i] >> 3] |= bit;
        }
    }
    void prepare() override {}
    void finish() override {}
    int64_t journal_rows() const override { return 0; }
    int64_t written_rows() const override { return written_; }

  private:
    static const size_t EARLY = 6;  // rows whose memory is asked for before it is written
    char* memory_;
    unsigned char* bits_;
    int64_t rows_, record_ = 0, written_ = 0;
};

}  // namespace twt
