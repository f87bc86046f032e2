//! Files of a source that are still on their way, while a conversion works on those that are here.
//!
//! A checkpoint is then opened from stand-ins: files of the right sizes that have nothing but their headers. What reads
//! data waits for the file itself.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

use crate::checksum::Checksum;
use crate::error::{Error, Result};
use crate::file;
use crate::header;
use crate::source_file::modified_ns;
use crate::work::lock;

/// Which files have come; shared by those that bring them and those that wait.
#[derive(Debug, Default)]
pub struct Arrivals {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    here: HashMap<String, PathBuf>,
    fault: Option<String>,
    is_stopped: bool,
}

impl Arrivals {
    /// The file of this name, relative to the checkpoint, is whole and lies at `path`.
    pub fn arrived(&self, name: String, path: PathBuf) {
        lock(&self.state).here.insert(name, path);
        self.changed.notify_all();
    }

    /// Nothing more will come, because of `fault`.
    pub fn failed(&self, fault: String) {
        lock(&self.state).fault.get_or_insert(fault);
        self.changed.notify_all();
    }

    /// Nobody needs what has not come yet: those that wait get [`Error::Cancelled`].
    pub fn stop(&self) {
        lock(&self.state).is_stopped = true;
        self.changed.notify_all();
    }

    /// Waits for a file and returns where it lies.
    fn wait(&self, name: &str) -> Result<PathBuf> {
        let mut state = lock(&self.state);
        loop {
            if let Some(path) = state.here.get(name) {
                return Ok(path.clone());
            }
            if state.is_stopped {
                return Err(Error::Cancelled);
            }
            if let Some(fault) = &state.fault {
                return Err(Error::Download(fault.clone()));
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// One file that a stand-in stands for.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) arrivals: Arc<Arrivals>,
    /// Size and header of the stand-in, which the file has to have.
    pub(crate) nbytes: u64,
    pub(crate) header_xxh3_128: Checksum,
    /// Where the file lies and when it was modified, once it is here and was compared.
    pub(crate) found: OnceLock<(PathBuf, u128)>,
}

impl Arrival {
    /// Opens the file for positioned reads; waits for it.
    pub(crate) fn open(&self, name: &str) -> Result<File> {
        let path = self.arrivals.wait(name)?;
        let (file, stat) = file::open_regular(&path)?;
        if self.found.get().is_none() {
            self.compare(&path, &file, &stat)?;
            // Another worker may have been here first, with the same answer.
            let _ = self.found.set((path.clone(), modified_ns(&stat)));
        }
        self.check_unchanged(&path, &stat)?;
        Ok(file)
    }

    /// Makes sure that the file, if it came, is still there and the one that was compared.
    pub(crate) fn check(&self) -> Result<()> {
        let Some((path, _)) = self.found.get() else { return Ok(()) };
        self.check_unchanged(path, &std::fs::metadata(path).map_err(|fault| Error::io(path, fault))?)
    }

    fn compare(&self, path: &Path, file: &File, stat: &Metadata) -> Result<()> {
        let is_same =
            stat.len() == self.nbytes && header::read(path, file, stat.len())?.checksum == self.header_xxh3_128;
        if is_same {
            return Ok(());
        }
        let found = format_args!("another size or header ({} bytes)", stat.len());
        Err(Error::file(path, found, format_args!("those that were announced ({} bytes)", self.nbytes)))
    }

    fn check_unchanged(&self, path: &Path, stat: &Metadata) -> Result<()> {
        let is_same =
            self.found.get().is_some_and(|(_, modified)| (stat.len(), modified_ns(stat)) == (self.nbytes, *modified));
        if is_same {
            return Ok(());
        }
        let found = format_args!("another size or modification time ({} bytes)", stat.len());
        Err(Error::file(path, found, format_args!("the file as it came ({} bytes)", self.nbytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(act: impl FnOnce(&Arrivals)) -> Result<PathBuf> {
        let arrivals = Arrivals::default();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| arrivals.wait("a"));
            std::thread::sleep(std::time::Duration::from_millis(20));
            arrivals.arrived("b".into(), "elsewhere".into());
            act(&arrivals);
            waiter.join().unwrap()
        })
    }

    #[test]
    fn a_file_is_waited_for() {
        assert_eq!(waiting(|arrivals| arrivals.arrived("a".into(), "x/a".into())).unwrap(), PathBuf::from("x/a"));
    }

    #[test]
    fn a_fault_and_a_stop_end_the_wait() {
        let fault = waiting(|arrivals| arrivals.failed("the hub is gone".into())).unwrap_err();
        assert_eq!(fault.to_string(), "the hub is gone");
        assert!(matches!(waiting(Arrivals::stop), Err(Error::Cancelled)));
    }

    #[test]
    fn what_came_before_a_fault_is_there() {
        let arrivals = Arrivals::default();
        arrivals.arrived("a".into(), "a".into());
        arrivals.failed("later".into());
        arrivals.stop();
        assert!(arrivals.wait("a").is_ok());
    }
}
