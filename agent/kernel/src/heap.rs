//! The agent's heap. It is here because this crate may be unsafe, and before anything else asks for memory.

/// Has all threads share one heap.
///
/// glibc gives every thread a heap of its own, up to eight a CPU, and what one thread has freed is of no use to
/// the others: an agent that has read ten thousand Pods takes 90 MiB in place of 50. Its threads hardly ever
/// allocate at the same time. To be called before there are other threads; other C libraries have one heap
/// anyway.
pub fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt(3) takes two numbers, and M_ARENA_MAX changes nothing of what is allocated.
        let done = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
        if done == 0 {
            tracing::debug!("the heap stays as it is");
        }
    }
}
