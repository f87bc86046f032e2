//! numpy-direct: one npy file per tensor, its data aligned to 64 bytes.

use safetensors::Dtype;

use crate::dtype;

/// Data of every npy file begins at a multiple of this, so that JAX on CPU can alias a mapping of it.
pub const DATA_ALIGNMENT: usize = 64;

/// Magic bytes and version 1.0.
const MAGIC: &[u8; 8] = b"\x93NUMPY\x01\x00";

/// The npy 1.0 header for a C-contiguous array, padded so that data starts at a multiple of 64.
///
/// `shape` is the shape as npy sees it: see [`stored_shape`].
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

/// The shape that npy stores: the logical one, except that packed float4 and float6 are flat bytes.
#[must_use]
pub fn stored_shape(dtype: Dtype, shape: &[u64], nbytes: u64) -> Vec<u64> {
    if dtype::is_sub_byte(dtype) { vec![nbytes] } else { shape.to_vec() }
}

/// The stored shape of one part, of `part_bytes` bytes, of a tensor that is split along axis 0.
///
/// None when the bytes are not a whole number of rows.
#[must_use]
pub fn part_shape(dtype: Dtype, shape: &[u64], nbytes: u64, part_bytes: u64) -> Option<Vec<u64>> {
    let mut stored = stored_shape(dtype, shape, nbytes);
    if part_bytes == nbytes {
        return Some(stored);
    }
    let rows = stored.first_mut()?;
    let row_bytes = nbytes.checked_div(*rows)?;
    *rows = part_bytes.checked_div(row_bytes)?;
    (*rows * row_bytes == part_bytes).then_some(stored)
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
        assert_eq!(part_shape(Dtype::F32, &[5, 3], 60, 24), Some(vec![2, 3]));
        assert_eq!(part_shape(Dtype::F32, &[5, 3], 60, 25), None);
        assert_eq!(part_shape(Dtype::F4, &[6, 2], 6, 4), Some(vec![4]));
        assert_eq!(part_shape(Dtype::F32, &[], 4, 2), None);
        assert_eq!(part_shape(Dtype::F32, &[0, 3], 0, 24), None);
    }
}
