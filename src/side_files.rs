//! The files beside the tensors: config, tokenizer, chat template, licence; copied, and corrected where they would lie.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;
use serde_json::value::RawValue;
use xxhash_rust::xxh3::Xxh3;

use crate::checkpoint::{Checkpoint, Kind};
use crate::checksum::Checksum;
use crate::error::{Error, Result};
use crate::file;
use crate::journal::JOURNAL_NAME;
use crate::manifest::{self, MANIFEST_NAME, SideFileInfo, SideFileOrigin};
use crate::model_config::{self, CONFIG_NAME, QUANTIZATION_KEY};
use crate::mxfp4;
use crate::options::Options;
use crate::ordered_map::OrderedMap;
use crate::plan::{self, Plan};
use crate::transform::Transform;

/// Names of our own that a source's file may not take.
const OWN_NAMES: [&str; 3] = [MANIFEST_NAME, JOURNAL_NAME, "load_params.py"];

/// Endings of the files that travel with a checkpoint.
const COPIED_SUFFIXES: [&str; 6] = [".json", ".jinja", ".txt", ".model", ".tiktoken", ".md"];

/// Beginnings of files without an ending that travel with a checkpoint.
const COPIED_PREFIXES: [&str; 3] = ["LICENSE", "NOTICE", "USAGE_POLICY"];

/// Longest name of a copied file: the temporary suffix fits behind it.
const MAX_NAME_BYTES: usize = 240;

/// One file to be written beside the tensors.
#[derive(Debug)]
pub struct SideFile {
    /// Its name in the output folder.
    pub name: String,
    /// Where it comes from.
    pub origin: SideFileOrigin,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Bytes(Vec<u8>),
    File(PathBuf),
}

/// The side files of a conversion, in the order of their names. Reads and corrects what has to be corrected.
pub fn plan(checkpoint: &Checkpoint, plan: &Plan, options: &Options) -> Result<Vec<SideFile>> {
    let generated = plan.side_files().into_iter();
    let generated = generated.map(|(name, bytes)| SideFile {
        name,
        origin: SideFileOrigin::Generated,
        content: Content::Bytes(bytes),
    });
    let mut files: Vec<_> = generated.collect();
    // What lies at the top of the tree keeps its name.
    let generated: HashSet<String> = files.iter().map(|file| top(&file.name).to_ascii_lowercase()).collect();
    let of_tensors: HashMap<String, &str> =
        plan.files.iter().map(|file| top(file.path())).map(|name| (name.to_ascii_lowercase(), name)).collect();
    if checkpoint.kind() != Kind::File {
        let root = checkpoint.root();
        for entry in std::fs::read_dir(root).map_err(|fault| Error::io(root, fault))? {
            let entry = entry.map_err(|fault| Error::io(root, fault))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let path = entry.path();
            if !is_copied(&name) || !std::fs::metadata(&path).is_ok_and(|stat| stat.is_file()) {
                continue;
            }
            let lower = name.to_ascii_lowercase();
            if let Some(tensor) = of_tensors.get(&lower) {
                return Err(Error::Mapping {
                    found: format!(
                        "tensor {tensor:?} beside the file {}, which would have one name in the output",
                        path.display()
                    ),
                    expected: "a tensor with another name, or the file elsewhere".into(),
                });
            }
            if generated.contains(&lower) {
                continue;
            }
            let edited = if name == CONFIG_NAME { corrected_config(&path, plan, options)? } else { None };
            files.push(match edited {
                Some(bytes) => SideFile { name, origin: SideFileOrigin::Edited, content: Content::Bytes(bytes) },
                None => SideFile { name, origin: SideFileOrigin::Copied, content: Content::File(path) },
            });
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

impl SideFile {
    /// Writes the file into `folder`, in bounded memory.
    pub fn write(&self, folder: &Path) -> Result<SideFileInfo> {
        let path = folder.join(&self.name);
        let temporary = file::temporary_path(&path);
        let output = file::create_temporary(&temporary)?;
        let info = self.read(|bytes, offset| file::write_all_at(&temporary, &output, bytes, offset))?;
        file::publish(&output, &temporary, &path)?;
        Ok(info)
    }

    /// What the manifest would say of the file, without writing it.
    pub fn info(&self) -> Result<SideFileInfo> {
        self.read(|_, _| Ok(()))
    }

    fn read(&self, mut take: impl FnMut(&[u8], u64) -> Result<()>) -> Result<SideFileInfo> {
        let mut hasher = Xxh3::new();
        let mut hash_and_take = |bytes: &[u8], offset| {
            hasher.update(bytes);
            take(bytes, offset)
        };
        let nbytes = match &self.content {
            Content::Bytes(bytes) => hash_and_take(bytes, 0).map(|()| bytes.len() as u64)?,
            Content::File(path) => file::read_through(path, hash_and_take)?,
        };
        Ok(SideFileInfo { nbytes, xxh3_128: Checksum(hasher.digest128()), origin: self.origin })
    }
}

/// The name at the top of the tree under which a path lies.
fn top(path: &str) -> &str {
    path.split_once('/').map_or(path, |(folder, _)| folder)
}

fn is_copied(name: &str) -> bool {
    // A name that a manifest could not list, or that leaves no room for a suffix, stays behind.
    name.len() <= MAX_NAME_BYTES
        && manifest::tree_path(Path::new(""), name).is_some()
        && !name.starts_with('.')
        && !name.ends_with(".safetensors.index.json")
        && !OWN_NAMES.iter().any(|own| own.eq_ignore_ascii_case(name))
        && (COPIED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
            || COPIED_PREFIXES.iter().any(|prefix| name.starts_with(prefix) && !name.contains('.')))
}

/// config.json with the quantization that is there and the dtype that is new; None when it still holds.
fn corrected_config(path: &Path, plan: &Plan, options: &Options) -> Result<Option<Vec<u8>>> {
    let is_decode = |transform| matches!(transform, Transform::Dequantize { .. } | Transform::DequantizeFloat8 { .. });
    let is_dequantized = plan.tensors.iter().any(|tensor| is_decode(tensor.transform));
    let is_encoded = plan.tensors.iter().any(|tensor| tensor.transform.encodes_blocks());
    let has_casts = plan.tensors.iter().any(|tensor| matches!(tensor.transform, Transform::Cast { .. }));
    if !is_dequantized && !is_encoded && !has_casts {
        return Ok(None);
    }
    // Raw values: what is not edited stays as it is written, to the last digit.
    let mut config: RawObject =
        serde_json::from_str(&model_config::read(path)?).map_err(|what| model_config::fault(path, what))?;
    if is_dequantized {
        config.0.retain(|(key, _)| key != QUANTIZATION_KEY);
    }
    if is_encoded {
        set_quantization(path, &mut config, plan)?;
    }
    if is_dequantized || has_casts {
        let dtype = match options.precision.target() {
            Some(target) => crate::dtype::name(target.dtype()),
            None => "bfloat16",
        };
        let dtype = raw(&dtype);
        if !correct_dtype(&mut config, &dtype) {
            config.0.push(("dtype".into(), dtype));
        }
    }
    let mut text = serde_json::to_string_pretty(&config).expect("a JSON object serializes");
    text.push('\n');
    Ok(Some(model_config::unquote_constants(&text).into_bytes()))
}

/// A JSON object whose values are kept as they are written.
type RawObject = OrderedMap<Box<RawValue>>;

fn raw(value: &impl Serialize) -> Box<RawValue> {
    serde_json::value::to_raw_value(value).expect("JSON serializes")
}

/// Says that the weights are MXFP4, and which are not, as Hugging Face does.
fn set_quantization(path: &Path, config: &mut RawObject, plan: &Plan) -> Result<()> {
    #[derive(Serialize)]
    struct Quantization {
        quant_method: &'static str,
        modules_to_not_convert: Vec<String>,
    }
    let quantization = Quantization { quant_method: MXFP4, modules_to_not_convert: modules_to_not_convert(plan) };
    let text = serde_json::to_string_pretty(&quantization).expect("strings serialize");
    // Line feeds stand between values alone, and the object stands one level deep.
    let value = RawValue::from_string(text.replace('\n', "\n  ")).expect("JSON");
    match config.0.iter_mut().find(|(key, _)| key == QUANTIZATION_KEY) {
        Some((_, earlier)) => {
            let method = serde_json::from_str::<Value>(earlier.get());
            if !method.is_ok_and(|earlier| earlier.is_null() || earlier["quant_method"] == MXFP4) {
                let expected = "none, or one with \"quant_method\": \"mxfp4\", for one model has one quantization";
                return Err(Error::file(path, format_args!("{QUANTIZATION_KEY} {}", earlier.get()), expected));
            }
            *earlier = value;
        }
        None => config.0.push((QUANTIZATION_KEY.into(), value)),
    }
    Ok(())
}

/// The method that Hugging Face calls MXFP4 pairs by.
const MXFP4: &str = "mxfp4";

/// The modules whose matrices stay floats, in their order. A number in a name becomes `*`, for all layers at once, but not
/// where a matrix that is MXFP4 has a name that begins alike: what reads the list takes its entries for beginnings.
fn modules_to_not_convert(plan: &Plan) -> Vec<String> {
    let outputs: Vec<_> = plan.tensors.iter().map(|tensor| tensor.candidate(Path::new(CONFIG_NAME))).collect();
    let encoded: BTreeSet<String> = mxfp4::pair(&outputs).pairs.iter().map(|pair| any_layer(&pair.name)).collect();
    let begins_one =
        |pattern: &str| encoded.range(pattern.to_owned()..).next().is_some_and(|name| name.starts_with(pattern));
    let mut seen = HashSet::new();
    let kept = plan.tensors.iter().filter(|tensor| plan::is_float_matrix(tensor.dtype, &tensor.shape));
    let modules = kept.map(|tensor| {
        let module = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
        let pattern = any_layer(module);
        if begins_one(&pattern) { module.to_owned() } else { pattern }
    });
    modules.filter(|module| seen.insert(module.clone())).collect()
}

/// A dotted name with `*` for each number between its dots.
fn any_layer(name: &str) -> String {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    name.split('.').map(|part| if is_number(part) { "*" } else { part }).collect::<Vec<_>>().join(".")
}

/// Names the new dtype wherever the configuration, or one of a part of the model in it, names one.
///
/// transformers wrote `torch_dtype` up to 4.55 and `dtype` since; both are read. Returns whether the top level names one.
fn correct_dtype(config: &mut RawObject, dtype: &RawValue) -> bool {
    let mut is_named = false;
    for (key, value) in &mut config.0 {
        if key == "dtype" || key == "torch_dtype" {
            *value = dtype.to_owned();
            is_named = true;
        } else if key.ends_with("_config")
            && let Ok(mut part) = serde_json::from_str::<RawObject>(value.get())
            && correct_dtype(&mut part, dtype)
        {
            *value = raw(&part);
        }
    }
    is_named
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_between_dots_are_layers() {
        assert_eq!(any_layer("model.layers.10.mlp.experts.3.w1"), "model.layers.*.mlp.experts.*.w1");
        for name in ["", ".", "a", "a.b1.2c", "v.١", "-1.+2"] {
            assert_eq!(any_layer(name), name);
        }
    }
}
