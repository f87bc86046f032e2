//! The dtype table: safetensors tag, bits per element, `ml_dtypes` name, npy descriptor.

pub use safetensors::Dtype;

/// What this crate knows about one dtype.
#[derive(Debug)]
pub struct DtypeInfo {
    /// The safetensors dtype.
    pub dtype: Dtype,
    /// Its tag in a safetensors header.
    pub tag: &'static str,
    /// Name in NumPy and `ml_dtypes`, the one users see.
    pub name: &'static str,
    /// `descr` of the npy header. bfloat16 is `<V2`, which `jnp.load` restores; what npy cannot name is `|u1`.
    pub npy_descr: &'static str,
}

/// All dtypes of safetensors 0.8, in the order of its enum.
pub static DTYPES: [DtypeInfo; 22] = [
    row(Dtype::BOOL, "BOOL", "bool", "|b1"),
    row(Dtype::F4, "F4", "float4_e2m1fn", "|u1"),
    row(Dtype::F6_E2M3, "F6_E2M3", "float6_e2m3fn", "|u1"),
    row(Dtype::F6_E3M2, "F6_E3M2", "float6_e3m2fn", "|u1"),
    row(Dtype::U8, "U8", "uint8", "|u1"),
    row(Dtype::I8, "I8", "int8", "|i1"),
    row(Dtype::F8_E5M2, "F8_E5M2", "float8_e5m2", "|u1"),
    row(Dtype::F8_E4M3, "F8_E4M3", "float8_e4m3fn", "|u1"),
    row(Dtype::F8_E8M0, "F8_E8M0", "float8_e8m0fnu", "|u1"),
    row(Dtype::F8_E4M3FNUZ, "F8_E4M3FNUZ", "float8_e4m3fnuz", "|u1"),
    row(Dtype::F8_E5M2FNUZ, "F8_E5M2FNUZ", "float8_e5m2fnuz", "|u1"),
    row(Dtype::I16, "I16", "int16", "<i2"),
    row(Dtype::U16, "U16", "uint16", "<u2"),
    row(Dtype::F16, "F16", "float16", "<f2"),
    row(Dtype::BF16, "BF16", "bfloat16", "<V2"),
    row(Dtype::I32, "I32", "int32", "<i4"),
    row(Dtype::U32, "U32", "uint32", "<u4"),
    row(Dtype::F32, "F32", "float32", "<f4"),
    row(Dtype::C64, "C64", "complex64", "<c8"),
    row(Dtype::F64, "F64", "float64", "<f8"),
    row(Dtype::I64, "I64", "int64", "<i8"),
    row(Dtype::U64, "U64", "uint64", "<u8"),
];

const fn row(dtype: Dtype, tag: &'static str, name: &'static str, npy_descr: &'static str) -> DtypeInfo {
    DtypeInfo { dtype, tag, name, npy_descr }
}

/// The table's row for `dtype`, or None for a dtype that a newer safetensors added.
#[must_use]
pub fn info(dtype: Dtype) -> Option<&'static DtypeInfo> {
    DTYPES.iter().find(|row| row.dtype == dtype)
}

/// The dtype with this safetensors tag.
#[must_use]
pub fn from_tag(tag: &str) -> Option<Dtype> {
    DTYPES.iter().find(|row| row.tag == tag).map(|row| row.dtype)
}

/// The dtype with this NumPy or `ml_dtypes` name.
#[must_use]
pub fn from_name(name: &str) -> Option<Dtype> {
    DTYPES.iter().find(|row| row.name == name).map(|row| row.dtype)
}

/// NumPy or `ml_dtypes` name of a dtype that a checkpoint was opened with.
///
/// # Panics
/// On a dtype outside the table, which [`crate::header`] refuses before anything else sees it.
#[must_use]
pub fn name(dtype: Dtype) -> &'static str {
    info(dtype).expect("headers with dtypes outside the table are refused").name
}

/// True for the float4 and float6 dtypes, whose elements do not fill whole bytes.
#[must_use]
pub fn is_sub_byte(dtype: Dtype) -> bool {
    dtype.bitsize() < 8
}

/// True for the dtypes that NumPy has itself; `ml_dtypes` has the others.
#[must_use]
pub fn is_of_numpy(dtype: Dtype) -> bool {
    !["bfloat16", "float8_", "float6_", "float4_"].iter().any(|prefix| name(dtype).starts_with(prefix))
}

/// Bytes of `shape` elements of `dtype`; None on overflow or when the bits do not fill whole bytes.
#[must_use]
pub fn checked_nbytes(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let bits = u128::from(checked_elements(shape)?) * dtype.bitsize() as u128;
    if bits.is_multiple_of(8) { u64::try_from(bits / 8).ok() } else { None }
}

/// Number of elements of `shape`; None on overflow.
#[must_use]
pub fn checked_elements(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_holds_every_dtype_once() {
        for row in &DTYPES {
            assert_eq!(DTYPES.iter().filter(|other| other.dtype == row.dtype).count(), 1);
            assert_eq!(from_name(row.name), Some(row.dtype));
            assert_eq!(from_tag(&row.dtype.to_string()), Some(row.dtype));
            assert_eq!(info(row.dtype).map(|found| found.name), Some(row.name));
        }
    }

    #[test]
    fn descriptors_have_the_width_of_their_dtype() {
        for row in &DTYPES {
            let width: usize = row.npy_descr[2..].parse().unwrap();
            assert_eq!(width, row.dtype.bitsize().div_ceil(8), "{}", row.name);
        }
    }

    #[test]
    fn sizes_are_checked() {
        assert_eq!(checked_nbytes(Dtype::F4, &[3]), None);
        assert_eq!(checked_nbytes(Dtype::F4, &[3, 2]), Some(3));
        assert_eq!(checked_nbytes(Dtype::F6_E2M3, &[4]), Some(3));
        assert_eq!(checked_nbytes(Dtype::F64, &[u64::MAX / 8 + 1]), None);
        assert_eq!(checked_nbytes(Dtype::F32, &[]), Some(4));
        assert_eq!(checked_nbytes(Dtype::F32, &[0, 5]), Some(0));
    }
}
