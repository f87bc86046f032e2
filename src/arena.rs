//! Memory that tensors are read into: anonymous mappings of huge pages, shared by the views into them.

use std::ops::Range;
#[cfg(target_os = "linux")]
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use memmap2::MmapMut;

use crate::error::{Error, Result};
#[cfg(target_os = "linux")]
use crate::system;
use crate::work::lock;

/// Beginnings of tensors are multiples of this: JAX on CPU shares a host buffer that is so aligned, and copies others.
pub const ALIGNMENT: u64 = 64;

/// Bytes of a huge page on the processors that have them.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Zeroed memory that begins at a page.
#[derive(Debug)]
pub struct Arena {
    memory: MmapMut,
    /// Its pages are there.
    is_touched: bool,
}

impl Arena {
    /// Reserves memory; pages come when they are first touched.
    pub fn new(nbytes: usize) -> Result<Self> {
        let fault = |source| Error::Io { path: format!("{nbytes} bytes of memory").into(), source };
        // Mappings of no bytes are refused by the system.
        let memory = MmapMut::map_anon(nbytes.max(1)).map_err(fault)?;
        // Only whole huge pages, so that none reaches beyond the arena. A system without them refuses, and goes on with
        // small ones.
        #[cfg(target_os = "linux")]
        if !system::returns_free_pages() {
            let _ = memory.advise_range(memmap2::Advice::HugePage, 0, nbytes / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES);
        }
        Ok(Self { memory, is_touched: false })
    }

    /// The memory.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.memory
    }

    /// The memory, to be written.
    #[must_use]
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

/// Bytes whose pages are brought at once.
#[cfg(target_os = "linux")]
const TOUCH_BYTES: usize = 32 << 20;

/// Brings the pages of new arenas, on several threads: a fault for each page, as it is read into, costs more than the
/// reading. Arenas that are used again have theirs: to ask for pages that are there takes most of the time of decoding
/// into them. Systems that have no call for this bring each page when it is first touched.
#[cfg_attr(not(target_os = "linux"), expect(unused_variables, reason = "Linux alone has the call"))]
pub fn touch(arenas: &mut [Arena], workers: usize) {
    #[cfg(target_os = "linux")]
    {
        let ranges: Vec<_> = arenas
            .iter()
            .filter(|arena| !arena.is_touched)
            .flat_map(|arena| (0..arena.memory.len()).step_by(TOUCH_BYTES).map(move |start| (arena, start)))
            .collect();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..workers.min(ranges.len()) {
                scope.spawn(|| {
                    while let Some((arena, start)) = ranges.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let length = TOUCH_BYTES.min(arena.memory.len() - start);
                        let _ = arena.memory.advise_range(memmap2::Advice::PopulateWrite, *start, length);
                    }
                });
            }
        });
    }
    for arena in arenas {
        arena.is_touched = true;
    }
}

/// A stretch of an arena, which it keeps alive.
#[derive(Debug, Clone)]
pub struct ArenaView {
    arena: Arc<Arena>,
    range: Range<usize>,
}

impl ArenaView {
    /// A view of `range`.
    #[must_use]
    pub fn new(arena: Arc<Arena>, range: Range<usize>) -> Self {
        Self { arena, range }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.arena.bytes()[self.range.clone()]
    }
}

/// Arenas to be used again once nobody looks into them: touching memory the first time is slow.
#[derive(Debug, Default)]
pub struct ArenaPool {
    arenas: Mutex<Vec<Arc<Arena>>>,
}

impl ArenaPool {
    /// An arena of at least `nbytes`: the smallest of the pool that fits and that nobody looks into, or a new one.
    ///
    /// Arenas more than twice as large are left for larger requests.
    pub fn take(&self, nbytes: usize) -> Result<Arena> {
        let mut arenas = lock(&self.arenas);
        let fits = |arena: &Arc<Arena>| {
            let len = arena.bytes().len();
            Arc::strong_count(arena) == 1 && len >= nbytes && len / 2 <= nbytes.max(HUGE_PAGE_BYTES)
        };
        let best = (0..arenas.len()).filter(|&i| fits(&arenas[i])).min_by_key(|&i| arenas[i].bytes().len());
        if let Some(arena) = best.and_then(|index| Arc::into_inner(arenas.swap_remove(index))) {
            return Ok(arena);
        }
        // What fits nothing would only take room.
        arenas.retain(|arena| Arc::strong_count(arena) > 1);
        drop(arenas);
        Arena::new(nbytes)
    }

    /// Lets an arena be used again after its last view is gone.
    pub fn give(&self, arena: Arc<Arena>) {
        lock(&self.arenas).push(arena);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arena_is_used_again_only_after_its_last_view() {
        let pool = ArenaPool::default();
        let mut arena = pool.take(4096).unwrap();
        arena.bytes_mut()[7] = 1;
        let arena = Arc::new(arena);
        let view = ArenaView::new(Arc::clone(&arena), 7..8);
        pool.give(arena);
        let other = pool.take(4096).unwrap();
        assert_eq!((other.bytes()[7], view.bytes()), (0, &[1][..]));
        let place = view.bytes().as_ptr();
        drop(view);
        let again = pool.take(4000).unwrap();
        assert_eq!(again.bytes()[7..].as_ptr(), place);
    }

    #[test]
    fn arenas_begin_at_a_page_whatever_their_size() {
        for nbytes in [0, 1, 5 << 20] {
            let mut arena = Arena::new(nbytes).unwrap();
            assert_eq!(arena.bytes().as_ptr() as usize % 4096, 0);
            assert!(arena.bytes_mut().len() >= nbytes && arena.bytes().iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let fault = Arena::new(1 << 60).unwrap_err().to_string();
        assert!(fault.contains("1152921504606846976 bytes of memory"), "{fault}");
    }
}
