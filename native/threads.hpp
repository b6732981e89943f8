#pragma once
// Fork and join on a few threads that stay alive between calls.

#include <type_traits>

namespace weft {

// Calls task(context, part) for every part in [0, parts) and returns when all are done; part 0 runs here.
// While another caller has the threads the parts run here, one after the other. A forked child starts
// threads of its own.
void run_parts(int parts, void (*task)(void *context, int part), void *context);

template <typename Task>
void parallel(int parts, Task &&task) {
    using Plain = std::remove_reference_t<Task>;
    run_parts(parts, [](void *context, int part) { (*static_cast<Plain *>(context))(part); }, &task);
}

}  // namespace weft
