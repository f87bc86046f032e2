//! What a conversion finds in its output folder: interrupted work goes on, foreign things are left alone.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use safetensors::Dtype;
use tensorport::Error;
use tensorport::cast::OnOverflow;
use tensorport::convert::Mode;
use tensorport::options::{Options, Precision};
use tensorport::progress::{Event, Phase};

use crate::fixtures::{
    MODEL_FILES, Place, Tensor, VERIFY, assert_same_tree, contents, convert, convert_as, float32, is_a, read_tree,
    small_shards, tight, verify, write, write_tree,
};

const RESUME: Mode = Mode { resume: true, overwrite: false, verify: false };
const OVERWRITE: Mode = Mode { resume: false, overwrite: true, verify: false };

/// Stops a conversion as its verification begins: everything is written and in the journal, nothing is finished.
fn stopped_before_verification(source: &Path, output: &Path, options: &Options) {
    let mut stop = |event: &Event<'_>| match event.phase {
        Phase::Verify => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let stopped = tensorport::convert(source, output, options, VERIFY, tight(1), &mut stop);
    assert!(matches!(stopped, Err(Error::Cancelled)), "{stopped:?}");
}

#[test]
fn an_interrupted_conversion_resumes_to_the_same_bytes() {
    let place = Place::new();
    convert(&place.model(), &place.at("whole"), &float32()).unwrap();
    let whole = read_tree(&place.at("whole"));
    stopped_before_verification(&place.model(), &place.out(), &float32());
    let stopped = read_tree(&place.out());
    assert!(stopped.contains_key("journal.jsonl") && !stopped.contains_key("manifest.json"));
    let journal = &stopped["journal.jsonl"];
    let lines: Vec<usize> = journal.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at).collect();
    // The first line is the header; the last tensor's line may be torn anywhere.
    for (entries, &line_end) in lines.iter().enumerate() {
        for cut in [line_end + 1, line_end + 25].into_iter().filter(|&cut| cut <= journal.len()) {
            let output = place.at(&format!("resumed{entries}_{cut}"));
            let mut files = stopped.clone();
            files.insert("journal.jsonl".into(), journal[..cut].to_vec());
            // What was being written when it stopped: too long a temporary file, and a whole file of other bytes.
            files.insert("shard_000/model_norm.npy.tmp".into(), vec![0xa5; 5000]);
            if entries == 0 {
                files.insert("shard_000/model_norm.npy".into(), vec![0xa5; 77]);
            }
            write_tree(&output, &files);
            let report = convert_as(&place.model(), &output, &float32(), RESUME).unwrap();
            assert_eq!(report.resumed_tensors, entries as u64);
            assert_same_tree(&read_tree(&output), &whole);
        }
    }
    assert_eq!(lines.len(), 1 + contents(&place.at("whole")).len());
}

#[test]
fn resuming_notices_files_that_were_damaged_meanwhile() {
    let place = Place::new();
    convert(&place.model(), &place.at("whole"), &small_shards()).unwrap();
    stopped_before_verification(&place.model(), &place.out(), &small_shards());
    let stopped = read_tree(&place.out());
    let total = contents(&place.at("whole")).len() as u64;
    for name in stopped.keys().filter(|name| is_a(name, "npy") && !name.contains("empty")) {
        let output = place.at(&name.replace('/', "_"));
        let mut files = stopped.clone();
        *files.get_mut(name).unwrap().last_mut().unwrap() ^= 1;
        write_tree(&output, &files);
        let report = convert_as(&place.model(), &output, &small_shards(), RESUME).unwrap();
        assert_eq!(report.resumed_tensors, total - 1, "{name}");
        assert_same_tree(&read_tree(&output), &read_tree(&place.at("whole")));
    }
}

#[test]
fn breaking_at_every_event_still_ends_with_the_same_bytes() {
    let place = Place::new();
    convert(&place.model(), &place.at("whole"), &float32()).unwrap();
    for patience in [1, 2, 3, 5] {
        let output = place.at(&format!("broken{patience}"));
        // Every run may see one event more than the last, so that the job ends.
        let mut runs = 0;
        loop {
            let mut events = 0;
            let mut stop = |_: &Event<'_>| {
                events += 1;
                if events > runs + patience { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let mode = Mode { resume: true, overwrite: false, verify: true };
            match tensorport::convert(&place.model(), &output, &float32(), mode, tight(8), &mut stop) {
                Ok(_) => break,
                Err(fault) => assert!(matches!(fault, Error::Cancelled), "{fault}"),
            }
            assert!(!output.join("manifest.json").exists());
            runs += 1;
            assert!(runs < 200, "the conversion never ends");
        }
        assert_same_tree(&read_tree(&output), &read_tree(&place.at("whole")));
    }
}

/// Asserts that a conversion is refused as an output error and that the folder keeps every byte.
fn assert_refused(source: &Path, output: &Path, options: &Options, mode: Mode, words: &[&str]) {
    let before = read_tree(output);
    let fault = convert_as(source, output, options, mode).unwrap_err();
    let message = fault.to_string();
    assert!(matches!(fault, Error::Output { .. }), "{message}");
    assert!(words.iter().all(|word| message.contains(word)), "{message}");
    assert_same_tree(&read_tree(output), &before);
}

#[test]
fn a_foreign_folder_is_refused_in_every_mode() {
    let place = Place::new();
    fs::create_dir(place.out()).unwrap();
    fs::write(place.out().join("thesis.txt"), "years of work").unwrap();
    for mode in [Mode::default(), RESUME, OVERWRITE] {
        assert_refused(&place.model(), &place.out(), &small_shards(), mode, &["thesis.txt", "empty folder"]);
    }
    // Some other tool's manifest makes it no tree of ours.
    fs::write(place.out().join("manifest.json"), r#"{"name": "a web app"}"#).unwrap();
    for mode in [Mode::default(), RESUME, OVERWRITE] {
        assert_refused(&place.model(), &place.out(), &small_shards(), mode, &["manifest.json"]);
    }
    fs::remove_file(place.out().join("manifest.json")).unwrap();
    fs::write(place.out().join("journal.jsonl"), "dear diary\n").unwrap();
    for mode in [Mode::default(), RESUME, OVERWRITE] {
        assert_refused(&place.model(), &place.out(), &small_shards(), mode, &["journal.jsonl"]);
    }
}

#[test]
fn a_finished_tree_is_refused_kept_or_replaced() {
    let place = Place::new();
    convert(&place.model(), &place.out(), &small_shards()).unwrap();
    let finished = read_tree(&place.out());
    assert_refused(&place.model(), &place.out(), &small_shards(), Mode::default(), &["finished", "overwrite"]);
    assert_refused(&place.model(), &place.out(), &float32(), RESUME, &["finished", "overwrite"]);
    let report = convert_as(&place.model(), &place.out(), &small_shards(), RESUME).unwrap();
    assert!(report.verified && report.resumed_tensors == report.total_tensors);
    assert_same_tree(&read_tree(&place.out()), &finished);
    // What is not ours survives an overwrite, what was the earlier tree's does not.
    fs::write(place.out().join("notes.md"), "mine").unwrap();
    fs::remove_file(place.model().join("tokenizer.json")).unwrap();
    convert_as(&place.model(), &place.out(), &float32(), OVERWRITE).unwrap();
    convert(&place.model(), &place.at("fresh"), &float32()).unwrap();
    let mut expected = read_tree(&place.at("fresh"));
    expected.insert("notes.md".into(), b"mine".to_vec());
    assert_same_tree(&read_tree(&place.out()), &expected);
}

#[test]
fn resuming_a_damaged_finished_tree_says_so() {
    let place = Place::new();
    convert(&place.model(), &place.out(), &small_shards()).unwrap();
    fs::write(place.out().join("shard_000/model_norm.npy"), "x").unwrap();
    let fault = convert_as(&place.model(), &place.out(), &small_shards(), RESUME).unwrap_err();
    assert!(matches!(&fault, Error::Verification(_)) && fault.to_string().contains("model_norm.npy"), "{fault}");
}

#[test]
fn an_unfinished_tree_takes_only_its_own_source_and_options() {
    let place = Place::new();
    stopped_before_verification(&place.model(), &place.out(), &small_shards());
    let refused = |options: &Options, mode, words: &[&str]| {
        assert_refused(&place.model(), &place.out(), options, mode, words);
    };
    refused(&small_shards(), Mode::default(), &["unfinished", "resume"]);
    refused(&float32(), RESUME, &["unfinished", "options", "overwrite"]);
    for options in [
        Options { shard_size: 0.002, ..small_shards() },
        Options { precision: Precision::Float16, ..small_shards() },
        Options { include: Some(vec!["model*".into()]), ..small_shards() },
        Options { exclude: Some(vec!["empty".into()]), ..small_shards() },
        Options { on_overflow: OnOverflow::Saturate, ..small_shards() },
    ] {
        refused(&options, RESUME, &["unfinished", "options"]);
    }
    // The same bytes with another time may be other data under the same header.
    let path = place.model().join(MODEL_FILES[1]);
    let bytes = fs::read(&path).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    fs::write(&path, &bytes).unwrap();
    refused(&small_shards(), RESUME, &["edited source"]);
    convert_as(&place.model(), &place.out(), &small_shards(), OVERWRITE).unwrap();
    assert_eq!(contents(&place.out()), contents(&place.model()));
    assert!(verify(&place.out(), Some(&place.model())).unwrap().ok);
}

#[test]
fn a_source_that_changes_meanwhile_is_no_finished_tree() {
    let place = Place::new();
    let path = place.model().join(MODEL_FILES[0]);
    let bytes = fs::read(&path).unwrap();
    let mut touched = false;
    let mut touch = |event: &Event<'_>| {
        if !touched && event.phase == Phase::Convert {
            touched = true;
            fs::write(&path, &bytes).unwrap();
        }
        ControlFlow::Continue(())
    };
    std::thread::sleep(std::time::Duration::from_millis(20));
    let fault = tensorport::convert(&place.model(), &place.out(), &float32(), VERIFY, tight(2), &mut touch);
    let message = fault.unwrap_err().to_string();
    assert!(message.contains(MODEL_FILES[0]) && message.contains("modification time"), "{message}");
    assert!(!place.out().join("manifest.json").exists());
}

#[test]
fn a_second_conversion_into_the_same_folder_is_refused() {
    let place = Place::new();
    let mut refusals = 0;
    let mut begin_another = |event: &Event<'_>| {
        // The first conversion holds the folder as long as its journal is there.
        if event.phase == Phase::Verify && refusals == 0 {
            for mode in [Mode::default(), RESUME, OVERWRITE] {
                let fault = convert_as(&place.model(), &place.out(), &float32(), mode).unwrap_err();
                assert!(matches!(fault, Error::Output { .. }) && fault.to_string().contains("another conversion"));
                refusals += 1;
            }
        }
        ControlFlow::Continue(())
    };
    tensorport::convert(&place.model(), &place.out(), &float32(), VERIFY, tight(2), &mut begin_another).unwrap();
    assert_eq!(refusals, 3);
    assert!(verify(&place.out(), Some(&place.model())).unwrap().ok);
}

/// A kill between the last two steps of a conversion leaves a whole tree with its journal still there.
#[test]
fn overwriting_a_tree_that_was_killed_at_its_end_removes_its_manifest_first() {
    let place = Place::new();
    stopped_before_verification(&place.model(), &place.out(), &small_shards());
    let journal = fs::read(place.out().join("journal.jsonl")).unwrap();
    convert_as(&place.model(), &place.out(), &small_shards(), RESUME).unwrap();
    fs::write(place.out().join("journal.jsonl"), journal).unwrap();
    let stop = &mut |_: &Event<'_>| ControlFlow::Break(());
    let mode = Mode { overwrite: true, ..VERIFY };
    let stopped = tensorport::convert(&place.model(), &place.out(), &float32(), mode, tight(1), stop);
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert!(!place.out().join("manifest.json").exists(), "the old manifest vouches for new files");
}

/// A kill between the two steps of an overwrite leaves the old manifest and its side files beside a new journal.
#[test]
fn an_overwrite_that_was_killed_at_its_start_leaves_nothing_of_the_old_tree() {
    let place = Place::new();
    convert(&place.model(), &place.out(), &small_shards()).unwrap();
    let old = read_tree(&place.out());
    fs::remove_file(place.model().join("tokenizer.json")).unwrap();
    let mode = Mode { overwrite: true, ..VERIFY };
    let stop = &mut |_: &Event<'_>| ControlFlow::Break(());
    let stopped = tensorport::convert(&place.model(), &place.out(), &float32(), mode, tight(1), stop);
    assert!(matches!(stopped, Err(Error::Cancelled)));
    let journal = fs::read(place.out().join("journal.jsonl")).unwrap();
    let header_end = journal.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    // Exactly what that kill leaves.
    fs::remove_dir_all(place.out()).unwrap();
    write_tree(&place.out(), &old);
    fs::write(place.out().join("journal.jsonl"), &journal[..header_end]).unwrap();
    let killed = read_tree(&place.out());
    convert(&place.model(), &place.at("fresh"), &float32()).unwrap();
    let fresh = read_tree(&place.at("fresh"));
    for mode in [RESUME, OVERWRITE] {
        fs::remove_dir_all(place.out()).unwrap();
        write_tree(&place.out(), &killed);
        convert_as(&place.model(), &place.out(), &float32(), mode).unwrap();
        assert_same_tree(&read_tree(&place.out()), &fresh);
    }
    // Once new files stand among old ones, the old manifest must not vouch for them.
    fs::remove_dir_all(place.out()).unwrap();
    write_tree(&place.out(), &killed);
    let stopped = tensorport::convert(&place.model(), &place.out(), &float32(), mode, tight(1), stop);
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert!(!place.out().join("manifest.json").exists(), "the old manifest is still there");
}

#[test]
fn a_source_is_never_its_own_output() {
    let place = Place::new();
    let single = place.at("folder/single.safetensors");
    fs::create_dir(place.at("folder")).unwrap();
    write(&single, &[Tensor::new("a", Dtype::U8, &[3])]);
    convert(&place.model(), &place.at("tree"), &small_shards()).unwrap();
    let parent = place.folder.path().to_path_buf();
    for (source, output) in [
        (place.model(), place.model()),
        (place.model(), place.model().join("../model/.")),
        (place.model(), parent),
        (single, place.at("folder")),
        (place.at("tree"), place.at("tree")),
    ] {
        for mode in [Mode::default(), RESUME, OVERWRITE] {
            assert_refused(&source, &output, &small_shards(), mode, &["output folder that does not hold the source"]);
        }
    }
}
