#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stddef.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

namespace twt {

namespace {

const int64_t PAGE = 4096;
const char MAGIC[8] = {'T', 'W', 'R', 'O', 'W', 'S', '0', '1'};

struct Header {
    char magic[8];
    int64_t rows, record, parts, generation;
    uint64_t seed;
    Part part[16];
    uint32_t sum;  // of all before it
};

struct Entry {  // before each record in the journal
    int64_t row;
    uint32_t sum, unused;
};

[[noreturn]] void fail(const std::string& what) { throw Failure{what}; }
[[noreturn]] void fail_io(const std::string& doing, const std::string& path) { fail(doing + " " + path + ": " + strerror(errno)); }

void write_all(int file, const void* data, int64_t bytes, int64_t at, const std::string& path) {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
        ssize_t done = pwrite(file, from, size_t(bytes), at);
        if (done < 0 && errno == EINTR) continue;
        if (done <= 0) fail_io("cannot write", path);
        from += done, at += done, bytes -= done;
    }
}

void read_all(int file, void* data, int64_t bytes, int64_t at, const std::string& path) {
    char* to = static_cast<char*>(data);
    while (bytes > 0) {
        ssize_t done = pread(file, to, size_t(bytes), at);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) fail_io("cannot read", path);
        if (done == 0) fail(path + " is shorter than its header says: it was truncated; restore it from a copy");
        to += done, at += done, bytes -= done;
    }
}

void sync(int file, const std::string& path) {
    if (fdatasync(file) != 0) fail_io("cannot flush", path);
}

void sync_folder(const std::string& folder) {
    File file;
    file = open(folder.c_str(), O_RDONLY | O_DIRECTORY);
    if (file < 0 || fsync(file) != 0) fail_io("cannot flush", folder);
}

uint64_t mix(uint64_t x) {  // the finalizer of SplitMix64 (Steele, Lea, Flood 2014)
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

}  // namespace

uint32_t checksum(const void* data, size_t bytes, uint32_t from) {  // CRC-32 (IEEE 802.3)
    static const std::vector<uint32_t> table = [] {
        std::vector<uint32_t> made(256);
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++) c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
            made[i] = c;
        }
        return made;
    }();
    uint32_t c = ~from;
    const unsigned char* p = static_cast<const unsigned char*>(data);
    for (size_t i = 0; i < bytes; i++) c = table[(c ^ p[i]) & 255] ^ (c >> 8);
    return ~c;
}

// UNIFORM: 24 bits. NORMAL: the sum of twelve 16-bit numbers, whose deviation is that of twelve uniforms: exact in integers, so the
// same bits everywhere, and within 6 deviations (Irwin-Hall).
void start_row(const Part& part, int64_t number, uint64_t seed, int64_t row, float* out) {
    int64_t count = part.bytes / 4;
    uint64_t base = mix(mix(mix(seed + 0x9e3779b97f4a7c15ull) ^ uint64_t(number)) ^ uint64_t(row));
    for (int64_t i = 0; i < count; i++) {
        if (part.start == CONSTANT) {
            out[i] = float(part.a);
        } else if (part.start == UNIFORM) {
            double u = double(mix(base + uint64_t(i) * 0x9e3779b97f4a7c15ull) >> 40) / 16777216.0;
            double span = (part.b - part.a) * u;
            out[i] = float(part.a + span);
        } else {
            int64_t sum = 0;
            for (uint64_t k = 0; k < 3; k++) {
                uint64_t word = mix(base + (uint64_t(i) * 3 + k) * 0x9e3779b97f4a7c15ull);
                sum += int64_t(word & 65535) + int64_t((word >> 16) & 65535) + int64_t((word >> 32) & 65535) + int64_t(word >> 48);
            }
            double z = double(2 * sum - 12 * 65535) / 131072.0;
            double scaled = part.b * z;
            out[i] = float(part.a + scaled);
        }
    }
}

// --- the index ------------------------------------------------------------------------------------------------------------------

void Index::clear() {
    rows_.assign(1024, -1);
    places_.assign(1024, 0);
    used_ = 0;
}

int64_t Index::find(int64_t row) const {
    uint64_t mask = rows_.size() - 1;
    for (uint64_t i = mix(uint64_t(row)) & mask;; i = (i + 1) & mask) {
        if (rows_[i] == row) return places_[i];
        if (rows_[i] < 0) return -1;
    }
}

void Index::put(int64_t row, int64_t place) {
    if ((used_ + 1) * 2 > int64_t(rows_.size())) grow();
    uint64_t mask = rows_.size() - 1;
    uint64_t i = mix(uint64_t(row)) & mask;
    while (rows_[i] >= 0 && rows_[i] != row) i = (i + 1) & mask;
    used_ += rows_[i] < 0;
    rows_[i] = row;
    places_[i] = place;
}

void Index::grow() {
    std::vector<int64_t> rows(rows_.size() * 2, -1), places(places_.size() * 2, 0);
    rows.swap(rows_);
    places.swap(places_);
    used_ = 0;
    for (size_t i = 0; i < rows.size(); i++)
        if (rows[i] >= 0) put(rows[i], places[i]);
}

// --- the files ------------------------------------------------------------------------------------------------------------------

Store::Store(const std::string& folder, int64_t rows, const std::vector<Part>& parts, uint64_t seed, bool create, int64_t wanted)
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
    int64_t said[2] = {0, 0};
    bool committed = read_commit(said);
    if (committed && wanted >= 0 && said[0] > wanted) {  // one table was ready, another was not: none of it counts
        if (unlink((folder_ + "/COMMIT").c_str()) != 0) fail_io("cannot remove", folder_ + "/COMMIT");
        sync_folder(folder_);
        committed = false;
    }
    log_ = open(log.c_str(), O_RDWR | O_CREAT | (committed ? 0 : O_TRUNC), 0644);
    if (log_ < 0) fail_io("cannot open", log);
    if (committed) apply();
}

File::~File() {
    if (number_ >= 0) close(number_);
}

File& File::operator=(int number) {
    if (number_ >= 0) close(number_);
    number_ = number;
    return *this;
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

void Store::read(int64_t row, char* record) const {
    int64_t place = journal_.find(row);
    if (place >= 0)
        read_all(log_, record, record_, place + int64_t(sizeof(Entry)), folder_ + "/journal.dat");
    else
        read_all(file_, record, record_, records_at_ + row * record_, folder_ + "/rows.dat");
}

void Store::write(int64_t row, const char* record) {
    Entry e{row, checksum(record, size_t(record_), uint32_t(row)), 0};
    int64_t place = journal_.find(row);
    bool more = place < 0;
    if (more) place = journal_end_;
    std::vector<char> both(static_cast<size_t>(entry_));
    memcpy(both.data(), &e, sizeof e);
    memcpy(both.data() + sizeof e, record, size_t(record_));
    write_all(log_, both.data(), entry_, place, folder_ + "/journal.dat");
    if (more) {
        journal_end_ += entry_;
        journal_.put(row, place);
    }
}

bool Store::read_commit(int64_t* said) const {
    std::string name = folder_ + "/COMMIT";
    File file;
    file = open(name.c_str(), O_RDONLY);
    if (file < 0 && errno == ENOENT) return false;
    if (file < 0) fail_io("cannot open", name);
    read_all(file, said, 2 * sizeof(int64_t), 0, name);
    return true;
}

void Store::prepare() {
    std::string log = folder_ + "/journal.dat", made = folder_ + "/COMMIT.new", name = folder_ + "/COMMIT";
    if (ftruncate(log_, journal_end_) != 0) fail_io("cannot trim", log);
    sync(log_, log);
    int64_t said[2] = {generation_ + 1, journal_end_};
    File file;
    file = open(made.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (file < 0) fail_io("cannot open", made);
    write_all(file, said, sizeof said, 0, made);
    sync(file, made);
    if (rename(made.c_str(), name.c_str()) != 0) fail_io("cannot rename", made);
    sync_folder(folder_);
}

// Copies a complete journal into the file. May be repeated: it only sets.
void Store::apply() {
    std::string log = folder_ + "/journal.dat", name = folder_ + "/COMMIT", path = folder_ + "/rows.dat";
    int64_t said[2];
    if (!read_commit(said)) fail(folder_ + " has no snapshot that was prepared");
    if (generation_ < said[0]) {
        std::vector<char> both(static_cast<size_t>(entry_));
        std::vector<bool> changed(bits_.size() / size_t(PAGE) + 1);  // pages of bits
        for (int64_t at = 0; at < said[1]; at += entry_) {
            read_all(log_, both.data(), entry_, at, log);
            Entry e;
            memcpy(&e, both.data(), sizeof e);
            if (e.row < 0 || e.row >= rows_ || e.sum != checksum(both.data() + sizeof e, size_t(record_), uint32_t(e.row)))
                fail(log + " is damaged at byte " + std::to_string(at) + ": restore the folder from a copy");
            write_all(file_, both.data() + sizeof e, record_, records_at_ + e.row * record_, path);
            stored_ += !((bits_[size_t(e.row >> 3)] >> (e.row & 7)) & 1);
            bits_[size_t(e.row >> 3)] |= (unsigned char)(1 << (e.row & 7));
            changed[size_t((e.row >> 3) / PAGE)] = true;
        }
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
    if (ftruncate(log_, 0) != 0) fail_io("cannot empty", log);
    journal_.clear();
    journal_end_ = 0;
}

}  // namespace twt
