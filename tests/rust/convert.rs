//! Conversions into real folders: the values are right and the bytes the same however they come about.

use std::collections::BTreeMap;
use std::fs;

use safetensors::Dtype;
use tensorport::Checkpoint;
use tensorport::Error;
use tensorport::cast::OnOverflow;
use tensorport::manifest::SideFileOrigin;
use tensorport::options::{Options, Precision};
use tensorport::progress;
use tensorport::work::Resources;

use crate::fixtures::{
    Place, Tensor, VERIFY, assert_same_tree, contents, convert, convert_as, float32, is_a, model_tensors,
    read_manifest, read_tree, small_shards, tensor_info, tight, verify, write,
};

#[test]
fn a_tree_holds_what_its_source_holds() {
    let place = Place::new();
    let report = convert_as(&place.model(), &place.out(), &small_shards(), VERIFY).unwrap();
    assert!(report.verified && report.warnings.is_empty());
    let expected: BTreeMap<_, _> = model_tensors()
        .concat()
        .into_iter()
        .map(|tensor| {
            let shape = tensor.shape.iter().map(|&dim| dim as u64).collect::<Vec<_>>();
            (tensor.name, (tensor.dtype, shape, tensor.data))
        })
        .collect();
    assert_eq!(contents(&place.out()), expected);
    assert_eq!(report.total_tensors, expected.len() as u64);
    // 130 rows of 1604 bytes, 62 to a part of at most 100 kB.
    let manifest = read_manifest(&place.out());
    assert_eq!(tensor_info(&manifest, "model.embed.weight").part_nbytes, [62 * 1604, 62 * 1604, 6 * 1604]);
    assert!(!read_tree(&place.out()).keys().any(|name| is_a(name, "tmp") || name == "journal.jsonl"));
}

#[test]
fn bytes_do_not_depend_on_workers_or_memory() {
    let place = Place::new();
    for (number, options) in [small_shards(), float32()].iter().enumerate() {
        convert(&place.model(), &place.at(&format!("first{number}")), options).unwrap();
        let first = read_tree(&place.at(&format!("first{number}")));
        for resources in [tight(1), tight(2), tight(8), Resources { workers: 3, max_memory: 1 << 30 }] {
            let output = place.at(&format!("again{number}_{}", resources.workers));
            tensorport::convert(&place.model(), &output, options, VERIFY, resources, &mut progress::ignore).unwrap();
            assert_same_tree(&read_tree(&output), &first);
        }
    }
}

#[test]
fn a_converted_tree_converts_again() {
    let place = Place::new();
    convert(&place.model(), &place.at("split"), &small_shards()).unwrap();
    // Other split points, so that pieces cross the parts of the source; then all in one.
    for (name, shard_size) in [("other", 37e3 / 1e9), ("one", 1.8)] {
        let options = Options { shard_size, ..Options::default() };
        convert_as(&place.at("split"), &place.at(name), &options, VERIFY).unwrap();
        assert_eq!(contents(&place.at(name)), contents(&place.model()));
        assert!(verify(&place.at(name), Some(&place.at("split"))).unwrap().ok, "{name}");
        // The model is not what this tree was made from, which a report may say; its values are the same.
        let report = verify(&place.at(name), Some(&place.model())).unwrap();
        assert!(report.failures.iter().all(|failure| failure.tensor.is_none()), "{name}: {report}");
    }
    // A cast from the split tree gives the same values as one from the source.
    convert(&place.at("split"), &place.at("cast"), &float32()).unwrap();
    convert(&place.model(), &place.at("direct"), &float32()).unwrap();
    assert_eq!(contents(&place.at("cast")), contents(&place.at("direct")));
}

#[test]
fn overflow_fails_warns_or_saturates() {
    let place = Place::new();
    let source = place.at("big.safetensors");
    let values = [1.5, -1e6, 3e38, f32::INFINITY, f32::NAN, 1e-30, 65504.0];
    write(&source, &[Tensor::f32("a.big", &[7], values), Tensor::f32("b", &[2], [1.0, 2.0])]);
    let options = |on_overflow| Options { precision: Precision::Float16, on_overflow, ..Options::default() };
    let fault = convert(&source, &place.out(), &options(OnOverflow::Error)).unwrap_err();
    assert!(matches!(&fault, Error::Overflow { count: 2, .. }), "{fault}");
    let message = fault.to_string();
    assert!(["\"a.big\"", "float16", "3.00", "6.5504e4"].iter().all(|word| message.contains(word)), "{message}");
    assert!(!place.out().join("manifest.json").exists());
    for (mode, [negative, positive]) in [(OnOverflow::Warn, [0xfc00, 0x7c00]), (OnOverflow::Saturate, [0xfbff, 0x7bff])]
    {
        let output = place.at(&format!("{mode:?}"));
        let report = convert_as(&source, &output, &options(mode), VERIFY).unwrap();
        assert_eq!(report.overflow.0, [("a.big".to_owned(), 2)]);
        assert_eq!(report.underflow.0, [("a.big".to_owned(), 1)]);
        assert_eq!(report.warnings.len(), usize::from(mode == OnOverflow::Warn));
        let bits: Vec<u16> = contents(&output)["a.big"].2.chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        assert_eq!(
            [bits[0], bits[1], bits[2], bits[3], bits[5], bits[6]],
            [0x3e00, negative, positive, 0x7c00, 0, 0x7bff]
        );
        assert!(bits[4] & 0x7fff > 0x7c00);
        assert_eq!(tensor_info(&read_manifest(&output), "a.big").overflow, 2);
    }
}

#[test]
fn side_files_are_copied_or_corrected() {
    let place = Place::new();
    let report = convert(&place.model(), &place.at("kept"), &small_shards()).unwrap();
    assert_eq!(report.copied_files, ["LICENSE", "config.json", "tokenizer.json"]);
    assert!(report.edited_files.is_empty());
    for name in report.copied_files {
        assert_eq!(fs::read(place.at("kept").join(&name)).unwrap(), fs::read(place.model().join(&name)).unwrap());
    }
    let report = convert(&place.model(), &place.out(), &float32()).unwrap();
    assert_eq!(
        (&report.copied_files[..], &report.edited_files[..]),
        (&["LICENSE".to_owned(), "tokenizer.json".to_owned()][..], &["config.json".to_owned()][..],)
    );
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(place.out().join("config.json")).unwrap()).unwrap();
    assert_eq!(config, serde_json::json!({ "model_type": "tiny", "torch_dtype": "float32" }));
    let manifest = read_manifest(&place.out());
    let config = manifest.side_files.0.iter().find(|(name, _)| name == "config.json");
    assert_eq!(config.unwrap().1.origin, SideFileOrigin::Edited);
    assert!(!place.out().join("pytorch_model.bin").exists());
    assert!(!place.out().join("model.safetensors.index.json").exists());
}

#[test]
fn hostile_names_stay_inside_the_output() {
    let place = Place::new();
    let names = ["../../x", "/etc/x", "a/../../x", "C:\\x", "con", "", ".", "..", "a\0b", "\u{202e}x", "A", "a"];
    let source = place.at("hostile.safetensors");
    let tensors: Vec<_> = names.iter().enumerate().map(|(i, name)| Tensor::new(name, Dtype::U8, &[i + 1])).collect();
    write(&source, &tensors);
    let before: Vec<_> = read_tree(place.folder.path()).into_keys().collect();
    convert_as(&source, &place.out(), &Options::default(), VERIFY).unwrap();
    let after = read_tree(place.folder.path());
    assert!(after.keys().all(|name| before.contains(name) || name.starts_with("out/")));
    assert_eq!(after.keys().filter(|name| is_a(name, "npy")).count(), names.len());
    assert_eq!(contents(&place.out()), contents(&source));
}

#[test]
fn an_empty_checkpoint_converts() {
    let place = Place::new();
    write(&place.at("empty.safetensors"), &[]);
    let report = convert_as(&place.at("empty.safetensors"), &place.out(), &Options::default(), VERIFY).unwrap();
    assert_eq!((report.total_tensors, report.total_files), (0, 0));
    assert!(Checkpoint::open(&place.out()).unwrap().tensors().is_empty());
}
