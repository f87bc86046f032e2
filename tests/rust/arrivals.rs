//! Conversions that begin with headers alone, and wait for the files behind them.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tensorport::arrivals::Arrivals;
use tensorport::convert::{ConversionReport, convert_arriving};
use tensorport::{Error, progress};

use crate::fixtures::{Place, VERIFY, assert_same_tree, convert, read_tree, small_shards, tight};

/// A folder as `source`, whose safetensors files have their sizes and headers and nothing else.
fn stand_ins(source: &Path, folder: &Path) -> Vec<String> {
    fs::create_dir(folder).unwrap();
    let mut names = Vec::new();
    for entry in fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut content = fs::read(&path).unwrap();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let header = usize::try_from(u64::from_le_bytes(content[..8].try_into().unwrap())).unwrap() + 8;
            content[header..].fill(0);
            names.push(name.clone());
        }
        fs::write(folder.join(name), content).unwrap();
    }
    names.sort();
    names
}

fn convert_stand_ins(place: &Place, arrivals: &Arc<Arrivals>) -> Result<ConversionReport, Error> {
    let (source, output) = (place.at("stand-ins"), place.out());
    convert_arriving(&source, Some(arrivals), &output, &small_shards(), VERIFY, tight(3), &mut progress::ignore)
}

#[test]
fn files_are_converted_as_they_come() {
    let place = Place::new();
    let names = stand_ins(&place.model(), &place.at("stand-ins"));
    assert!(names.len() > 1);
    convert(&place.model(), &place.at("expected"), &small_shards()).unwrap();
    let arrivals = Arc::new(Arrivals::default());
    std::thread::scope(|scope| {
        let job = scope.spawn(|| convert_stand_ins(&place, &arrivals));
        for name in names {
            std::thread::sleep(Duration::from_millis(30));
            assert!(!job.is_finished());
            arrivals.arrived(name.clone(), place.model().join(name));
        }
        assert!(job.join().unwrap().unwrap().verified);
    });
    assert_same_tree(&read_tree(&place.out()), &read_tree(&place.at("expected")));
}

#[test]
fn a_file_that_will_not_come_ends_the_job_with_its_message() {
    let place = Place::new();
    let names = stand_ins(&place.model(), &place.at("stand-ins"));
    let arrivals = Arc::new(Arrivals::default());
    arrivals.arrived(names[0].clone(), place.model().join(&names[0]));
    arrivals.failed("the hub is gone".into());
    let fault = convert_stand_ins(&place, &arrivals).unwrap_err();
    assert!(matches!(&fault, Error::Download(message) if message == "the hub is gone"), "{fault}");
}

#[test]
fn a_file_that_is_another_one_is_refused() {
    let place = Place::new();
    let names = stand_ins(&place.model(), &place.at("stand-ins"));
    let arrivals = Arc::new(Arrivals::default());
    for name in &names {
        arrivals.arrived(name.clone(), place.model().join(&names[0]));
    }
    let fault = convert_stand_ins(&place, &arrivals).unwrap_err().to_string();
    assert!(fault.contains("another size or header"), "{fault}");
}

#[test]
fn a_fault_of_one_worker_frees_those_that_wait() {
    let place = Place::new();
    let names = stand_ins(&place.model(), &place.at("stand-ins"));
    let arrivals = Arc::new(Arrivals::default());
    // The first file is none, and no other comes.
    arrivals.arrived(names[0].clone(), place.at("nowhere"));
    assert!(matches!(convert_stand_ins(&place, &arrivals), Err(Error::Io { .. })));
}
