// Whole reads and writes of files; what fails throws Failure and says which file.
#pragma once
#include <stdint.h>

#include <string>

namespace twt {

struct Failure {
    std::string what;
};

const int64_t PAGE = 4096;

[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail_io(const std::string& doing, const std::string& path);
void write_all(int file, const void* data, int64_t bytes, int64_t at, const std::string& path);
void read_all(int file, void* data, int64_t bytes, int64_t at, const std::string& path);
void sync(int file, const std::string& path);
void sync_folder(const std::string& folder);

}  // namespace twt
