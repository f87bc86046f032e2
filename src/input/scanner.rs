//! Reads a file from its beginning to its end, but for stretches that are skipped.

use std::fmt::Display;
use std::fs::File;
use std::path::Path;

use xxhash_rust::xxh3::Xxh3;

use crate::checksum::Checksum;
use crate::error::{Error, Result};
use crate::file;

/// Bytes that are scanned.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    File(&'a File, u64),
    Bytes(&'a [u8]),
}

impl Source<'_> {
    /// How many there are.
    pub(super) fn nbytes(&self) -> u64 {
        match self {
            Self::File(_, nbytes) => *nbytes,
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }
}

/// Bytes that are read at once.
const BUFFER_BYTES: usize = 1 << 16;

/// Longest text that is taken.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// A place in a file.
pub(super) struct Scanner<'a> {
    path: &'a Path,
    source: Source<'a>,
    nbytes: u64,
    position: u64,
    /// Bytes of the file from `start` on.
    buffer: Vec<u8>,
    start: u64,
    hasher: Xxh3,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(path: &'a Path, source: Source<'a>) -> Self {
        let nbytes = source.nbytes();
        Self { path, source, nbytes, position: 0, buffer: Vec::new(), start: 0, hasher: Xxh3::new() }
    }

    /// Bytes of all.
    pub(super) fn nbytes(&self) -> u64 {
        self.nbytes
    }

    /// Where the next byte stands.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Bytes after this place.
    pub(super) fn left(&self) -> u64 {
        self.nbytes - self.position
    }

    /// Hash of all that was read.
    pub(super) fn checksum(&self) -> Checksum {
        Checksum(self.hasher.digest128())
    }

    /// A fault of the file at this place.
    pub(super) fn fault(&self, found: impl Display, expected: impl Display) -> Error {
        Error::file(self.path, format_args!("{found} before byte {}", self.position), expected)
    }

    /// Bytes of a text or the like.
    pub(super) fn bytes(&mut self, count: u64) -> Result<&[u8]> {
        if count > MAX_TEXT_BYTES {
            return Err(self.fault(format_args!("a text of {count} bytes"), format_args!("at most {MAX_TEXT_BYTES}")));
        }
        self.check_left(count)?;
        let count = usize::try_from(count).expect("bounded above");
        let is_buffered =
            self.position >= self.start && self.position + count as u64 <= self.start + self.buffer.len() as u64;
        if !is_buffered {
            let wanted = count.max(BUFFER_BYTES).min(usize::try_from(self.left()).unwrap_or(usize::MAX));
            self.buffer.resize(wanted, 0);
            self.start = self.position;
            match self.source {
                Source::File(file, _) => file::read_exact_at(self.path, file, &mut self.buffer, self.start)?,
                Source::Bytes(bytes) => {
                    let start = usize::try_from(self.start).expect("within the bytes");
                    self.buffer.copy_from_slice(&bytes[start..start + wanted]);
                }
            }
        }
        let from = usize::try_from(self.position - self.start).expect("within the buffer");
        self.position += count as u64;
        let bytes = &self.buffer[from..from + count];
        self.hasher.update(bytes);
        Ok(bytes)
    }

    /// A number of so many bytes, the lowest first.
    pub(super) fn little_endian<const N: usize>(&mut self) -> Result<u64> {
        self.bytes(N as u64).map(|bytes| bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    /// A number of so many bytes, the highest first.
    pub(super) fn big_endian<const N: usize>(&mut self) -> Result<u64> {
        self.bytes(N as u64).map(|bytes| bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    pub(super) fn byte(&mut self) -> Result<u8> {
        self.bytes(1).map(|bytes| bytes[0])
    }

    pub(super) fn text(&mut self, count: u64) -> Result<String> {
        let bytes = self.bytes(count)?.to_vec();
        String::from_utf8(bytes).map_err(|_| self.fault("a text that is not UTF-8", "UTF-8"))
    }

    /// Skips data and returns where it stands and how much it is.
    pub(super) fn skip(&mut self, count: u64) -> Result<(u64, u64)> {
        self.check_left(count)?;
        let data = (self.position, count);
        self.position += count;
        Ok(data)
    }

    fn check_left(&self, count: u64) -> Result<()> {
        if count > self.left() {
            let left = self.left();
            return Err(self.fault(format_args!("an end after {left} more bytes"), format_args!("{count} more")));
        }
        Ok(())
    }
}
