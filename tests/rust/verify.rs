//! Verification: whatever happens to a tree, the report names the file.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;
use tensorport::checkpoint::Checkpoint;
use tensorport::manifest::Manifest;
use tensorport::options::{Mxfp4Mode, Options, Precision};
use tensorport::verify::{Failure, VerificationReport};

use crate::fixtures::{
    Tensor, convert, read_manifest, read_tree, small_shards, tensor_info, verify, write, write_model,
};

/// A tree of small files, of which one tensor is split, with a side file.
fn small_tree() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model");
    fs::create_dir(&source).unwrap();
    let tensors = [
        Tensor::new("a.weight", Dtype::F32, &[5, 3]),
        Tensor::new("b", Dtype::U8, &[7]),
        Tensor::new("c", Dtype::I64, &[]),
        Tensor::f32("empty", &[0, 2], []),
    ];
    write(&source.join("m.safetensors"), &tensors);
    fs::write(source.join("config.json"), "{\"a\": 1}").unwrap();
    let output = folder.path().join("out");
    convert(&source, &output, &Options { shard_size: 36e-9, ..Options::default() }).unwrap();
    assert!(verify(&output, Some(&source)).unwrap().ok);
    (folder, output)
}

/// The two files of the tensor that is split.
fn parts(output: &Path) -> Vec<String> {
    let files = tensor_info(&read_manifest(output), "a.weight").files.clone();
    assert_eq!(files.len(), 2);
    files
}

fn names_file(report: &VerificationReport, file: &str) -> bool {
    report.failures.iter().any(|failure| failure.file == file)
}

/// Verifies the tree while one file holds other bytes, or is gone.
fn with_file(output: &Path, name: &str, bytes: Option<&[u8]>) -> VerificationReport {
    let path = output.join(name);
    let original = fs::read(&path).unwrap();
    match bytes {
        Some(bytes) => fs::write(&path, bytes).unwrap(),
        None => fs::remove_file(&path).unwrap(),
    }
    let report = verify(output, None);
    fs::write(&path, original).unwrap();
    report.unwrap_or_else(|fault| panic!("{name}: an error in place of a report: {fault}"))
}

fn assert_found(output: &Path, name: &str, bytes: Option<&[u8]>, what: &str) {
    let report = with_file(output, name, bytes);
    assert!(!report.ok && names_file(&report, name), "{name} {what}: {report}");
    assert!(report.to_string().contains(name), "{report}");
}

#[test]
fn a_flipped_bit_anywhere_is_found() {
    let (_folder, output) = small_tree();
    let parts = parts(&output);
    for (name, bytes) in read_tree(&output) {
        // Some 40 places in each file, the first and the last byte among them.
        let step = (bytes.len() / 40).max(1);
        for (number, at) in (0..bytes.len()).step_by(step).chain([bytes.len() - 1]).enumerate() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (number % 8);
            let report = with_file(&output, &name, Some(&damaged));
            // The values of a split tensor have one hash: which part differs is the next test's matter.
            let is_split = |failure: &Failure| parts.contains(&name) && failure.tensor.as_deref() == Some("a.weight");
            let is_found = names_file(&report, &name) || report.failures.iter().any(is_split);
            assert!(!report.ok && is_found, "{name}, bit {} of byte {at}: {report}", number % 8);
        }
    }
    assert!(verify(&output, None).unwrap().ok);
}

#[test]
fn damage_to_a_part_of_a_split_tensor_names_that_part() {
    let (_folder, output) = small_tree();
    for name in parts(&output) {
        let mut damaged = fs::read(output.join(&name)).unwrap();
        *damaged.last_mut().unwrap() ^= 1;
        assert_found(&output, &name, Some(&damaged), "last bit");
    }
}

#[test]
fn every_bit_of_the_data_counts() {
    let (_folder, output) = small_tree();
    for name in parts(&output) {
        let bytes = fs::read(output.join(&name)).unwrap();
        for bit in 8 * 128..8 * bytes.len() {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let report = with_file(&output, &name, Some(&damaged));
            let is_named = |failure: &Failure| failure.tensor.as_deref() == Some("a.weight");
            assert!(!report.ok && report.failures.iter().any(is_named), "bit {bit} of {name}");
        }
    }
}

#[test]
fn truncated_extended_and_missing_files_are_found() {
    let (_folder, output) = small_tree();
    for (name, bytes) in read_tree(&output) {
        for length in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            assert_found(&output, &name, Some(&bytes[..length]), &format!("cut to {length}"));
        }
        for more in [&b"\0"[..], b"\n", &[7; 64]] {
            assert_found(&output, &name, Some(&[&bytes[..], more].concat()), "extended");
        }
        assert_found(&output, &name, None, "deleted");
    }
}

#[test]
fn swapped_files_are_found_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("m.safetensors");
    write(&source, &[Tensor::new("a", Dtype::U8, &[3, 5]), Tensor::new("b", Dtype::U8, &[3, 5])]);
    let output = folder.path().join("out");
    convert(&source, &output, &Options::default()).unwrap();
    let [a, b, swap] = ["shard_000/a.npy", "shard_000/b.npy", "swap"].map(|name| output.join(name));
    fs::rename(&a, &swap).unwrap();
    fs::rename(&b, &a).unwrap();
    fs::rename(&swap, &b).unwrap();
    let report = verify(&output, None).unwrap();
    assert!(names_file(&report, "shard_000/a.npy") && names_file(&report, "shard_000/b.npy"), "{report}");
}

#[test]
fn a_file_that_the_manifest_does_not_know_is_no_fault_of_the_tree() {
    let (_folder, output) = small_tree();
    fs::copy(output.join(&parts(&output)[0]), output.join("shard_000/extra.npy")).unwrap();
    let report = verify(&output, None).unwrap();
    assert!(report.ok, "{report}");
}

#[test]
fn a_folder_or_a_link_to_nowhere_in_place_of_a_file_is_found() {
    let (_folder, output) = small_tree();
    for name in read_tree(&output).into_keys().filter(|name| name != "manifest.json") {
        let bytes = fs::read(output.join(&name)).unwrap();
        fs::remove_file(output.join(&name)).unwrap();
        fs::create_dir(output.join(&name)).unwrap();
        let report = verify(&output, None).unwrap();
        assert!(!report.ok && names_file(&report, &name), "{name}: {report}");
        fs::remove_dir(output.join(&name)).unwrap();
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("nowhere", output.join(&name)).unwrap();
            let report = verify(&output, None).unwrap();
            assert!(!report.ok && names_file(&report, &name), "{name}: {report}");
            fs::remove_file(output.join(&name)).unwrap();
        }
        fs::write(output.join(&name), bytes).unwrap();
    }
}

#[test]
fn a_tree_without_a_manifest_is_a_failed_one() {
    let folder = tempfile::tempdir().unwrap();
    let report = verify(folder.path(), None).unwrap();
    assert!(!report.ok && names_file(&report, "manifest.json"), "{report}");
}

/// Replaces every leaf of a JSON value in turn, and calls `check` with the path of the leaf and the new text.
fn edit_leaves(root: &Value, pointer: &str, check: &mut impl FnMut(&str, &Value)) {
    let value = root.pointer(pointer).unwrap();
    let children: Vec<String> = match value {
        Value::Object(map) => map.keys().map(|key| key.replace('~', "~0").replace('/', "~1")).collect(),
        Value::Array(items) => (0..items.len()).map(|index| index.to_string()).collect(),
        _ => Vec::new(),
    };
    for child in &children {
        edit_leaves(root, &format!("{pointer}/{child}"), check);
    }
    if !children.is_empty() {
        return;
    }
    let edited = match value {
        Value::Number(number) => Value::from(number.as_f64().unwrap() + 1.0),
        Value::String(text) => Value::from(format!("{text}x")),
        Value::Bool(flag) => Value::from(!flag),
        Value::Null => serde_json::json!(["*"]),
        Value::Array(_) => serde_json::json!([1]),
        Value::Object(_) => serde_json::json!({ "key": "value" }),
    };
    let mut copy = root.clone();
    // Whole numbers stay whole numbers.
    *copy.pointer_mut(pointer).unwrap() = match (value.as_u64(), edited) {
        (Some(number), Value::Number(_)) => Value::from(number + 1),
        (_, edited) => edited,
    };
    check(pointer, &copy);
}

#[test]
fn every_edited_field_of_the_manifest_is_found() {
    let (_folder, output) = small_tree();
    let text = fs::read_to_string(output.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    let mut edits = 0;
    edit_leaves(&manifest, "", &mut |pointer, edited| {
        edits += 1;
        let edited = serde_json::to_string_pretty(edited).unwrap();
        assert_found(&output, "manifest.json", Some(edited.as_bytes()), pointer);
    });
    assert!(edits > 60, "{edits}");
}

#[test]
fn fields_that_describe_the_tree_are_found_even_under_a_new_hash() {
    let (_folder, output) = small_tree();
    let text = fs::read_to_string(output.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    let mut edits = 0;
    edit_leaves(&manifest, "", &mut |pointer, edited| {
        // Of the source and of what was lost on the way, the tree itself holds no trace.
        let untraceable = ["/source", "/options", "/metadata", "/tensorport_version", "/manifest_xxh3", "/format"];
        let is_count = pointer.ends_with("flow") || pointer.ends_with("source_dtype") || pointer.ends_with("origin");
        if is_count || untraceable.iter().any(|start| pointer.starts_with(start)) {
            return;
        }
        // The writer computes the hash anew, if the schema still holds.
        let Ok(edited) = serde_json::from_value::<Manifest>(edited.clone()) else { return };
        edits += 1;
        let path = output.join("manifest.json");
        edited.write(&mut fs::File::create(&path).unwrap()).unwrap();
        let report = verify(&output, None).unwrap();
        assert!(!report.ok, "{pointer} was not found");
        fs::write(&path, &text).unwrap();
    });
    assert!(edits > 30, "{edits}");
}

#[test]
fn a_source_that_differs_in_one_bit_names_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model");
    write_model(&source);
    for options in
        [small_shards(), Options { mxfp4: Mxfp4Mode::Dequantize, precision: Precision::Float32, ..small_shards() }]
    {
        let output = folder.path().join(format!("{:?}", options.precision));
        convert(&source, &output, &options).unwrap();
        let checkpoint = Checkpoint::open(&source).unwrap();
        for tensor in checkpoint.tensors().iter().filter(|tensor| tensor.nbytes > 0) {
            let (path, offset) = (checkpoint.path_of(tensor), tensor.parts[0].offset);
            let original = fs::read(path).unwrap();
            let mut changed = original.clone();
            // The first element's top mantissa or code bits: no cast rounds them away.
            changed[usize::try_from(offset + tensor.nbytes - 1).unwrap()] ^= 1;
            fs::write(path, &changed).unwrap();
            let report = verify(&output, Some(&source)).unwrap();
            fs::write(path, &original).unwrap();
            let is_pair = tensor.name.starts_with("experts") && options.mxfp4 == Mxfp4Mode::Dequantize;
            let name = if is_pair { "experts.down" } else { tensor.name.as_str() };
            let named: Vec<_> = report.failures.iter().filter_map(|failure| failure.tensor.as_deref()).collect();
            assert_eq!(named, [name], "{report}");
            assert!(report.failures[0].what.contains("element"), "{report}");
        }
        assert!(verify(&output, Some(&source)).unwrap().ok);
    }
}

#[test]
fn a_source_with_other_tensors_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let (source, output) = (folder.path().join("m.safetensors"), folder.path().join("out"));
    write(&source, &[Tensor::new("a", Dtype::U8, &[3]), Tensor::new("b", Dtype::I16, &[5])]);
    convert(&source, &output, &Options::default()).unwrap();
    for (tensors, culprit) in [
        (vec![Tensor::new("a", Dtype::U8, &[3])], "b"),
        (vec![Tensor::new("a", Dtype::U8, &[3]), Tensor::new("b", Dtype::U16, &[5])], "b"),
        (vec![Tensor::new("a", Dtype::U8, &[3, 1]), Tensor::new("b", Dtype::I16, &[5])], "a"),
        (
            vec![
                Tensor::new("a", Dtype::U8, &[3]),
                Tensor::new("b", Dtype::I16, &[5]),
                Tensor::new("c", Dtype::U8, &[2]),
            ],
            "c",
        ),
    ] {
        write(&source, &tensors);
        let report = verify(&output, Some(&source)).unwrap();
        assert!(!report.ok);
        let is_named =
            |failure: &Failure| failure.tensor.as_deref() == Some(culprit) && failure.file == "manifest.json";
        assert!(report.failures.iter().any(is_named), "{culprit}: {report}");
    }
}
