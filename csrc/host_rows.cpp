#include "host_rows.h"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <system_error>

namespace bvae {
namespace {

constexpr int64_t kPieceRows = 16;  // fewer are not worth a thread's wake-up

std::string reason(int error) { return std::string(std::strerror(error)); }

// Every stream of the process. Never destroyed: streams may outlive the statics.
struct Registry {
  std::mutex mutex;
  std::set<RowStream*> streams;
};

Registry& registry() {
  static Registry* all = new Registry;
  return *all;
}

}  // namespace

// ---- the file ------------------------------------------------------------------------------------------------------

RowFile::RowFile(const std::string& path, int64_t offset, int64_t row_bytes, int64_t rows)
    : row_bytes(row_bytes), rows(rows), path_(path), offset_(offset) {
  if (offset < 0 || row_bytes < 1 || rows < 0) throw std::invalid_argument("bvae: rows of no length, or before the file");
  file_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file_ < 0) throw ReadError(path + ": cannot be opened (" + reason(errno) + ")");
  const int failed = ::fstat(file_, &opened_) != 0 ? errno : 0;
  const bool is_short = !failed && (opened_.st_size - offset) / row_bytes < rows;
  if (failed || is_short) {
    ::close(file_);
    throw ReadError(path + (failed ? ": cannot be read (" + reason(failed) + ")"
                                   : ": is cut short: it has " + std::to_string(opened_.st_size) + " bytes, not the " +
                                         std::to_string(offset + rows * row_bytes) + " of its " +
                                         std::to_string(rows) + " images"));
  }
  // Rows are drawn at random: what the kernel would read ahead of one is not what comes next.
  ::posix_fadvise(file_, 0, 0, POSIX_FADV_RANDOM);
}

RowFile::~RowFile() { ::close(file_); }

void RowFile::check_unchanged() const {
  struct stat now {};
  if (::fstat(file_, &now) != 0) throw ReadError(path_ + ": cannot be read (" + reason(errno) + ")");
  if (now.st_size != opened_.st_size || now.st_mtim.tv_sec != opened_.st_mtim.tv_sec ||
      now.st_mtim.tv_nsec != opened_.st_mtim.tv_nsec) {
    throw ReadError(path_ + ": was changed while it was in use");
  }
}

void RowFile::check_index(const int64_t* index, int64_t n) const {
  for (int64_t i = 0; i < n; ++i) {
    if (index[i] < 0 || index[i] >= rows) {
      throw std::out_of_range("bvae: index " + std::to_string(index[i]) + " is out of range for " +
                              std::to_string(rows) + " images");
    }
  }
}

// Reads from the page cache alone, without waiting for the disk.
bool RowFile::read_cached(int64_t at, int64_t bytes, uint8_t* to) const {
  iovec piece{to, static_cast<size_t>(bytes)};
  return ::preadv2(file_, &piece, 1, at, RWF_NOWAIT) == bytes;
}

void RowFile::read_all(int64_t at, int64_t bytes, uint8_t* to) const {
  while (bytes > 0) {
    const ssize_t got = ::pread(file_, to, static_cast<size_t>(bytes), at);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw ReadError(path_ + ": cannot be read at byte " + std::to_string(at) + " (" + reason(errno) + ")");
    if (got == 0) throw ReadError(path_ + ": was cut short while it was in use: it ends at byte " + std::to_string(at));
    at += got;
    to += got;
    bytes -= got;
  }
}

void RowFile::read(const int64_t* index, int64_t n, uint8_t* to, const std::atomic<bool>* stop) const {
  // Neighbours in the file that are neighbours in the index too are one piece.
  struct Piece {
    int64_t at, bytes;
    uint8_t* to;
  };
  std::vector<Piece> waiting;
  for (int64_t i = 0; i < n;) {
    int64_t run = 1;
    while (i + run < n && index[i + run] == index[i] + run) ++run;
    const Piece piece{offset_ + index[i] * row_bytes, run * row_bytes, to + i * row_bytes};
    i += run;
    if (read_cached(piece.at, piece.bytes, piece.to)) continue;
    // The disk gets to know of all that is missing before the first wait.
    ::posix_fadvise(file_, piece.at, piece.bytes, POSIX_FADV_WILLNEED);
    waiting.push_back(piece);
  }
  for (const Piece& piece : waiting) {
    if (stop != nullptr && stop->load(std::memory_order_relaxed)) return;
    read_all(piece.at, piece.bytes, piece.to);
  }
}

// ---- the stream ----------------------------------------------------------------------------------------------------

RowStream::RowStream(std::shared_ptr<const RowFile> file, const int64_t* order, int64_t count, int64_t batch,
                     std::vector<uint8_t*> slots, int threads)
    : file_(std::move(file)),
      order_(order),
      batch_(batch),
      batches_(batch > 0 ? count / batch : 0),
      slots_(std::move(slots)),
      pieces_(std::max<int64_t>(1, std::min<int64_t>(threads, batch / kPieceRows))),
      units_(batches_ * pieces_),
      owner_(::getpid()),
      done_(slots_.size(), 0) {
  if (batch < 1 || count % batch != 0 || slots_.empty() || threads < 1) {
    throw std::invalid_argument("bvae: a stream needs whole batches, a buffer and a thread");
  }
  file_->check_index(order, count);
  file_->check_unchanged();
  try {
    const int64_t useful = std::min<int64_t>(threads, units_);
    for (int64_t i = 0; i < useful; ++i) threads_.emplace_back([this] { work(); });
  } catch (const std::system_error& error) {
    close();  // the threads that did start
    throw ReadError("reading threads cannot be started (" + reason(error.code().value()) + ")");
  } catch (...) {
    close();
    throw;
  }
  const std::lock_guard<std::mutex> lock(registry().mutex);
  registry().streams.insert(this);
}

RowStream::~RowStream() {
  {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    registry().streams.erase(this);
  }
  close();
}

void RowStream::close() {
  if (forked()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  room_.notify_all();
  const std::lock_guard<std::mutex> lock(join_);
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

bool RowStream::forked() const { return ::getpid() != owner_; }

void RowStream::close_all() {
  const std::lock_guard<std::mutex> lock(registry().mutex);
  for (RowStream* stream : registry().streams) stream->close();
}

void RowStream::work() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    room_.wait(lock, [this] { return stop_ || !error_.empty() || unit_ == units_ || may_fill(); });
    if (stop_ || !error_.empty() || unit_ == units_) return;
    const int64_t unit = unit_++;
    const int64_t batch = unit / pieces_, piece = unit % pieces_;
    const int64_t slot = batch % static_cast<int64_t>(slots_.size());
    const int64_t first = piece * batch_ / pieces_, last = (piece + 1) * batch_ / pieces_;
    lock.unlock();
    std::string error;
    try {
      file_->read(order_ + batch * batch_ + first, last - first, slots_[slot] + first * file_->row_bytes, &stop_);
    } catch (const std::exception& e) {
      error = e.what();
    }
    lock.lock();
    if (!error.empty()) {
      if (error_.empty()) error_ = error;
      filled_.notify_all();
      room_.notify_all();
      return;
    }
    if (++done_[slot] == pieces_) filled_.notify_all();
    if (unit_ == units_) room_.notify_all();  // the others have nothing left to wait for
  }
}

RowStream::Ready RowStream::next(std::chrono::milliseconds wait, int64_t* slot) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (stop_ || given_ == batches_) return Ready::ended;
  *slot = given_ % static_cast<int64_t>(slots_.size());
  // With every place given away, what is done in this one is done for an older batch.
  const auto whole = [&] { return given_ < released_ + static_cast<int64_t>(slots_.size()) && done_[*slot] == pieces_; };
  filled_.wait_for(lock, wait, [&] { return whole() || !error_.empty(); });
  if (whole()) {
    if (++given_ == batches_) file_->check_unchanged();
    return Ready::yes;
  }
  if (!error_.empty()) throw ReadError(error_);
  return Ready::no;
}

void RowStream::release() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (released_ == given_) throw std::logic_error("bvae: nothing to release");
    done_[released_ % static_cast<int64_t>(slots_.size())] = 0;
    ++released_;
  }
  room_.notify_all();
}

}  // namespace bvae
