//! Read models in SQL over real events: fed live while they are imported, and equal to what the file itself says.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use kuma_core::{Kuma, Options, ProjectionHandle, SqlProjection};
use serde::Deserialize;

const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../kuma-core/examples");
const SOON: Duration = Duration::from_secs(300);

#[derive(Deserialize)]
struct Line {
    kind: String,
    id: String,
    #[serde(rename = "type")]
    name: String,
    data: Data,
}

/// What the two projections look at.
#[derive(Deserialize)]
struct Data {
    carrier: Option<String>,
    distance_mi: Option<i64>,
    arr_delay_min: Option<i64>,
    air_time_min: Option<i64>,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Carrier {
    flights: i64,
    cancelled: i64,
    miles: i64,
    arrivals: i64,
    delay_min: i64,
}

type Carriers = BTreeMap<String, Carrier>;
/// Flights, miles and minutes in the air by tail number.
type Aircraft = BTreeMap<String, (i64, i64, i64)>;

/// Straight from the file, without a store.
fn computed(input: &[u8]) -> (Carriers, Aircraft) {
    let (mut carriers, mut aircraft) = (Carriers::new(), Aircraft::new());
    for line in input.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let Line { kind, id, name, data } = serde_json::from_slice(line).unwrap();
        if kind != "aircraft" {
            continue;
        }
        let carrier = carriers.entry(data.carrier.unwrap()).or_default();
        match name.as_str() {
            "Flown" => {
                let miles = data.distance_mi.unwrap();
                carrier.flights += 1;
                carrier.miles += miles;
                carrier.arrivals += i64::from(data.arr_delay_min.is_some());
                carrier.delay_min += data.arr_delay_min.unwrap_or(0);
                let flown = aircraft.entry(id).or_default();
                *flown = (flown.0 + 1, flown.1 + miles, flown.2 + data.air_time_min.unwrap_or(0));
            }
            "Cancelled" => carrier.cancelled += 1,
            other => panic!("{other}"),
        }
    }
    (carriers, aircraft)
}

async fn rows(projection: &ProjectionHandle, select: &str) -> Vec<serde_json::Value> {
    let answer = projection.query(select).rows_max(1_000_000).run().await.unwrap();
    assert!(!answer.truncated && answer.as_of.commits_behind == 0, "{:?}", answer.as_of);
    answer.json().as_array().unwrap().clone()
}

async fn models(carriers: &ProjectionHandle, aircraft: &ProjectionHandle) -> (Carriers, Aircraft) {
    let number = |row: &serde_json::Value, name: &str| row[name].as_i64().unwrap();
    let carrier = |row: serde_json::Value| {
        let carrier = Carrier {
            flights: number(&row, "flights"),
            cancelled: number(&row, "cancelled"),
            miles: number(&row, "miles"),
            arrivals: number(&row, "arrivals"),
            delay_min: number(&row, "delay_min"),
        };
        (row["code"].as_str().unwrap().to_owned(), carrier)
    };
    let flown = |row: serde_json::Value| {
        let flown = (number(&row, "flights"), number(&row, "miles"), number(&row, "air_min"));
        (row["tail"].as_str().unwrap().to_owned(), flown)
    };
    (
        rows(carriers, "SELECT * FROM carrier").await.into_iter().map(carrier).collect(),
        rows(aircraft, "SELECT * FROM aircraft").await.into_iter().map(flown).collect(),
    )
}

async fn check(input: &[u8]) {
    let directory = tempfile::tempdir().unwrap();
    let kuma = Kuma::start(Options::new(directory.path())).await.unwrap();
    let load = |name: &str| SqlProjection::load(Path::new(EXAMPLES).join("projections").join(name)).unwrap();
    let carriers = kuma.projection(load("carriers.sql")).await.unwrap();
    let aircraft = kuma.projection(load("busiest_aircraft.sql")).await.unwrap();
    // Both are live from here on.
    carriers.caught_up(SOON).await.unwrap();
    aircraft.caught_up(SOON).await.unwrap();
    kuma.import("flights").run(input, |_| {}).await.unwrap();
    carriers.caught_up(SOON).await.unwrap();
    aircraft.caught_up(SOON).await.unwrap();
    let expected = computed(input);
    assert!(expected.0.len() > 5 && expected.1.len() > 500);
    assert_eq!(models(&carriers, &aircraft).await, expected);

    // The same when they are built from what is there.
    carriers.rebuild().await.unwrap();
    aircraft.rebuild().await.unwrap();
    carriers.caught_up(SOON).await.unwrap();
    aircraft.caught_up(SOON).await.unwrap();
    assert_eq!(models(&carriers, &aircraft).await, expected);
    let busiest = rows(&aircraft, "SELECT tail, flights FROM busiest_aircraft").await;
    let most = expected.1.values().map(|(flights, ..)| *flights).max();
    assert_eq!(busiest[0]["flights"].as_i64(), most);
    kuma.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn totals_by_carrier_and_aircraft_are_those_of_the_file() {
    check(&std::fs::read(Path::new(EXAMPLES).join("flights-sample.ndjson")).unwrap()).await;
}

/// The whole year, if it is there: `KUMA_FLIGHTS=path/to/flights-2013.ndjson.gz`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs KUMA_FLIGHTS, the file of a year of flights"]
async fn totals_of_a_year_are_those_of_the_file() {
    let path = PathBuf::from(std::env::var_os("KUMA_FLIGHTS").expect("KUMA_FLIGHTS is the path of the file"));
    let input = match path.extension().is_some_and(|extension| extension == "gz") {
        true => Command::new("gzip").arg("-dc").arg(&path).output().unwrap().stdout,
        false => std::fs::read(&path).unwrap(),
    };
    check(&input).await;
}
