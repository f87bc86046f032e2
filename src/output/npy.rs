//! numpy-direct: one npy file per tensor, its data aligned to 64 bytes.

use safetensors::Dtype;

use super::{
    FileBuilder, FileLayout, Layout, Member, PlacedFile, Placement, Tensor, check_parts, step_rows, stored_shape,
    warn_of_large_row,
};
use crate::dtype;
use crate::error::Result;
use crate::names;
use crate::ordered_map::OrderedMap;

/// The reader for those who have no tensorport; written into every tree.
const LOAD_PARAMS_NAME: &str = "load_params.py";
const LOAD_PARAMS: &str = include_str!("load_params.py");

/// Data of every npy file begins at a multiple of this, so that JAX on CPU can alias a mapping of it.
pub const DATA_ALIGNMENT: usize = 64;

/// Magic bytes and version 1.0.
const MAGIC: &[u8; 8] = b"\x93NUMPY\x01\x00";

/// The npy 1.0 header for a C-contiguous array, padded so that data starts at a multiple of 64.
///
/// `shape` is the shape as npy sees it: [`part_shape`].
#[must_use]
pub fn header(dtype: Dtype, shape: &[u64]) -> Vec<u8> {
    let descr = dtype::info(dtype).map_or("|u1", |row| row.npy_descr);
    let dims: Vec<_> = shape.iter().map(u64::to_string).collect();
    let shape = match dims.as_slice() {
        [dim] => format!("({dim},)"),
        dims => format!("({})", dims.join(", ")),
    };
    let dict = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    // Magic, a two-byte length, the dict, spaces, a newline.
    let total = (MAGIC.len() + 2 + dict.len() + 1).next_multiple_of(DATA_ALIGNMENT);
    let dict_bytes = total - MAGIC.len() - 2;
    let length = u16::try_from(dict_bytes).expect("64 dimensions of 20 digits stay far below 64 KiB");
    let mut header = Vec::with_capacity(total);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&length.to_le_bytes());
    header.extend_from_slice(dict.as_bytes());
    header.resize(total - 1, b' ');
    header.push(b'\n');
    header
}

/// numpy-direct.
#[derive(Debug, Clone, Copy)]
pub struct Npy;

impl Layout for Npy {
    /// Shard folders filled in the order of the tensors; a tensor beyond the limit is split along axis 0.
    fn place(&self, tensors: &[Tensor<'_>], unit_bytes: &dyn Fn(usize) -> u64, shard_bytes: u64) -> Result<Placement> {
        let names: Vec<&str> = tensors.iter().map(|tensor| tensor.name).collect();
        let stems = names::file_stems(&names);
        let Placement { mut files, mut shards, mut warnings } = Placement::default();
        let mut shard_fill = 0;
        for ((index, tensor), stem) in tensors.iter().enumerate().zip(stems) {
            let parts = split_bytes(tensor, unit_bytes(index), shard_bytes)?;
            let is_split = parts.len() > 1;
            if let Some(large) = parts.iter().find(|&&bytes| bytes > shard_bytes) {
                warnings.push(warn_of_large_row(tensor, *large, shard_bytes));
            }
            let mut start = 0;
            for (number, part_bytes) in parts.into_iter().enumerate() {
                if shards.is_empty() || shard_fill + part_bytes > shard_bytes && shard_fill > 0 {
                    shards.push((format!("shard_{:03}", shards.len()), files.len()..files.len()));
                    shard_fill = 0;
                }
                shard_fill += part_bytes;
                let (shard, range) = shards.last_mut().expect("pushed above");
                range.end += 1;
                let name = if is_split { format!("{stem}.part{number:03}.npy") } else { format!("{stem}.npy") };
                let data = start..start + part_bytes;
                start = data.end;
                files.push(PlacedFile { path: format!("{shard}/{name}"), tensors: index..index + 1, data });
            }
        }
        Ok(Placement { files, shards, warnings })
    }

    fn file(&self, members: &[Member<'_>], _: &OrderedMap<String>) -> Result<FileLayout, String> {
        let [Member { tensor, data, .. }] = members else {
            return Err(format!("{} tensors, where npy has one", members.len()));
        };
        let part_bytes = data.end - data.start;
        let shape =
            part_shape(tensor, part_bytes).ok_or_else(|| format!("a part of {part_bytes} bytes, no whole rows"))?;
        let mut file = FileBuilder::default();
        file.bytes(&header(tensor.dtype, &shape));
        file.data(0, data.clone());
        Ok(file.finish())
    }

    fn side_files(&self, _: &[Tensor<'_>], _: &[PlacedFile]) -> Vec<(String, Vec<u8>)> {
        vec![(LOAD_PARAMS_NAME.into(), LOAD_PARAMS.into())]
    }
}

/// The stored shape of one part, of `part_bytes` bytes, of a tensor that is split along axis 0.
///
/// None when the bytes are not a whole number of rows.
#[must_use]
pub fn part_shape(tensor: &Tensor<'_>, part_bytes: u64) -> Option<Vec<u64>> {
    let mut stored = stored_shape(tensor);
    if part_bytes == tensor.nbytes {
        return Some(stored);
    }
    let rows = stored.first_mut()?;
    let row_bytes = tensor.nbytes.checked_div(*rows)?;
    *rows = part_bytes.checked_div(row_bytes)?;
    (*rows * row_bytes == part_bytes).then_some(stored)
}

/// Bytes of the parts of a tensor: whole rows of axis 0 and whole units, each within `limit` where one row is.
fn split_bytes(tensor: &Tensor<'_>, unit_bytes: u64, limit: u64) -> Result<Vec<u64>> {
    let rows = tensor.shape.first().copied().unwrap_or(1);
    if tensor.nbytes <= limit || rows <= 1 {
        return Ok(vec![tensor.nbytes]);
    }
    let step_bytes = tensor.nbytes / (rows / step_rows(tensor.nbytes, rows, unit_bytes));
    let part_bytes = (limit / step_bytes).max(1) * step_bytes;
    let (whole_parts, rest) = (tensor.nbytes / part_bytes, tensor.nbytes % part_bytes);
    check_parts(tensor, limit, whole_parts.saturating_add(1))?;
    let whole_parts = usize::try_from(whole_parts).expect("bounded above");
    let mut parts = vec![part_bytes; whole_parts];
    if rest > 0 {
        parts.push(rest);
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_numpys_own_text_padded_to_64() {
        for shape in [&[][..], &[3], &[3, 0, 7], &[u64::MAX; 64]] {
            let header = header(Dtype::BF16, shape);
            assert_eq!(header.len() % DATA_ALIGNMENT, 0);
            assert_eq!(header.last(), Some(&b'\n'));
            let length = usize::from(u16::from_le_bytes([header[8], header[9]]));
            assert_eq!(length + 10, header.len());
        }
        let text = String::from_utf8(header(Dtype::F32, &[5])[10..].to_vec()).unwrap();
        assert!(text.starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (5,), }"));
    }

    #[test]
    fn parts_are_whole_rows() {
        let part_shape = |dtype, shape, nbytes, part_bytes| {
            super::part_shape(&Tensor { name: "", dtype, shape, nbytes }, part_bytes)
        };
        assert_eq!(part_shape(Dtype::F32, &[5, 3], 60, 24), Some(vec![2, 3]));
        assert_eq!(part_shape(Dtype::F32, &[5, 3], 60, 25), None);
        assert_eq!(part_shape(Dtype::F4, &[6, 2], 6, 4), Some(vec![4]));
        assert_eq!(part_shape(Dtype::F32, &[], 4, 2), None);
        assert_eq!(part_shape(Dtype::F32, &[0, 3], 0, 24), None);
    }
}
