//! Headers: whatever the safetensors crate writes opens, nothing panics, and nothing opens that it would refuse.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};
use tensorport::dtype::DTYPES;
use tensorport::header;
use tensorport::{Checkpoint, Error};

use crate::fixtures::{Tensor, serialize};

/// One to nine tensors of any dtype and of rank 0 to 4, empty ones included.
fn any_tensors() -> impl Strategy<Value = Vec<Tensor>> {
    let name = prop_oneof![3 => "[a-z.0-9_]{0,12}", 1 => any::<String>()];
    let shape = prop_oneof![9 => vec(1usize..6, 0..5), 1 => vec(0usize..3, 1..4)];
    btree_map(name, (0..DTYPES.len(), shape), 1..10).prop_map(|tensors| {
        let named = |(name, (row, mut shape)): (String, (usize, Vec<usize>))| {
            let dtype: Dtype = DTYPES[row].dtype;
            // Four elements fill whole bytes in every dtype.
            if tensorport::dtype::is_sub_byte(dtype) {
                shape.push(4);
            }
            Tensor::new(&name, dtype, &shape)
        };
        tensors.into_iter().filter(|(name, _)| name != "__metadata__").map(named).collect()
    })
}

/// A change to the bytes of a file.
#[derive(Debug, Clone)]
enum Mutation {
    Flip(prop::sample::Index, u8),
    Replace(prop::sample::Index, u8),
    Remove(prop::sample::Index, usize),
    Insert(prop::sample::Index, Vec<u8>),
    Truncate(prop::sample::Index),
    Extend(Vec<u8>),
}

fn any_mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<prop::sample::Index>;
    // Bytes that mean something in a header come more often than chance would have them.
    let byte = || prop_oneof![any::<u8>(), prop::sample::select(b"0123456789[]{},:\" \\.-eFUI".to_vec())];
    prop_oneof![
        (at(), 0u8..8).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        (at(), byte()).prop_map(|(at, byte)| Mutation::Replace(at, byte)),
        (at(), 1usize..9).prop_map(|(at, count)| Mutation::Remove(at, count)),
        (at(), vec(byte(), 1..9)).prop_map(|(at, bytes)| Mutation::Insert(at, bytes)),
        at().prop_map(Mutation::Truncate),
        vec(any::<u8>(), 1..40).prop_map(Mutation::Extend),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    if bytes.is_empty() {
        return;
    }
    match mutation {
        Mutation::Flip(at, bit) => *at.get_mut(bytes) ^= 1 << bit,
        Mutation::Replace(at, byte) => *at.get_mut(bytes) = *byte,
        Mutation::Remove(at, count) => {
            let start = at.index(bytes.len());
            bytes.drain(start..(start + count).min(bytes.len()));
        }
        Mutation::Insert(at, more) => {
            let start = at.index(bytes.len());
            bytes.splice(start..start, more.iter().copied());
        }
        Mutation::Truncate(at) => bytes.truncate(at.index(bytes.len())),
        Mutation::Extend(more) => bytes.extend(more),
    }
}

fn opened(bytes: &[u8]) -> (tempfile::TempDir, PathBuf, tensorport::Result<Checkpoint>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    fs::write(&path, bytes).unwrap();
    let checkpoint = Checkpoint::open(&path);
    (folder, path, checkpoint)
}

/// What opens here has to open in the safetensors crate, with the same tensors.
fn check_against_safetensors(bytes: &[u8]) -> Result<(), TestCaseError> {
    let (_folder, _, checkpoint) = opened(bytes);
    match checkpoint {
        Ok(checkpoint) => {
            let theirs = SafeTensors::deserialize(bytes);
            prop_assert!(theirs.is_ok(), "safetensors refuses what was accepted: {:?}", theirs.err());
            let theirs = theirs.unwrap();
            prop_assert_eq!(checkpoint.tensors().len(), theirs.len());
            for tensor in checkpoint.tensors() {
                let view = theirs.tensor(&tensor.name).unwrap();
                let shape: Vec<_> = tensor.shape.iter().map(|&dim| usize::try_from(dim).unwrap()).collect();
                prop_assert_eq!((tensor.dtype, &shape[..]), (view.dtype(), view.shape()));
                let views = checkpoint.view(tensor).unwrap();
                prop_assert_eq!(views[0].bytes(), view.data());
            }
        }
        Err(error) => {
            prop_assert!(matches!(error, Error::MalformedFile { .. } | Error::MalformedTensor { .. }), "{error:?}");
            prop_assert!(error.to_string().contains("m.safetensors"));
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn valid_tables_of_all_dtypes_open_as_they_were_written(tensors in any_tensors()) {
        let (_folder, _, checkpoint) = opened(&serialize(&tensors));
        let checkpoint = checkpoint.unwrap();
        prop_assert_eq!(checkpoint.tensors().len(), tensors.len());
        for tensor in &tensors {
            let spec = checkpoint.get(&tensor.name).unwrap();
            let shape: Vec<_> = tensor.shape.iter().map(|&dim| dim as u64).collect();
            prop_assert_eq!((spec.dtype, &spec.shape, spec.nbytes), (tensor.dtype, &shape, tensor.data.len() as u64));
            let views = checkpoint.view(spec).unwrap();
            prop_assert_eq!(views[0].bytes(), &tensor.data[..]);
        }
    }

    #[test]
    fn arbitrary_bytes_are_refused_or_agree_with_safetensors(bytes in vec(any::<u8>(), 0..200)) {
        check_against_safetensors(&bytes)?;
    }

    #[test]
    fn arbitrary_header_text_is_refused_or_agrees_with_safetensors(text in r#"\{[\[\]{}",:a0-9.eE\\u\-]{0,60}\}?"#) {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.bytes());
        check_against_safetensors(&bytes)?;
        // The same header before any amount of data never panics.
        for data_bytes in [0, 1, u64::MAX / 2, u64::MAX] {
            let _ = header::parse(Path::new("m.safetensors"), text.as_bytes(), data_bytes);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_files_are_refused_or_agree_with_safetensors(
        tensors in any_tensors(),
        mutations in vec(any_mutation(), 1..4),
        in_header in any::<bool>(),
    ) {
        let mut bytes = serialize(&tensors);
        let header_end = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
        if in_header {
            // Only the header's text, its length corrected: otherwise nearly every change ends at the length.
            let mut text = bytes[8..header_end].to_vec();
            for mutation in &mutations {
                mutate(&mut text, mutation);
            }
            let data = bytes.split_off(header_end);
            bytes = (text.len() as u64).to_le_bytes().to_vec();
            bytes.extend(text);
            bytes.extend(data);
        } else {
            for mutation in &mutations {
                mutate(&mut bytes, mutation);
            }
        }
        check_against_safetensors(&bytes)?;
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = serialize(&[Tensor::new("a.b", Dtype::F32, &[2, 3]), Tensor::new("c", Dtype::U8, &[5])]);
    for length in 0..bytes.len() {
        let (_folder, path, checkpoint) = opened(&bytes[..length]);
        let message = checkpoint.unwrap_err().to_string();
        assert!(message.starts_with(&path.display().to_string()), "{message}");
    }
    opened(&bytes).2.unwrap();
}

#[test]
fn rank_64_is_the_largest_accepted() {
    let header = |rank: usize| {
        let shape = vec!["1"; rank].join(",");
        format!(r#"{{"a":{{"dtype":"U8","shape":[{shape}],"data_offsets":[0,1]}}}}"#)
    };
    let parse = |rank| header::parse(Path::new("m.safetensors"), header(rank).as_bytes(), 1);
    assert_eq!(parse(64).unwrap().1[0].shape.len(), 64);
    assert!(parse(65).unwrap_err().to_string().contains("64"));
}

#[test]
fn a_huge_shape_of_whole_bytes_is_not_called_a_fraction_of_a_byte() {
    for (dtype, dim) in [("U8", 1u64 << 61), ("F32", 1 << 60), ("F4", 1 << 62)] {
        let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":[{dim}],"data_offsets":[0,8]}}}}"#);
        let message = header::parse(Path::new("m.safetensors"), header.as_bytes(), 8).unwrap_err().to_string();
        assert!(!message.contains("whole number of bytes"), "{dtype} [{dim}]: {message}");
    }
}

#[test]
fn a_null_metadata_is_no_metadata() {
    let (metadata, tensors) = header::parse(Path::new("m.safetensors"), br#"{"__metadata__":null}"#, 0).unwrap();
    assert!(metadata.0.is_empty() && tensors.is_empty());
}
