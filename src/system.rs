//! What differs between operating systems: positioned reads and writes, durable renames, the lock of a folder.
//!
//! Every call that only some systems have stands here, with its twin for the others. Elsewhere only the Python binding
//! asks for the system: what it calls an error number.

#[cfg(unix)]
pub use unix::*;
#[cfg(windows)]
pub use windows::*;

#[cfg(unix)]
mod unix {
    use std::fs::{File, TryLockError};
    use std::io::{self, ErrorKind};
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    #[cfg(target_os = "linux")]
    use std::sync::OnceLock;

    /// Fills `buffer` from `offset` on.
    pub fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        file.read_exact_at(buffer, offset)
    }

    /// Writes all of `bytes` at `offset`.
    pub fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    /// Renames a file that may be open, in place of one that may be there.
    pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    /// Makes what was written to a file durable, where the filesystem can.
    pub fn sync_data(file: &File) -> io::Result<()> {
        match file.sync_data() {
            Err(fault) if is_refused_by_filesystem(&fault) => Ok(()),
            result => result,
        }
    }

    /// Makes the renames inside `folder` durable, where the filesystem can.
    pub fn sync_folder(folder: &Path) -> io::Result<()> {
        match File::open(folder)?.sync_all() {
            // Some network and FUSE filesystems have no such call for folders.
            Err(fault) if fault.kind() == ErrorKind::InvalidInput || is_refused_by_filesystem(&fault) => Ok(()),
            result => result,
        }
    }

    /// Whether a filesystem has no such call. On macOS a sync asks the drive to write its cache (`F_FULLFSYNC`), which
    /// network filesystems answer with ENOTSUP.
    fn is_refused_by_filesystem(fault: &io::Error) -> bool {
        const APPLE_ENOTSUP: i32 = 45;
        fault.kind() == ErrorKind::Unsupported
            || cfg!(target_vendor = "apple") && fault.raw_os_error() == Some(APPLE_ENOTSUP)
    }

    /// Whether the process, or the whole system, has too many files open.
    pub fn has_too_many_open_files(fault: &io::Error) -> bool {
        // ENFILE and EMFILE of every Unix.
        matches!(fault.raw_os_error(), Some(23 | 24))
    }

    /// Whether a file lies on a filesystem behind a network or a user's process (FUSE). Systems other than Linux are not
    /// asked: their files count as local.
    #[cfg(target_os = "linux")]
    pub fn is_remote(path: &Path) -> io::Result<bool> {
        // From statfs(2), and the sources of the filesystems that the page lacks.
        const REMOTE: [u32; 15] = [
            0x6969,      // NFS
            0x517b,      // SMB
            0xff53_4d42, // CIFS
            0xfe53_4d42, // SMB2
            0x6573_5546, // FUSE
            0x0102_1997, // 9P
            0x00c3_6400, // Ceph
            0x0bd0_0bd0, // Lustre
            0x4750_4653, // GPFS
            0x5346_414f, // AFS
            0x7375_7245, // Coda
            0x1983_0326, // BeeGFS
            0xaad7_aaea, // PanFS
            0x786f_4256, // VirtualBox shared folders
            0x564c,      // NCP
        ];
        // The type's width and sign differ between architectures; its low 32 bits do not.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the low 32 bits are meant")]
        let kind = rustix::fs::statfs(path)?.f_type as u32;
        Ok(REMOTE.contains(&kind))
    }

    /// Whether this is a virtual machine that returns its free memory to its host, in stretches of many pages. There
    /// a huge page is one that the host must bring again: reading 3.75 GB into huge pages took 3.3 to 5.8 s, into small
    /// ones 1.0 to 1.5 s (Linux 6.18, 2 cores of an AMD EPYC, 2026-11-21).
    #[cfg(target_os = "linux")]
    pub fn returns_free_pages() -> bool {
        // Order of the stretches; all bits are set where nobody asked for them.
        const PATH: &str = "/sys/module/page_reporting/parameters/page_reporting_order";
        // Small arenas are made faster than the file is read.
        static RETURNS_FREE_PAGES: OnceLock<bool> = OnceLock::new();
        *RETURNS_FREE_PAGES.get_or_init(|| {
            let order = std::fs::read_to_string(PATH).ok().and_then(|text| text.trim().parse::<u32>().ok());
            order.is_some_and(|order| order < u64::BITS)
        })
    }

    /// Whether a file lies on a filesystem behind a network: not asked here, files count as local.
    #[cfg(not(target_os = "linux"))]
    #[expect(clippy::unnecessary_wraps, reason = "other systems can fail")]
    pub fn is_remote(_: &Path) -> io::Result<bool> {
        Ok(false)
    }

    /// Keeps other processes, and other threads of this one, out of a folder while it lives.
    #[derive(Debug)]
    pub struct FolderLock(File);

    /// Locks a folder; None when somebody else has it.
    ///
    /// Filesystems without locks (some network ones) are taken as unlocked: the check is then the user's.
    pub fn lock_folder(folder: &Path, _: &str) -> io::Result<Option<FolderLock>> {
        let handle = File::open(folder)?;
        match handle.try_lock() {
            Err(TryLockError::WouldBlock) => Ok(None),
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Some(FolderLock(handle))),
        }
    }

    impl Drop for FolderLock {
        fn drop(&mut self) {
            // By name, for a forked child may hold the handle too. Nothing to do about a failure.
            let _ = self.0.unlock();
        }
    }
}

#[cfg(windows)]
mod windows {
    use std::fs::File;
    use std::io;
    use std::os::windows::fs::{FileExt, OpenOptionsExt};
    use std::path::Path;
    use std::time::Duration;

    const ERROR_TOO_MANY_OPEN_FILES: i32 = 4;
    const ERROR_ACCESS_DENIED: i32 = 5;
    const ERROR_SHARING_VIOLATION: i32 = 32;
    const FILE_FLAG_DELETE_ON_CLOSE: u32 = 0x0400_0000;

    /// Fills `buffer` from `offset` on. Moves the handle's own position.
    pub fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match file.seek_read(buffer, offset)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => {
                    buffer = &mut buffer[n..];
                    offset += n as u64;
                }
            }
        }
        Ok(())
    }

    /// Writes all of `bytes` at `offset`. Moves the handle's own position.
    pub fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match file.seek_write(bytes, offset)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => {
                    bytes = &bytes[n..];
                    offset += n as u64;
                }
            }
        }
        Ok(())
    }

    /// Renames a file that may be open, in place of one that may be there.
    ///
    /// Virus scanners and indexers hold files for a moment when they see them: tries again for half a second.
    pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
        for milliseconds in [1, 10, 50, 100, 350] {
            match std::fs::rename(from, to) {
                Err(fault) if matches!(fault.raw_os_error(), Some(ERROR_ACCESS_DENIED | ERROR_SHARING_VIOLATION)) => {
                    std::thread::sleep(Duration::from_millis(milliseconds));
                }
                result => return result,
            }
        }
        std::fs::rename(from, to)
    }

    /// Makes what was written to a file durable.
    pub fn sync_data(file: &File) -> io::Result<()> {
        file.sync_data()
    }

    /// Windows has no such call: NTFS logs renames in their order, and a flush of a later file makes them durable.
    #[expect(clippy::unnecessary_wraps, reason = "the other systems can fail")]
    pub fn sync_folder(_: &Path) -> io::Result<()> {
        Ok(())
    }

    /// Whether a file lies on a filesystem behind a network: not asked here, files count as local.
    #[expect(clippy::unnecessary_wraps, reason = "other systems can fail")]
    pub fn is_remote(_: &Path) -> io::Result<bool> {
        Ok(false)
    }

    /// Whether the process, or the whole system, has too many files open.
    pub fn has_too_many_open_files(fault: &io::Error) -> bool {
        fault.raw_os_error() == Some(ERROR_TOO_MANY_OPEN_FILES)
    }

    /// Keeps other processes, and other threads of this one, out of a folder while it lives.
    #[derive(Debug)]
    pub struct FolderLock(#[expect(dead_code, reason = "its handle is the lock")] File);

    /// Locks a folder; None when somebody else has it.
    ///
    /// Folders have no locks here: a file `name` that nobody else can open takes their place, and goes with its handle,
    /// also when the process is killed.
    pub fn lock_folder(folder: &Path, name: &str) -> io::Result<Option<FolderLock>> {
        let opened = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .share_mode(0)
            .custom_flags(FILE_FLAG_DELETE_ON_CLOSE)
            .open(folder.join(name));
        match opened {
            Err(fault) if fault.raw_os_error() == Some(ERROR_SHARING_VIOLATION) => Ok(None),
            result => Ok(Some(FolderLock(result?))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_has_one_holder_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let lock = || lock_folder(folder.path(), "lock").unwrap();
        let first = lock();
        assert!(first.is_some() && lock().is_none());
        drop(first);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(lock().is_some());
    }

    #[test]
    fn an_open_file_is_renamed_in_place_of_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("file"), "old").unwrap();
        let file = std::fs::File::create_new(path("temporary")).unwrap();
        write_all_at(&file, b"n", 0).unwrap();
        rename(&path("temporary"), &path("file")).unwrap();
        write_all_at(&file, b"ew", 1).unwrap();
        let mut bytes = [0; 2];
        read_exact_at(&std::fs::File::open(path("file")).unwrap(), &mut bytes, 1).unwrap();
        assert_eq!((&bytes, std::fs::read(path("file")).unwrap()), (b"ew", b"new".to_vec()));
    }
}
