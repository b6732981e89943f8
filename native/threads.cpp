#include "threads.hpp"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace weft {

namespace {

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
    asm volatile("yield");
#else
    std::this_thread::yield();
#endif
}

// Layers of one network follow each other within microseconds: a worker spins that long before it sleeps.
constexpr int spins = 2000;

class Pool {
public:
    // False where the threads are taken or cannot be had; nothing has run then.
    bool run(int parts, void (*task)(void *, int), void *context) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner.owns_lock()) return false;
        if (!grow(parts - 1)) return false;
        task_ = task;
        context_ = context;
        parts_ = parts;
        pending_.store(workers_, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(sleep_);
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        task(context, 0);
        for (int i = 0; pending_.load(std::memory_order_acquire) != 0; ++i) {
            if (i < spins) relax();
            else std::this_thread::yield();
        }
        return true;
    }

private:
    bool grow(int wanted) {
        while (workers_ < wanted) {
            const std::uint64_t seen = generation_.load(std::memory_order_relaxed);
            const int part = workers_ + 1;
            try {
                std::thread([this, part, seen] { work(part, seen); }).detach();
            } catch (const std::system_error &) {
                return false;
            }
            ++workers_;
        }
        return true;
    }

    void work(int part, std::uint64_t seen) {
        for (;;) {
            for (int i = 0; i < spins && generation_.load(std::memory_order_acquire) == seen; ++i) relax();
            if (generation_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep_);
                wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
            }
            // The owner waits for every worker before it starts a new generation, so none is missed.
            ++seen;
            if (part < parts_) task_(context_, part);
            pending_.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex owner_;
    std::mutex sleep_;
    std::condition_variable wake_;
    std::atomic<std::uint64_t> generation_{0};
    std::atomic<int> pending_{0};
    int workers_ = 0;
    int parts_ = 0;
    void (*task_)(void *, int) = nullptr;
    void *context_ = nullptr;
};

// Never destroyed: its detached threads may outlive the statics of a process that exits.
std::atomic<Pool *> pool{nullptr};

#if defined(__unix__) || defined(__APPLE__)
// A forked child has the pool's memory but none of its threads: it starts a pool of its own.
void forget_pool() { pool.store(nullptr); }
#endif

Pool &the_pool() {
    Pool *current = pool.load(std::memory_order_acquire);
    if (current != nullptr) return *current;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
#endif
    Pool *fresh = new Pool;
    if (pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
    return *current;
}

}  // namespace

void run_parts(int parts, void (*task)(void *, int), void *context) {
    if (parts > 1 && the_pool().run(parts, task, context)) return;
    for (int part = 0; part < parts; ++part) task(context, part);
}

}  // namespace weft
