//! As much of JSON Schema as `openapi.json` uses, to hold real values against it. For tests only: it panics at what it does not know,
//! so that a schema cannot say more than is checked.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

/// What a schema may say. Descriptions are for people; a default is checked by its own test.
const KNOWN: [&str; 12] = [
    "$ref",
    "additionalProperties",
    "const",
    "default",
    "description",
    "enum",
    "items",
    "minimum",
    "oneOf",
    "properties",
    "required",
    "type",
];

/// Follows `#/a/b`.
pub fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    match schema.get("$ref") {
        Some(Value::String(pointer)) => {
            let target = document.pointer(pointer.strip_prefix('#').unwrap());
            resolve(document, target.unwrap_or_else(|| panic!("{pointer} leads nowhere")))
        }
        _ => schema,
    }
}

/// What is wrong with `value`, each with the place where; nothing when it is as `schema` says.
pub fn check(document: &Value, schema: &Value, value: &Value) -> Vec<String> {
    let mut checker = Checker { document, wrong: Vec::new(), seen: BTreeSet::new() };
    checker.check(schema, value, "");
    checker.wrong
}

/// Which of the properties that `schema` gives objects the `values` have, by address (see [`properties`]).
pub fn seen(document: &Value, schema: &Value, values: &[Value]) -> BTreeSet<String> {
    let mut checker = Checker { document, wrong: Vec::new(), seen: BTreeSet::new() };
    for value in values {
        checker.check(schema, value, "");
    }
    assert!(checker.wrong.is_empty(), "{:?}", checker.wrong);
    checker.seen
}

struct Checker<'a> {
    document: &'a Value,
    wrong: Vec<String>,
    seen: BTreeSet<String>,
}

impl Checker<'_> {
    fn check(&mut self, schema: &Value, value: &Value, at: &str) {
        let schema = resolve(self.document, schema);
        let object = schema.as_object().unwrap_or_else(|| panic!("{at}: a schema is an object"));
        if let Some(unknown) = object.keys().find(|key| !KNOWN.contains(&key.as_str())) {
            panic!("{at}: the checker does not know {unknown}");
        }
        if let Some(kinds) = object.get("type") {
            let any = kinds.as_array().cloned().unwrap_or_else(|| vec![kinds.clone()]);
            if !any.iter().any(|kind| is(value, kind.as_str().unwrap())) {
                return self.wrong.push(format!("{at}: {value} is not {kinds}"));
            }
        }
        if object.get("const").is_some_and(|wanted| wanted != value) {
            self.wrong.push(format!("{at}: {value} is another constant"));
        }
        if object.get("enum").is_some_and(|wanted| !wanted.as_array().unwrap().contains(value)) {
            self.wrong.push(format!("{at}: {value} is none of {}", object["enum"]));
        }
        let least = object.get("minimum").and_then(Value::as_i64);
        if least.zip(value.as_i64()).is_some_and(|(least, number)| number < least) {
            self.wrong.push(format!("{at}: {value} is less than {}", object["minimum"]));
        }
        if let Some(choices) = object.get("oneOf") {
            self.check_choices(choices.as_array().unwrap(), value, at);
        }
        if let (Some(items), Value::Array(values)) = (object.get("items"), value) {
            for (i, value) in values.iter().enumerate() {
                self.check(items, value, &format!("{at}[{i}]"));
            }
        }
        if let Value::Object(fields) = value {
            self.check_fields(object, fields, at);
        }
    }

    fn check_choices(&mut self, choices: &[Value], value: &Value, at: &str) {
        let fits = |choice: &&Value| check(self.document, choice, value).is_empty();
        let fitting: Vec<&Value> = choices.iter().filter(fits).collect();
        match fitting[..] {
            [choice] => self.check(choice, value, at),
            _ => self.wrong.push(format!("{at}: {value} fits {} of the choices", fitting.len())),
        }
    }

    fn check_fields(&mut self, schema: &Map<String, Value>, fields: &Map<String, Value>, at: &str) {
        for name in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
            if !fields.contains_key(name.as_str().unwrap()) {
                self.wrong.push(format!("{at}: {name} is missing"));
            }
        }
        for (name, value) in fields {
            let place = format!("{at}.{name}");
            match (schema.get("properties").and_then(|p| p.get(name)), schema.get("additionalProperties")) {
                (Some(property), _) => {
                    self.seen.insert(std::ptr::from_ref(property).addr().to_string());
                    self.check(property, value, &place);
                }
                (None, Some(Value::Bool(false))) => self.wrong.push(format!("{place}: unknown")),
                (None, Some(Value::Object(_))) => self.check(&schema["additionalProperties"], value, &place),
                (None, _) => {}
            }
        }
    }
}

fn is(value: &Value, kind: &str) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64() || value.is_i64(),
        "null" => value.is_null(),
        other => panic!("the checker does not know the type {other}"),
    }
}

/// Every property that `schema` and what it refers to give objects: its name, and the address that [`seen`] knows it by.
pub fn properties(document: &Value, schema: &Value, into: &mut Vec<(String, String)>) {
    let schema = resolve(document, schema);
    for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        into.push((name.clone(), std::ptr::from_ref(property).addr().to_string()));
        properties(document, property, into);
    }
    let nested = ["items", "additionalProperties"].iter().filter_map(|key| schema.get(*key));
    let choices = schema.get("oneOf").and_then(Value::as_array).into_iter().flatten();
    for nested in nested.chain(choices).filter(|nested| nested.is_object()) {
        properties(document, nested, into);
    }
}

#[test]
fn the_checker_finds_what_is_wrong() {
    let document = serde_json::json!({ "a": { "type": "integer", "minimum": 0 } });
    let schema = serde_json::json!({
        "type": "object",
        "properties": { "n": { "$ref": "#/a" }, "k": { "enum": ["x", "y"] }, "l": { "type": "array", "items": { "const": 1 } },
            "o": { "oneOf": [{ "type": "string" }, { "type": ["boolean", "null"] }] } },
        "required": ["n"],
        "additionalProperties": false
    });
    let right = serde_json::json!({ "n": 1, "k": "y", "l": [1, 1], "o": null });
    assert_eq!(check(&document, &schema, &right), [""; 0]);
    for wrong in [
        serde_json::json!([]),
        serde_json::json!({}),
        serde_json::json!({ "n": "1" }),
        serde_json::json!({ "n": -1 }),
        serde_json::json!({ "n": 1.5 }),
        serde_json::json!({ "n": 1, "k": "z" }),
        serde_json::json!({ "n": 1, "l": [1, 2] }),
        serde_json::json!({ "n": 1, "o": 3 }),
        serde_json::json!({ "n": 1, "other": 1 }),
    ] {
        assert_eq!(check(&document, &schema, &wrong).len(), 1, "{wrong}");
    }
}
