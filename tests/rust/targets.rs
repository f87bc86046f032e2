//! What the fuzzers run, and the proptest harness that runs the same on a stable toolchain: arbitrary bytes in, no
//! panic, and what is accepted keeps its promises.

use std::path::Path;

use safetensors::SafeTensors;
use tensorport::input::{FileFormat, NamedArray};
use tensorport::manifest::Manifest;
use tensorport::output::{Tensor, npy};
use tensorport::{dtype, header, index, journal};

/// The whole bytes of a safetensors file.
pub fn safetensors_file(data: &[u8]) {
    let Some((length, rest)) = data.split_first_chunk::<8>() else { return };
    let Ok(length) = usize::try_from(u64::from_le_bytes(*length)) else { return };
    let Some((json, values)) = rest.split_at_checked(length) else { return };
    let Ok((_, tensors)) = header::parse(Path::new("f"), json, values.len() as u64) else { return };
    let total: u64 = tensors.iter().map(|tensor| tensor.nbytes).sum();
    assert_eq!(total, values.len() as u64, "tensors tile the data");
    // What we accept, the safetensors crate accepts and reads as we do.
    let theirs = SafeTensors::deserialize(data).expect("accepted by us alone");
    for tensor in &tensors {
        let view = theirs.tensor(&tensor.name).expect("known by us alone");
        let start = usize::try_from(tensor.offset).unwrap();
        let end = start + usize::try_from(tensor.nbytes).unwrap();
        assert_eq!(view.data(), &values[start..end]);
    }
}

/// The JSON of a safetensors header, whatever data follows: fuzzers get past the length field.
pub fn header(data: &[u8]) {
    for data_bytes in [0, 4, 24] {
        if let Ok((_, tensors)) = header::parse(Path::new("f"), data, data_bytes) {
            assert!(tensors.iter().all(|tensor| tensor.offset + tensor.nbytes <= data_bytes));
            assert!(tensors.iter().all(|tensor| tensor.shape.len() <= header::MAX_RANK));
        }
    }
}

/// An index.
pub fn index(data: &[u8]) {
    if let Ok(index) = index::parse(Path::new("folder/f"), data) {
        for (name, path) in index.files(Path::new("folder")) {
            assert_eq!(path.parent(), Some(Path::new("folder")), "{name:?} leaves the folder");
        }
    }
}

/// A manifest.
pub fn manifest(data: &[u8]) {
    let _ = Manifest::self_hash_holds(data);
    if let Ok(manifest) = Manifest::from_bytes(Path::new("f"), data) {
        let mut text = Vec::new();
        manifest.write(&mut text).expect("writing to a Vec cannot fail");
        assert!(Manifest::self_hash_holds(&text));
        let again = Manifest::from_bytes(Path::new("f"), &text).expect("what we write we read");
        assert_eq!(again.tensors, manifest.tensors);
    }
}

/// A journal.
pub fn journal(data: &[u8]) {
    if let Ok((header, _, whole)) = journal::parse(Path::new("f"), data) {
        assert!(whole <= data.len());
        assert_eq!(header.difference(&header), None);
    }
}

/// The npy header and the parts of any shape: rank, dtype, part and dimensions from the bytes.
pub fn npy_header(data: &[u8]) {
    let [dtype, part, dims @ ..] = data else { return };
    let dtype = dtype::DTYPES[usize::from(*dtype) % dtype::DTYPES.len()].dtype;
    let shape: Vec<u64> =
        dims.chunks(2).take(header::MAX_RANK).map(|d| d.iter().fold(0, |n, &b| n << 8 | u64::from(b))).collect();
    let Some(nbytes) = dtype::checked_nbytes(dtype, &shape) else { return };
    let part_bytes = nbytes / (u64::from(*part) + 1);
    let tensor = Tensor { name: "", dtype, shape: &shape, nbytes };
    let Some(part_shape) = npy::part_shape(&tensor, part_bytes) else { return };
    let stored = if dtype::is_sub_byte(dtype) { vec![nbytes] } else { shape.clone() };
    assert_eq!(part_shape.get(1..), stored.get(1..), "only axis 0 is split");
    let header = npy::header(dtype, &part_shape);
    assert_eq!(header.len() % npy::DATA_ALIGNMENT, 0);
    assert!(header.starts_with(b"\x93NUMPY\x01\x00") && header.ends_with(b"\n"));
}

/// The bytes of a msgpack file.
pub fn msgpack_file(data: &[u8]) {
    arrays_lie_within(FileFormat::Msgpack, data);
}

/// The bytes of a pickle.
pub fn pickle_file(data: &[u8]) {
    arrays_lie_within(FileFormat::Pickle, data);
}

fn arrays_lie_within(format: FileFormat, data: &[u8]) {
    let Ok(table) = format.parse(Path::new("f"), data) else { return };
    for NamedArray { name, array } in table.arrays {
        let nbytes: u64 = array.parts.iter().map(|part| part.1).sum();
        assert_eq!(dtype::checked_nbytes(array.dtype, &array.shape), Some(nbytes), "{name}");
        for (offset, nbytes) in array.parts {
            assert!(offset + nbytes <= data.len() as u64, "{name} ends behind the file");
        }
    }
}
