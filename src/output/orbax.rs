//! orbax: a checkpoint of the nested tree in uncompressed zarr arrays, which orbax-checkpoint restores, sharded or not.
//!
//! Written in its plain layout (`use_ocdbt=False`, `use_zarr3=False`) with a folder to an array and chunks of whole rows,
//! so that a device reads little more than its own rows and a conversion goes on where it was stopped.

use std::collections::{BTreeSet, HashSet};

use safetensors::Dtype;
use serde::Serialize;

use super::{
    FileBuilder, FileLayout, Layout, Member, PlacedFile, Placement, Tensor, check_parts, step_rows, stored_shape,
    unfit, warn_of_large_row,
};
use crate::dtype;
use crate::error::Result;
use crate::file;
use crate::journal::JOURNAL_NAME;
use crate::manifest::MANIFEST_NAME;
use crate::ordered_map::OrderedMap;

/// Largest chunk, unless a row is larger: what a device reads at least.
const MAX_CHUNK_BYTES: u64 = 1 << 28;

/// The file beside the chunks of an array that describes it.
const ARRAY_NAME: &str = ".zarray";

/// Longest name of a folder that every system takes.
const MAX_NAME_BYTES: usize = 200;

/// orbax.
#[derive(Debug, Clone, Copy)]
pub struct Orbax;

impl Layout for Orbax {
    fn place(&self, tensors: &[Tensor<'_>], unit_bytes: &dyn Fn(usize) -> u64, shard_bytes: u64) -> Result<Placement> {
        check_names(tensors)?;
        let limit = shard_bytes.min(MAX_CHUNK_BYTES);
        let mut placement = Placement::default();
        for (index, tensor) in tensors.iter().enumerate() {
            let shape = stored_shape(tensor);
            if tensor.nbytes == 0 {
                return Err(unfit(
                    tensor,
                    &format!("shape {:?}", tensor.shape),
                    "at least one element, for orbax has no arrays without",
                ));
            }
            let rows = shape.first().copied().unwrap_or(1);
            let row_bytes = tensor.nbytes / rows;
            let step_rows = step_rows(tensor.nbytes, rows, unit_bytes(index));
            // As few chunks as the limit allows, as even as they can be.
            let chunks = rows.div_ceil((limit / (row_bytes * step_rows)).max(1) * step_rows);
            check_parts(tensor, limit, chunks)?;
            let chunk_rows = rows.div_ceil(chunks).next_multiple_of(step_rows);
            if chunk_rows * row_bytes > shard_bytes {
                placement.warnings.push(warn_of_large_row(tensor, chunk_rows * row_bytes, shard_bytes));
            }
            let first = placement.files.len();
            for chunk in 0..rows.div_ceil(chunk_rows) {
                let end = ((chunk + 1) * chunk_rows).min(rows);
                let mut path = format!("{}/{chunk}", tensor.name);
                path.push_str(&".0".repeat(shape.len().saturating_sub(1)));
                let data = chunk * chunk_rows * row_bytes..end * row_bytes;
                placement.files.push(PlacedFile { path, tensors: index..index + 1, data });
            }
            placement.shards.push((tensor.name.to_owned(), first..placement.files.len()));
        }
        Ok(placement)
    }

    fn file(&self, members: &[Member<'_>], _: &OrderedMap<String>) -> Result<FileLayout, String> {
        let [Member { tensor, data, part_bytes }] = members else {
            return Err(format!("{} tensors, where a chunk has one", members.len()));
        };
        let rows = stored_shape(tensor).first().copied().unwrap_or(1);
        let row_bytes = tensor.nbytes.checked_div(rows).unwrap_or(0);
        let is_chunk = row_bytes > 0
            && *part_bytes > 0
            && data.start < tensor.nbytes
            && part_bytes.is_multiple_of(row_bytes)
            && data.start.is_multiple_of(*part_bytes)
            && data.end == data.start.saturating_add(*part_bytes).min(tensor.nbytes);
        if !is_chunk {
            return Err(format!("bytes {data:?} of tensor {:?}, no chunk of whole rows", tensor.name));
        }
        let mut file = FileBuilder::default();
        file.data(0, data.clone());
        // Chunks are all of one size.
        file.zeros(part_bytes - (data.end - data.start));
        Ok(file.finish())
    }

    fn side_files(&self, tensors: &[Tensor<'_>], files: &[PlacedFile]) -> Vec<(String, Vec<u8>)> {
        let firsts = files.iter().filter(|file| file.data.start == 0);
        let arrays = firsts.map(|file| {
            let tensor = &tensors[file.tensors.start];
            (format!("{}/{ARRAY_NAME}", tensor.name), to_json(&ZarrArray::new(tensor, file.data.end)))
        });
        let tree = PyTree {
            tree_metadata: OrderedMap(
                tensors.iter().map(|tensor| (key_path(tensor.name), Leaf::new(tensor.name))).collect(),
            ),
            use_ocdbt: false,
            use_zarr3: false,
            store_array_data_equal_to_fill_value: true,
            custom_metadata: None,
        };
        let step = serde_json::json!({
            "item_handlers": "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler",
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": null,
            "commit_timestamp_nsecs": null,
            "custom_metadata": {},
        });
        let of_tree = [("_METADATA".into(), to_json(&tree)), ("_CHECKPOINT_METADATA".into(), to_json(&step))];
        arrays.chain(of_tree).collect()
    }
}

/// Whether a file in an array's folder bears a name that this format gives.
pub(crate) fn is_file_of_array(name: &str) -> bool {
    name == ARRAY_NAME
        || name.split('.').all(|index| !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit()))
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("names and numbers serialize")
}

/// The description of an array beside its chunks.
#[derive(Serialize)]
struct ZarrArray {
    chunks: Vec<u64>,
    compressor: Option<()>,
    dimension_separator: &'static str,
    dtype: &'static str,
    fill_value: Option<()>,
    filters: Option<()>,
    order: &'static str,
    shape: Vec<u64>,
    zarr_format: u8,
}

impl ZarrArray {
    fn new(tensor: &Tensor<'_>, part_bytes: u64) -> Self {
        let shape = stored_shape(tensor);
        let mut chunks = shape.clone();
        if let Some(rows) = chunks.first_mut() {
            *rows = part_bytes / (tensor.nbytes / *rows);
        }
        Self {
            chunks,
            compressor: None,
            dimension_separator: ".",
            dtype: zarr_dtype(tensor.dtype),
            fill_value: None,
            filters: None,
            order: "C",
            shape,
            zarr_format: 2,
        }
    }
}

/// The name of a dtype in zarr as tensorstore extends it; bytes for what it does not have.
fn zarr_dtype(dtype: Dtype) -> &'static str {
    let row = dtype::info(dtype).expect("tensors have dtypes of the table");
    match dtype {
        Dtype::BF16 | Dtype::F8_E5M2 | Dtype::F8_E4M3 | Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ => row.name,
        _ => row.npy_descr,
    }
}

/// What orbax wants to know of the tree.
#[derive(Serialize)]
struct PyTree<'a> {
    tree_metadata: OrderedMap<Leaf<'a>>,
    use_ocdbt: bool,
    use_zarr3: bool,
    store_array_data_equal_to_fill_value: bool,
    custom_metadata: Option<()>,
}

#[derive(Serialize)]
struct Leaf<'a> {
    key_metadata: Vec<Key<'a>>,
    value_metadata: Value,
}

#[derive(Serialize)]
struct Key<'a> {
    key: &'a str,
    /// 2 is a key of a dict.
    key_type: u8,
}

#[derive(Serialize)]
struct Value {
    value_type: &'static str,
    skip_deserialize: bool,
}

impl<'a> Leaf<'a> {
    fn new(name: &'a str) -> Self {
        let key_metadata = name.split('.').map(|key| Key { key, key_type: 2 }).collect();
        Self { key_metadata, value_metadata: Value { value_type: "np.ndarray", skip_deserialize: false } }
    }
}

/// A path of keys as Python writes a tuple of them. Names with quotes and backslashes are refused.
fn key_path(name: &str) -> String {
    let keys: Vec<_> = name.split('.').map(|key| format!("'{key}'")).collect();
    match keys.as_slice() {
        [key] => format!("({key},)"),
        keys => format!("({})", keys.join(", ")),
    }
}

/// Refuses names that orbax cannot have: it makes folders of them, and a tree.
fn check_names(tensors: &[Tensor<'_>]) -> Result<()> {
    let mut lower = HashSet::new();
    let names: BTreeSet<&str> = tensors.iter().map(|tensor| tensor.name).collect();
    for tensor in tensors {
        let name = tensor.name;
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-+=@".contains(&byte);
        let has_keys = name.split('.').all(|key| !key.is_empty() && key.bytes().all(is_plain));
        if is_own(name) {
            return Err(unfit(tensor, "its name", "another one, for a file of the checkpoint may have this one"));
        }
        if !has_keys || name.len() > MAX_NAME_BYTES {
            let expected =
                "names for folders: keys of letters, digits, `_`, `-`, `+`, `=` and `@` with dots between them";
            return Err(unfit(tensor, "its name", expected));
        }
        if !lower.insert(name.to_ascii_lowercase()) {
            return Err(unfit(
                tensor,
                "a name that differs from another by case alone",
                "folders that no system mixes up",
            ));
        }
        // Those that begin with `name.` follow it closely, behind such as `name-2`.
        let inner = format!("{name}.");
        if names.range(inner.as_str()..).next().is_some_and(|next| next.starts_with(&inner)) {
            return Err(unfit(
                tensor,
                &format!("a tensor beside others in {inner:?}"),
                "a tree whose leaves hold no leaves",
            ));
        }
    }
    Ok(())
}

/// Names of other files in a checkpoint: ours, and those that orbax looks for and that say of what kind it is.
const OWN_NAMES: [&str; 9] = [
    MANIFEST_NAME,
    JOURNAL_NAME,
    file::LOCK_NAME,
    "_METADATA",
    "_CHECKPOINT_METADATA",
    "_sharding",
    "array_metadatas",
    "checkpoint",
    "manifest.ocdbt",
];

/// Whether a name is that of another file of the tree, or of one that is still being written.
fn is_own(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name.ends_with(file::TEMPORARY_SUFFIX) || OWN_NAMES.iter().any(|own| own.eq_ignore_ascii_case(&name))
}
