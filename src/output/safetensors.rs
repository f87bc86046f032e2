//! safetensors, with an index: data aligned to 64 bytes, so that every reader that maps a file can alias it.
//!
//! The format has no room between tensors, so those whose size is a multiple of 64 come first and the others after them,
//! the widest dtypes first; what follows an odd size is not aligned.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{FileBuilder, FileLayout, Layout, Member, PlacedFile, Placement, Tensor, fill_files, refuse_name};
use crate::dtype;
use crate::error::Result;
use crate::header::{MAX_HEADER_BYTES, METADATA_KEY};
use crate::ordered_map::OrderedMap;

/// Data of every file begins at a multiple of this.
const ALIGNMENT: usize = 64;

/// The index's name, which every reader of sharded checkpoints knows.
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// safetensors.
#[derive(Debug, Clone, Copy)]
pub struct Safetensors;

/// A tensor in a header.
#[derive(Serialize)]
struct Entry<'a> {
    dtype: &'a str,
    shape: &'a [u64],
    data_offsets: (u64, u64),
}

impl Layout for Safetensors {
    fn place(&self, tensors: &[Tensor<'_>], _: &dyn Fn(usize) -> u64, shard_bytes: u64) -> Result<Placement> {
        refuse_name(tensors, METADATA_KEY, "the metadata")?;
        let mut placement = fill_files(tensors, shard_bytes, |_| String::new());
        let count = placement.files.len();
        let names = (1..=count).map(|number| format!("model-{number:05}-of-{count:05}.safetensors"));
        for ((file, shard), name) in placement.files.iter_mut().zip(&mut placement.shards).zip(names) {
            file.path.clone_from(&name);
            shard.0 = name;
        }
        Ok(placement)
    }

    fn file(&self, members: &[Member<'_>], metadata: &OrderedMap<String>) -> Result<FileLayout, String> {
        let mut order: Vec<usize> = (0..members.len()).collect();
        order.sort_by_key(|&index| {
            let tensor = &members[index].tensor;
            (!tensor.nbytes.is_multiple_of(ALIGNMENT as u64), std::cmp::Reverse(tensor.dtype.bitsize()))
        });
        let mut entries: OrderedMap<Entry<'_>> = OrderedMap::default();
        let mut starts = vec![0; members.len()];
        let mut end = 0u64;
        for &index in &order {
            let Member { tensor, data, .. } = &members[index];
            if *data != (0..tensor.nbytes) {
                return Err(format!("a part of tensor {:?}, where safetensors has whole ones", tensor.name));
            }
            starts[index] = end;
            end = end.checked_add(tensor.nbytes).ok_or("more than 2^64 bytes")?;
            let dtype = dtype::info(tensor.dtype).map_or("", |row| row.tag);
            let data_offsets = (starts[index], end);
            entries.0.push((tensor.name.to_owned(), Entry { dtype, shape: tensor.shape, data_offsets }));
        }
        let mut file = FileBuilder::default();
        file.bytes(&header(&entries, metadata)?);
        // Extents in the order of the members, which is not that of the data.
        let begin = file.nbytes;
        for (index, (member, start)) in members.iter().zip(starts).enumerate() {
            file.nbytes = begin + start;
            file.data(index, member.data.clone());
        }
        file.nbytes = begin + end;
        Ok(file.finish())
    }

    fn side_files(&self, tensors: &[Tensor<'_>], files: &[PlacedFile]) -> Vec<(String, Vec<u8>)> {
        #[derive(Serialize)]
        struct Index<'a> {
            metadata: Totals,
            weight_map: BTreeMap<&'a str, &'a str>,
        }
        #[derive(Serialize)]
        struct Totals {
            total_size: u64,
        }
        let files_of = files.iter().flat_map(|file| file.tensors.clone().map(|index| (index, file.path.as_str())));
        let index = Index {
            metadata: Totals { total_size: tensors.iter().map(|tensor| tensor.nbytes).sum() },
            weight_map: files_of.map(|(index, path)| (tensors[index].name, path)).collect(),
        };
        let mut text = serde_json::to_vec_pretty(&index).expect("names and numbers serialize");
        text.push(b'\n');
        vec![(INDEX_NAME.into(), text)]
    }
}

/// The length and the text, padded with spaces so that data is aligned.
fn header(entries: &OrderedMap<Entry<'_>>, metadata: &OrderedMap<String>) -> Result<Vec<u8>, String> {
    let mut header = vec![0; 8];
    header.push(b'{');
    if !metadata.0.is_empty() {
        serde_json::to_writer(&mut header, METADATA_KEY).expect("writing to a Vec cannot fail");
        header.push(b':');
        serde_json::to_writer(&mut header, metadata).expect("writing to a Vec cannot fail");
    }
    for (name, entry) in &entries.0 {
        if header.len() > 9 {
            header.push(b',');
        }
        serde_json::to_writer(&mut header, name).expect("writing to a Vec cannot fail");
        header.push(b':');
        serde_json::to_writer(&mut header, entry).expect("writing to a Vec cannot fail");
    }
    header.push(b'}');
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
    let length = header.len() as u64 - 8;
    if length > MAX_HEADER_BYTES {
        return Err(format!("a safetensors header of {length} bytes, of which readers take {MAX_HEADER_BYTES}"));
    }
    header[..8].copy_from_slice(&length.to_le_bytes());
    Ok(header)
}
