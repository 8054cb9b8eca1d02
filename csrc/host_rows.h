// Rows of a file for the streaming loader: read on demand, or gathered into a ring of buffers by threads that work
// ahead of whoever uses them. Plain C++ on Linux; host.cpp binds it to Python.
#pragma once

#include <sys/stat.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace bvae {

// The file cannot be read; what() is one line that names it.
struct ReadError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Rows of equal length that lie one behind the other in a file, which stays open: it may be renamed or unlinked while
// it is used, but not changed. Read with pread, for a mapped file would answer a failing disk with SIGBUS.
class RowFile {
 public:
  // Throws ReadError where the file cannot be opened or is too short.
  RowFile(const std::string& path, int64_t offset, int64_t row_bytes, int64_t rows);
  ~RowFile();
  RowFile(const RowFile&) = delete;
  RowFile& operator=(const RowFile&) = delete;

  // Rows index[0 .. n) to `to`, one behind the other; gives up early where `stop` turns true. Throws ReadError.
  void read(const int64_t* index, int64_t n, uint8_t* to, const std::atomic<bool>* stop = nullptr) const;

  // Throws ReadError where the file is not what it was when it was opened.
  void check_unchanged() const;

  // Throws std::out_of_range.
  void check_index(const int64_t* index, int64_t n) const;

  const int64_t row_bytes, rows;

 private:
  bool read_cached(int64_t at, int64_t bytes, uint8_t* to) const;
  void read_all(int64_t at, int64_t bytes, uint8_t* to) const;

  const std::string path_;
  const int64_t offset_;
  int file_ = -1;
  struct stat opened_ {};
};

// Batches of rows in a given order, in a ring of buffers. Threads fill the ring as far ahead as it is long; the batches
// come out in order, whatever the number of threads.
//
// One consumer: next() gives the batch's place in the ring, which stays untouched until release(). Places are
// released in the order in which they were given.
class RowStream {
 public:
  enum class Ready { yes, no, ended };

  // order: [batches * batch] row numbers, kept alive by the caller. slots: buffers of batch * row_bytes bytes. Throws
  // ReadError where the file was changed or no thread can be started.
  RowStream(std::shared_ptr<const RowFile> file, const int64_t* order, int64_t count, int64_t batch,
            std::vector<uint8_t*> slots, int threads);
  ~RowStream();
  RowStream(const RowStream&) = delete;
  RowStream& operator=(const RowStream&) = delete;

  // Waits up to `wait` for the next batch; `slot` is its place. Throws ReadError where it cannot be read.
  Ready next(std::chrono::milliseconds wait, int64_t* slot);

  // The oldest place that next() gave and that was not released yet may be filled anew. Throws std::logic_error.
  void release();

  // Ends the threads; next() then gives nothing more. Safe to call twice, and by several threads: all return after the
  // reading threads' end.
  void close();

  // True in a child of the process that has the threads. There, all but close() is undefined, and a stream must
  // not be destroyed: its mutex may be locked for good.
  bool forked() const;

  // Closes every stream there is: before the process exits, while the buffers are still there.
  static void close_all();

 private:
  void work();
  bool may_fill() const { return unit_ < units_ && unit_ / pieces_ < released_ + static_cast<int64_t>(slots_.size()); }

  const std::shared_ptr<const RowFile> file_;
  const int64_t* const order_;
  const int64_t batch_, batches_;
  const std::vector<uint8_t*> slots_;
  const int64_t pieces_;  // pieces of a batch, so that threads share one
  const int64_t units_;   // pieces of all batches
  const int owner_;       // the process that has the threads

  std::mutex mutex_;
  std::condition_variable room_, filled_;
  std::atomic<bool> stop_{false};
  int64_t unit_ = 0;       // the next piece to be read
  int64_t given_ = 0;      // batches that next() gave
  int64_t released_ = 0;   // batches among given_ whose place is free again
  std::vector<int64_t> done_;  // pieces read of the batch in each place
  std::string error_;
  std::mutex join_;  // held while threads_ are joined
  std::vector<std::thread> threads_;
};

}  // namespace bvae
