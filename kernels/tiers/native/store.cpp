#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stddef.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>

namespace twt {

namespace {

const size_t AHEAD = 32;  // rows whose memory is asked for before it is read
const char MAGIC[8] = {'T', 'W', 'R', 'O', 'W', 'S', '0', '2'};

struct Header {
    char magic[8];
    int64_t rows, record, parts, generation;
    uint64_t seed;
    Part part[16];
    uint32_t sum;  // of all before it
};

struct Entry {  // before each record in the journal
    int64_t row;
    uint32_t sum, here;  // here: 1; 0 in the holes that were given back
};

const int64_t SEGMENT = MOST_ROWS;        // records of the journal that are given back together: whole pages, whatever a record's size
const int64_t SPARE = 64 * SEGMENT;  // records that nobody needs any more, which the journal may hold anyway

// A copy to memory that nobody reads soon: the CPU's caches, which another thread trains with, keep what they have. end_copies() before others read it.
void copy_past(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
    if (uintptr_t(to) % 16 == 0 && bytes % 16 == 0) {
        for (int64_t i = 0; i < bytes; i += 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
        return;
    }
#endif
    memcpy(to, from, size_t(bytes));
}

void end_copies() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

}  // namespace

Store::Store(const std::string& folder, int64_t rows, const std::vector<Part>& parts, uint64_t seed, bool create, int64_t wanted, int64_t near)
    : folder_(folder), rows_(rows), seed_(seed), parts_(parts) {
    if (parts.empty() || parts.size() > 16) fail("a row has between 1 and 16 parts");
    for (const Part& part : parts) record_ += part.bytes;
    entry_ = int64_t(sizeof(Entry)) + record_;
    bits_at_ = PAGE;
    records_at_ = bits_at_ + ((rows + 7) / 8 + PAGE - 1) / PAGE * PAGE;
    std::string path = folder + "/rows.dat";
    lock_ = open((folder + "/LOCK").c_str(), O_RDWR | O_CREAT, 0644);
    if (lock_ < 0) fail_io("cannot open", folder + "/LOCK");
    if (flock(lock_, LOCK_EX | LOCK_NB) != 0) fail(folder + " is in use by another process, or by a model of this one: one writer at a time");
    struct stat facts;
    bool fresh = stat(path.c_str(), &facts) != 0 || facts.st_size == 0;
    if (fresh && !create) fail(path + " does not exist");
    file_ = open(path.c_str(), O_RDWR | (fresh ? O_CREAT : 0), 0644);
    if (file_ < 0) fail_io("cannot open", path);
    if (fresh) {
        if (ftruncate(file_, records_at_ + rows_ * record_) != 0) fail_io("cannot make", path);
        write_header();
        sync(file_, path);
        sync_folder(folder_);
    } else if (facts.st_size != records_at_ + rows_ * record_) {
        read_header(true);  // says what is foreign about it before its size is judged
        fail(path + " has " + std::to_string(facts.st_size) + " bytes and must have " + std::to_string(records_at_ + rows_ * record_) +
             ": it was truncated or grown; restore it from a copy");
    }
    read_header(false);
    bits_.resize(size_t((rows_ + 7) / 8));
    read_all(file_, bits_.data(), int64_t(bits_.size()), bits_at_, path);
    for (unsigned char b : bits_) stored_ += __builtin_popcount(b);
    std::string log = folder_ + "/journal.dat";
    int64_t said[3] = {0, 0, 0};
    bool committed = read_commit(said);
    if (committed && wanted >= 0 && said[0] > wanted) {  // one table was ready, another was not: none of it counts
        if (unlink((folder_ + "/COMMIT").c_str()) != 0) fail_io("cannot remove", folder_ + "/COMMIT");
        sync_folder(folder_);
        committed = false;
    }
    log_.open(log, SEGMENT * entry_, near, !committed);
    if (committed) {
        look_through(said[1], said[2]);
        apply();
    }
}

void Store::read_header(bool only_look) {
    Header h;
    std::string path = folder_ + "/rows.dat";
    read_all(file_, &h, sizeof h, 0, path);
    if (memcmp(h.magic, MAGIC, 8) != 0) fail(path + " is not a file of rows of this version");
    if (h.sum != checksum(&h, offsetof(Header, sum))) fail(path + " has a damaged header; restore it from a copy");
    bool same = h.rows == rows_ && h.record == record_ && h.parts == int64_t(parts_.size()) && h.seed == seed_;
    for (size_t i = 0; same && i < parts_.size(); i++) same = memcmp(&h.part[i], &parts_[i], sizeof(Part)) == 0;
    if (!same)
        fail(path + " holds another table: " + std::to_string(h.rows) + " rows of " + std::to_string(h.record) + " bytes, seed " + std::to_string(h.seed) +
             "; wanted " + std::to_string(rows_) + " rows of " + std::to_string(record_) + " bytes, seed " + std::to_string(seed_) +
             ", with the same parts: give another path, or the plan that it was made with");
    if (!only_look) generation_ = h.generation;
}

void Store::write_header() {
    Header h;
    memset(&h, 0, sizeof h);
    memcpy(h.magic, MAGIC, 8);
    h.rows = rows_, h.record = record_, h.parts = int64_t(parts_.size()), h.generation = generation_, h.seed = seed_;
    for (size_t i = 0; i < parts_.size(); i++) h.part[i] = parts_[i];
    h.sum = checksum(&h, offsetof(Header, sum));
    write_all(file_, &h, sizeof h, 0, folder_ + "/rows.dat");
}

Where Store::where(int64_t row) const {
    int64_t place = journal_.find(row);
    if (place >= 0) return {true, place + int64_t(sizeof(Entry)), row};
    bool stored = (bits_[size_t(row >> 3)] >> (row & 7)) & 1;
    return {false, stored ? records_at_ + row * record_ : -1, row};
}

void Store::soon(int64_t row) const {
    journal_.soon(row);
    __builtin_prefetch(&bits_[size_t(row >> 3)]);
}

// Records of the journal are checked, since what could not be written is not known before the next snapshot.
bool Store::whole(const char* entry) const {
    Entry e;
    memcpy(&e, entry, sizeof e);
    return e.here == 1 && e.row >= 0 && e.row < rows_ && e.sum == checksum(entry + sizeof e, size_t(record_), uint32_t(e.row));
}

const char* Store::checked(const char* entry, Where where) const {
    int64_t row;
    memcpy(&row, entry + offsetof(Entry, row), sizeof row);
    if (row != where.row)
        fail(folder_ + "/journal.dat has row " + std::to_string(row) + " at byte " + std::to_string(where.at - int64_t(sizeof(Entry))) + ", where row " + std::to_string(where.row) +
             " was looked for: go back to the last snapshot");
    return entry + sizeof(Entry);
}

void Store::read(Where where, char* record) const {
    if (!where.logged) return read_all(file_, record, record_, where.at, folder_ + "/rows.dat");
    int64_t at = where.at - int64_t(sizeof(Entry));
    if (log_.near(at)) {
        memcpy(record, checked(log_.at(at), where), size_t(record_));
        return;
    }
    std::vector<char> bytes(static_cast<size_t>(entry_));
    log_.read(at, bytes.data(), entry_);
    if (!whole(bytes.data())) fail(folder_ + "/journal.dat is damaged at byte " + std::to_string(at) + ": go back to the last snapshot");
    memcpy(record, checked(bytes.data(), where), size_t(record_));
}

void Store::soon(Where where) const {
    if (!where.logged || !log_.near(where.at - int64_t(sizeof(Entry)))) return;
    const char* entry = log_.at(where.at - int64_t(sizeof(Entry)));
    for (int64_t i = 0; i < entry_; i += 64) __builtin_prefetch(entry + i, 0, 0);
}

bool Store::read_now(Where where, char* record) const {
    const int64_t at = where.at - int64_t(sizeof(Entry));
    if (where.logged && log_.near(at)) {
        memcpy(record, checked(log_.at(at), where), size_t(record_));
        return true;
    }
#ifdef RWF_NOWAIT
    struct iovec all[] = {{record, size_t(record_)}};
    return !where.logged && preadv2(file_, all, 1, where.at, RWF_NOWAIT) == record_;
#else
    return false;
#endif
}

void Store::write(const std::vector<int64_t>& rows, const std::function<void(size_t, char*)>& record) {
    if (rows.size() > MOST_ROWS) fail(std::to_string(rows.size()) + " rows are written at once; " + std::to_string(MOST_ROWS) + " are the most");
    log_.reserve(int64_t(rows.size()) * entry_);
    one_.resize(size_t(entry_));
    for (size_t i = 0; i < rows.size(); i++) {
        record(i, one_.data() + sizeof(Entry));
        Entry e{rows[i], checksum(one_.data() + sizeof(Entry), size_t(record_), uint32_t(rows[i])), 1};
        memcpy(one_.data(), &e, sizeof e);
        copy_past(log_.next(int64_t(i) * entry_), one_.data(), entry_);
    }
    end_copies();
    append(rows);
    tidy();
    more();
}

// Notes where the records of `rows` are, which were put at the end of the journal: the order of its records is that of time.
void Store::append(const std::vector<int64_t>& rows) {
    int64_t place = log_.end(), segment = SEGMENT * entry_;
    log_.grow(int64_t(rows.size()) * entry_);
    live_.resize(size_t(log_.end() / segment + 1));
    for (int64_t at = place; at < log_.end(); at += entry_) live_[size_t(at / segment)]++;
    for (size_t i = 0; i < rows.size(); i++, place += entry_) {
        if (i + AHEAD < rows.size()) journal_.soon(rows[i + AHEAD]);
        int64_t before = journal_.put(rows[i], place);
        if (before < 0) continue;
        size_t old = size_t(before / segment);
        if (--live_[old] == 0 && int64_t(old + 1) * segment <= log_.end() && !prepared_) give_back(old);
    }
}

// Gives the room of a segment that holds nothing any more back to the file system, and that of others that waited for the disk.
void Store::give_back(size_t segment) {
    given_back_++;
    empty_.push_back(segment);
    const int64_t bytes = SEGMENT * entry_;
    empty_.erase(std::remove_if(empty_.begin(), empty_.end(), [&](size_t each) { return log_.give_back(int64_t(each) * bytes, bytes); }), empty_.end());
}

int Store::ask(const std::vector<Where>& wanted) {
    std::vector<int64_t> places;
    for (Where each : wanted) places.push_back(each.at - int64_t(sizeof(Entry)));
    more();
    asked_ = 1 - asked_;
    reads_[asked_].begin(log_.direct(), places, entry_, log_.grain(), reads_[1 - asked_].under_way());
    return asked_;
}

void Store::more() {
    reads_[1 - asked_].more(0);
    reads_[asked_].more(reads_[1 - asked_].under_way());
}

const char* Store::answer(int asked, size_t i, Where where) {
    reads_[asked].end();
    const char* entry = reads_[asked].found(i);
    return entry && whole(entry) ? checked(entry, where) : nullptr;
}

// Where more than half of the journal is needed no more, what is needed of the emptiest segments moves to the end.
void Store::tidy() {
    while (!prepared_ && log_.end() / entry_ - given_back_ * SEGMENT > 2 * journal_.size() + SPARE) {
        size_t full = size_t(log_.end() / (SEGMENT * entry_)), least = full;
        for (size_t i = 0; i < full; i++)
            if (live_[i] > 0 && live_[i] < (least == full ? SEGMENT : live_[least])) least = i;
        if (least == full) return;
        int64_t first = int64_t(least) * SEGMENT * entry_;
        const char* bytes = log_.piece(first, SEGMENT * entry_);
        log_.reserve(SEGMENT * entry_);
        std::vector<int64_t> rows;
        for (int64_t i = -int64_t(AHEAD); i < SEGMENT; i++) {
            Entry e;
            if (i + int64_t(AHEAD) < SEGMENT) {
                memcpy(&e, bytes + (i + int64_t(AHEAD)) * entry_, sizeof e);
                journal_.soon(e.row);
            }
            if (i < 0) continue;
            memcpy(&e, bytes + i * entry_, sizeof e);
            if (journal_.find(e.row) != first + i * entry_) continue;
            memcpy(log_.next(int64_t(rows.size()) * entry_), bytes + i * entry_, size_t(entry_));
            rows.push_back(e.row);
        }
        append(rows);
    }
}

bool Store::read_commit(int64_t* said) const {
    std::string name = folder_ + "/COMMIT";
    File file;
    file = open(name.c_str(), O_RDONLY);
    if (file < 0 && errno == ENOENT) return false;
    if (file < 0) fail_io("cannot open", name);
    read_all(file, said, 3 * sizeof(int64_t), 0, name);
    return true;
}

void Store::prepare() {
    std::string made = folder_ + "/COMMIT.new", name = folder_ + "/COMMIT";
    log_.flush();
    int64_t said[3] = {generation_ + 1, log_.end(), journal_.size()};
    File file;
    file = open(made.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (file < 0) fail_io("cannot open", made);
    write_all(file, said, sizeof said, 0, made);
    sync(file, made);
    prepared_ = true;
    if (rename(made.c_str(), name.c_str()) != 0) fail_io("cannot rename", made);
    sync_folder(folder_);
}

// Every record of the journal up to `end`, in order.
void Store::each_entry(int64_t end, const std::function<void(int64_t at, int64_t row, const char* record)>& use) {
    std::string log = folder_ + "/journal.dat";
    for (int64_t first = 0; first < end; first += SEGMENT * entry_) {
        int64_t count = std::min(SEGMENT * entry_, end - first);
        const char* bytes = log_.piece(first, count);
        for (int64_t i = 0; i < count; i += entry_) {
            Entry e;
            memcpy(&e, bytes + i, sizeof e);
            if (e.row == 0 && e.sum == 0 && e.here == 0) continue;
            if (!whole(bytes + i)) fail(log + " is damaged at byte " + std::to_string(first + i) + ": restore the folder from a copy");
            use(first + i, e.row, bytes + i + sizeof e);
        }
    }
}

// Checks a complete journal, all of it, and notes where its rows are.
void Store::look_through(int64_t end, int64_t rows) {
    log_.start(end);
    each_entry(end, [&](int64_t at, int64_t row, const char*) { journal_.put(row, at); });
    if (journal_.size() != rows)
        fail(folder_ + "/journal.dat is damaged: it holds " + std::to_string(journal_.size()) + " rows, and COMMIT says " + std::to_string(rows) + ": restore the folder from a copy");
}

// Copies a complete journal into the file. May be repeated: it only sets.
void Store::apply() {
    std::string name = folder_ + "/COMMIT", path = folder_ + "/rows.dat";
    int64_t said[3];
    if (!read_commit(said)) fail(folder_ + " has no snapshot that was prepared");
    if (said[1] != log_.end()) fail(folder_ + ": rows were written between the two halves of a snapshot: prepare it anew");
    if (generation_ < said[0]) {
        std::vector<bool> changed(bits_.size() / size_t(PAGE) + 1);  // pages of bits
        each_entry(said[1], [&](int64_t at, int64_t row, const char* record) {
            if (journal_.find(row) != at) return;  // there is a newer one
            write_all(file_, record, record_, records_at_ + row * record_, path);
            stored_ += !((bits_[size_t(row >> 3)] >> (row & 7)) & 1);
            bits_[size_t(row >> 3)] |= (unsigned char)(1 << (row & 7));
            changed[size_t((row >> 3) / PAGE)] = true;
        });
        for (size_t page = 0; page < changed.size(); page++) {
            if (!changed[page]) continue;
            int64_t first = int64_t(page) * PAGE, bytes = std::min(PAGE, int64_t(bits_.size()) - first);
            write_all(file_, bits_.data() + first, bytes, bits_at_ + first, path);
        }
        sync(file_, path);
        generation_ = said[0];
        write_header();
        sync(file_, path);
    }
    if (unlink(name.c_str()) != 0) fail_io("cannot remove", name);
    sync_folder(folder_);
    log_.clear();
    journal_.clear();
    live_.clear();
    empty_.clear();
    given_back_ = 0;
    prepared_ = false;
}

}  // namespace twt
