//! The files of a tree, told from what its manifest says of each tensor, and compared with what its format makes of them.

use std::borrow::Cow;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

use super::{Content, FileLayout, Frame, Layout, Member, Tensor};
use crate::error::{Error, Result};
use crate::file;
use crate::ordered_map::OrderedMap;

/// What a manifest says of a part of a tensor.
pub(crate) struct Stretch<'a, F> {
    /// Number of the tensor, and of the part.
    pub tensor: (usize, usize),
    /// What the format knows of the tensor.
    pub view: Tensor<'a>,
    /// The file that holds the part.
    pub file: F,
    /// Where it begins.
    pub offset: u64,
    /// Which bytes of the tensor.
    pub data: Range<u64>,
    /// Bytes of the tensor's first part.
    pub part_bytes: u64,
}

/// Gives the stretches of each file to `visit`. Those of one file follow each other.
pub(crate) fn for_each_file<'a, F: PartialEq>(
    stretches: impl Iterator<Item = Stretch<'a, F>>,
    mut visit: impl FnMut(&[Stretch<'a, F>]) -> Result<()>,
) -> Result<()> {
    let mut file: Vec<Stretch<'a, F>> = Vec::new();
    for stretch in stretches {
        if file.first().is_some_and(|first| first.file != stretch.file) {
            visit(&file)?;
            file.clear();
        }
        file.push(stretch);
    }
    if file.is_empty() { Ok(()) } else { visit(&file) }
}

/// The file of `nbytes` bytes that holds these stretches; what is wrong with them where a format puts them elsewhere.
pub(crate) fn layout_of<F>(
    layout: &dyn Layout,
    stretches: &[Stretch<'_, F>],
    metadata: &OrderedMap<String>,
    nbytes: u64,
) -> Result<FileLayout, String> {
    // A manifest can claim any number of bytes, and frames are made for as many.
    let claimed = stretches.iter().fold(0u64, |sum, stretch| sum.saturating_add(stretch.data.end - stretch.data.start));
    if claimed > nbytes {
        return Err(format!("parts of {claimed} bytes in a file of {nbytes} bytes"));
    }
    let mut members: Vec<Member<'_>> = Vec::new();
    let mut last = None;
    for stretch in stretches {
        match members.last_mut() {
            Some(member) if last == Some(stretch.tensor.0) && member.data.end == stretch.data.start => {
                member.data.end = stretch.data.end;
            }
            _ => members.push(Member {
                tensor: stretch.view,
                data: stretch.data.clone(),
                part_bytes: stretch.part_bytes,
            }),
        }
        last = Some(stretch.tensor.0);
    }
    let file = layout.file(&members, metadata)?;
    let found = stretches.iter().map(|stretch| (stretch.offset, &stretch.data));
    let expected = file.extents.iter().map(|extent| (extent.offset, &extent.data));
    if let Some((found, expected)) = found.zip(expected).find(|(found, expected)| found != expected) {
        let ((at, data), (expected_at, expected_data)) = (found, expected);
        return Err(format!(
            "a part of {} bytes at offset {at}, where the format has one of {} bytes at offset {expected_at}",
            data.end - data.start,
            expected_data.end - expected_data.start
        ));
    }
    if stretches.len() != file.extents.len() {
        return Err(format!("{} parts, where the format has {}", stretches.len(), file.extents.len()));
    }
    Ok(file)
}

/// Most bytes of a frame of zeros that are handled at once.
const ZEROS_AT_ONCE: u64 = 1 << 16;

/// The bytes of a frame, with their offsets.
pub(crate) fn frame_bytes(frame: &Frame) -> impl Iterator<Item = (u64, Cow<'_, [u8]>)> {
    let (bytes, zeros) = match &frame.content {
        Content::Bytes(bytes) => (Some((frame.offset, Cow::Borrowed(bytes.as_slice()))), 0),
        Content::Zeros(count) => (None, *count),
    };
    let zeros = (0..zeros.div_ceil(ZEROS_AT_ONCE)).map(move |number| {
        let start = number * ZEROS_AT_ONCE;
        let count = usize::try_from((zeros - start).min(ZEROS_AT_ONCE)).expect("64 KiB at most");
        (frame.offset + start, Cow::Owned(vec![0; count]))
    });
    bytes.into_iter().chain(zeros)
}

/// Compares the frames of a file with what it should have, after its size.
pub(crate) fn check_frames(path: &Path, handle: &File, nbytes: u64, layout: &FileLayout) -> Result<()> {
    if nbytes != layout.nbytes {
        return Err(Error::file(path, format_args!("{nbytes} bytes"), format_args!("{} bytes", layout.nbytes)));
    }
    let mut found = Vec::new();
    for (offset, bytes) in layout.frames.iter().flat_map(frame_bytes) {
        found.resize(bytes.len(), 0);
        file::read_exact_at(path, handle, &mut found, offset)?;
        if found != *bytes {
            let at = found.iter().zip(bytes.iter()).position(|(found, expected)| found != expected).unwrap_or(0);
            let found = format_args!("another header (byte {})", offset + at as u64);
            return Err(Error::file(path, found, "the one for the dtypes and shapes of its tensors"));
        }
    }
    Ok(())
}
