//! `openapi.json` against the server: what it promises is served, and what is served is promised.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::http::{Head, Response};
use super::routes::{self, BackendBody, Incoming, NothingBody, OPENAPI, ROUTES, ShutdownBody, SnapshotBody};
use super::schema::{check, properties, resolve, seen};
use super::tests::Fake;
use crate::config::{
    BootConfig, BootProtocol, ConsoleConfig, DeviceConfig, Initramfs, MachineConfig, MemoryConfig,
};
use crate::control::{
    Description, DeviceDescription, DeviceKind, DeviceMetrics, Metrics, Refusal, Reply, SavedDisk,
    SnapshotReport, State,
};
use crate::metrics::{ExitCounters, Reason};

fn document() -> Value {
    serde_json::from_str(OPENAPI).unwrap()
}

fn operations(document: &Value) -> impl Iterator<Item = (String, String, &Value)> {
    document["paths"].as_object().unwrap().iter().flat_map(|(path, item)| {
        let operations = item.as_object().unwrap().iter();
        operations.map(|(method, operation)| (method.to_uppercase(), path.clone(), operation))
    })
}

#[test]
fn paths_and_methods_are_the_routes() {
    let document = document();
    let described: BTreeSet<_> = operations(&document).map(|(method, path, _)| (method, path)).collect();
    let served: BTreeSet<_> =
        ROUTES.iter().map(|(method, path, _)| ((*method).into(), (*path).into())).collect();
    assert_eq!(described, served);
    let names: BTreeSet<_> =
        operations(&document).map(|(.., o)| o["operationId"].as_str().unwrap()).collect();
    assert_eq!(names.len(), ROUTES.len());
}

#[test]
fn every_reference_leads_somewhere_and_everything_is_used() {
    fn references(value: &Value, into: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                into.extend(fields.get("$ref").map(|r| r.as_str().unwrap().to_string()));
                fields.values().for_each(|value| references(value, into));
            }
            Value::Array(values) => values.iter().for_each(|value| references(value, into)),
            _ => {}
        }
    }
    let document = document();
    let mut used = BTreeSet::new();
    references(&document, &mut used);
    for reference in &used {
        assert!(document.pointer(&reference[1..]).is_some(), "{reference}");
    }
    // The rest of the responses is every path's: `info.description` names them.
    for (schema, _) in document["components"]["schemas"].as_object().unwrap() {
        assert!(used.contains(&format!("#/components/schemas/{schema}")), "{schema}");
    }
}

fn head(method: &str, path: &str, accept: Option<&str>) -> Head {
    Head {
        method: method.into(),
        path: path.replace("{slot}", "0"),
        content_type: Some("application/json".into()),
        accept: accept.map(Into::into),
        len: 0,
        content_length: 0,
        keep_alive: true,
        expects_continue: false,
    }
}

fn ask(head: Head, body: &str, answer: Result<Reply, Refusal>) -> Response {
    let files = match head.path.ends_with("/backend") {
        true => vec![std::fs::File::open("/dev/null").unwrap().into()],
        false => Vec::new(),
    };
    routes::answer(Incoming { head, body: body.into(), files }, &Fake::new(answer))
}

/// The smallest body that an operation takes.
fn least(operation: &Value) -> &'static str {
    match operation["operationId"].as_str().unwrap() {
        "snapshot" => r#"{"directory":"/x"}"#,
        "attach" => r#"{"kind":"disk"}"#,
        _ => "",
    }
}

#[test]
fn every_answer_is_described() {
    let document = document();
    for (method, path, operation) in operations(&document) {
        let (described, right) = match operation["operationId"].as_str().unwrap() {
            "describe" => ("200", Reply::Description(Box::new(descriptions().remove(0)))),
            "snapshot" => ("200", Reply::Snapshot(report())),
            "metrics" | "openapi" => ("200", Reply::Metrics(metrics())),
            _ => ("204", Reply::Done),
        };
        let refusals = [
            (described, Ok(right)),
            ("400", Err(Refusal::Invalid("x".into()))),
            ("409", Err(Refusal::State { now: State::Ended, wanted: "running" })),
            ("410", Err(Refusal::Gone)),
            ("500", Err(Refusal::Failed("x".into()))),
        ];
        for (status, answer) in refusals {
            if operation["operationId"] == "openapi" && status != "200" {
                continue;
            }
            let response = ask(head(&method, &path, None), least(operation), answer);
            assert_eq!(response.status.to_string(), status, "{method} {path}");
            let promised = resolve(&document, &operation["responses"][status]);
            match &promised["content"][response.content_type]["schema"] {
                Value::Null => assert!(response.body.is_empty(), "{method} {path} {status}"),
                schema => {
                    let body: Value = serde_json::from_slice(&response.body).unwrap();
                    assert_eq!(check(&document, schema, &body), [""; 0], "{method} {path} {status}");
                }
            }
        }
    }
    let text = ask(head("GET", "/v1/metrics", Some("text/plain")), "", Ok(Reply::Metrics(metrics())));
    let media = text.content_type.split(';').next().unwrap();
    assert!(document["paths"]["/v1/metrics"]["get"]["responses"]["200"]["content"][media].is_object());
}

/// What serde makes of a body, and what the schema says of it, for an operation.
fn accepted(id: &str, body: &Value) -> Option<Value> {
    fn read<T: serde::de::DeserializeOwned + serde::Serialize>(body: &Value) -> Option<Value> {
        serde_json::from_value::<T>(body.clone()).ok().map(|value| json!(value))
    }
    match id {
        "start" | "pause" | "resume" => read::<NothingBody>(body),
        "shutdown" => read::<ShutdownBody>(body),
        "snapshot" => read::<SnapshotBody>(body),
        "attach" => read::<BackendBody>(body),
        other => panic!("{other} has no body"),
    }
}

#[test]
fn bodies_are_what_their_schemas_say() {
    let document = document();
    let full = BTreeMap::from([
        ("start", json!({})),
        ("pause", json!({})),
        ("resume", json!({})),
        ("shutdown", json!({ "force": true, "timeout_ms": 1 })),
        ("snapshot", json!({ "directory": "/x", "diff": true })),
        ("attach", json!({ "kind": "tap", "read_only": false })),
    ]);
    for (_, path, operation) in operations(&document) {
        let id = operation["operationId"].as_str().unwrap();
        let Some(body) = operation.get("requestBody") else {
            assert!(!full.contains_key(id), "{path}");
            continue;
        };
        let schema = resolve(&document, &body["content"]["application/json"]["schema"]);
        let full = &full[id];
        let fields: BTreeSet<_> = schema["properties"].as_object().unwrap().keys().collect();
        assert_eq!(full.as_object().unwrap().keys().collect::<BTreeSet<_>>(), fields, "{path}");
        let agree = |body: &Value| {
            let right = check(&document, schema, body).is_empty();
            assert_eq!(accepted(id, body).is_some(), right, "{path}: {body}");
            right
        };
        assert!(agree(full));
        assert_eq!(accepted(id, full).as_ref(), Some(full), "names go both ways");
        for (field, value) in full.as_object().unwrap() {
            let mut changed = full.clone();
            changed[field] = json!(["neither"]);
            assert!(!agree(&changed));
            changed.as_object_mut().unwrap().remove(field);
            agree(&changed);
            changed[field] = value.clone();
            changed["unknown"] = json!(1);
            assert!(!agree(&changed));
            // What is left away has the value that the file says.
            if let Some(default) = schema["properties"][field].get("default") {
                changed = full.clone();
                changed.as_object_mut().unwrap().remove(field);
                assert_eq!(&accepted(id, &changed).unwrap()[field], default, "{path}: {field}");
            }
        }
        for kind in ["disk", "tap", "none"].iter().filter(|_| id == "attach") {
            agree(&json!({ "kind": kind }));
        }
        let optional = agree(&json!({}));
        assert_eq!(body["required"], !optional, "{path}");
    }
}

#[test]
fn every_described_field_is_really_sent() {
    let document = document();
    let schemas = &document["components"]["schemas"];
    let table: [(&str, Vec<Value>); 5] = [
        ("Description", descriptions().iter().map(|d| json!(d)).collect()),
        ("SnapshotReport", vec![json!(report())]),
        ("Metrics", vec![json!(metrics())]),
        ("Error", vec![json!({ "error": "x" })]),
        ("StateError", vec![json!({ "error": "x", "state": "paused" })]),
    ];
    for (name, values) in table {
        let seen = seen(&document, &schemas[name], &values);
        let mut described = Vec::new();
        properties(&document, &schemas[name], &mut described);
        for (field, address) in described {
            assert!(seen.contains(&address), "{name} … {field}");
        }
    }
    for state in [State::Created, State::Running, State::Paused, State::Ended] {
        assert_eq!(check(&document, &schemas["State"], &json!(state)), [""; 0]);
        assert_eq!(json!(state), state.to_string());
    }
    assert_eq!(serde_json::from_value::<Metrics>(json!(metrics())).unwrap(), metrics());
    assert_eq!(serde_json::from_value::<SnapshotReport>(json!(report())).unwrap(), report());
    for description in descriptions() {
        assert_eq!(serde_json::from_value::<Description>(json!(description)).unwrap(), description);
    }
}

/// Between them they have everything that a machine can have.
fn descriptions() -> Vec<Description> {
    let devices = json!([
        { "block": { "path": "/d", "read_only": true } },
        { "net": { "tap": "t", "mac": "02:00:00:00:00:01", "address": "10.0.0.2/24", "gateway": "10.0.0.1" } },
        { "vsock": { "cid": 3, "uds_path": "/v" } },
        { "rng": {} },
        { "block": {} },
        { "net": {} },
    ]);
    let devices: Vec<DeviceConfig> = serde_json::from_value(devices).unwrap();
    let config = |initramfs, protocol, console| MachineConfig {
        boot: BootConfig { kernel: "/k".into(), initramfs, protocol, ..BootConfig::default() },
        memory: MemoryConfig { track_dirty: true, ..MemoryConfig::default() },
        devices: devices.clone(),
        console,
        ..MachineConfig::default()
    };
    let configs = [
        config(Initramfs::BuiltIn, BootProtocol::Auto, ConsoleConfig::None),
        config(Initramfs::None, BootProtocol::Linux, ConsoleConfig::Stdio),
        config(Initramfs::File("/i".into()), BootProtocol::Pvh, ConsoleConfig::File("/c".into())),
        config(Initramfs::BuiltIn, BootProtocol::Auto, ConsoleConfig::Stderr),
    ];
    let kinds = [DeviceKind::Block, DeviceKind::Net, DeviceKind::Vsock, DeviceKind::Rng];
    let devices = kinds.iter().enumerate().map(|(slot, kind)| DeviceDescription {
        slot,
        kind: *kind,
        backend: (slot % 2 == 0).then(|| "/d".into()),
        read_only: (slot == 0).then_some(true),
    });
    let describe = |config| Description {
        state: State::Running,
        vmm_version: "1".into(),
        pid: 1,
        uptime_ms: 1,
        config,
        devices: devices.clone().collect(),
    };
    configs.into_iter().chain([MachineConfig::default()]).map(describe).collect()
}

fn report() -> SnapshotReport {
    SnapshotReport {
        directory: "/x".into(),
        diff: false,
        pause_us: 1,
        memory_bytes: 2,
        file_bytes: 3,
        disks: vec![SavedDisk { slot: 0, how: "reflink".into() }],
        frozen: true,
    }
}

fn metrics() -> Metrics {
    let exits = ExitCounters::default();
    exits.record(Reason::MmioRead, std::time::Duration::from_micros(3));
    let vcpu = exits.read(0);
    let device = DeviceMetrics {
        slot: 0,
        kind: "block".into(),
        counters: BTreeMap::from([("reads".into(), 1)]),
        latency: vcpu.exit_latency.clone(),
    };
    let counters = BTreeMap::from([("emulated_instructions".into(), 1)]);
    Metrics { uptime_ms: 1, counters, vcpus: vec![vcpu], devices: vec![device] }
}
