#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "log.h"

namespace twt {

File::~File() {
    if (number_ >= 0) close(number_);
}

File& File::operator=(int number) {
    if (number_ >= 0) close(number_);
    number_ = number;
    return *this;
}

void fail(const std::string& what) { throw Failure{what}; }
void fail_io(const std::string& doing, const std::string& path) { fail(doing + " " + path + ": " + strerror(errno)); }

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

}  // namespace twt
