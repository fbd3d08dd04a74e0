// A file that only grows at its end. Its newest part is in memory; whole blocks of it go to the disk while other things go on (Linux AIO on a
// file opened with O_DIRECT), so that no page of the system's memory is filled for them. Where that cannot be, they are written when their memory is
// needed. What was there when the file was opened is in the file alone.
#pragma once
#include <stdint.h>

#include <string>
#include <vector>

#include "files.h"

namespace twt {

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

class Log {
  public:
    Log() {}
    ~Log();
    Log(const Log&) = delete;
    Log& operator=(const Log&) = delete;

    // `unit`: bytes, whole pages: what lies between multiples of it is in one piece in memory. `near`: bytes in memory, about.
    // `fresh`: what the file held is dropped. Throws Failure, as the others that read or write.
    void open(const std::string& path, int64_t unit, int64_t near, bool fresh);
    void start(int64_t end) { end_ = sent_ = landed_ = loaded_ = end; }  // the file holds so much; it is only read until clear()

    int64_t end() const { return end_; }
    int direct() const { return direct_; }  // the file for reads past the system's memory; -1: there is none
    int64_t grain() const { return grain_; }  // bytes: where such reads begin and end, in the file and in memory
    bool near(int64_t place) const { return place >= near_from_ && place >= loaded_; }
    bool far(int64_t place) const { return place < end_ + margin_ - room_ && place < landed_ && direct_ >= 0; }  // on the disk, and soon only there
    bool any_far() const { return end_ + margin_ > room_; }
    const char* at(int64_t place) const { return memory_ + place % room_; }  // where near

    // Room for `bytes` more at the end: what it takes from older ones is on the disk then.
    void reserve(int64_t bytes);
    char* next(int64_t after) { return memory_ + (end_ + after) % room_; }  // in that room
    void grow(int64_t bytes);  // by what was put there
    void flush();              // all of it is in the file for good
    void clear();
    // `bytes` from `first` on, where no page of it begins in memory and ends on the disk; until the next call.
    char* piece(int64_t first, int64_t bytes);
    void read(int64_t place, char* to, int64_t bytes) const;  // from the file, of what is not near
    bool give_back(int64_t first, int64_t bytes);  // to the file system; false: not yet, for it is still to be written

  private:
    enum State : char { LEFT, UNDER_WAY, DONE };
    void send();
    void reap(bool wait);
    void settle(int64_t end);
    void stop();
    char& state(int64_t place) { return states_[size_t(place % room_ / block_)]; }
    File file_, direct_;
    std::string path_;
    char *memory_ = nullptr, *piece_ = nullptr;
    int64_t grain_ = PAGE, unit_ = 0, block_ = 0, room_ = 0, margin_ = 0, step_ = 0;
    int64_t end_ = 0, near_from_ = 0, loaded_ = 0;
    int64_t sent_ = 0, landed_ = 0, allocated_ = 0;  // bytes: handed to the disk, on it, and with room on it
    std::vector<char> states_;  // by block of the memory, between landed_ and sent_
    unsigned long context_ = 0;
};

}  // namespace twt
