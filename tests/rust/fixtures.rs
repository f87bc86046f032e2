//! What the areas share: checkpoints made with the safetensors crate, and folders as maps of bytes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tensorport::Checkpoint;
use tensorport::checkpoint::TensorSpec;
use tensorport::convert::{ConversionReport, Mode};
use tensorport::manifest::{Manifest, TensorInfo};
use tensorport::options::{Mxfp4Mode, Options, Precision};
use tensorport::progress;
use tensorport::verify::VerificationReport;
use tensorport::work::Resources;

/// One tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

impl Tensor {
    /// A tensor whose bytes follow from its name.
    pub fn new(name: &str, dtype: Dtype, shape: &[usize]) -> Self {
        let bits = shape.iter().product::<usize>() * dtype.bitsize();
        assert!(bits.is_multiple_of(8), "whole bytes");
        let seed = name.bytes().fold(7, |seed, byte| seed * 31 % 1_000_003 + u64::from(byte));
        let mut data = pseudo_random(bits / 8, seed);
        if dtype == Dtype::BOOL {
            for byte in &mut data {
                *byte &= 1;
            }
        }
        Self { name: name.into(), dtype, shape: shape.to_vec(), data }
    }

    /// A float32 tensor of these values.
    pub fn f32(name: &str, shape: &[usize], values: impl IntoIterator<Item = f32>) -> Self {
        let data: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        assert_eq!(data.len(), 4 * shape.iter().product::<usize>());
        Self { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec(), data }
    }
}

/// Bytes that look random and are always the same: splitmix64.
pub fn pseudo_random(nbytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)).to_le_bytes()
    };
    let mut bytes: Vec<u8> = (0..nbytes.div_ceil(8)).flat_map(|_| next()).collect();
    bytes.truncate(nbytes);
    bytes
}

/// The bytes of a safetensors file, as the safetensors crate writes them.
pub fn serialize(tensors: &[Tensor]) -> Vec<u8> {
    let views = tensors.iter().map(|tensor| {
        (tensor.name.as_str(), TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.data).unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

/// Writes a safetensors file.
pub fn write(path: &Path, tensors: &[Tensor]) {
    fs::write(path, serialize(tensors)).unwrap();
}

/// Values from -8 to 8 that every float dtype holds without overflow.
fn ordinary(count: u16) -> impl Iterator<Item = f32> {
    (0..count).map(|i| (f32::from(i % 4001) - 2000.0) / 250.0)
}

/// Every kind of tensor at once: pairs across files, packed, empty, scalar and split tensors, hostile names.
pub fn model_tensors() -> [Vec<Tensor>; 2] {
    let doubles: Vec<u8> = ordinary(51).flat_map(|value| (f64::from(value) * 1.1).to_le_bytes()).collect();
    let halves: Vec<u8> = ordinary(4200).flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect();
    // Scale bytes around one, so that the decoded values fit every target.
    let scales: Vec<u8> = (0..30).map(|i| 120 + i % 11).collect();
    [
        vec![
            Tensor::f32("model.embed.weight", &[130, 401], ordinary(52130)),
            Tensor { name: "model.norm".into(), dtype: Dtype::F64, shape: vec![3, 17], data: doubles },
            Tensor { name: "experts.down_scales".into(), dtype: Dtype::U8, shape: vec![3, 5, 2], data: scales },
            Tensor::new("model.position", Dtype::I64, &[]),
            Tensor::new("../../escape", Dtype::BOOL, &[11]),
        ],
        vec![
            Tensor { name: "model.head".into(), dtype: Dtype::BF16, shape: vec![7, 600], data: halves },
            Tensor::new("experts.down_blocks", Dtype::U8, &[3, 5, 2, 16]),
            Tensor::new("packed.f4", Dtype::F4, &[6, 10]),
            Tensor::new("packed.f6", Dtype::F6_E2M3, &[4, 3]),
            Tensor::new("scale.f8", Dtype::F8_E8M0, &[13]),
            Tensor::f32("empty", &[0, 9], []),
        ],
    ]
}

/// Names of the two files of [`write_model`].
pub const MODEL_FILES: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// A whole model folder: two shard files, their index, a configuration and other side files.
pub fn write_model(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let mut weight_map = serde_json::Map::new();
    for (file, tensors) in MODEL_FILES.iter().zip(model_tensors()) {
        write(&folder.join(file), &tensors);
        weight_map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), (*file).into())));
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let config =
        r#"{"model_type": "tiny", "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}"#;
    fs::write(folder.join("config.json"), config).unwrap();
    fs::write(folder.join("tokenizer.json"), r#"{ "version" : "1.0" }"#).unwrap();
    fs::write(folder.join("LICENSE"), "free\n").unwrap();
    fs::write(folder.join("pytorch_model.bin"), "not copied").unwrap();
}

/// Every file below a folder, by its path with `/`.
pub fn read_tree(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder)).unwrap() {
            let entry = entry.unwrap();
            let relative = folder.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                folders.push(relative);
            } else {
                let name = relative.to_str().unwrap().replace('\\', "/");
                files.insert(name, fs::read(entry.path()).unwrap());
            }
        }
    }
    files
}

/// Writes what [`read_tree`] read.
pub fn write_tree(root: &Path, files: &BTreeMap<String, Vec<u8>>) {
    for (name, bytes) in files {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

/// Compares two trees by name first: a whole tree in a failure message helps nobody.
pub fn assert_same_tree(left: &BTreeMap<String, Vec<u8>>, right: &BTreeMap<String, Vec<u8>>) {
    let names = |tree: &BTreeMap<String, Vec<u8>>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(left), names(right));
    for (name, bytes) in left {
        assert!(bytes == &right[name], "{name} differs");
    }
}

/// Shards of 100 kB, so that the largest tensor of the model is split.
pub fn small_shards() -> Options {
    Options { shard_size: 100e3 / 1e9, ..Options::default() }
}

/// `workers` threads with the least memory that they can work with.
pub fn tight(workers: usize) -> Resources {
    Resources { workers, max_memory: (128 << 10) * workers as u64 }
}

/// Converts with two workers, without a verification pass.
pub fn convert(source: &Path, output: &Path, options: &Options) -> tensorport::Result<ConversionReport> {
    convert_as(source, output, options, Mode::default())
}

/// Converts with two workers in a mode.
pub fn convert_as(source: &Path, output: &Path, options: &Options, mode: Mode) -> tensorport::Result<ConversionReport> {
    tensorport::convert(source, output, options, mode, tight(2), &mut progress::ignore)
}

/// Verifies with two workers.
pub fn verify(output: &Path, source: Option<&Path>) -> tensorport::Result<VerificationReport> {
    tensorport::verify(output, source, tight(2), &mut progress::ignore)
}

/// What a checkpoint says of a tensor that stands nowhere: enough for a plan.
pub fn spec(name: &str, dtype: Dtype, shape: &[u64]) -> TensorSpec {
    let nbytes = tensorport::dtype::checked_nbytes(dtype, shape).unwrap();
    TensorSpec { name: name.into(), dtype, shape: shape.to_vec(), nbytes, parts: Vec::new() }
}

/// A temporary folder with the model in `model`; `out` does not exist yet.
pub struct Place {
    pub folder: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_model(&folder.path().join("model"));
        Self { folder }
    }
    pub fn model(&self) -> PathBuf {
        self.folder.path().join("model")
    }
    pub fn out(&self) -> PathBuf {
        self.folder.path().join("out")
    }
    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Everything decoded and cast to float32, in small shards.
pub fn float32() -> Options {
    Options { precision: Precision::Float32, mxfp4: Mxfp4Mode::Dequantize, ..small_shards() }
}

/// The data of every tensor of a checkpoint, its parts joined.
pub fn contents(source: &Path) -> BTreeMap<String, (Dtype, Vec<u64>, Vec<u8>)> {
    let checkpoint = Checkpoint::open(source).unwrap();
    let tensors = checkpoint.tensors().iter().map(|tensor| {
        let data = checkpoint.view(tensor).unwrap().iter().flat_map(|view| view.bytes().to_vec()).collect();
        (tensor.name.clone(), (tensor.dtype, tensor.shape.clone(), data))
    });
    tensors.collect()
}

/// The mode that also reads everything again.
pub const VERIFY: Mode = Mode { resume: false, overwrite: false, verify: true };

/// Whether the name of a file has this extension, as our own files spell it.
pub fn is_a(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|found| found == extension)
}

/// The manifest of a tree.
pub fn read_manifest(tree: &Path) -> Manifest {
    let path = tree.join("manifest.json");
    Manifest::from_bytes(&path, &fs::read(&path).unwrap()).unwrap()
}

/// A tensor of a manifest.
pub fn tensor_info<'a>(manifest: &'a Manifest, name: &str) -> &'a TensorInfo {
    &manifest.tensors.0.iter().find(|(found, _)| found == name).unwrap().1
}
